"""The exact result of a case, in fp64, without any of the operators that are measured."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import wmha  # noqa: F401  (registers torch.ops.wmha)
from benchmark_cases import Case

BLOCK = 256  # queries at a time
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}  # of the largest number


def exact(case: Case, inputs: tuple[Tensor, ...], backward: bool, rng_state: Tensor | None = None) -> list[Tensor]:
    """The output and, if backward, the gradients of query, key and value. rng_state: of the dropout."""
    query, key, value, grad_output = (tensor.double() for tensor in inputs)
    results = [
        torch.zeros_like(tensor) for tensor in ((grad_output, query, key, value) if backward else (grad_output,))
    ]
    first = case.length - case.rows
    for begin in range(0, case.rows, BLOCK):
        end = min(begin + BLOCK, case.rows)
        rows, keys = slice(begin, end), slice(max(0, first + begin - case.reach), first + end)
        position = torch.arange(first + begin, first + end, device=query.device)[:, None]
        distance = position - torch.arange(keys.start, keys.stop, device=query.device)
        leaves = [query[:, :, rows], key[:, :, keys], value[:, :, keys]]
        leaves = [leaf.detach().requires_grad_(backward) for leaf in leaves]
        key_of_each, value_of_each = (leaf.repeat_interleave(case.shared_by, 1) for leaf in leaves[1:])
        scores = leaves[0] @ key_of_each.mT / math.sqrt(case.dim)
        weights = scores.masked_fill((distance < 0) | (distance > case.reach), -torch.inf).softmax(-1)
        if rng_state is not None:
            keep = torch.ops.wmha._dropout_mask(
                rng_state, batch=case.batch, heads=case.heads, queries=end - begin, keys=keys.stop - keys.start,
                dropout_p=case.dropout_p, first_query=begin, first_key=keys.start,
            )  # fmt: skip
            weights = weights * keep / (1 - round(case.dropout_p * 65536) / 65536)
        output = weights @ value_of_each
        results[0][:, :, rows] = output.detach()
        if backward:
            gradients = torch.autograd.grad(output, leaves, grad_output[:, :, rows])
            for result, part, gradient in zip(results[1:], (rows, keys, keys), gradients, strict=True):
                result[:, :, part] += gradient
    return results


def largest_error(results: list[Tensor], expected: list[Tensor]) -> float:
    """Of all results, relative to the largest number of each."""
    pairs = zip(results, expected, strict=True)
    return max(((result.double() - exact).abs().max() / exact.abs().max()).item() for result, exact in pairs)
