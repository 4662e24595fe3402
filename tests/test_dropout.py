"""The dropout mask: its bits, its statistics, and that forward, backward, threads and checkpoints agree on it."""

import math

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import wmha
from cases import DTYPES, Case, make_inputs
from reference import expected, quantised

SHAPE = {"batch": 2, "heads": 3, "queries": 37, "keys": 50}


def philox(counter: list[np.ndarray], seed: int, rounds: int = 7) -> list[np.ndarray]:
    """Philox4x32 of Salmon et al.: four words of counter, 64 bits of key."""
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    words = [np.asarray(word, np.uint64) & low for word in counter]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for _ in range(rounds):
        products = np.uint64(0xD2511F53) * words[0], np.uint64(0xCD9E8D57) * words[2]
        words = [
            (products[1] >> high) ^ words[1] ^ key[0],
            products[1] & low,
            (products[0] >> high) ^ words[3] ^ key[1],
            products[0] & low,
        ]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return words


def expected_mask(seed, offset, batch, heads, queries, keys, dropout_p, first_query=0, first_key=0):
    head, row, key = np.meshgrid(
        np.arange(batch * heads), first_query + np.arange(queries), first_key + np.arange(keys), indexing="ij"
    )
    words = np.stack(philox([key >> 3, row, head, np.full_like(key, offset // 4)], seed))
    word = np.take_along_axis(words, (key % 8 // 2)[None], 0)[0]
    numbers = word >> (16 * (key % 2)).astype(np.uint64) & np.uint64(0xFFFF)
    return torch.from_numpy(numbers >= quantised(dropout_p)[0]).view(batch, heads, queries, keys)


def mask_of_seed(seed, offset, dropout_p, device="cpu", **shape):
    state = torch.tensor([seed, offset], device=device)
    return torch.ops.wmha._dropout_mask(state, **(SHAPE | shape), dropout_p=dropout_p)


def test_philox_here_gives_the_published_numbers():
    """Random123's known answers."""
    answers = {
        (7, 0x00000000): (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
        (7, 0xFFFFFFFF): (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
        (10, 0x00000000): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (10, 0xFFFFFFFF): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    }
    for (rounds, word), answer in answers.items():
        words = philox([np.uint64(word)] * 4, word << 32 | word, rounds)
        assert tuple(int(word) for word in words) == answer


@pytest.mark.parametrize("dropout_p", [0.0, 1e-3, 0.1, 0.5, 0.9, 1 - 2**-17, 1.0])
@pytest.mark.parametrize("seed, offset", [(0, 0), (42, 4), (2**63 - 1, 2**33 + 8), (-1, 0), (2**32 + 1, 7)])
def test_bits(seed, offset, dropout_p, device):
    mask = mask_of_seed(seed, offset, dropout_p, device)
    assert mask.dtype == torch.bool
    assert torch.equal(mask.cpu(), expected_mask(seed & (2**64 - 1), offset, **SHAPE, dropout_p=dropout_p))


def test_bits_of_a_part(device):
    whole = mask_of_seed(7, 0, 0.4, device)
    part = mask_of_seed(7, 0, 0.4, device, queries=5, keys=21, first_query=30, first_key=13)
    assert torch.equal(part, whole[:, :, 30:35, 13:34])
    far = mask_of_seed(7, 0, 0.4, device, queries=3, keys=9, first_query=2**31 + 5, first_key=2**34 + 3)
    assert torch.equal(far.cpu(), expected_mask(7, 0, 2, 3, 3, 9, 0.4, 2**31 + 5, 2**34 + 3))


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(-1, -1), (9, 4), (-1, 0)])
def test_forward_and_backward_use_these_bits(window, dtype, device):
    case = Case("bits", heads=4, kv_heads=2, queries=83, keys=99, dropout_p=0.3, window=window)
    inputs = make_inputs(case, dtype, device)
    torch.manual_seed(5)
    output, logsumexp, rng_state = torch.ops.wmha._attention_forward(*inputs.leaves, **case.options())
    torch.manual_seed(5)
    results = torch.ops.wmha.attention_with_lse(*inputs.leaves, **case.options())
    assert torch.equal(results[0], output)
    seed, offset = rng_state.tolist()
    mask = expected_mask(seed, offset, 2, 4, 83, 99, 0.3)
    bounds = expected(case, inputs, mask)
    gradients = torch.autograd.grad(results, inputs.leaves, (inputs.grad_output, inputs.grad_logsumexp))
    for name, result in zip(
        ("output", "logsumexp", "grad_query", "grad_key", "grad_value"), (*results, *gradients), strict=True
    ):
        bounds[name].check(name, result)


def test_dropped_weights_are_exactly_zero(device):
    query = torch.zeros(2, 3, 37, 4, device=device)
    key = torch.zeros(2, 3, 50, 4, device=device)
    value = torch.eye(50, device=device).expand(2, 3, 50, 50)
    for dtype in DTYPES:
        torch.manual_seed(1)
        inputs = [tensor.to(dtype) for tensor in (query, key, value)]
        output, _, rng_state = torch.ops.wmha._attention_forward(*inputs, dropout_p=0.25)
        mask = torch.ops.wmha._dropout_mask(rng_state, **SHAPE, dropout_p=0.25)
        assert torch.equal(output != 0, mask)
        torch.testing.assert_close(output, (mask * quantised(0.25)[1] / 50).to(dtype))


@pytest.mark.parametrize("dropout_p", [1e-3, 0.1, 0.5, 0.9])
def test_keep_rate(dropout_p, device):
    mask = mask_of_seed(3, 0, dropout_p, device, batch=4, heads=8, queries=256, keys=256).double()
    dropped = 1 - mask
    p = quantised(dropout_p)[0] / 65536

    def check(sums, count):  # five standard deviations of a binomial, for each of the sums
        assert (sums - p * count).abs().max() < 5 * math.sqrt(count * p * (1 - p)) + 1

    check(dropped.sum(), mask.numel())
    check(dropped.sum((0, 1, 2)), 4 * 8 * 256)  # of each key, so of each of the eight numbers of a counter
    check(dropped.sum((0, 1, 3)), 4 * 8 * 256)  # of each query
    check(dropped.sum((2, 3)), 256 * 256)  # of each head


def test_nothing_is_correlated(device):
    mask = mask_of_seed(3, 0, 0.5, device, batch=4, heads=8, queries=256, keys=256).double() - 0.5
    other_seed = mask_of_seed(4, 0, 0.5, device, batch=4, heads=8, queries=256, keys=256).double() - 0.5
    other_offset = mask_of_seed(3, 4, 0.5, device, batch=4, heads=8, queries=256, keys=256).double() - 0.5

    def correlation(one, other):
        return 4 * (one * other).mean() * math.sqrt(one.numel())  # in standard deviations

    assert correlation(mask, mask) > 1000
    assert correlation(mask, other_seed).abs() < 5
    assert correlation(mask, other_offset).abs() < 5
    for axis in range(4):
        for distance in (1, 2, 4, 8, 16):
            if distance < mask.size(axis):
                size = mask.size(axis) - distance
                shifted = mask.narrow(axis, distance, size)
                assert correlation(mask.narrow(axis, 0, size), shifted).abs() < 5, f"{axis=} {distance=}"
    above, below = torch.triu_indices(256, 256, 1), torch.triu_indices(256, 256, 1).flip(0)
    assert correlation(mask[(..., *above)], mask[(..., *below)]).abs() < 5


@pytest.fixture
def inputs(device):
    case = Case("dropout", heads=4, kv_heads=2, queries=60, window=(20, 0))
    return [leaf.detach().requires_grad_() for leaf in make_inputs(case, torch.float32, device).leaves]


def test_no_dropout(inputs):
    """p = 0 draws nothing from the generator."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    output = torch.ops.wmha.attention(*inputs, dropout_p=0.0)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(output, torch.ops.wmha.attention(*inputs))


@pytest.mark.parametrize("dropout_p", [1.0, 1 - 2**-18])
def test_everything_dropped(dropout_p, inputs):
    """A p that rounds to 65536 / 65536 drops everything; logsumexp knows nothing of it."""
    output, logsumexp = torch.ops.wmha.attention_with_lse(*inputs, dropout_p=dropout_p)
    assert torch.all(output == 0)
    assert torch.equal(logsumexp, torch.ops.wmha.attention_with_lse(*inputs)[1])
    for gradient in torch.autograd.grad(output, inputs, torch.ones_like(output)):
        assert torch.all(gradient == 0)


def test_tiny_p_rounds_to_none(inputs):
    assert torch.equal(torch.ops.wmha.attention(*inputs, dropout_p=2**-18), torch.ops.wmha.attention(*inputs))


@pytest.mark.parametrize("function", ["attention", "attention_with_lse"])
def test_seed_advances_and_repeats(function, inputs):
    def call(**options):
        result = getattr(torch.ops.wmha, function)(*inputs, dropout_p=0.5, **options)
        return result if isinstance(result, torch.Tensor) else result[0]

    torch.manual_seed(1)
    first, second = call(), call()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, call())
    assert torch.equal(second, call())


def test_generator(inputs, device):
    generator = torch.Generator(device).manual_seed(3)
    default = torch.get_rng_state()
    first = torch.ops.wmha.attention(*inputs, dropout_p=0.5, generator=generator)
    second = torch.ops.wmha.attention(*inputs, dropout_p=0.5, generator=generator)
    assert not torch.equal(first, second)
    assert torch.equal(default, torch.get_rng_state())
    assert torch.equal(first, torch.ops.wmha.attention(*inputs, dropout_p=0.5, generator=generator.manual_seed(3)))
    assert torch.equal(first, wmha.attention(*inputs, dropout_p=0.5, generator=generator.manual_seed(3)))
    torch.manual_seed(3)  # the default generator in the same state draws the same
    assert torch.equal(first, torch.ops.wmha.attention(*inputs, dropout_p=0.5))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_repeats_the_mask(reentrant, inputs):
    def block(query, key, value):
        return torch.ops.wmha.attention(query, key, value, window_left=9, dropout_p=0.5).square()

    def checkpointed():
        return checkpoint(block, *inputs, use_reentrant=reentrant)

    def train(run):
        for leaf in inputs:
            leaf.grad = None
        torch.manual_seed(2)
        output = run()
        torch.ops.wmha.attention(*inputs, dropout_p=0.5)  # moves the generator on before backward
        output.sum().backward()
        return output, *(leaf.grad for leaf in inputs)

    for one, other in zip(train(lambda: block(*inputs)), train(checkpointed), strict=True):
        assert torch.equal(one, other)


def test_mask_is_the_same_in_every_dtype(device):
    masks = []
    for dtype in DTYPES:
        zeros = torch.zeros(2, 2, 40, 8, dtype=dtype, device=device)
        one_hot = torch.eye(40, dtype=dtype, device=device).expand(2, 2, 40, 40)
        torch.manual_seed(6)
        masks.append(torch.ops.wmha.attention(zeros, zeros, one_hot, window_left=9, dropout_p=0.5) != 0)
    assert all(torch.equal(masks[0], mask) for mask in masks)
    assert masks[0].any()


def test_mask_is_the_same_for_any_number_of_threads(inputs, threads):
    outputs = []
    for count in (1, 2, 3):
        threads(count)
        torch.manual_seed(8)
        outputs.append(torch.ops.wmha.attention(*inputs, dropout_p=0.5))
    assert all(torch.equal(outputs[0], output) for output in outputs)


def test_fused_and_composed_draw_the_same(inputs):
    torch.manual_seed(9)
    fused = torch.ops.wmha.attention(*inputs, dropout_p=0.5)
    torch.manual_seed(9)
    leaves = [leaf.detach() for leaf in inputs]
    composed, _ = torch.func.vjp(lambda *leaves: torch.ops.wmha.attention(*leaves, dropout_p=0.5), *leaves)
    torch.testing.assert_close(fused, composed, atol=1e-5, rtol=1e-5)
    after = torch.rand(())
    torch.manual_seed(9)
    torch.ops.wmha.attention(*inputs, dropout_p=0.5)
    assert torch.equal(after, torch.rand(()))
