"""The language model of the demo, the trainer and the tuner: bytes in, logits of the next byte out."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmha.nn import KeyValueCache, TransformerStack

REACH = 3  # bytes before its own that a byte enters with
SLOTS = 8191  # of the tables for pairs and triples, which share them by the remainder; prime, to spread them


class State(NamedTuple):
    """What `decode` remembers of a text."""

    before: Tensor
    """(B, 2 + REACH), the last bytes"""
    caches: list[KeyValueCache]
    """for each layer"""


class LanguageModel(nn.Module):
    """A causal TransformerStack between tables: a byte enters as the sum of three vectors, for itself, for its pair and
    for its triple with the bytes before, to which each feature adds a weighted sum of those of the last REACH + 1 bytes.
    That is all it knows of order. It leaves by its similarity to each byte's vector.

    Args:
        window: how many bytes before its own a byte sees, -1: all; one number for all layers, or one for each.
        options: all others of wmha.nn.TransformerStack.
    """

    def __init__(self, num_layers: int, embed_dim: int, num_heads: int, *, window: list[int], **options: Any):
        super().__init__()
        if len(window) not in (1, num_layers):
            raise ValueError(f"window must be one number or one for each of {num_layers} layers, got {len(window)}")
        windows = [(reach, 0) for reach in (window * num_layers if len(window) == 1 else window)]
        self.reach, self.slots = REACH, SLOTS
        self.embedding = nn.Embedding(256, embed_dim)
        self.pairs = nn.Embedding(SLOTS, embed_dim)
        self.triples = nn.Embedding(SLOTS, embed_dim)
        self.mix = nn.Parameter(torch.empty(embed_dim, 1 + REACH).uniform_(-0.5, 0.5))
        self.stack = TransformerStack(num_layers, embed_dim, num_heads, windows=windows, final_norm=True, **options)
        for table in (self.embedding, self.pairs, self.triples):
            nn.init.normal_(table.weight, std=0.03)
        for layer in self.stack.layers:  # with norm="before" each layer starts as the identity
            nn.init.zeros_(layer.self_attn.out_proj.weight)
            nn.init.zeros_(layer.linear2.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N), int64 -> logits of each next byte (B, N, 256)."""
        return F.linear(self.stack(self._embed(F.pad(tokens, (2 + self.reach, 0)))), self.embedding.weight)

    @torch.jit.export
    def decode(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """`forward` for the next bytes of a text, of which the state holds what they need of those before."""
        tokens = F.pad(tokens, (2 + self.reach, 0)) if state is None else torch.cat((state.before, tokens), 1)
        x, caches = self.stack.decode(self._embed(tokens), None if state is None else state.caches)
        return F.linear(x, self.embedding.weight), State(tokens[:, -2 - self.reach :], caches)

    def _embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, 2 + REACH + N), the first of which only come before the N others -> (B, N, E)."""
        pairs = tokens[:, 1:] + 256 * tokens[:, :-1]
        triples = pairs[:, 1:] + 65536 * tokens[:, :-2]
        x = self.embedding(tokens[:, 2:]) + self.pairs(pairs[:, 1:] % self.slots) + self.triples(triples % self.slots)
        mixed = x[:, self.reach :]
        for i in range(1 + self.reach):
            mixed = mixed + x[:, i : x.size(1) - self.reach + i] * self.mix[:, i]
        return mixed


@torch.no_grad()
def generate(model: LanguageModel, prompt: bytes, count: int, generator: torch.Generator) -> bytes:
    """`count` bytes after the prompt, drawn one by one from what the model finds likely."""
    model.eval()
    text = list(prompt)
    device = model.embedding.weight.device
    tokens, state = torch.tensor([text], device=device), None
    for _ in range(count):
        logits, state = model.decode(tokens, state)
        tokens = torch.multinomial(torch.softmax(logits[:, -1].cpu() / 0.8, dim=-1), 1, generator=generator)
        text.append(int(tokens))
        tokens = tokens.to(device)
    return bytes(text)
