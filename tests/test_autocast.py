"""Autocast: query, key, value, weights and biases go to the lower dtype; temperature and fp64 stay what they are."""

import pytest
import torch
from torch.testing import assert_close

OPTIONS = {"window_left": 6, "window_right": 1, "softcap": 4.0}


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def lower(request):
    return request.param


@pytest.fixture
def tensors(device):
    shapes = [(2, 4, 20, 8), (2, 2, 25, 8), (2, 2, 25, 8)]
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


def test_attention(lower, tensors, device):
    temperature = torch.tensor([0.7003, 0.9, 1.1, 2.0], device=device, requires_grad=True)  # 0.7003 is no bf16 number
    with torch.autocast(device, lower):
        output, logsumexp = torch.ops.wmha.attention_with_lse(*tensors, temperature=temperature, **OPTIONS)
        alone = torch.ops.wmha.attention(*tensors, temperature=temperature, **OPTIONS)
        weights = torch.ops.wmha.attention_weights(*tensors[:2], temperature=temperature, **OPTIONS)
    cast = [tensor.to(lower) for tensor in tensors]
    expected = torch.ops.wmha.attention_with_lse(*cast, temperature=temperature, **OPTIONS)
    assert output.dtype == weights.dtype == lower
    assert logsumexp.dtype == torch.float32
    assert torch.equal(output, expected[0])
    assert torch.equal(output, alone)
    assert torch.equal(logsumexp, expected[1])
    assert torch.equal(weights, torch.ops.wmha.attention_weights(*cast[:2], temperature=temperature, **OPTIONS))

    leaves = [*tensors, temperature]
    grads = (torch.ones_like(output), torch.ones_like(logsumexp))
    for one, other, leaf in zip(
        torch.autograd.grad((output, logsumexp), leaves, grads),
        torch.autograd.grad(expected, leaves, grads),
        leaves,
        strict=True,
    ):
        assert one.dtype == leaf.dtype == torch.float32
        assert torch.equal(one, other)


def test_mixed_dtypes_become_one(lower, tensors, device):
    query, key, value = tensors
    with torch.autocast(device, lower):
        output = torch.ops.wmha.attention(query.half(), key.bfloat16(), value)
    assert output.dtype == lower


def test_fp64_is_left_alone(lower, tensors, device):
    doubles = [tensor.double() for tensor in tensors]
    temperature = torch.tensor(0.7, dtype=torch.float64, device=device)
    with torch.autocast(device, lower):
        output, logsumexp = torch.ops.wmha.attention_with_lse(*doubles, temperature=temperature, **OPTIONS)
    assert output.dtype == logsumexp.dtype == torch.float64
    assert torch.equal(output, torch.ops.wmha.attention(*doubles, temperature=temperature, **OPTIONS))


def test_multi_head_attention(lower, device):
    x = torch.randn(2, 20, 16, device=device)
    weight, bias = torch.randn(16, 16, device=device) / 4, torch.randn(16, device=device)
    temperature = torch.tensor(0.7003, device=device)
    with torch.autocast(device, lower):
        output = torch.ops.wmha.multi_head_attention(
            x, x, x, weight, weight, weight, bias, None, bias, weight, bias, num_heads=2, temperature=temperature
        )
    x, weight, bias = (tensor.to(lower) for tensor in (x, weight, bias))
    expected = torch.ops.wmha.multi_head_attention(
        x, x, x, weight, weight, weight, bias, None, bias, weight, bias, num_heads=2, temperature=temperature
    )
    assert output.dtype == lower
    assert torch.equal(output, expected)


def test_dropout_draws_as_ever(lower, tensors, device):
    torch.manual_seed(0)
    with torch.autocast(device, lower):
        output = torch.ops.wmha.attention(*tensors, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(output, torch.ops.wmha.attention(*(tensor.to(lower) for tensor in tensors), dropout_p=0.5))


def test_disabled_inside(lower, tensors, device):
    with torch.autocast(device, lower), torch.autocast(device, enabled=False):
        assert torch.ops.wmha.attention(*tensors).dtype == torch.float32


@pytest.mark.parametrize("backward", ["inside", "outside"])
def test_composed(backward, lower, tensors, device):
    """Under a torch.func transform: arithmetic stays in fp32, wherever backward runs."""
    query, key, value = (tensor.detach() for tensor in tensors)
    cast = [tensor.to(lower) for tensor in (query, key, value)]
    expected, expected_gradient = torch.func.vjp(lambda query: torch.ops.wmha.attention(query, *cast[1:]), cast[0])
    grad_output = torch.randn_like(expected)
    with torch.autocast(device, lower):
        output, gradient = torch.func.vjp(lambda query: torch.ops.wmha.attention(query, key, value), query)
        if backward == "inside":
            (grad_query,) = gradient(grad_output)
    if backward == "outside":
        (grad_query,) = gradient(grad_output)
    assert output.dtype == lower
    assert grad_query.dtype == torch.float32
    assert_close(output, expected, atol=1e-6, rtol=torch.finfo(lower).eps)  # sums near 0 differ by fp32's rounding
    assert_close(grad_query, expected_gradient(grad_output)[0].float(), atol=1e-5, rtol=torch.finfo(lower).eps)


def test_create_graph(lower, tensors, device):
    cast = [tensor.detach().to(lower).requires_grad_() for tensor in tensors]
    output = torch.ops.wmha.attention(*cast)
    grad_output = torch.randn_like(output)
    expected = torch.autograd.grad(output, cast, grad_output, create_graph=True)
    with torch.autocast(device, lower):
        output = torch.ops.wmha.attention(*tensors)
        gradients = torch.autograd.grad(output, tensors, grad_output, create_graph=True)
    for one, other in zip(gradients, expected, strict=True):
        assert one.dtype == torch.float32
        assert_close(one, other.float(), atol=1e-5, rtol=torch.finfo(lower).eps)


def test_compiled(lower, tensors, device):
    def function(*tensors):
        with torch.autocast(device, lower):
            return torch.ops.wmha.attention(*tensors, **OPTIONS)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(*tensors)
    assert compiled.dtype == lower
    assert torch.equal(compiled, function(*tensors))
