"""The contract in plain fp64 tensors, and how far from it the operators may be."""

from __future__ import annotations

import dataclasses
import functools

import torch

from cases import INT64_MAX, INT64_MIN, Case, Inputs, acc_dtype


def saturate(number: int) -> int:
    return max(INT64_MIN, min(number, INT64_MAX))


@functools.cache
def visible_keys(queries: int, keys: int, window: tuple[int, int], query_offset: int | None) -> torch.Tensor:
    """(queries, keys): does the query see the key? By Python's unbounded integers, pair by pair."""
    left, right = window
    offset = keys - queries if query_offset is None else query_offset

    def sees(i: int, j: int) -> bool:
        position = saturate(i + offset)
        after_first = left == -1 or saturate(position - left) <= j
        before_last = right == -1 or j <= saturate(position + right)
        return after_first and before_last

    rows = [[sees(i, j) for j in range(keys)] for i in range(queries)]
    return torch.tensor(rows, dtype=torch.bool).reshape(queries, keys)


def visible_in(case: Case) -> torch.Tensor:
    return visible_keys(case.query_shape[2], case.key_shape[2], case.window, case.query_offset)


@dataclasses.dataclass
class Steps:
    """The results and what they are made of; all of it differentiable."""

    scores: torch.Tensor  # z of all pairs, visible or not
    capped: torch.Tensor | None  # tanh(x / c)
    weights: torch.Tensor  # P
    logsumexp: torch.Tensor
    output: torch.Tensor


def attention(
    query: torch.Tensor,  # (B, Hq, Nq, Dk)
    key: torch.Tensor,  # (B, Hq, Nk, Dk): heads repeated already
    value: torch.Tensor,  # (B, Hq, Nk, Dv)
    visible: torch.Tensor,  # (Nq, Nk)
    *,
    scale: float,
    temperature: float | torch.Tensor = 1.0,
    softcap: float = 0.0,
    keep: torch.Tensor | float = 1.0,  # 0, or the inverse of the keep rate: (B, Hq, Nq, Nk)
) -> Steps:
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.reshape(-1, 1, 1)
    products = scale * (query @ key.mT)
    capped = torch.tanh(products / softcap) if softcap else None
    scores = (products if capped is None else softcap * capped) / temperature
    sees_any = visible.any(-1)
    # A row that sees no key would make NaN out of -inf - -inf. It gets zeros to chew on, and is overwritten below.
    masked = scores.masked_fill(~visible, -torch.inf).masked_fill(~sees_any[:, None], 0.0)
    weights = masked.softmax(-1) * sees_any[:, None]
    logsumexp = masked.logsumexp(-1).masked_fill(~sees_any, -torch.inf)
    return Steps(scores, capped, weights, logsumexp, (keep * weights) @ value)


