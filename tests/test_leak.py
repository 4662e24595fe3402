"""What a query doesn't see can't change its results in one bit, and what no query sees may hold anything."""

import pytest
import torch

from cases import DTYPES, Case, make_inputs
from reference import visible_in

CASES = [
    Case("window", heads=4, kv_heads=2, queries=70, keys=90, window=(9, 2), softcap=3.0, temperature="(Hq,)"),
    Case("dropout", queries=60, window=(13, 0), dropout_p=0.3),
    Case("causal", queries=101, window=(-1, 0)),
    Case("left", queries=50, window=(4, -1)),
    Case("before_and_after", queries=40, keys=120, window=(5, 5), query_offset=30, temperature="()"),
    Case("rows_without_keys", queries=60, keys=20, window=(3, 0), query_offset=-30),
    Case("few_queries", heads=6, kv_heads=2, queries=5, keys=150, window=(70, 1), softcap=3.0, dropout_p=0.3),
    Case("few_queries_before_the_keys", heads=9, kv_heads=1, queries=4, keys=80, window=(3, 0), query_offset=-2),
    Case("none_seen", queries=20, keys=20, window=(3, 0), query_offset=1000, temperature="()"),
]
WITH_UNSEEN_KEYS = [case for case in CASES if not visible_in(case).any(0).all()]
WITH_BLIND_QUERIES = [case for case in CASES if not visible_in(case).any(1).all()]
MIXED = [case for case in CASES if 0 < visible_in(case).sum() < visible_in(case).numel()]


def every(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_form = pytest.mark.parametrize("form", ["fused", "composed", "create_graph"])


def results(case, inputs, form):
    """Output, logsumexp and all gradients."""
    gradients = (inputs.grad_output, inputs.grad_logsumexp)

    def call(query, key, value, temperature=None):
        torch.manual_seed(0)
        return torch.ops.wmha.attention_with_lse(query, key, value, **case.options(temperature))

    if form == "composed":
        computed, differentiate = torch.func.vjp(call, *(leaf.detach() for leaf in inputs.leaves))
        return *computed, *differentiate(gradients)
    computed = call(*inputs.leaves)
    return *computed, *torch.autograd.grad(computed, inputs.leaves, gradients, create_graph=form == "create_graph")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Tells 0.0 from -0.0 and one NaN from another."""
    return tensor.detach().reshape(-1).view(torch.uint8)


@every_form
@every_dtype
@every(WITH_UNSEEN_KEYS)
def test_keys_that_no_query_sees_may_hold_anything(case, dtype, form, device):
    inputs = make_inputs(case, dtype, device)
    clean = results(case, inputs, form)
    seen = visible_in(case).any(0).to(device)
    for rubbish in (torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max):
        with torch.no_grad():
            inputs.key[:, :, ~seen] = rubbish
            inputs.value[:, :, ~seen] = rubbish
        for one, other in zip(clean, results(case, inputs, form), strict=True):
            assert torch.equal(bits(one), bits(other))
    for gradient in clean[3:5]:
        assert torch.all(gradient[:, :, ~seen] == 0)


@every_dtype
@every(WITH_BLIND_QUERIES)
def test_queries_that_see_no_key_may_hold_anything(case, dtype, device):
    inputs = make_inputs(case, dtype, device)
    clean = results(case, inputs, "fused")
    sees_any = visible_in(case).any(1).to(device)
    for rubbish in (torch.nan, torch.inf):
        with torch.no_grad():
            inputs.query[:, :, ~sees_any] = rubbish
        for one, other in zip(clean, results(case, inputs, "fused"), strict=True):
            assert torch.equal(bits(one), bits(other))
    assert torch.all(clean[0][:, :, ~sees_any] == 0)
    assert torch.all(clean[1][:, :, ~sees_any] == -torch.inf)
    assert torch.all(clean[2][:, :, ~sees_any] == 0)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every(MIXED)
def test_unseen_finite_values_change_nothing(case, dtype, form, device):
    """Other queries see the changed key: their neighbours' results, and gradients of keys they share, keep their bits."""
    inputs = make_inputs(case, dtype, device)
    clean = results(case, inputs, form)
    visible = visible_in(case).to(device)
    for changed in (0, visible.size(1) // 2, visible.size(1) - 1):
        with torch.no_grad():
            before = inputs.key[:, :, changed].clone(), inputs.value[:, :, changed].clone()
            inputs.key[:, :, changed] *= 37.0
            inputs.value[:, :, changed] = torch.finfo(dtype).max / 4
        blind = ~visible[:, changed]
        output, logsumexp, grad_query, *_ = results(case, inputs, form)
        for one, other in zip(clean, (output, logsumexp, grad_query), strict=False):
            assert torch.equal(bits(one[:, :, blind]), bits(other[:, :, blind]))
        with torch.no_grad():
            inputs.key[:, :, changed], inputs.value[:, :, changed] = before


@every_form
@every(MIXED)
def test_unseen_queries_change_no_key_gradient(case, form, device):
    """The gradient of a key comes from the queries that see it and no other."""
    inputs = make_inputs(case, torch.float32, device)
    clean = results(case, inputs, form)
    visible = visible_in(case).to(device)
    for changed in (0, visible.size(0) // 2, visible.size(0) - 1):
        with torch.no_grad():
            before = inputs.query[:, :, changed].clone(), inputs.grad_output[:, :, changed].clone()
            inputs.query[:, :, changed] *= 37.0
            inputs.grad_output[:, :, changed] = 1e30
        blind = ~visible[changed]
        for one, other in zip(clean[3:5], results(case, inputs, form)[3:5], strict=True):
            assert torch.equal(bits(one[:, :, blind]), bits(other[:, :, blind]))
        with torch.no_grad():
            inputs.query[:, :, changed], inputs.grad_output[:, :, changed] = before


def test_nan_that_is_seen_stays_visible(device):
    """Hiding a NaN would be a lie: the queries that see it get NaN, and no others."""
    case = Case("window", queries=40, window=(5, 0), batch=1, heads=1)
    inputs = make_inputs(case, torch.float32, device)
    with torch.no_grad():
        inputs.key[:, :, 20] = torch.nan
    output, logsumexp = torch.ops.wmha.attention_with_lse(*inputs.leaves[:3], **case.options())
    sees = visible_in(case)[:, 20]
    assert torch.equal(output.isnan().all(-1)[0, 0].cpu(), sees)
    assert torch.equal(logsumexp.isnan()[0, 0].cpu(), sees)
    assert torch.equal(output.isnan().any(-1)[0, 0].cpu(), sees)
