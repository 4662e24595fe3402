"""The demo's language model: bytes in, logits of the next byte out. Every byte sees a window of the bytes before it."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wmha  # noqa: F401  (registers torch.ops.wmha)


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
        return torch.ops.wmha.attention(
            query,
            key,
            value,
            window_left=self.window,
            window_right=0,
            temperature=self.log_temperature.exp(),
            dropout_p=self.dropout if self.training else 0.0,
        )

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
    def __init__(self, layers: int, dim: int, heads: int, window: int, dropout: float, attention=WindowAttention):
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        self.blocks = nn.ModuleList(Block(attention(dim, heads, window, dropout), dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        pairs = dim // heads // 2
        self.register_buffer("frequencies", 1000.0 ** (-torch.arange(pairs) / pairs))
        nn.init.normal_(self.embedding.weight, std=0.05)
        for block in self.blocks:
            nn.init.normal_(block.attention.qkv.weight, std=dim**-0.5)
            nn.init.normal_(block.up.weight, std=dim**-0.5)
            nn.init.zeros_(block.attention.out.weight)  # each block starts as the identity
            nn.init.zeros_(block.down.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N), int64 -> logits of each next byte (B, N, 256)."""
        angles = torch.arange(tokens.size(1), device=tokens.device)[:, None, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding(tokens)
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


def bits_per_byte(model: nn.Module, text: Tensor) -> float:
    """What the model needs to encode `text` (N,), each byte from those before it; a 0 byte stands in front."""
    training, length = model.training, 4096
    model.eval()
    total = 0.0
    with torch.no_grad():
        inputs = F.pad(text, (1, -1))
        for first in range(0, len(text), length):
            part = slice(first, first + length)
            logits = model(inputs[None, part])[0]
            total += F.cross_entropy(logits, text[part], reduction="sum").item()
    model.train(training)
    return total / math.log(2) / len(text)


@torch.no_grad()
def generate(model: nn.Module, prompt: bytes, count: int, context: int, generator: torch.Generator) -> bytes:
    """`count` bytes after the prompt, drawn one by one from what the model finds likely after the last `context`."""
    model.eval()
    text = list(prompt)
    device = next(model.parameters()).device
    for _ in range(count):
        logits = model(torch.tensor([text[-context:]], device=device))[0, -1].cpu()
        text.append(int(torch.multinomial(torch.softmax(logits / 0.7, dim=-1), 1, generator=generator)))
    return bytes(text)
