"""multi_head_attention: projections around attention, against PyTorch's own where it can do the same."""

import pytest
import torch
from torch.testing import assert_close

import wmha

BATCH, QUERIES, KEYS, E, HEADS = 3, 11, 13, 12, 4


def linear(rows, columns, device, dtype=torch.float64):
    return torch.randn(rows, columns, dtype=dtype, device=device).mul(columns**-0.5).requires_grad_()


@pytest.fixture
def inputs(device):
    return [
        torch.randn(BATCH, n, E, dtype=torch.float64, device=device, requires_grad=True) for n in (QUERIES, KEYS, KEYS)
    ]


def assert_same_with_gradients(one, other, leaves):
    assert_close(one, other)
    grad_output = torch.randn_like(one)
    for first, second in zip(
        torch.autograd.grad(one, leaves, grad_output), torch.autograd.grad(other, leaves, grad_output), strict=True
    ):
        assert_close(first, second)


@pytest.mark.parametrize("bias", [False, True])
def test_is_torch_nn_multihead_attention(bias, inputs, device):
    module = torch.nn.MultiheadAttention(E, HEADS, bias=bias, batch_first=True, dtype=torch.float64, device=device)
    if bias:
        torch.nn.init.normal_(module.in_proj_bias)
        torch.nn.init.normal_(module.out_proj.bias)
    weights = module.in_proj_weight.chunk(3)
    biases = module.in_proj_bias.chunk(3) if bias else (None, None, None)
    output = torch.ops.wmha.multi_head_attention(
        *inputs, *weights, *biases, module.out_proj.weight, module.out_proj.bias, num_heads=HEADS
    )
    expected, _ = module(*inputs, need_weights=False)
    assert_same_with_gradients(output, expected, [*inputs, *module.parameters()])


def by_hand(inputs, weights, biases, out_weight, out_bias, heads, kv_heads, **options):
    """Projections by nn.functional.linear, heads by view, attention by its operator."""

    def project(x, weight, bias, heads):
        return torch.nn.functional.linear(x, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)

    counts = (heads, kv_heads, kv_heads)
    projected = [project(*arguments) for arguments in zip(inputs, weights, biases, counts, strict=True)]
    output = torch.ops.wmha.attention(*projected, **options)
    return torch.nn.functional.linear(output.transpose(1, 2).flatten(2), out_weight, out_bias)


@pytest.mark.parametrize("present", range(16), ids=lambda present: f"{present:04b}")
def test_each_bias_is_optional(present, inputs, device):
    """Grouped heads; Dk, Dv, E, Ek, Ev and Eo all differ."""
    query, key, value = inputs[0], inputs[1][..., :5], inputs[2][..., :7]
    weights = [linear(4 * 3, E, device), linear(2 * 3, 5, device), linear(2 * 6, 7, device)]
    out_weight = linear(10, 4 * 6, device)
    sizes = (4 * 3, 2 * 3, 2 * 6, 10)
    biases = [
        torch.randn(size, dtype=torch.float64, device=device, requires_grad=True) if present >> i & 1 else None
        for i, size in enumerate(sizes)
    ]
    options = {"window_left": 5, "window_right": 1, "softcap": 3.0, "temperature": 0.7}
    output = torch.ops.wmha.multi_head_attention(
        query, key, value, *weights, *biases[:3], out_weight, biases[3], num_heads=4, num_kv_heads=2, **options
    )
    expected = by_hand((query, key, value), weights, biases[:3], out_weight, biases[3], 4, 2, **options)
    leaves = [*inputs, *weights, out_weight, *(bias for bias in biases if bias is not None)]
    assert output.shape == (BATCH, QUERIES, 10)
    assert_same_with_gradients(output, expected, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_options_in_lower_precision(dtype, device):
    inputs = [torch.randn(2, 40, 16, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
    weights = [linear(rows, 16, device, dtype) for rows in (4 * 8, 2 * 8, 2 * 8)]
    out_weight, out_bias = linear(16, 32, device, dtype), linear(1, 16, device, dtype)[0]
    temperature = torch.rand(4, device=device).add(0.5).requires_grad_()
    options = {"window_left": 9, "window_right": 0, "scale": 0.3, "temperature": temperature, "softcap": 2.0}
    options |= {"dropout_p": 0.3, "query_offset": 1}
    torch.manual_seed(0)
    output = torch.ops.wmha.multi_head_attention(
        *inputs, *weights, None, None, None, out_weight, out_bias, num_heads=4, num_kv_heads=2, **options
    )
    torch.manual_seed(0)
    expected = by_hand(inputs, weights, (None,) * 3, out_weight, out_bias, 4, 2, **options)
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    leaves = [*inputs, *weights, out_weight, temperature]
    gradients = torch.autograd.grad(output.sum(), leaves)
    for one, other in zip(gradients, torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert torch.equal(one, other)


def test_generator_and_python_function(device):
    x = torch.randn(2, 9, 8, device=device)
    weight, bias = torch.randn(8, 8, device=device), torch.randn(8, device=device)
    seed = torch.Generator(device).manual_seed(1)
    expected = torch.ops.wmha.multi_head_attention(
        x, x, x, weight, weight, weight, bias, None, bias, weight, bias,
        num_heads=2, window_left=3, window_right=1, dropout_p=0.5, generator=seed,
    )  # fmt: skip
    output = wmha.multi_head_attention(
        x, x, x, weight, weight, weight, weight, num_heads=2, q_bias=bias, v_bias=bias, out_bias=bias,
        window=(3, 1), dropout_p=0.5, generator=seed.manual_seed(1),
    )  # fmt: skip
    assert torch.equal(output, expected)


@pytest.mark.parametrize("batch, queries, keys", [(0, 5, 6), (2, 0, 6), (2, 5, 0), (0, 0, 0)])
def test_empty(batch, queries, keys, device):
    query = torch.randn(batch, queries, 8, device=device, requires_grad=True)
    key = torch.randn(batch, keys, 8, device=device, requires_grad=True)
    weight, bias = torch.randn(8, 8, device=device, requires_grad=True), torch.randn(8, device=device)
    output = torch.ops.wmha.multi_head_attention(
        query, key, key, weight, weight, weight, None, None, None, weight, bias, num_heads=2
    )
    assert torch.equal(output, bias.expand(batch, queries, 8))  # nothing seen: the projection of 0
    for gradient in torch.autograd.grad(output.sum(), (query, key, weight)):
        assert torch.all(gradient == 0)
