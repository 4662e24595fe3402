"""Differentiation: to any order, forward and reverse, and by the fused kernels where they can."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from cases import Case, make_inputs

CASES = [
    Case("plain", queries=5, key_dim=3),
    Case("window", queries=6, keys=8, key_dim=3, value_dim=2, window=(2, 1)),
    Case("groups", heads=4, kv_heads=2, queries=4, key_dim=2, window=(2, 0), temperature="(Hq,)"),
    Case("softcap", batch=1, queries=5, key_dim=3, window=(-1, 0), softcap=0.8, temperature="()"),
    Case("one_temperature", batch=1, queries=5, key_dim=3, temperature="(1,)", scale=-0.6),
    Case("dropout", batch=1, queries=6, key_dim=2, dropout_p=0.4, window=(3, 3), temperature="(Hq,)", softcap=2.0),
    Case("rows_without_keys", batch=1, heads=1, queries=7, keys=3, key_dim=2, window=(1, 0), temperature="()"),
    Case("scale_zero", batch=1, heads=1, queries=4, key_dim=2, scale=0.0),
    Case("by_position", queries=4, key_dim=3, layout="by_position", window=(1, 1)),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def function_of(case):
    """attention_with_lse as a function of its tensors; rows without keys lose their -inf, which no difference survives."""

    def function(query, key, value, *temperature):
        torch.manual_seed(4)
        options = case.options(*temperature)
        output, logsumexp = torch.ops.wmha.attention_with_lse(query, key, value, **options)
        return output, logsumexp.masked_fill(logsumexp.detach().isinf(), 0.0)

    return function


def leaves_of(case, device):
    return make_inputs(case, torch.float64, device).leaves


@every_case
def test_gradcheck(case, device):
    assert gradcheck(
        function_of(case),
        leaves_of(case, device),
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=case.dropout_p == 0,  # vmap refuses to draw a seed for all of them
        check_undefined_grad=True,
    )


@every_case
def test_gradgradcheck(case, device):
    options = {"check_batched_grad": False, "check_fwd_over_rev": True, "check_rev_over_rev": True}
    assert gradgradcheck(function_of(case), leaves_of(case, device), **options)


def is_fused(result):
    return "AttentionFunction" in result.grad_fn.name()


@pytest.fixture
def leaves(device):
    case = Case("leaves", heads=4, kv_heads=2, queries=30, temperature="(Hq,)")
    return list(make_inputs(case, torch.float64, device).leaves)


def attend(query, key, value, temperature=1.0, **options):
    return torch.ops.wmha.attention(
        query, key, value, window_left=7, window_right=2, temperature=temperature, softcap=3.0, **options
    )


def test_plain_calls_are_fused(leaves):
    assert is_fused(attend(*leaves))
    assert attend(*(leaf.detach() for leaf in leaves)).grad_fn is None


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x.unsqueeze(0)),
    "dual": lambda f, x: forward_mode(f, x),
    "failed": lambda f, x: failing_transform(f, x),
}


def forward_mode(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def failing_transform(function, x):
    with pytest.raises(RuntimeError, match="query"):
        torch.func.grad(lambda x: function(x.squeeze()).sum())(x[:1, :, :, :1])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_next_plain_call_is_fused_again(transform, leaves):
    query = leaves[0].detach()[:, :, :5]
    TRANSFORMS[transform](lambda query: attend(query, *leaves[1:]), query)
    assert is_fused(attend(*leaves))


def test_create_graph_agrees_with_the_kernels(leaves):
    output = attend(*leaves)
    grad_output = torch.randn_like(output)
    fused = torch.autograd.grad(output, leaves, grad_output, retain_graph=True)
    composed = torch.autograd.grad(output, leaves, grad_output, create_graph=True)
    for one, other in zip(fused, composed, strict=True):
        assert not one.requires_grad
        assert other.requires_grad
        torch.testing.assert_close(one, other)


def test_third_order(leaves):
    query = leaves[0][:1, :, :4].detach().requires_grad_()
    key, value = (leaf[:1, :, :4].detach() for leaf in leaves[1:3])

    def order(query, n):
        result = attend(query, key, value).pow(3).sum()
        for _ in range(n):
            (gradient,) = torch.autograd.grad(result, query, create_graph=True)
            result = gradient.pow(2).sum()
        return result

    assert gradcheck(lambda query: order(query, 2), query)


@pytest.mark.parametrize("wanted", range(1, 16), ids=lambda wanted: f"{wanted:04b}")
def test_only_some_require_gradients(wanted, leaves):
    grad_output = torch.randn(2, 4, 30, 8, dtype=torch.float64, device=leaves[0].device)
    everything = torch.autograd.grad(attend(*leaves), leaves, grad_output)
    some = [leaf.detach().requires_grad_(bool(wanted >> i & 1)) for i, leaf in enumerate(leaves)]
    for create_graph in (False, True):
        gradients = torch.autograd.grad(
            attend(*some), [leaf for leaf in some if leaf.requires_grad], grad_output, create_graph=create_graph
        )
        expected = [gradient for i, gradient in enumerate(everything) if wanted >> i & 1]
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other)
    attend(*some).backward(grad_output)
    assert [leaf.grad is not None for leaf in some] == [leaf.requires_grad for leaf in some]


@pytest.mark.parametrize("changed", ["query", "key", "value", "temperature", "output"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_changing_what_backward_needs_is_an_error(changed, create_graph, leaves):
    tensors = [leaf * 1.0 for leaf in leaves]
    output = attend(*tensors)
    loss = output.sum()
    with torch.no_grad():
        (*tensors, output)[("query", "key", "value", "temperature", "output").index(changed)].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves, create_graph=create_graph)


@pytest.mark.parametrize("shape", [(), (1,), (4,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_temperature_keeps_shape_dtype_and_gradient(shape, dtype, leaves):
    """Also a 0-dim tensor, which PyTorch would turn into a number if the other overload came first."""
    temperature = torch.full(shape, 0.75, dtype=dtype, device=leaves[0].device, requires_grad=True)
    for cast in (torch.float64, torch.float32, torch.bfloat16):
        tensors = [leaf.detach().to(cast) for leaf in leaves[:3]]
        output = torch.ops.wmha.attention(*tensors, temperature=temperature)
        assert output.requires_grad
        (gradient,) = torch.autograd.grad(output.double().square().sum(), temperature)
        assert gradient.shape == shape
        assert gradient.dtype == dtype
        assert torch.all(gradient != 0)
        torch.testing.assert_close(output, torch.ops.wmha.attention(*tensors, temperature=0.75))


def test_backward_twice(leaves):
    output = attend(*leaves, dropout_p=0.3)
    first = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(output.sum(), leaves), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.sum(), leaves)


def test_hooks_see_the_gradients(leaves):
    gradients = torch.autograd.grad(attend(*leaves).sum(), leaves)
    seen = []
    output = attend(*leaves)
    output.register_hook(lambda gradient: gradient * 2)
    for leaf in leaves:
        leaf.register_hook(lambda gradient: seen.append(gradient))
    torch.autograd.grad(output.sum(), leaves)
    assert len(seen) == 4
    for gradient in gradients:
        assert any(torch.equal(2 * gradient, one) for one in seen)


def test_gradients_accumulate(leaves):
    attend(*leaves).sum().backward()
    once = [leaf.grad.clone() for leaf in leaves]
    attend(*leaves).sum().backward()
    for leaf, gradient in zip(leaves, once, strict=True):
        assert torch.equal(leaf.grad, 2 * gradient)


def test_one_tensor_in_three_places(device):
    x = torch.randn(1, 2, 6, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(lambda x: torch.ops.wmha.attention(x, x, x, window_right=0), x)
    assert gradgradcheck(lambda x: torch.ops.wmha.attention(x, x, x, window_right=0), x)


def test_operators_without_a_derivative_say_so(leaves):
    """No silent zero: the private operators aren't differentiable."""
    query, key, value, _ = leaves
    output, logsumexp, rng_state = torch.ops.wmha._attention_forward(query, key, value)
    for result in (output, logsumexp):
        with pytest.raises(RuntimeError, match="_attention_forward"):
            result.sum().backward()


