"""torch.func: grad, vjp, jvp, jacobians, hessian, and vmap with its batching and randomness rules."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

from cases import Case, make_inputs

OPTIONS = {"window_left": 3, "window_right": 1, "softcap": 2.0}


def attend(query, key, value, temperature=1.0, **options):
    return torch.ops.wmha.attention(query, key, value, temperature=temperature, **(OPTIONS | options))


def loss(query, key, value, temperature):
    output, logsumexp = torch.ops.wmha.attention_with_lse(query, key, value, temperature=temperature, **OPTIONS)
    return output.square().sum() + logsumexp.sin().sum()


@pytest.fixture
def leaves(device):
    case = Case("leaves", batch=2, heads=4, kv_heads=2, queries=5, keys=6, key_dim=3, value_dim=2, temperature="(Hq,)")
    return tuple(leaf.detach() for leaf in make_inputs(case, torch.float64, device).leaves)


def gradients_by_kernel(leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(loss(*leaves), leaves)


def test_grad(leaves):
    for one, other in zip(grad(loss, argnums=(0, 1, 2, 3))(*leaves), gradients_by_kernel(leaves), strict=True):
        assert_close(one, other)


def test_vjp(leaves):
    value, differentiate = vjp(loss, *leaves)
    assert_close(value, loss(*leaves))
    for one, other in zip(differentiate(torch.ones_like(value)), gradients_by_kernel(leaves), strict=True):
        assert_close(one, other)


def test_jvp(leaves):
    tangents = tuple(torch.randn_like(leaf) for leaf in leaves)
    _, tangent = jvp(loss, leaves, tangents)
    exact = sum((gradient * one).sum() for gradient, one in zip(gradients_by_kernel(leaves), tangents, strict=True))
    assert_close(tangent, exact)


def test_jacobians(leaves):
    query, key, value, temperature = leaves
    for argument in range(4):
        by_rows = jacrev(attend, argument)(*leaves)
        assert_close(by_rows, jacfwd(attend, argument)(*leaves))
        function = torch.autograd.functional.jacobian

        def one_argument(x, argument=argument):
            return attend(*(x if i == argument else leaf for i, leaf in enumerate(leaves)))

        assert_close(by_rows, function(one_argument, leaves[argument]))


def test_hessian(leaves):
    query, key, value, temperature = (leaf[:1, :2, :3] if leaf.dim() == 4 else leaf[:2] for leaf in leaves)
    for argument in (0, 1, 3):
        tensors = (query, key[:, :1], value[:, :1], temperature)
        exact = torch.autograd.functional.hessian(
            lambda x, i=argument, t=tensors: loss(*t[:i], x, *t[i + 1 :]), tensors[argument]
        )
        assert_close(hessian(loss, argument)(*tensors), exact)
        assert_close(jacrev(grad(loss, argument), argument)(*tensors), exact)


def stack(tensor, copies=3):
    return torch.stack([tensor * (1 + i / 4) for i in range(copies)])


IN_DIMS = [
    (0, 0, 0, 0),
    (0, None, None, None),
    (None, 0, None, None),
    (None, None, 0, None),
    (None, None, None, 0),
    (1, 2, None, 0),
    (4, None, 3, None),
    (-1, 0, 1, 1),
    (2, 4, -2, None),
]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap(in_dims, leaves):
    batched = [leaf if dim is None else stack(leaf).movedim(0, dim) for leaf, dim in zip(leaves, in_dims, strict=True)]

    def example(i):
        return [leaf if d is None else leaf.select(d, i) for leaf, d in zip(batched, in_dims, strict=True)]

    for function in (attend, loss, grad(loss), grad(loss, argnums=3), jacrev(attend, 3)):
        results = vmap(function, in_dims)(*batched)
        assert_close(results, torch.stack([function(*example(i)) for i in range(3)]))


def test_vmap_of_temperature_number_and_out_dims(leaves):
    query, key, value, _ = leaves
    results = vmap(lambda query: attend(query, key, value, 0.5), out_dims=2)(stack(query))
    assert_close(results.movedim(2, 0), torch.stack([attend(one, key, value, 0.5) for one in stack(query)]))


def test_nested_vmap(leaves):
    query, key, value, temperature = leaves
    inner = vmap(attend, (None, 0, None, None))
    results = vmap(inner, (0, None, None, None))(stack(query, 2), stack(key), value, temperature)
    for i, one in enumerate(stack(query, 2)):
        for j, other in enumerate(stack(key)):
            assert_close(results[i, j], attend(one, other, value, temperature))


def test_vmap_of_the_other_operators(leaves):
    query, key, value, temperature = leaves
    with_lse = vmap(torch.ops.wmha.attention_with_lse, (0, None, None))(stack(query), key, value)
    weights = vmap(lambda q: torch.ops.wmha.attention_weights(q, key, temperature=temperature))(stack(query))
    for i, one in enumerate(stack(query)):
        for result, exact in zip(with_lse, torch.ops.wmha.attention_with_lse(one, key, value), strict=True):
            assert_close(result[i], exact)
        assert_close(weights[i], torch.ops.wmha.attention_weights(one, key, temperature=temperature))

    x = torch.randn(3, 2, 5, 4, dtype=torch.float64, device=query.device)
    weight = torch.randn(4, 4, dtype=torch.float64, device=query.device)

    def whole(x):
        options = {"num_heads": 2, "window_left": 2}
        return torch.ops.wmha.multi_head_attention(
            x, x, x, weight, weight, weight, None, None, None, weight, None, **options
        )

    assert_close(vmap(whole)(x), torch.stack([whole(one) for one in x]))


def test_vmap_outside_of_autograd(leaves):
    """Ordinary backward through a vmap."""
    query, key, value, temperature = (leaf.clone().requires_grad_() for leaf in leaves)
    leaves = (query, key, value, temperature)
    together = vmap(attend, (0, None, None, None))(stack(query), key, value, temperature)
    apart = torch.stack([attend(one, key, value, temperature) for one in stack(query)])
    assert_close(together, apart)
    for one, other in zip(
        torch.autograd.grad(together.square().sum(), leaves),
        torch.autograd.grad(apart.square().sum(), leaves),
        strict=True,
    ):
        assert_close(one, other)


def test_batched_gradients(leaves):
    """is_grads_batched is a vmap over the backward pass."""
    query = leaves[0].clone().requires_grad_()
    output = attend(query, *leaves[1:])
    grad_outputs = torch.randn(3, *output.shape, dtype=output.dtype, device=output.device)
    (together,) = torch.autograd.grad(output, query, grad_outputs, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad(output, query, one, retain_graph=True)[0] for one in grad_outputs]
    assert_close(together, torch.stack(apart))


class TestRandomness:
    """Dropout under vmap: randomness="error" (the default), "same" and "different", as PyTorch's own dropout."""

    @pytest.fixture
    def run(self, leaves):
        query, key, value, _ = leaves
        queries = query.expand(4, *query.shape).clone()

        def run(randomness, function=None, **options):
            torch.manual_seed(1)
            function = function or (lambda query: attend(query, key, value, dropout_p=0.5))
            return vmap(function, randomness=randomness, **options)(queries)

        return run

    def test_error(self, run):
        with pytest.raises(RuntimeError, match="random"):
            run("error")

    def test_same(self, run, leaves):
        results = run("same")
        torch.manual_seed(1)
        assert_close(results, attend(*leaves[:3], dropout_p=0.5).expand_as(results))

    def test_different(self, run):
        results = run("different")
        assert len({tuple(one.flatten().tolist()) for one in results}) == 4  # of equal queries
        assert torch.equal(results, run("different"))

    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_gradients_have_the_same_mask(self, randomness, run, leaves):
        _, key, value, _ = leaves

        def both(query):
            output, differentiate = vjp(lambda value: attend(query, key, value, dropout_p=0.5), value)
            return output, differentiate(torch.ones_like(output))[0]

        outputs, gradients = run(randomness, both)
        # The output is linear in value, so that <output, 1> = <gradient, value>.
        assert_close(outputs.sum((1, 2, 3, 4)), (gradients * value).sum((1, 2, 3, 4)))

    def test_no_dropout_needs_no_randomness(self, run, leaves):
        results = run("error", lambda query: attend(query, *leaves[1:3], dropout_p=0.0))
        assert_close(results[0], attend(*leaves[:3]))