def repeat_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.repeat_interleave(heads // tensor.size(1) if tensor.size(1) else 1, 1)


def quantised(dropout_p: float) -> tuple[int, float]:
    """An element is dropped iff its 16-bit number is below the first; survivors are scaled by the second."""
    threshold = int(dropout_p * 65536 + 0.5)
    return threshold, 65536 / (65536 - threshold) if threshold < 65536 else 0.0


@dataclasses.dataclass
class Bounded:
    """An exact result and how far from it a computed one may be, element by element."""

    exact: torch.Tensor
    slack: torch.Tensor

    def check(self, name: str, computed: torch.Tensor) -> float:
        """Raises unless computed is near enough; returns how much of the slack was used."""
        assert computed.shape == self.exact.shape, f"{name}: shape {computed.shape}, expected {self.exact.shape}"
        computed = computed.detach().to("cpu", torch.float64)
        infinite = self.exact.isinf()
        assert torch.equal(computed[infinite], self.exact[infinite]), f"{name}: infinite in other places"
        error = (computed - self.exact)[~infinite].abs()
        used = (error / self.slack[~infinite]).nan_to_num(nan=torch.inf)
        worst = used.max().item() if used.numel() else 0.0
        assert worst <= 1, f"{name}: error {error.max().item():.3g} is {worst:.3g} times what rounding explains"
        return worst


# The tolerance is derived, not tuned: each result is a sum of products, and its slack the same sum over absolute
# values, times the relative error of what is summed.
#   - Arithmetic is in fp32 (fp64 for fp64). A weight exp(z - lse) has the relative error of exp, 20 ulp at most in
#     fp32, plus the absolute errors of z and lse, which are relative to the largest score: ROUNDINGS * (1 + |z|). The
#     rest is for the sums. Over the table, fp32 and fp64 use a sixth of it where terms don't cancel.
#   - Kernels may round weights and gradients of scores to bf16, and on CUDA to fp16, before they are multiplied by
#     tensors of that dtype: half an epsilon each, or half of the smallest number.
#   - Results are rounded to their own dtype once: half an epsilon. Backward reads the output that forward rounded.
ROUNDINGS = 24
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
# Underflow: a weight below 1e-38 (fp32) may be 0, whatever it is multiplied by; fp16 has nothing below 2^-24.
FLOOR = {torch.float64: 1e-290, torch.float32: 1e-33, torch.bfloat16: 1e-33, torch.float16: 2.0**-24}


def root_of_squares(errors: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    """Bounds a sum of independent errors, each within its own bound (so at least three standard deviations wide)."""
    return 2 * errors.square().sum(dim, keepdim=True).sqrt()


def expected(case: Case, inputs: Inputs, mask: torch.Tensor | None = None) -> dict[str, Bounded]:
    """Results and gradients of a case; mask is the dropout mask, True where kept."""
    dtype = inputs.query.dtype
    exact = [tensor.detach().to("cpu", torch.float64).requires_grad_() for tensor in inputs.leaves]
    query, key, value = exact[:3]
    temperature = exact[3] if len(exact) > 3 else case.temperature
    heads = query.size(1)
    keys, values = repeat_heads(key, heads), repeat_heads(value, heads)
    grad_output = inputs.grad_output.to("cpu", torch.float64)
    grad_logsumexp = inputs.grad_logsumexp.to("cpu", torch.float64)
    visible = visible_in(case)
    keep = 1.0 if mask is None else mask.to("cpu", torch.float64) * quantised(case.dropout_p)[1]
    steps = attention(
        query, keys, values, visible, scale=case.actual_scale, temperature=temperature, softcap=case.softcap, keep=keep
    )
    # -inf of a row without keys is a constant; its gradient must not turn 0 into NaN.
    finite = steps.logsumexp.masked_fill(steps.logsumexp.isinf(), 0.0)
    total = (steps.output * grad_output).sum() + (finite * grad_logsumexp).sum()
    gradients = torch.autograd.grad(total, exact)

    with torch.no_grad():
        divisor = temperature.reshape(-1, 1, 1) if isinstance(temperature, torch.Tensor) else temperature
        rounding = ROUNDINGS * EPSILON[acc_dtype(dtype)]
        size = abs(case.actual_scale) * (query.abs() @ keys.mT.abs()) / divisor
        sizes = size.masked_fill(~visible, 0.0)
        relative = rounding * (1 + (sizes.amax(-1, keepdim=True) if sizes.size(-1) else sizes.sum(-1, keepdim=True)))
        weights = steps.weights
        grad_weights = keep * (grad_output.abs() @ values.mT.abs())
        delta = (weights * grad_weights).sum(-1, keepdim=True) + grad_logsumexp.abs().unsqueeze(-1)
        rounded_delta = EPSILON[dtype] * root_of_squares(grad_output * steps.output, -1)
        grad_scores = weights * (grad_weights + delta)
        grad_scores_slack = relative * grad_scores + weights * rounded_delta
        through_cap, through_cap_slack = 1.0, 0.0
        if steps.capped is not None:
            through_cap = 1 - steps.capped**2
            through_cap_slack = rounding * (1 + through_cap * size * divisor / case.softcap)
        factor = abs(case.actual_scale) / divisor
        products_slack = factor * (grad_scores_slack * through_cap + grad_scores * through_cap_slack)

        def rounded_products(left: torch.Tensor, right: torch.Tensor, unit: float | torch.Tensor = 1.0) -> torch.Tensor:
            """How far left @ right may be off if left is rounded, in multiples of unit."""
            if dtype != torch.bfloat16 and not (dtype == torch.float16 and inputs.query.is_cuda):
                return torch.zeros(())
            rounded = EPSILON[dtype] / 2 * left.abs() + FLOOR[dtype] / 2 * unit * (left != 0)
            return rounded @ right.abs()

        grad_products = factor * grad_scores * through_cap  # rounded before or after they are multiplied by the factor
        unit = torch.as_tensor(factor).clamp(min=1)

        def fold(tensor: torch.Tensor) -> torch.Tensor:  # sums over the query heads that share a key head
            kv_heads = key.size(1)
            return tensor.unflatten(1, (kv_heads, -1 if kv_heads * heads else 0)).sum(2) if kv_heads else tensor

        slacks = {
            "weights": relative * weights,
            "output": relative * ((keep * weights) @ values.abs()) + rounded_products(keep * weights, values),
            "logsumexp": relative.squeeze(-1),
            "grad_query": products_slack @ keys.abs() + rounded_products(grad_products, keys, unit),
            "grad_key": fold(products_slack.mT @ query.abs() + rounded_products(grad_products.mT, query, unit)),
            "grad_value": fold(
                (relative * keep * weights).mT @ grad_output.abs() + rounded_products((keep * weights).mT, grad_output)
            ),
        }
        if isinstance(temperature, torch.Tensor):
            shares = ((grad_scores_slack * steps.scores.abs() + grad_scores * relative) / divisor).sum(-1)
            shares = root_of_squares(shares, (0, 2) if temperature.numel() > 1 else (0, 1, 2))
            slacks["grad_temperature"] = shares.reshape(temperature.shape)

    results = (steps.weights, steps.output, steps.logsumexp, *gradients)
    dtypes = {"logsumexp": acc_dtype(dtype), "grad_temperature": acc_dtype(dtype)}
    bounded = {}
    for (name, slack), result in zip(slacks.items(), results, strict=True):
        own = dtypes.get(name, dtype)
        bounded[name] = Bounded(result.detach(), slack + EPSILON[own] * result.detach().abs() + FLOOR[own])
    return bounded
