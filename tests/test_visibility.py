"""Exactly the keys inside the window are seen: by equality, never by a tolerance, forward and backward."""

import itertools

import pytest
import torch

from cases import DTYPES, INT64_MAX, INT64_MIN
from reference import visible_keys

SMALL = list(itertools.product(range(1, 6), range(1, 6)))
ENDS = (-1, 0, 1, 2, 4)


def weights_of(queries, keys, window, offset, device, dtype=torch.float32, composed=False):
    """Weights of all pairs: values are one-hot, and equal scores give every visible key the same weight."""
    query = torch.zeros(1, 1, queries, 1, dtype=dtype, device=device)
    key = torch.zeros(1, 1, keys, 1, dtype=dtype, device=device)
    value = torch.eye(keys, dtype=dtype, device=device).view(1, 1, keys, keys)
    options = {"window_left": window[0], "window_right": window[1], "query_offset": offset}

    def call(query):
        return torch.ops.wmha.attention(query, key, value, **options)

    # Under a torch.func transform the operator takes its composite form.
    return (torch.func.vjp(call, query)[0] if composed else call(query))[0, 0]


def check_forward(queries, keys, window, offset, device, dtype=torch.float32, composed=False):
    visible = visible_keys(queries, keys, window, offset)
    weights = weights_of(queries, keys, window, offset, device, dtype, composed).cpu()
    count = visible.sum(-1, keepdim=True).clamp_min(1)
    assert torch.equal(weights != 0, visible), f"{queries=} {keys=} {window=} {offset=}"
    torch.testing.assert_close(weights, (visible / count).to(dtype))


def check_backward(queries, keys, window, offset, device):
    """Batch b has a gradient at query b alone: the keys it reaches are those that query b sees."""
    visible = visible_keys(queries, keys, window, offset)
    query = torch.zeros(queries, 1, queries, 1, device=device)
    key = torch.zeros(queries, 1, keys, 1, device=device, requires_grad=True)
    value = torch.randn(queries, 1, keys, 1, device=device, requires_grad=True)
    output = torch.ops.wmha.attention(
        query + 1, key, value, window_left=window[0], window_right=window[1], query_offset=offset
    )
    grad_output = torch.eye(queries, device=device).view(queries, 1, queries, 1)
    grad_key, grad_value = torch.autograd.grad(output, (key, value), grad_output)
    assert torch.equal(grad_value[:, 0, :, 0].cpu() != 0, visible), f"{queries=} {keys=} {window=} {offset=}"
    assert torch.all(grad_key[:, 0, :, 0].cpu()[~visible] == 0)


@pytest.mark.numerics
@pytest.mark.parametrize("offset", [None, -3, -1, 0, 2, 5])
def test_all_small_windows(offset, device):
    for (queries, keys), left, right in itertools.product(SMALL, ENDS, ENDS):
        check_forward(queries, keys, (left, right), offset, device)


@pytest.mark.parametrize("offset", [None, -2, 1])
def test_all_small_windows_backward(offset, device):
    for (queries, keys), left, right in itertools.product(SMALL[::2], ENDS, ENDS):
        check_backward(queries, keys, (left, right), offset, device)


@pytest.mark.parametrize("offset", [None, 1])
def test_all_small_windows_composed(offset, device):
    for (queries, keys), left, right in itertools.product(SMALL[::2], ENDS, ENDS):
        check_forward(queries, keys, (left, right), offset, device, composed=True)


# Around the tiles that a kernel may have, and the chunks that one task may take.
SIZES = (1, 2, 7, 15, 16, 17, 31, 47, 48, 49, 63, 64, 65, 97, 130)


@pytest.mark.numerics
@pytest.mark.parametrize("queries", SIZES)
def test_windows_over_tiles(queries, device):
    for keys in SIZES:
        n = max(queries, keys)
        for window in ((0, 0), (n // 3, n // 2), (-1, 0), (n // 2, -1), (1, n), (n - 1, 0), (-1, -1)):
            check_forward(queries, keys, window, None, device)
    check_backward(queries, 49, (queries // 2, 1), None, device)
    check_backward(queries, 97, (-1, 5), -9, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_in_every_dtype(dtype, device):
    for queries, keys in ((50, 50), (33, 70), (70, 33)):
        for window in ((0, 0), (5, 3), (-1, 0), (40, 1), (INT64_MAX, 0)):
            check_forward(queries, keys, window, None, device, dtype)


@pytest.mark.parametrize("queries, keys", [(600, 600), (500, 700), (700, 500)])
def test_windows_over_tasks(queries, keys, device):
    for window in ((0, 0), (10, 3), (100, 200), (-1, 0)):
        check_forward(queries, keys, window, None, device)


FAR = (INT64_MIN, INT64_MIN + 1, -(2**62), -(2**32), 2**32, 2**62, INT64_MAX - 1, INT64_MAX)
FAR_ENDS = (-1, 0, 1, 2**31, 2**62, INT64_MAX - 1, INT64_MAX)


@pytest.mark.parametrize("composed", [False, True], ids=["fused", "composed"])
def test_sums_saturate(composed, device):
    for offset, left, right in itertools.product(FAR, FAR_ENDS, FAR_ENDS):
        check_forward(3, 2, (left, right), offset, device, composed=composed)


def test_sums_saturate_backward(device):
    for offset, left, right in itertools.product(FAR, FAR_ENDS, FAR_ENDS):
        check_backward(3, 2, (left, right), offset, device)


def test_grouped_heads_and_batches_see_the_same(device):
    visible = visible_keys(21, 30, (6, 2), None)
    query = torch.zeros(3, 8, 21, 5, device=device)
    key = torch.zeros(3, 2, 30, 5, device=device)
    value = torch.eye(30, device=device).expand(3, 2, 30, 30)
    weights = torch.ops.wmha.attention(query, key, value, window_left=6, window_right=2)
    assert torch.equal(weights.cpu() != 0, visible.expand(3, 8, 21, 30))


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "backward"])
def test_left_bound_alone_sees_the_future(gradients, device):
    check = check_backward if gradients else check_forward
    check(6, 6, (2, -1), None, device)
    assert visible_keys(6, 6, (2, -1), None)[0].all()
