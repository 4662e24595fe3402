"""Strides in and out, offsets beyond 2^31 elements, and inputs left alone."""

import pytest
import torch

from cases import LAYOUTS, Case, make_inputs

OPTIONS = {"window_left": 6, "window_right": 2, "softcap": 3.0}


def dense(sizes, order):
    """Strides of a dense tensor whose axes lie in memory in this order."""
    strides, step = [0] * 4, 1
    for axis in reversed(order):
        strides[axis] = step
        step *= sizes[axis]
    return tuple(strides)


def test_output_of_contiguous_query_is_contiguous(device):
    query = torch.randn(2, 4, 9, 8, device=device)
    value = torch.randn(2, 9, 2, 5, device=device).transpose(1, 2)  # must have no say
    output, logsumexp = torch.ops.wmha.attention_with_lse(query, query[:, :2], value)
    assert output.is_contiguous()
    assert logsumexp.is_contiguous()


@pytest.mark.parametrize("form", ["inference", "training", "composed", "create_graph"])
def test_output_lies_as_the_query(form, device):
    """A (B, N, H, D) tensor through a transpose: so is the output, dense, without a copy for the projection after it."""
    query = torch.randn(2, 9, 4, 8, device=device).transpose(1, 2).requires_grad_(form != "inference")
    key = torch.randn(2, 2, 11, 8, device=device)
    value = torch.randn(2, 2, 11, 5, device=device)
    if form == "composed":
        output, _ = torch.func.vjp(lambda query: torch.ops.wmha.attention(query, key, value), query.detach())
    else:
        output = torch.ops.wmha.attention(query, key, value)
    if form == "create_graph":
        (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
        assert gradient.shape == query.shape
    assert output.shape == (2, 4, 9, 5)
    assert output.stride() == dense((2, 4, 9, 5), (0, 2, 1, 3))
    assert output.transpose(1, 2).is_contiguous()


def test_output_of_packed_query_is_dense(device):
    packed = torch.randn(2, 9, 3, 4, 8, device=device)  # (B, N, qkv, H, D)
    query, key, value = (part.squeeze(2).transpose(1, 2) for part in packed.split(1, 2))
    output = torch.ops.wmha.attention(query, key, value)
    assert output.stride() == dense((2, 4, 9, 8), (0, 2, 1, 3))


@pytest.mark.parametrize("layout", [*LAYOUTS, "packed"])
@pytest.mark.parametrize("heads, queries", [(4, 13), (1, 13), (4, 1), (1, 1), (4, 0)])
def test_meta_agrees_on_strides(layout, heads, queries, device):
    case = Case("layout", heads=heads, kv_heads=min(heads, 2), queries=queries, layout=layout)
    inputs = make_inputs(case, torch.float32, device)

    def run(leaves):
        query, key, value = (leaf.detach() for leaf in leaves)
        output, logsumexp, rng_state = torch.ops.wmha._attention_forward(query, key, value, dropout_p=0.5)
        gradients = torch.ops.wmha._attention_backward(
            output, logsumexp, query, key, value, output, logsumexp, rng_state, dropout_p=0.5
        )
        plain = torch.ops.wmha.attention(query, key, value)
        return output, logsumexp, rng_state, *gradients, plain

    meta = [torch.empty_strided(leaf.size(), leaf.stride(), device="meta") for leaf in inputs.leaves]
    for real, fake in zip(run(inputs.leaves), run(meta), strict=True):
        assert real.shape == fake.shape
        assert real.stride() == fake.stride()
        assert real.dtype == fake.dtype
        assert real.storage_offset() == fake.storage_offset()


@pytest.mark.parametrize("layout", [*LAYOUTS, "packed"])
def test_layout_changes_no_bit(layout, device):
    """The same values in another layout give the same results; packed slices differ in value, so compare with copies."""
    case = Case("layout", heads=4, kv_heads=2, queries=60, layout=layout, dropout_p=0.2)
    inputs = make_inputs(case, torch.float32, device)

    def run(leaves):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        torch.manual_seed(0)
        output, logsumexp = torch.ops.wmha.attention_with_lse(*leaves, **OPTIONS, dropout_p=case.dropout_p)
        return output, logsumexp, *torch.autograd.grad(output, leaves, inputs.grad_output)

    copies = [leaf.detach().clone(memory_format=torch.contiguous_format) for leaf in inputs.leaves]
    for one, other in zip(run(inputs.leaves), run(copies), strict=True):
        assert torch.equal(one, other)


def test_inputs_are_left_alone(device):
    """Bit for bit, and what lies between their rows too (NaN, in this layout)."""
    case = Case("layout", layout="unaligned", queries=50, dropout_p=0.2, temperature="(Hq,)", window=(9, 0))
    inputs = make_inputs(case, torch.float32, device)
    tensors = (*inputs.leaves, inputs.grad_output, inputs.grad_logsumexp)
    storages = [tensor.detach().untyped_storage() for tensor in tensors]
    before = [storage.clone() for storage in storages]
    results = torch.ops.wmha.attention_with_lse(*inputs.leaves[:3], **case.options(inputs.temperature))
    torch.autograd.grad(results, inputs.leaves, (inputs.grad_output, inputs.grad_logsumexp))
    for one, other in zip(before, storages, strict=True):
        assert list(one) == list(other)


@pytest.mark.parametrize("gradient", ["expanded", "by_position", "every_second", "unaligned"])
def test_any_stride_of_the_gradient(gradient, device):
    """sum() sends back a gradient of stride 0."""
    query, key, value = (torch.randn(2, 2, 50, 6, device=device, requires_grad=True) for _ in range(3))
    output, logsumexp = torch.ops.wmha.attention_with_lse(query, key, value, **OPTIONS)
    if gradient == "expanded":
        grads = [torch.ones((), device=device).expand_as(result) for result in (output, logsumexp)]
    else:
        grads = [LAYOUTS[gradient](torch.randn_like(output)), torch.randn(50, 2, 2, device=device).permute(1, 2, 0)]
    copies = [grad.contiguous() for grad in grads]
    strided = torch.autograd.grad((output, logsumexp), (query, key, value), grads, retain_graph=True)
    plain = torch.autograd.grad((output, logsumexp), (query, key, value), copies)
    for one, other in zip(strided, plain, strict=True):
        assert torch.equal(one, other)


FAR = 2**31 // 4 + 8  # elements from one index to the next; the fifth lies beyond 2^31


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("which", range(4), ids=["query", "key", "value", "gradient"])
def test_offsets_beyond_31_bits(which, axis, device):
    """Only the pages that are touched take memory."""
    shape = [2, 2, 3, 8]
    shape[axis] = 5
    near = [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(4)]
    strides = [1024, 128, 16, 1]
    strides[axis] = FAR
    storage = torch.empty(4 * FAR + 4096, dtype=torch.bfloat16, device=device)
    far = list(near)
    far[which] = storage.as_strided(shape, strides).copy_(near[which])

    def run(query, key, value, gradient):
        leaves = [leaf.detach().requires_grad_() for leaf in (query, key, value)]
        results = torch.ops.wmha.attention_with_lse(*leaves, window_left=2)
        return *results, *torch.autograd.grad(results[0], leaves, gradient)

    for one, other in zip(run(*far), run(*near), strict=True):
        assert torch.equal(one, other)