def test_attention_weights_and_multi_head_attention(device):
    case = Case("weights", heads=4, kv_heads=2, queries=5, key_dim=3, softcap=2.0, temperature="(Hq,)")
    query, key, _, temperature = make_inputs(case, torch.float64, device).leaves

    def weights(query, key, temperature):
        return torch.ops.wmha.attention_weights(query, key, temperature=temperature, window_left=2, softcap=2.0)

    assert gradcheck(weights, (query, key, temperature), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(weights, (query, key, temperature))

    x = torch.randn(2, 5, 4, dtype=torch.float64, device=device, requires_grad=True)
    projections = [
        torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        for shape in ((8, 4), (4, 4), (4, 4), (3, 8), (3,))
    ]

    def whole(x, temperature, q_weight, k_weight, v_weight, out_weight, out_bias):
        torch.manual_seed(0)
        return torch.ops.wmha.multi_head_attention(
            x, x, x, q_weight, k_weight, v_weight, None, None, None, out_weight, out_bias,
            num_heads=4, num_kv_heads=2, window_left=2, temperature=temperature, dropout_p=0.3,
        )  # fmt: skip

    assert gradcheck(whole, (x, temperature, *projections), check_forward_ad=True)
    assert gradgradcheck(whole, (x, temperature, *projections))
