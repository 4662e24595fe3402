"""The reference against the formulas in plain Python, and the check against results that are a little wrong."""

import dataclasses
import itertools
import math

import pytest
import torch

from cases import DTYPES, INT64_MAX, INT64_MIN, Case, make_inputs
from reference import attention, expected, repeat_heads, visible_in, visible_keys

SMALL = [
    Case("plain", queries=4),
    Case("groups", heads=4, kv_heads=2, queries=5, keys=3, window=(1, 1), temperature="(Hq,)"),
    Case("no_keys_for_some", queries=7, keys=3, window=(1, 0), softcap=0.7, temperature=0.3),
    Case("shifted", queries=3, shift=-120.0, scale=-0.5, query_offset=1, window=(-1, 0)),
]


def by_hand(case: Case, inputs, keep) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logsumexp in Python's floats, one pair at a time."""
    query, key, value = (leaf.tolist() for leaf in inputs.leaves[:3])
    batch, heads, queries, _ = case.query_shape
    _, kv_heads, keys, value_dim = case.value_shape
    offset = keys - queries if case.query_offset is None else case.query_offset
    output = torch.zeros(batch, heads, queries, value_dim, dtype=torch.float64)
    logsumexp = torch.full((batch, heads, queries), -math.inf, dtype=torch.float64)
    for b, h, i in itertools.product(range(batch), range(heads), range(queries)):
        kv = h // (heads // kv_heads)
        exponentials = {}
        for j in range(keys):
            distance = j - (i + offset)
            if (case.window[0] >= 0 and distance < -case.window[0]) or (
                case.window[1] >= 0 and distance > case.window[1]
            ):
                continue
            product = sum(x * y for x, y in zip(query[b][h][i], key[b][kv][j], strict=True)) * case.actual_scale
            if case.softcap:
                product = case.softcap * math.tanh(product / case.softcap)
            temperature = inputs.temperature[h].item() if inputs.temperature is not None else case.temperature
            exponentials[j] = math.exp(product / temperature)
        total = sum(exponentials.values())
        if not exponentials:
            continue
        logsumexp[b, h, i] = math.log(total)
        for j, exponential in exponentials.items():
            for d in range(value_dim):
                output[b, h, i, d] += keep[b, h, i, j] * exponential / total * value[b][kv][j][d]
    return output, logsumexp


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_reference_is_the_formula(case):
    inputs = make_inputs(case, torch.float64)
    keep = torch.rand(*case.query_shape[:3], case.key_shape[2], dtype=torch.float64)
    temperature = case.temperature if inputs.temperature is None else inputs.temperature
    leaves = (inputs.query, *(repeat_heads(leaf, case.heads) for leaf in (inputs.key, inputs.value)))
    options = {"scale": case.actual_scale, "temperature": temperature, "softcap": case.softcap, "keep": keep}
    steps = attention(*leaves, visible_in(case), **options)
    output, logsumexp = by_hand(case, inputs, keep)
    torch.testing.assert_close(steps.output, output, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(steps.logsumexp, logsumexp, atol=1e-12, rtol=1e-12)


def test_visible_keys():
    def seen(*arguments) -> list[list[int]]:
        return [row.nonzero().flatten().tolist() for row in visible_keys(*arguments)]

    assert seen(3, 3, (-1, -1), None) == [[0, 1, 2]] * 3
    assert seen(3, 3, (-1, 0), None) == [[0], [0, 1], [0, 1, 2]]
    assert seen(2, 4, (1, 0), None) == [[1, 2], [2, 3]]
    assert seen(4, 2, (0, 1), None) == [[], [0], [0, 1], [1]]
    assert seen(3, 3, (1, -1), None) == [[0, 1, 2], [0, 1, 2], [1, 2]]
    assert seen(2, 3, (0, 0), 2) == [[2], []]
    # Sums saturate: every position is INT64_MAX, and INT64_MAX keys before it is key 0.
    assert seen(2, 3, (INT64_MAX, 0), INT64_MAX) == [[0, 1, 2]] * 2
    assert seen(2, 3, (INT64_MAX - 2, 0), INT64_MAX) == [[2]] * 2
    assert seen(2, 3, (0, INT64_MAX), INT64_MIN) == [[], [0]]
    assert seen(0, 3, (0, 0), None) == []


MISTAKES = {
    "window": lambda case: dataclasses.replace(case, window=(case.window[0] + 1, case.window[1])),
    "right": lambda case: dataclasses.replace(case, window=(case.window[0], case.window[1] - 1)),
    "offset": lambda case: dataclasses.replace(case, query_offset=1),
    "scale": lambda case: dataclasses.replace(case, scale=case.actual_scale * 1.25),
    "softcap": lambda case: dataclasses.replace(case, softcap=case.softcap * 1.25),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_finds_mistakes(mistake, dtype):
    """A case that is off by one key, or by a quarter, is outside the tolerance of every dtype, in every result."""
    case = Case("right", window=(5, 3), softcap=2.0, temperature="(Hq,)")
    inputs = make_inputs(case, dtype)
    right, wrong = expected(case, inputs), expected(MISTAKES[mistake](case), inputs)
    for name, bounded in right.items():
        bounded.check(name, bounded.exact)
        with pytest.raises(AssertionError, match="times what rounding explains"):
            bounded.check(name, wrong[name].exact)


def test_check_finds_nan_and_lost_infinity():
    case = Case("rows_without_keys", queries=7, keys=3, window=(1, 0))
    bounds = expected(case, make_inputs(case, torch.float32))
    for name, bounded in bounds.items():
        for broken in (torch.nan, torch.inf):
            with pytest.raises(AssertionError, match=name):
                bounded.check(name, torch.full_like(bounded.exact, broken))
    with pytest.raises(AssertionError, match="infinite in other places"):
        bounds["logsumexp"].check("logsumexp", bounds["logsumexp"].exact.clamp_min(-1e30))
