"""A transformer's layer, and a stack of them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._check import check, check_choice, check_positive, check_probability
from .multihead_attention import KeyValueCache, MultiheadAttention

ACTIVATIONS = ("gelu", "relu", "silu", "geglu", "swiglu")
GATED = ("geglu", "swiglu")


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual connection and a layer norm.

    With norm="before", x + dropout(sublayer(norm(x))) twice; with norm="after", norm(x + dropout(sublayer(x))) twice.

    Args:
        embed_dim, num_heads: as of MultiheadAttention.
        dim_feedforward: width of the feed-forward network. Default: 4 * embed_dim.
        activation: "gelu" (the default), "relu", "silu"; or gated, act(a) * b with twice the rows in `linear1`, first
            those of a: "geglu", "swiglu".
        norm: "before" (the default) or "after" each sublayer.
        layer_norm_eps: epsilon of the layer norms. Default: 1e-5.
        dropout: on each sublayer's output, in training mode only. Default: 0.0.
        attention_dropout: on the attention weights, in training mode only. Default: 0.0.
        bias: the projections of attention and feed-forward network have biases. Default: True.
        device, dtype: of the parameters.
        attention: further options of MultiheadAttention, such as window=(256, 0) or num_kv_heads=2.

    The submodules are `self_attn`, `linear1`, `linear2`, `norm1` and `norm2`, as in torch.nn.TransformerEncoderLayer;
    the parameters start as theirs do.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        dim_feedforward: int | None = None,
        activation: str = "gelu",
        norm: str = "before",
        layer_norm_eps: float = 1e-5,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        for name in ("kdim", "vdim"):
            size = attention.get(name)
            check(size in (None, embed_dim), f"{name} must be embed_dim, {embed_dim}, for self-attention, got {size}")
        width = 4 * embed_dim if dim_feedforward is None else dim_feedforward
        check_positive("dim_feedforward", width)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("norm", norm, ("before", "after"))
        check(layer_norm_eps >= 0, f"layer_norm_eps must be 0 or positive, got {layer_norm_eps}")
        check_probability("dropout", dropout)
        check_probability("attention_dropout", attention_dropout)

        made = {"device": device, "dtype": dtype}
        self.activation, self.norm = activation, norm
        self.self_attn = MultiheadAttention(
            embed_dim, num_heads, bias=bias, dropout=attention_dropout, **made, **attention
        )
        self.linear1 = nn.Linear(embed_dim, width * (2 if activation in GATED else 1), bias, **made)
        self.linear2 = nn.Linear(width, embed_dim, bias, **made)
        self.norm1 = nn.LayerNorm(embed_dim, layer_norm_eps, **made)
        self.norm2 = nn.LayerNorm(embed_dim, layer_norm_eps, **made)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Draws new initial parameters."""
        self.self_attn.reset_parameters()
        self.linear1.reset_parameters()
        self.linear2.reset_parameters()
        self.norm1.reset_parameters()
        self.norm2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, embed_dim) -> (B, N, embed_dim)"""
        return self._after_attention(x, self.self_attn(self._attention_input(x)))

    @torch.jit.export
    def decode(self, x: Tensor, cache: KeyValueCache | None = None) -> tuple[Tensor, KeyValueCache]:
        """`forward` for the next positions of a sequence: see MultiheadAttention.decode."""
        attended, kept = self.self_attn.decode(self._attention_input(x), cache)
        return self._after_attention(x, attended), kept

    def _attention_input(self, x: Tensor) -> Tensor:
        return self.norm1(x) if self.norm == "before" else x

    def _after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(attended)
        if self.norm == "before":
            return x + self.dropout(self._feed_forward(self.norm2(x)))
        x = self.norm1(x)
        return self.norm2(x + self.dropout(self._feed_forward(x)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        hidden = self.linear1(x)
        if self.activation == "relu":
            hidden = F.relu(hidden)
        elif self.activation == "gelu":
            hidden = F.gelu(hidden)
        elif self.activation == "silu":
            hidden = F.silu(hidden)
        else:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = hidden * (F.gelu(gate) if self.activation == "geglu" else F.silu(gate))
        return self.linear2(hidden)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, norm={self.norm}"


class TransformerStack(nn.Module):
    """Layers one after the other, each with its own window if wanted.

    Args:
        num_layers: how many.
        embed_dim, num_heads: as of MultiheadAttention.
        windows: one (left, right) for each layer, in place of the option `window`. Default: the same for all.
        final_norm: a layer norm, `norm`, after the last layer. Default: False.
        layer: further options of TransformerLayer.

    The submodules are `layers.0`, `layers.1`, ..., `norm`, as in torch.nn.TransformerEncoder.
    """

    def __init__(
        self,
        num_layers: int,
        embed_dim: int,
        num_heads: int,
        *,
        windows: Sequence[tuple[int, int]] | None = None,
        final_norm: bool = False,
        **layer: Any,
    ) -> None:
        super().__init__()
        check_positive("num_layers", num_layers)
        options = [layer] * num_layers
        if windows is not None:
            given = tuple(layer.get("window", (-1, -1)))
            check(given == (-1, -1), f"window must be (-1, -1) where windows are given, got {given}")
            check(
                len(windows) == num_layers,
                f"windows must be one for each of the {num_layers} layers, got {len(windows)}",
            )
            options = [layer | {"window": window} for window in windows]
        self.layers = nn.ModuleList(TransformerLayer(embed_dim, num_heads, **one) for one in options)
        made = {name: layer.get(name) for name in ("device", "dtype")}
        self.norm = nn.LayerNorm(embed_dim, self.layers[0].norm1.eps, **made) if final_norm else None

    def reset_parameters(self) -> None:
        """Draws new initial parameters."""
        for layer in self.layers:
            layer.reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, embed_dim) -> (B, N, embed_dim)"""
        for layer in self.layers:
            x = layer(x)
        return x if self.norm is None else self.norm(x)

    @torch.jit.export
    def decode(self, x: Tensor, caches: list[KeyValueCache] | None = None) -> tuple[Tensor, list[KeyValueCache]]:
        """`forward` for the next positions of a sequence, a cache for each layer: see MultiheadAttention.decode."""
        if caches is not None and len(caches) != len(self.layers):
            raise RuntimeError(f"wmha: caches must be one for each of the {len(self.layers)} layers, got {len(caches)}")
        kept: list[KeyValueCache] = []
        for i, layer in enumerate(self.layers):
            x, cache = layer.decode(x, None if caches is None else caches[i])
            kept.append(cache)
        return x if self.norm is None else self.norm(x), kept
