"""Every case of the table against the fp64 reference: values, logsumexp, weights, and gradients."""

import dataclasses

import pytest
import torch

import wmha
from cases import CASES, DTYPES, Case, Inputs, make_inputs
from reference import Bounded, expected, visible_in

GRADIENTS = ("grad_query", "grad_key", "grad_value", "grad_temperature")


@dataclasses.dataclass
class Problem:
    case: Case
    inputs: Inputs
    expected: dict[str, Bounded]

    def check(self, **results: torch.Tensor) -> None:
        for name, result in results.items():
            self.expected[name].check(name, result)

    def options(self) -> dict:
        return self.case.options(self.inputs.temperature)


def mask_of(case: Case, inputs: Inputs) -> torch.Tensor | None:
    """The dropout mask of the next call after torch.manual_seed(0)."""
    if case.dropout_p == 0:
        return None
    torch.manual_seed(0)
    with torch.no_grad():
        *_, rng_state = torch.ops.wmha._attention_forward(*inputs.leaves[:3], **case.options(inputs.temperature))
    batch, heads, queries, _ = case.query_shape
    keys = case.key_shape[2]
    return torch.ops.wmha._dropout_mask(
        rng_state, batch=batch, heads=heads, queries=queries, keys=keys, dropout_p=case.dropout_p
    )


# Module-scoped, so that pytest runs all tests of one problem in a row and its reference is computed once.
@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.fixture(scope="module", params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def problem(case, request, device):
    inputs = make_inputs(case, request.param, device)
    return Problem(case, inputs, expected(case, inputs, mask_of(case, inputs)))


def with_lse(case: Case, *leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value, *temperature = leaves
    torch.manual_seed(0)
    return torch.ops.wmha.attention_with_lse(query, key, value, **case.options(*temperature))


@pytest.mark.numerics
def test_fused(problem):
    inputs = problem.inputs
    output, logsumexp = with_lse(problem.case, *inputs.leaves)
    gradients = torch.autograd.grad((output, logsumexp), inputs.leaves, (inputs.grad_output, inputs.grad_logsumexp))
    problem.check(output=output, logsumexp=logsumexp, **dict(zip(GRADIENTS, gradients, strict=False)))
    assert output.dtype == inputs.query.dtype
    assert logsumexp.dtype == inputs.grad_logsumexp.dtype
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in inputs.leaves]


def test_composed(problem):
    """Under a torch.func transform the operator takes its composite form."""
    inputs = problem.inputs
    detached = (leaf.detach() for leaf in inputs.leaves)
    (output, logsumexp), differentiate = torch.func.vjp(lambda *leaves: with_lse(problem.case, *leaves), *detached)
    gradients = differentiate((inputs.grad_output, inputs.grad_logsumexp))
    problem.check(output=output, logsumexp=logsumexp, **dict(zip(GRADIENTS, gradients, strict=False)))


def test_attention_weights(problem):
    options = problem.options()
    del options["dropout_p"]
    weights = torch.ops.wmha.attention_weights(problem.inputs.query, problem.inputs.key, **options)
    assert weights.dtype == problem.inputs.query.dtype
    assert torch.all(weights.cpu()[..., ~visible_in(problem.case)] == 0)
    problem.check(weights=weights)


@pytest.mark.parametrize("result", ["output", "logsumexp"])
def test_gradient_of_one_result(case, result, device):
    inputs = make_inputs(case, torch.float64, device)
    output, logsumexp = with_lse(case, *inputs.leaves)
    if result == "output":
        torch.manual_seed(0)
        computed = torch.ops.wmha.attention(*inputs.leaves[:3], **case.options(inputs.temperature))
        assert torch.equal(computed, output)
        gradient = inputs.grad_output
        inputs.grad_logsumexp = torch.zeros_like(logsumexp)
    else:
        computed, gradient = logsumexp, inputs.grad_logsumexp
        inputs.grad_output = torch.zeros_like(output)
    gradients = torch.autograd.grad(computed, inputs.leaves, gradient, materialize_grads=True)
    exact = expected(case, inputs, mask_of(case, inputs))
    for name, computed_gradient in zip(GRADIENTS, gradients, strict=False):
        exact[name].check(name, computed_gradient)


def test_inference_is_training(case, device):
    """With and without gradients, the same bits."""
    inputs = make_inputs(case, torch.float32, device)
    training = with_lse(case, *inputs.leaves)
    with torch.no_grad():
        no_grad = with_lse(case, *inputs.leaves)
    with torch.inference_mode():
        inference = with_lse(case, *inputs.leaves)
    for one, two, three in zip(training, no_grad, inference, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_python_functions(case, device):
    """The typed functions are the operators."""
    inputs = make_inputs(case, torch.float32, device)
    options = case.options(inputs.temperature)
    output, logsumexp = with_lse(case, *inputs.leaves)
    options["window"] = (options.pop("window_left"), options.pop("window_right"))
    torch.manual_seed(0)
    assert torch.equal(wmha.attention(*inputs.leaves[:3], **options), output)
    torch.manual_seed(0)
    results = wmha.attention_with_lse(*inputs.leaves[:3], **options)
    assert torch.equal(results[0], output)
    assert torch.equal(results[1], logsumexp)
    del options["dropout_p"]
    weights = wmha.attention_weights(inputs.query, inputs.key, **options)
    operator_options = case.options(inputs.temperature)
    del operator_options["dropout_p"]
    assert torch.equal(weights, torch.ops.wmha.attention_weights(inputs.query, inputs.key, **operator_options))
