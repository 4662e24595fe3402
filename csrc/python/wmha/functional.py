"""The operators as typed functions.

Shapes: B batch, Hq query heads, Hkv key and value heads (Hkv divides Hq; query head h reads key head h // (Hq // Hkv)),
Nq queries, Nk keys, Dk key and Dv value dimension. Dtypes: float64, float32, bfloat16, float16, the same for query, key
and value. Any strides are accepted; only a last dimension that isn't contiguous is copied.

Query i sits at key position p(i) = i + query_offset and sees key j iff p(i) - left <= j <= p(i) + right:

    z_ij  = softcap(scale * <q_i, k_j>) / temperature_h      softcap(x) = c * tanh(x / c), off when c == 0
    lse_i = log sum_{j seen} exp(z_ij)
    P_ij  = exp(z_ij - lse_i)
    out_i = sum_j keep_ij / (1 - p) * P_ij * v_j             keep ~ Bernoulli(1 - p)

A query that sees no key gives output 0, logsumexp -inf and zero gradients. Wrong arguments raise RuntimeError with the
name of the argument, what was expected and what came.

Options of all functions:
    window: (left, right), how many keys before and after its own position a query sees; -1: all on that side.
        (256, 0) is causal with 256 keys of context, (-1, 0) causal, (-1, -1) (the default) unbounded.
    scale: factor on <q, k>, finite; may be 0 or negative. Default: 1 / sqrt(Dk).
    temperature: divides the scores; a positive number (default 1.0), or a tensor of shape (), (1,) or (Hq,) that may be
        learned.
    softcap: scores are squashed into (-softcap, softcap); 0.0 (the default): off.
    query_offset: key position of query 0. Default: Nk - Nq, the last query on the last key.
"""

from __future__ import annotations

import torch
from torch import Tensor

_UNBOUNDED = -1


def _operator(packet):
    """The operator, its overload chosen here: PyTorch tries one after the other, which takes longer than a small call.
    An option that is off isn't passed on, since reading it takes PyTorch as long as ten lines of Python.
    TorchScript chooses by the static type of the temperature, so each function below calls its operator in two places.
    """

    def call(
        *tensors: Tensor,
        window_left: int,
        window_right: int,
        scale: float | None,
        temperature: float | Tensor,
        softcap: float,
        query_offset: int | None,
        dropout_p: float = 0.0,
        generator: torch.Generator | None = None,
        **options,
    ) -> Tensor | tuple[Tensor, ...]:
        if window_left is not _UNBOUNDED:  # by identity: comparing a symbolic number would be a guard
            options["window_left"] = window_left
        if window_right is not _UNBOUNDED:
            options["window_right"] = window_right
        if scale is not None:
            options["scale"] = scale
        if not isinstance(softcap, float) or softcap != 0.0:  # a tensor is for the operator to refuse
            options["softcap"] = softcap
        if not isinstance(dropout_p, float) or dropout_p != 0.0:
            options["dropout_p"] = dropout_p
        if query_offset is not None:
            options["query_offset"] = query_offset
        if generator is not None:
            options["generator"] = generator
        if isinstance(temperature, Tensor):
            return packet.temperature_tensor(*tensors, temperature=temperature, **options)
        if temperature != 1.0:
            options["temperature"] = temperature
        return packet.default(*tensors, **options)

    torch.jit._builtins._register_builtin(call, packet._qualified_op_name)  # what TorchScript sees in its place
    return call


