"""The table of cases. Each row is a problem: shape, memory layout, options. Tests and benchmark run the same rows.

A bug fix adds a row first.
"""

from __future__ import annotations

import dataclasses
import math

import torch

INT64_MAX = 2**63 - 1
INT64_MIN = -(2**63)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None  # None: as heads
    queries: int = 19
    keys: int | None = None  # None: as queries
    key_dim: int = 8
    value_dim: int | None = None  # None: as key_dim
    layout: str = "contiguous"  # a key of LAYOUTS, or "packed"
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    temperature: float | str = 1.0  # a number, or the shape of a tensor: "()", "(1,)", "(Hq,)"
    temperature_range: tuple[float, float] = (0.5, 2.0)
    softcap: float = 0.0
    dropout_p: float = 0.0
    query_offset: int | None = None
    magnitude: float = 1.0  # of the elements of query and key
    shift: float = 0.0  # added to all scores, by way of query and key

    @property
    def query_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.queries, self.key_dim

    @property
    def key_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self._or(self.kv_heads, self.heads), self._or(self.keys, self.queries), self.key_dim

    @property
    def value_shape(self) -> tuple[int, int, int, int]:
        return *self.key_shape[:3], self._or(self.value_dim, self.key_dim)

    @property
    def actual_scale(self) -> float:
        return 1 / math.sqrt(self.key_dim) if self.scale is None else self.scale

    @staticmethod
    def _or(value: int | None, default: int) -> int:
        return default if value is None else value

    def options(self, temperature: torch.Tensor | None = None) -> dict:
        """The operators' keyword arguments."""
        return {
            "window_left": self.window[0],
            "window_right": self.window[1],
            "scale": self.scale,
            "temperature": self.temperature if temperature is None else temperature,
            "softcap": self.softcap,
            "dropout_p": self.dropout_p,
            "query_offset": self.query_offset,
        }


@dataclasses.dataclass
class Inputs:
    """What a case is called with: leaves that require gradients, and gradients of the results."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    temperature: torch.Tensor | None
    grad_output: torch.Tensor
    grad_logsumexp: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        leaves = (self.query, self.key, self.value)
        return leaves if self.temperature is None else (*leaves, self.temperature)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of arithmetic, logsumexp and temperature."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def by_position(tensor: torch.Tensor) -> torch.Tensor:
    """A (B, N, H, D) tensor seen through a transpose."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """Starts one element into its storage; rows are an odd number of elements apart."""
    *leading, width = tensor.shape
    rows = width + 1 + width % 2
    storage = torch.full((math.prod(leading) * rows + 1,), math.nan, dtype=tensor.dtype, device=tensor.device)
    view = storage[1:].view(*leading, rows)[..., :width]
    return view.copy_(tensor)


def expanded(dim: int):
    """The first element along dim stands for all: stride 0."""
    return lambda tensor: tensor.narrow(dim, 0, 1).expand_as(tensor) if tensor.numel() else tensor


def reversed_axes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "by_position": by_position,
    "unaligned": unaligned,
    "every_second": lambda tensor: torch.stack((tensor, tensor.neg()), -1)[..., 0],  # features 2 elements apart
    "reversed_axes": reversed_axes,
    "expanded_batch": expanded(0),
    "expanded_heads": expanded(1),
    "expanded_positions": expanded(2),
    "expanded_features": expanded(3),
}


def packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Slices of one projection (B, N, Hq + 2 Hkv, D): they share storage."""
    projection = torch.cat((query, key, value), 1).transpose(1, 2).contiguous()
    parts = projection.split([query.size(1), key.size(1), value.size(1)], 2)
    return tuple(part.transpose(1, 2) for part in parts)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query = normal(*case.query_shape) * case.magnitude
    key = normal(*case.key_shape) * case.magnitude
    value = normal(*case.value_shape)
    if case.shift:  # one feature carries the shift, up to its own noise
        share = math.sqrt(abs(case.shift / case.actual_scale))
        query[..., 0] += share
        key[..., 0] += math.copysign(share, case.shift / case.actual_scale)

    query, key, value = (tensor.to(device, dtype) for tensor in (query, key, value))
    if case.layout == "packed":
        query, key, value = packed(query, key, value)
    else:
        query, key, value = (LAYOUTS[case.layout](tensor) for tensor in (query, key, value))

    temperature = None
    if isinstance(case.temperature, str):
        shape = {"()": (), "(1,)": (1,), "(Hq,)": (case.heads,)}[case.temperature]
        low, high = case.temperature_range
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        temperature = (low * (high / low) ** uniform).to(device, acc_dtype(dtype)).requires_grad_()

    output_shape = (*case.query_shape[:3], case.value_shape[3])
    grad_output = normal(*output_shape).to(device, dtype)
    grad_logsumexp = normal(*output_shape[:3]).to(device, acc_dtype(dtype))
    leaves = (tensor.detach().requires_grad_() for tensor in (query, key, value))
    return Inputs(*leaves, temperature, grad_output, grad_logsumexp)


