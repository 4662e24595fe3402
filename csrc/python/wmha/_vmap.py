"""Batching rules that vmap needs beside those in C++."""

import torch
from torch import Tensor


@torch.library.register_vmap("wmha::_dropout_mask")
def _dropout_mask(info, in_dims, rng_state: Tensor, **options) -> tuple[Tensor, int]:
    """A mask for each seed, under vmap with randomness="different"."""
    states = rng_state.movedim(in_dims[0], 0)
    return torch.stack([torch.ops.wmha._dropout_mask(state, **options) for state in states]), 0