_attention = _operator(torch.ops.wmha.attention)
_attention_with_lse = _operator(torch.ops.wmha.attention_with_lse)
_attention_weights = _operator(torch.ops.wmha.attention_weights)
_multi_head_attention = _operator(torch.ops.wmha.multi_head_attention)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    query_offset: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Windowed attention.

    Args:
        query: (B, Hq, Nq, Dk)
        key: (B, Hkv, Nk, Dk)
        value: (B, Hkv, Nk, Dv)
        dropout_p: probability in [0, 1] with which an attention weight is dropped. Default: 0.0.
        generator: where the dropout seed is drawn from. Default: the device's default generator.
        window, scale, temperature, softcap, query_offset: see the module.

    Returns:
        (B, Hq, Nq, Dv); in memory as (B, Nq, Hq, Dv) where the query lies so, else contiguous.
    """
    if isinstance(temperature, Tensor):
        return _attention(
            query,
            key,
            value,
            window_left=window[0],
            window_right=window[1],
            scale=scale,
            temperature=temperature,
            softcap=softcap,
            dropout_p=dropout_p,
            query_offset=query_offset,
            generator=generator,
        )
    return _attention(
        query,
        key,
        value,
        window_left=window[0],
        window_right=window[1],
        scale=scale,
        temperature=temperature,
        softcap=softcap,
        dropout_p=dropout_p,
        query_offset=query_offset,
        generator=generator,
    )


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    query_offset: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention`, and logsumexp (B, Hq, Nq) in float32 (float64 for float64 inputs), both differentiable."""
    if isinstance(temperature, Tensor):
        return _attention_with_lse(
            query,
            key,
            value,
            window_left=window[0],
            window_right=window[1],
            scale=scale,
            temperature=temperature,
            softcap=softcap,
            dropout_p=dropout_p,
            query_offset=query_offset,
            generator=generator,
        )
    return _attention_with_lse(
        query,
        key,
        value,
        window_left=window[0],
        window_right=window[1],
        scale=scale,
        temperature=temperature,
        softcap=softcap,
        dropout_p=dropout_p,
        query_offset=query_offset,
        generator=generator,
    )


def attention_weights(
    query: Tensor,
    key: Tensor,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    query_offset: int | None = None,
) -> Tensor:
    """The matrix P of `attention`, (B, Hq, Nq, Nk). It takes memory for all of it: meant for looking at."""
    if isinstance(temperature, Tensor):
        return _attention_weights(
            query,
            key,
            window_left=window[0],
            window_right=window[1],
            scale=scale,
            temperature=temperature,
            softcap=softcap,
            query_offset=query_offset,
        )
    return _attention_weights(
        query,
        key,
        window_left=window[0],
        window_right=window[1],
        scale=scale,
        temperature=temperature,
        softcap=softcap,
        query_offset=query_offset,
    )


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    out_weight: Tensor,
    num_heads: int,
    num_kv_heads: int | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    query_offset: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projections, `attention` and output projection.

    Args:
        query: (B, Nq, E)
        key: (B, Nk, Ek)
        value: (B, Nk, Ev)
        q_weight, k_weight, v_weight: (Hq * Dk, E), (Hkv * Dk, Ek), (Hkv * Dv, Ev), as in `torch.nn.Linear`
        out_weight: (Eo, Hq * Dv)
        num_heads: Hq
        num_kv_heads: Hkv. Default: Hq.
        q_bias, k_bias, v_bias, out_bias: vectors as long as their weight has rows. Default: none.
        window, scale, temperature, softcap, dropout_p, query_offset, generator: as in `attention`.

    Returns:
        (B, Nq, Eo)
    """
    if isinstance(temperature, Tensor):
        return _multi_head_attention(
            query,
            key,
            value,
            q_weight,
            k_weight,
            v_weight,
            q_bias,
            k_bias,
            v_bias,
            out_weight,
            out_bias,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            window_left=window[0],
            window_right=window[1],
            scale=scale,
            temperature=temperature,
            softcap=softcap,
            dropout_p=dropout_p,
            query_offset=query_offset,
            generator=generator,
        )
    return _multi_head_attention(
        query,
        key,
        value,
        q_weight,
        k_weight,
        v_weight,
        q_bias,
        k_bias,
        v_bias,
        out_weight,
        out_bias,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        window_left=window[0],
        window_right=window[1],
        scale=scale,
        temperature=temperature,
        softcap=softcap,
        dropout_p=dropout_p,
        query_offset=query_offset,
        generator=generator,
    )