def shapes() -> list[Case]:
    return [
        Case("plain"),
        Case("one_of_each", batch=1, heads=1, queries=1, key_dim=1),
        Case("more_keys", queries=5, keys=70, window=(9, 0)),
        Case("more_queries", queries=70, keys=5, window=(9, 0)),
        Case("many_batches", batch=9, heads=3, queries=3),
        Case("groups_of_two", heads=4, kv_heads=2, window=(6, 3)),
        Case("groups_of_eight", heads=8, kv_heads=1, window=(6, 3), dropout_p=0.2, temperature="(Hq,)"),
        Case("three_groups", heads=6, kv_heads=3, queries=60, window=(-1, 0), softcap=2.0),
        Case("no_batch", batch=0, temperature="(Hq,)"),
        Case("no_heads", heads=0, kv_heads=0, temperature="()"),
        Case("no_query_heads", heads=0, kv_heads=2, temperature="()"),
        Case("no_queries", queries=0, keys=5, temperature="(Hq,)"),
        Case("no_keys", queries=5, keys=0, temperature="(Hq,)", dropout_p=0.5),
        Case("nothing", queries=0, keys=0),
        # A wide value and a narrow key, and the reverse: no kernel may take the one size for the other.
        Case("wide_value", key_dim=3, value_dim=40, window=(4, 4)),
        Case("wide_key", key_dim=40, value_dim=3, window=(4, 4)),
        Case("wide_both", batch=1, queries=50, key_dim=256, value_dim=256, window=(20, 0)),
        Case("wider_than_256", batch=1, queries=50, key_dim=300, value_dim=271, window=(20, 0), temperature="()"),
        *(
            Case(f"dim_{dim}", batch=1, key_dim=dim, value_dim=71 - dim, window=(7, 2))
            for dim in (*range(1, 20), 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 70)
        ),
    ]


def layouts() -> list[Case]:
    options = {"heads": 4, "kv_heads": 2, "window": (6, 2), "dropout_p": 0.3, "temperature": "(Hq,)"}
    return [
        *(Case(f"layout_{layout}", layout=layout, **options) for layout in LAYOUTS),
        Case("layout_packed", layout="packed", **options),
        Case("layout_packed_odd", layout="packed", key_dim=13, queries=60, window=(-1, 0)),
        Case("layout_unaligned_odd", layout="unaligned", key_dim=17, value_dim=7, queries=60, window=(3, 0)),
        Case("layout_by_position_one_head", layout="by_position", heads=1),
        Case("layout_by_position_one_query", layout="by_position", queries=1, keys=30),
    ]


