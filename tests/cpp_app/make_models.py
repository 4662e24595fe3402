"""Writes one small model in the two forms that a C++ program can load, and an input with the output it has to get.

python make_models.py FOLDER    # writes FOLDER/model.pt, FOLDER/model.pt2 and FOLDER/example.pt
"""

import pathlib
import sys

import torch

import wmha  # noqa: F401  (registers torch.ops.wmha)


class Block(torch.nn.Module):
    """Causal sliding-window self-attention over tokens, with grouped heads and a learned temperature."""

    def __init__(self, tokens: int = 50, width: int = 32, heads: int = 4, kv_heads: int = 2, window: int = 12):
        super().__init__()
        self.heads, self.kv_heads, self.window = heads, kv_heads, window
        self.embedding = torch.nn.Embedding(tokens, width)
        self.queries = torch.nn.Linear(width, width)
        self.keys = torch.nn.Linear(width, width // heads * kv_heads)
        self.values = torch.nn.Linear(width, width // heads * kv_heads)
        self.out = torch.nn.Linear(width, tokens)
        self.temperature = torch.nn.Parameter(torch.linspace(0.5, 2, heads))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)  # (B, N, width)
        y = torch.ops.wmha.multi_head_attention(
            x,
            x,
            x,
            self.queries.weight,
            self.keys.weight,
            self.values.weight,
            self.queries.bias,
            self.keys.bias,
            self.values.bias,
            torch.eye(x.size(-1)),
            None,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            window_left=self.window,
            window_right=0,
            temperature=self.temperature,
            softcap=20.0,
        )
        return self.out(x + y)  # (B, N, tokens)


class Example(torch.nn.Module):
    """A file of tensors that C++ reads without further ado."""

    def __init__(self, **tensors: torch.Tensor):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Block().eval()
    tokens = torch.randint(50, (2, 100))
    with torch.no_grad():
        expected = model(tokens)
        torch.jit.script(Example(input=tokens, output=expected)).save(str(folder / "example.pt"))
        torch.jit.script(model).save(str(folder / "model.pt"))
        exported = torch.export.export(model, (tokens,))
        torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / "model.pt2"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]))
