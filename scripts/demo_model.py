"""The demo's language model: bytes in, logits of the next byte out. Every byte sees a window of the bytes before it."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wmha

SLOTS = 8191  # of the tables for pairs and triples, which share them by the remainder; prime, to spread them


class WindowAttention(nn.Module):
    """Causal self-attention in which each position sees itself and the `window` positions before it."""

    def __init__(self, dim: int, heads: int, window: int, dropout: float):
        super().__init__()
        self.heads, self.window, self.dropout = heads, window, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.log_temperature = nn.Parameter(torch.zeros(heads))  # its exponential stays positive

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, dim) -> query, key, value (B, H, N, D). cos and sin (N, 1, D/2) turn the first two by position."""
        query, key, value = self.qkv(x).unflatten(-1, (3 * self.heads, -1)).chunk(3, dim=2)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        temperature = self.log_temperature.exp()
        return wmha.attention(query, key, value, window=(self.window, 0), temperature=temperature, dropout_p=dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = self.project(x, cos, sin)
        return self.out(self.attend(query, key, value).transpose(1, 2).flatten(2))


class MaskedAttention(WindowAttention):
    """The same numbers from PyTorch's own attention, which takes a window as a mask of N x N booleans."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = window_mask(query.size(2), self.window, query.device)
        query = query / self.log_temperature.exp()[:, None, None]
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


class Block(nn.Module):
    def __init__(self, attention: nn.Module, dim: int):
        super().__init__()
        self.attention = attention
        self.attention_norm = nn.LayerNorm(dim, bias=False)
        self.norm = nn.LayerNorm(dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.down(F.relu(self.up(self.norm(x))).square())


class LanguageModel(nn.Module):
    """A byte enters as the sum of three vectors: for itself, for its pair and for its triple with the bytes before."""

    def __init__(self, layers: int, dim: int, heads: int, window: int, dropout: float, attention=WindowAttention):
        super().__init__()
        self.slots = SLOTS
        self.embedding = nn.Embedding(256, dim)
        self.pairs = nn.Embedding(SLOTS, dim)
        self.triples = nn.Embedding(SLOTS, dim)
        self.blocks = nn.ModuleList(Block(attention(dim, heads, window, dropout), dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        turns = dim // heads // 2
        self.register_buffer("frequencies", 1000.0 ** (-torch.arange(turns) / turns))
        for table in (self.embedding, self.pairs, self.triples):
            nn.init.normal_(table.weight, std=0.03)
        for block in self.blocks:
            nn.init.normal_(block.attention.qkv.weight, std=dim**-0.5)
            nn.init.normal_(block.up.weight, std=dim**-0.5)
            nn.init.zeros_(block.attention.out.weight)  # each block starts as the identity
            nn.init.zeros_(block.down.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N), int64 -> logits of each next byte (B, N, 256)."""
        angles = torch.arange(tokens.size(1), device=tokens.device)[:, None, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        pairs = tokens + 256 * F.pad(tokens, (1, 0))[:, :-1]
        triples = pairs + 65536 * F.pad(tokens, (2, 0))[:, :-2]
        x = self.embedding(tokens) + self.pairs(pairs % self.slots) + self.triples(triples % self.slots)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(self.norm(x), self.embedding.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: a product of a turned query and a turned key depends on their distance alone."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


@functools.lru_cache(maxsize=1)  # as a careful user would: one mask for all layers and steps
def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    back = position[:, None] - position
    return (back >= 0) & (back <= window)


@torch.no_grad()
def generate(model: nn.Module, prompt: bytes, count: int, context: int, generator: torch.Generator) -> bytes:
    """`count` bytes after the prompt, drawn one by one from what the model finds likely after the last `context`."""
    model.eval()
    text = list(prompt)
    device = next(model.parameters()).device
    for _ in range(count):
        logits = model(torch.tensor([text[-context:]], device=device))[0, -1].cpu()
        text.append(int(torch.multinomial(torch.softmax(logits / 0.8, dim=-1), 1, generator=generator)))
    return bytes(text)