def tiles() -> list[Case]:
    """The last, partial tile. With scores about -120, exp(0 - logsumexp) of a padding lane would overflow."""
    around = sorted({multiple + step for multiple in (16, 32, 48, 64, 80, 96) for step in (-1, 0, 1)})
    return [
        *(
            Case(f"tile_{n}", batch=1, queries=n, shift=-120.0, temperature="()", window=(n // 3, n // 2))
            for n in (*range(1, 15), *around)
        ),
        *(
            Case(f"tile_causal_{n}", batch=1, heads=2, kv_heads=1, queries=n, window=(-1, 0), shift=-120.0, key_dim=5)
            for n in around
        ),
        Case("tile_shift_up", queries=50, shift=120.0, window=(20, 0)),
        # Nq < Nk, and Nq longer than a tile: the first query tile starts in the middle of a key tile.
        Case("tile_first_query", batch=1, queries=100, keys=163, window=(70, 0), shift=-120.0),
        Case("tile_first_query_unbounded", batch=1, queries=100, keys=163, window=(-1, 0)),
        # Longer than what one task of the backward pass takes: gradients of keys that two tasks share.
        Case("long_narrow", batch=1, queries=1000, key_dim=5, window=(37, 11), dropout_p=0.1, temperature="(Hq,)"),
        Case("long_causal", batch=1, heads=2, kv_heads=1, queries=600, window=(-1, 0), softcap=3.0),
        Case("long_wide", batch=1, queries=600, keys=500, window=(300, 400), query_offset=-100),
        Case("long_batches", queries=530, key_dim=4, window=(100, 0), temperature="()"),
    ]


def windows() -> list[Case]:
    n = 21
    ends = (0, 1, n - 1, n, n + 1, 2 * n, INT64_MAX)
    pairs = {(-1, -1), (-1, 0), (-1, 3), (3, -1), (0, 0), (0, 3), (3, 0), (3, 3), *((end, end) for end in ends)}
    pairs |= {(end, -1) for end in ends} | {(-1, end) for end in ends}
    return [
        *(
            Case(f"window_{left}_{right}_{queries}_{keys}", batch=1, queries=queries, keys=keys, window=(left, right))
            for left, right in sorted(pairs)
            for queries, keys in ((n, n), (n - 8, n), (n, n - 8))
        ),
        Case("offset_before", query_offset=-7, window=(4, 2)),
        Case("offset_after", query_offset=12, window=(4, 2)),
        Case("offset_beyond", query_offset=1000, window=(4, 2), temperature="()"),
        Case("offset_far_before", query_offset=-1000, window=(4, 2), temperature="()"),
        Case("offset_zero", queries=10, keys=30, query_offset=0, window=(-1, 0)),
        Case("offset_ends_max", query_offset=INT64_MAX, window=(INT64_MAX, 0)),
        Case("offset_ends_min", query_offset=INT64_MIN, window=(0, INT64_MAX)),
        Case("rows_without_keys", queries=60, keys=20, window=(3, 0), query_offset=-30, dropout_p=0.2, softcap=2.0),
    ]


def scores() -> list[Case]:
    banded = {"queries": 40, "window": (11, 3)}
    return [
        Case("scale_zero", scale=0.0, **banded),
        Case("scale_negative", scale=-0.7, temperature="(Hq,)", **banded),
        Case("scale_large", scale=9.0, **banded),
        Case("temperature_number", temperature=0.6, **banded),
        Case("temperature_low", temperature=1e-3, **banded),
        Case("temperature_high", temperature=1e3, **banded),
        Case("temperature_0d", temperature="()", **banded),
        Case("temperature_1d", temperature="(1,)", **banded),
        Case("temperature_per_head", heads=4, kv_heads=2, temperature="(Hq,)", **banded),
        Case("temperature_low_tensor", temperature="(Hq,)", temperature_range=(1e-3, 2e-3), **banded),
        Case("temperature_high_tensor", temperature="(Hq,)", temperature_range=(1e3, 2e3), **banded),
        Case("softcap", softcap=1.5, **banded),
        Case("softcap_small", softcap=0.25, magnitude=6.0, temperature="(1,)", **banded),
        Case("softcap_large", softcap=1e4, **banded),
        Case("softcap_shifted", softcap=50.0, shift=-120.0, temperature=0.5, **banded),
        Case("everything", heads=4, kv_heads=2, softcap=3.0, dropout_p=0.3, temperature="(Hq,)", scale=-0.4, **banded),
        # Scores that a finite stand-in for -inf, or a product in half precision, would not survive.
        Case("scores_very_low", scale=1.0, shift=-1e5, **banded),
        Case("scores_very_low_causal", scale=1.0, shift=-1e5, queries=70, keys=50, window=(-1, 0)),
        Case("products_overflow_half", key_dim=64, magnitude=150.0, scale=1e-5, **banded),
        Case("dropout", dropout_p=0.1, **banded),
        Case("dropout_half", dropout_p=0.5, heads=4, kv_heads=1, queries=100, keys=130, window=(-1, 0)),
        Case("dropout_most", dropout_p=0.9, **banded),
        Case("dropout_all", dropout_p=1.0, temperature="()", **banded),
        Case("dropout_softcap", dropout_p=0.4, softcap=1.0, temperature="()", magnitude=4.0, **banded),
    ]


CASES = [*shapes(), *layouts(), *tiles(), *windows(), *scores()]
