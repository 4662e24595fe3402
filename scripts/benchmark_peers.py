"""What wmha is compared with: other ways to the same numbers. Each takes a case and returns a function of query, key
and value, or None where it has no answer. Some have one on CUDA alone, and some raise an error where they can't run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import wmha
from benchmark_cases import Case

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def is_self_attention(case: Case) -> bool:
    return case.queries is None


def ours(case: Case, dtype: torch.dtype, device: str) -> Attention:
    return lambda q, k, v: wmha.attention(q, k, v, window=case.window, dropout_p=case.dropout_p)


def ours_without_dropout(case: Case, dtype: torch.dtype, device: str) -> Attention | None:
    if not case.dropout_p:
        return None
    return lambda q, k, v: wmha.attention(q, k, v, window=case.window)


def flex(case: Case, dtype: torch.dtype, device: str) -> Attention | None:
    """torch.compile of flex_attention; on a CPU it has no backward."""
    if not is_self_attention(case) or case.dropout_p or case.length < 128:
        return None

    def sees(batch, head, query, key):
        return (query >= key) & (query - key <= case.reach)

    mask = create_block_mask(sees, None, None, case.length, case.length, device=device)
    torch._dynamo.reset()  # it stops to compile one function for ever more shapes
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def sdpa(case: Case, dtype: torch.dtype, device: str) -> Attention | None:
    """PyTorch's own attention where it needs no large mask: causal, or few queries on the part of the cache that they
    see.
    """
    if case.dropout_p:
        return None
    if is_self_attention(case):
        if case.left >= 0:
            return None
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    first = max(0, case.length - case.rows - case.reach)
    mask = None if case.rows == 1 else window_mask(case, case.rows, case.length - first, device)
    options = {"attn_mask": mask, "enable_gqa": case.shared_by > 1}
    return lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, first:], v[:, :, first:], **options)


def window_mask(case: Case, queries: int, keys: int, device: str) -> Tensor:
    """Who sees whom of the last queries and keys."""
    back = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (back >= 0) & (back <= case.reach)


LARGEST_MASK = 4096  # positions; longer ones take seconds a call


def sdpa_masked(case: Case, dtype: torch.dtype, device: str) -> Attention | None:
    """PyTorch's own attention with the window as a mask."""
    if not is_self_attention(case) or case.left < 0 or case.dropout_p or case.length > LARGEST_MASK:
        return None
    mask = window_mask(case, case.length, case.length, device)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def chunked(case: Case, dtype: torch.dtype, device: str) -> Attention | None:
    """PyTorch's own attention on chunks as long as the window, each with its own keys and those of the one before."""
    width = case.left
    if not is_self_attention(case) or width < 1 or case.dropout_p or case.length % width != 0:
        return None
    query = torch.arange(width, device=device)[:, None] + width
    key = torch.arange(2 * width, device=device)
    seen = ((key <= query) & (key >= query - width)).repeat(case.length // width, 1, 1)
    seen[0, :, :width] = False  # nothing lies before the first chunk
    bias = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -torch.inf)

    def chunks(x: Tensor) -> Tensor:  # (B, H, N, D) -> (B * H, N / W, W, D)
        return x.reshape(-1, case.length // width, width, case.dim)

    def with_previous(x: Tensor) -> Tensor:
        own = chunks(x)
        return torch.cat((F.pad(own, (0, 0, 0, 0, 1, 0))[:, :-1], own), 2)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(chunks(q), with_previous(k), with_previous(v), attn_mask=bias).view_as(q)

    return attention


def local_attention(case: Case, dtype: torch.dtype, device: str) -> Attention | None:
    """The package local-attention, where it is installed."""
    if not is_self_attention(case) or case.left < 1 or case.dropout_p:
        return None
    if importlib.util.find_spec("local_attention") is None:
        return None
    from local_attention import LocalAttention

    return LocalAttention(case.left, causal=True, exact_windowsize=True, autopad=True, use_rotary_pos_emb=False)


def flash_attention(case: Case, dtype: torch.dtype, device: str) -> Attention | None:
    """The package flash-attn, where it is installed."""
    if device == "cpu" or dtype == torch.float32 or case.dropout_p or importlib.util.find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_func

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # it takes and returns (B, N, H, D)
        by_position = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return flash_attn_func(*by_position, causal=True, window_size=case.window).transpose(1, 2)

    return attention


def on_backend(peer: Callable, backend: SDPBackend) -> Callable:
    """A peer made of PyTorch's own attention, on one of its backends for CUDA."""

    def peer_on_backend(case: Case, dtype: torch.dtype, device: str) -> Attention | None:
        attention = None if device == "cpu" else peer(case, dtype, device)
        if attention is None:
            return None

        def on_this_backend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return attention(q, k, v)

        return on_this_backend

    return peer_on_backend


PEERS = {
    "flex": flex,
    "SDPA": sdpa,
    "SDPA, mask": sdpa_masked,
    "chunked": chunked,
    "local-attention": local_attention,
    "flash-attn": flash_attention,
    "SDPA, flash": on_backend(sdpa, SDPBackend.FLASH_ATTENTION),
    "SDPA, cuDNN": on_backend(sdpa, SDPBackend.CUDNN_ATTENTION),
    "SDPA, efficient": on_backend(sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "SDPA, mask, cuDNN": on_backend(sdpa_masked, SDPBackend.CUDNN_ATTENTION),
    "SDPA, mask, efficient": on_backend(sdpa_masked, SDPBackend.EFFICIENT_ATTENTION),
    "no dropout": ours_without_dropout,
}
FORWARD_ONLY_ON_CPU = {"flex"}
