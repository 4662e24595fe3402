"""Multi-head attention as a module."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import attention, multi_head_attention
from ._check import check, check_choice, check_positive, check_probability

MAX_HEADS = 128


class KeyValueCache(NamedTuple):
    """What `decode` remembers of the positions before: no more of them than the window reaches back."""

    key: Tensor
    """(B, Hkv, n, Dk), the last n positions; n <= window_left, or all positions without a bound."""
    value: Tensor
    """(B, Hkv, n, Dv)"""
    length: Tensor
    """int64 of shape (), on the device of key: how many positions have been seen, which is the next one's number."""


class MultiheadAttention(nn.Module):
    """Projections, windowed attention and output projection: `wmha.multi_head_attention` with its weights.

    Args:
        embed_dim: E, features of query and output.
        num_heads: Hq, 1 to 128.
        num_kv_heads: Hkv, a divisor of num_heads; each key and value head serves num_heads / num_kv_heads query heads.
            Default: num_heads.
        head_dim: Dk, dimension of a query and key head. Default: embed_dim / num_heads.
        value_dim: Dv, dimension of a value head. Default: head_dim.
        kdim, vdim: features of the inputs `key` and `value`. Default: embed_dim.
        bias: the four projections have biases. Default: True.
        window: (left, right), how many positions before and after its own a query sees; -1: all on that side.
            Default: (-1, -1).
        causal: no position after the query's own; the same as 0 for the window's right side, which may be -1 or 0 then.
            Default: False.
        scale: factor on <q, k>. Default: 1 / sqrt(Dk).
        temperature: divides the scores; positive. Where it is learned, it starts with this. Default: 1.0.
        learned_temperature: "none" (the default), "shared" (one for all heads) or "per_head". A learned temperature is
            exp(log_temperature), which stays positive; log_temperature has shape (1,) or (num_heads,).
        softcap: scores are squashed into (-softcap, softcap); 0.0 (the default): off.
        dropout: probability with which an attention weight is dropped, in training mode only. Default: 0.0.
        device, dtype: of the parameters.

    Parameters are `q_proj`, `k_proj`, `v_proj`, `out_proj` (`weight`, `bias`, laid out as torch.nn.Linear's) and
    `log_temperature`. They start as torch.nn.MultiheadAttention's with separate projections do: q, k and v
    xavier_uniform, the output projection as torch.nn.Linear's, biases 0.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        window: tuple[int, int] = (-1, -1),
        causal: bool = False,
        scale: float | None = None,
        temperature: float = 1.0,
        learned_temperature: str = "none",
        softcap: float = 0.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("embed_dim", embed_dim)
        check(1 <= num_heads <= MAX_HEADS, f"num_heads must be between 1 and {MAX_HEADS}, got {num_heads}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive("num_kv_heads", num_kv_heads)
        check(num_heads % num_kv_heads == 0, f"num_kv_heads must divide num_heads, {num_heads}, got {num_kv_heads}")
        if head_dim is None:
            multiple = embed_dim % num_heads == 0
            check(
                multiple, f"embed_dim must be a multiple of num_heads, {num_heads}, without head_dim, got {embed_dim}"
            )
            head_dim = embed_dim // num_heads
        value_dim = head_dim if value_dim is None else value_dim
        kdim = embed_dim if kdim is None else kdim
        vdim = embed_dim if vdim is None else vdim
        for name, size in (("head_dim", head_dim), ("value_dim", value_dim), ("kdim", kdim), ("vdim", vdim)):
            check_positive(name, size)
        left, right = window
        for name, side in (("window_left", left), ("window_right", right)):
            check(side >= -1, f"{name} must be -1 (no bound), 0 or positive, got {side}")
        check(not causal or right <= 0, f"window_right must be -1 or 0 where causal is set, got {right}")
        check(scale is None or math.isfinite(scale), f"scale must be finite, got {scale}")
        finite = math.isfinite(temperature) and temperature > 0
        check(finite, f"temperature must be positive and finite, got {temperature}")
        check_choice("learned_temperature", learned_temperature, ("none", "shared", "per_head"))
        off_or_positive = math.isfinite(softcap) and softcap >= 0
        check(off_or_positive, f"softcap must be 0 (off) or positive, and finite, got {softcap}")
        check_probability("dropout", dropout)

        self.embed_dim, self.kdim, self.vdim = embed_dim, kdim, vdim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.value_dim = head_dim, value_dim
        self.window = (left, 0 if causal else right)
        self.scale, self.softcap, self.dropout = scale, float(softcap), float(dropout)
        self.temperature, self.learned_temperature = float(temperature), learned_temperature

        made = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias, **made)
        self.k_proj = nn.Linear(kdim, num_kv_heads * head_dim, bias, **made)
        self.v_proj = nn.Linear(vdim, num_kv_heads * value_dim, bias, **made)
        self.out_proj = nn.Linear(num_heads * value_dim, embed_dim, bias, **made)
        learned = {"none": 0, "shared": 1, "per_head": num_heads}[learned_temperature]
        self.log_temperature = nn.Parameter(torch.empty(learned, **made)) if learned else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new initial parameters."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight)
        self.out_proj.reset_parameters()
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(self.temperature))

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        """Self-attention of `query`, or attention of `query` to `key` and `value`.

        The last query sits on the last key: where there are fewer queries than keys, theirs are the last positions.

        Args:
            query: (B, Nq, embed_dim)
            key: (B, Nk, kdim). Default: query.
            value: (B, Nk, vdim). Default: key.

        Returns:
            (B, Nq, embed_dim)
        """
        if key is None:
            if value is not None:
                raise RuntimeError("wmha: value must come with key, got value alone")
            key = query
        if value is None:
            value = key
        return multi_head_attention(
            query,
            key,
            value,
            self.q_proj.weight,
            self.k_proj.weight,
            self.v_proj.weight,
            self.out_proj.weight,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            q_bias=self.q_proj.bias,
            k_bias=self.k_proj.bias,
            v_bias=self.v_proj.bias,
            out_bias=self.out_proj.bias,
            window=self.window,
            scale=self.scale,
            temperature=self._current_temperature(),
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
        )

    @torch.jit.export
    def decode(self, x: Tensor, cache: KeyValueCache | None = None) -> tuple[Tensor, KeyValueCache]:
        """Self-attention of the next positions of a sequence, of which the cache holds what they see of those before.

        Called with the parts of a sequence, one after the other, it gives the parts of what `forward` gives for the
        whole. It needs a causal window. With window_left = -1 the cache grows by every position, else it holds the
        last window_left.

        Args:
            x: (B, N, embed_dim), one or more positions.
            cache: what the call before returned; None (the default) where a sequence begins. It isn't changed, so that
                a sequence can go on from it in more than one way.

        Returns:
            output (B, N, embed_dim), and the cache for the next call.
        """
        left, right = self.window
        if right != 0:
            raise RuntimeError(f"wmha: window_right must be 0 (causal) for decode, got {right}")
        query = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        key = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        value = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.value_dim)).transpose(1, 2)
        if cache is None:
            length = torch.zeros((), dtype=torch.int64, device=x.device)
        else:
            key, value = torch.cat((cache.key, key), 2), torch.cat((cache.value, value), 2)
            length = cache.length
        output = attention(
            query,
            key,
            value,
            window=self.window,
            scale=self.scale,
            temperature=self._current_temperature(),
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
        )
        kept = KeyValueCache(_last(key, left), _last(value, left), length + x.size(1))
        return self.out_proj(output.transpose(1, 2).flatten(2)), kept

    def _current_temperature(self) -> float | Tensor:
        if self.log_temperature is not None:
            return self.log_temperature.exp()
        return self.temperature

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **options: Any) -> "MultiheadAttention":
        """A module with a copy of a torch.nn.MultiheadAttention's weights, its dropout, dtype, device and mode.

        Without a window it computes what that one does (of its outputs, the first). It takes (B, N, E), also where the
        other has batch_first=False. Modules made with add_bias_kv or add_zero_attn are errors.

        Args:
            options: those of MultiheadAttention that the other doesn't have, such as window=(256, 0).
        """
        if module.bias_k is not None or module.bias_v is not None:
            raise ValueError("wmha: from_torch needs a module with add_bias_kv=False, got add_bias_kv=True")
        if module.add_zero_attn:
            raise ValueError("wmha: from_torch needs a module with add_zero_attn=False, got add_zero_attn=True")
        weight, bias = module.out_proj.weight, module.in_proj_bias
        taken = {"kdim": module.kdim, "vdim": module.vdim, "bias": bias is not None, "dropout": module.dropout}
        taken |= {"device": weight.device, "dtype": weight.dtype}
        result = cls(module.embed_dim, module.num_heads, **(taken | options))
        packed = module.in_proj_weight
        separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        state = {f"out_proj.{name}": parameter for name, parameter in module.out_proj.named_parameters()}
        for name, part in zip("qkv", separate if packed is None else packed.chunk(3), strict=True):
            state[f"{name}_proj.weight"] = part
        if bias is not None:
            for name, part in zip("qkv", bias.chunk(3), strict=True):
                state[f"{name}_proj.bias"] = part
        result.load_state_dict(result.state_dict() | state)  # a learned temperature is its own
        return result.train(module.training)

    def extra_repr(self) -> str:
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        text += f", head_dim={self.head_dim}, value_dim={self.value_dim}, window={self.window}"
        if self.scale is not None:
            text += f", scale={self.scale:g}"
        if self.temperature != 1 or self.learned_temperature != "none":
            text += f", temperature={self.temperature:g}"
        if self.learned_temperature != "none":
            text += f", learned_temperature={self.learned_temperature}"
        if self.softcap != 0:
            text += f", softcap={self.softcap:g}"
        if self.dropout != 0:
            text += f", dropout={self.dropout:g}"
        return text


def _last(tensor: Tensor, count: int) -> Tensor:
    """The last `count` positions of (B, H, N, D), or all for -1. A copy where a view would keep much else in memory."""
    surplus = tensor.size(2) - count
    if count < 0 or surplus <= 0:
        return tensor
    last = tensor.narrow(2, surplus, count)
    return last.clone() if surplus > count else last
