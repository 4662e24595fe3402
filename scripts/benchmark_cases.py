"""What the benchmark measures: self-attention and decoding, with a window or without one."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    batch: int
    heads: int
    length: int  # of key and value
    dim: int
    left: int  # keys seen before a query's own position; -1: all. None after it: the attention is causal.
    dropout_p: float = 0.0
    queries: int | None = None  # None: as many as keys; they are the last ones
    shared_by: int = 1  # heads that share a key and value head
    passes: tuple[str, ...] = ("forward", "training")
    dtypes: tuple[torch.dtype, ...] = ()  # none: any

    @property
    def rows(self) -> int:
        return self.length if self.queries is None else self.queries

    @property
    def kv_heads(self) -> int:
        return self.heads // self.shared_by

    @property
    def window(self) -> tuple[int, int]:
        return self.left, 0

    @property
    def reach(self) -> int:
        """The most keys that a query sees, itself left out."""
        return self.length - 1 if self.left < 0 else min(self.left, self.length - 1)

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, of one head."""
        first = self.length - self.rows
        return sum(min(position, self.reach) + 1 for position in range(first, self.length))

    def flops(self, backward: bool) -> float:
        """Useful work: two products forward, five more backward."""
        return (14 if backward else 4) * self.batch * self.heads * self.dim * self.pairs()

    def cache_bytes(self, dtype: torch.dtype) -> float:
        """Of the keys and values that few queries read, which is what takes their time; else 0."""
        if self.queries is None:
            return 0.0
        seen = min(self.length, self.rows + self.reach)
        return 2.0 * self.batch * self.kv_heads * seen * self.dim * dtype.itemsize

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """query, key, value and the output's gradient."""
        generator = torch.Generator().manual_seed(0)

        def normal(heads: int, positions: int) -> Tensor:
            shape = (self.batch, heads, positions, self.dim)
            return torch.randn(shape, generator=generator).to(device, dtype)

        query, key, value = normal(self.heads, self.rows), *(normal(self.kv_heads, self.length) for _ in range(2))
        return query, key, value, normal(self.heads, self.rows)

    def __str__(self) -> str:
        window = "causal" if self.left < 0 else f"W={self.left}"
        rows = "" if self.queries is None else f"{self.queries} of "
        dropout = f", dropout {self.dropout_p:g}" if self.dropout_p else ""
        heads = f"{self.heads}" if self.shared_by == 1 else f"{self.heads} on {self.kv_heads}"
        return f"{self.batch} x {heads} x {rows}{self.length} x {self.dim}, {window}{dropout}"


FORWARD = ("forward",)
LENGTHS = (1024, 2048, 4096, 8192, 16384)
WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)

CPU = [
    Case("window 256", 1, 8, 4096, 64, 256),
    Case("long", 1, 8, 16384, 64, 256),
    Case("batch", 4, 8, 1024, 64, 128),
    Case("wide", 1, 8, 8192, 128, 1024),
    Case("narrow", 1, 8, 4096, 64, 32),
    Case("dense", 1, 8, 2048, 64, -1),
    Case("dropout", 1, 8, 4096, 64, 256, dropout_p=0.1),
    Case("one head", 1, 1, 16384, 64, 256),
    Case("decode", 16, 16, 4096, 64, 1024, queries=1, passes=FORWARD),
    Case("decode", 1, 8, 1024, 64, -1, queries=1, passes=FORWARD),  # from the CPU's caches
    Case("decode", 1, 32, 4096, 128, -1, queries=1, shared_by=4, passes=FORWARD),
    Case("decode", 1, 8, 4096, 64, -1, queries=8, passes=FORWARD),
    Case("tiny", 1, 8, 16, 64, -1),
    *(Case("N", 1, 8, length, 64, 256, dtypes=(torch.float32,)) for length in LENGTHS),
    *(Case("W", 1, 8, 4096, 64, left, dtypes=(torch.float32,)) for left in WINDOWS),
]
# Enough heads to fill a GPU.
CUDA = [
    Case("window 256", 4, 16, 4096, 64, 256),
    Case("long", 1, 16, 32768, 64, 256),
    Case("batch", 32, 16, 1024, 64, 128),
    Case("wide", 2, 16, 8192, 128, 1024),
    Case("narrow", 4, 16, 4096, 64, 32),
    Case("dense", 4, 16, 4096, 64, -1),
    Case("dropout", 4, 16, 4096, 64, 256, dropout_p=0.1),
    Case("one head", 1, 1, 16384, 64, 256),
    Case("decode", 64, 16, 4096, 64, 1024, queries=1, passes=FORWARD),
    Case("decode", 1, 8, 16384, 128, -1, queries=1, passes=FORWARD),  # fewer heads than multiprocessors
    Case("tiny", 1, 8, 16, 64, -1),
    *(Case("N", 4, 16, length, 64, 256, dtypes=(torch.bfloat16,)) for length in LENGTHS),
    *(Case("W", 4, 16, 4096, 64, left, dtypes=(torch.bfloat16,)) for left in WINDOWS),
]
QUICK = [
    Case("window 128", 1, 8, 1024, 64, 128),
    Case("dense", 1, 8, 512, 64, -1),
    Case("dropout", 1, 8, 1024, 64, 128, dropout_p=0.1),
    Case("decode", 4, 8, 1024, 64, 512, queries=1, passes=FORWARD),
    Case("decode", 1, 8, 1024, 64, 512, queries=4, shared_by=4, passes=FORWARD),
    Case("tiny", 1, 8, 16, 64, -1),
]
