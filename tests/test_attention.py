"""Every case of the table against the fp64 reference: values, logsumexp, weights, and gradients."""

import pytest
import torch

import wmha
from cases import CASES, DTYPES, Case, Inputs, make_inputs
from reference import expected, visible_in

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

GRADIENTS = ("grad_query", "grad_key", "grad_value", "grad_temperature")


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


def check(case: Case, inputs: Inputs, **results: torch.Tensor) -> None:
    bounds = expected(case, inputs, mask_of(case, inputs))
    for name, result in results.items():
        bounds[name].check(name, result)


def with_lse(case: Case, *leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value, *temperature = leaves
    torch.manual_seed(0)
    return torch.ops.wmha.attention_with_lse(query, key, value, **case.options(*temperature))


@pytest.mark.numerics
@every_dtype
@every_case
def test_fused(case, dtype, device):
    inputs = make_inputs(case, dtype, device)
    output, logsumexp = with_lse(case, *inputs.leaves)
    results = (output, logsumexp)
    gradients = torch.autograd.grad(results, inputs.leaves, (inputs.grad_output, inputs.grad_logsumexp))
    check(case, inputs, output=output, logsumexp=logsumexp, **dict(zip(GRADIENTS, gradients, strict=False)))
    for leaf, gradient in zip(inputs.leaves, gradients, strict=True):
        assert gradient.dtype == leaf.dtype


@every_dtype
@every_case
def test_composed(case, dtype, device):
    """Under a torch.func transform the operator takes its composite form."""
    inputs = make_inputs(case, dtype, device)
    detached = (leaf.detach() for leaf in inputs.leaves)
    (output, logsumexp), differentiate = torch.func.vjp(lambda *leaves: with_lse(case, *leaves), *detached)
    gradients = differentiate((inputs.grad_output, inputs.grad_logsumexp))
    check(case, inputs, output=output, logsumexp=logsumexp, **dict(zip(GRADIENTS, gradients, strict=False)))


@pytest.mark.parametrize("result", ["output", "logsumexp"])
@every_case
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
    check(case, inputs, **dict(zip(GRADIENTS, gradients, strict=False)))


@every_case
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


@every_dtype
@every_case
def test_attention_weights(case, dtype, device):
    inputs = make_inputs(case, dtype, device)
    options = case.options(inputs.temperature)
    del options["dropout_p"]
    weights = torch.ops.wmha.attention_weights(inputs.query, inputs.key, **options)
    assert weights.dtype == dtype
    assert torch.all(weights.cpu()[..., ~visible_in(case)] == 0)
    check(case, inputs, weights=weights)


@every_case
def test_python_functions(case, device):
    """The typed functions are the operators."""
    inputs = make_inputs(case, torch.float32, device)
    options = case.options(inputs.temperature)
    options["window"] = (options.pop("window_left"), options.pop("window_right"))
    expected_results = with_lse(case, *inputs.leaves)
    torch.manual_seed(0)
    output, logsumexp = wmha.attention_with_lse(*inputs.leaves[:3], **options)
    torch.manual_seed(0)
    assert torch.equal(wmha.attention(*inputs.leaves[:3], **options), output)
    assert torch.equal(output, expected_results[0])
    assert torch.equal(logsumexp, expected_results[1])
    dropout_p = options.pop("dropout_p")
    weights = wmha.attention_weights(inputs.query, inputs.key, **options)
    if dropout_p == 0 and case.value_shape[2] > 0:
        values = inputs.value.repeat_interleave(case.heads // max(case.key_shape[1], 1), 1)
        torch.testing.assert_close(weights @ values, output, atol=1e-4, rtol=1e-4)
