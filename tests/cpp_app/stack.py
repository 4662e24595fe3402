"""A TransformerStack on its way from Python to C++ (train.cpp), where it is trained, and back.

python stack.py make FOLDER     # writes FOLDER/python_stack.pt and FOLDER/python_example.pt
python stack.py check FOLDER    # checks FOLDER/cpp_stack.pt, which C++ wrote, by FOLDER/cpp_example.pt
"""

import pathlib
import sys

import torch
from make_models import Example
from torch.testing import assert_close

from wmha.nn import TransformerStack


def make_stack() -> TransformerStack:
    """The options of train.cpp."""
    return TransformerStack(
        2, 32, 4, windows=[(8, 0), (-1, -1)], causal=True, num_kv_heads=2, softcap=20.0, learned_temperature="per_head",
        dim_feedforward=48, activation="swiglu", dropout=0.1, attention_dropout=0.1, final_norm=True,
    )  # fmt: skip


def train(stack: TransformerStack, input: torch.Tensor, target: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(stack.parameters(), lr=1e-3)
    stack.train()
    torch.manual_seed(1)  # of the dropout masks
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(stack(input), target).backward()
        optimizer.step()
    stack.eval()


def make(folder: pathlib.Path) -> None:
    torch.manual_seed(0)
    stack = make_stack().eval()
    input, target = torch.randn(2, 2, 20, 32)
    torch.jit.script(stack).save(str(folder / "python_stack.pt"))
    example = {"input": input, "output": stack(input).detach(), "target": target}
    train(stack, input, target)
    example["trained_output"] = stack(input).detach()
    torch.jit.script(Example(**example)).save(str(folder / "python_example.pt"))


def check(folder: pathlib.Path) -> None:
    stack = make_stack().eval()
    stack.load_state_dict(torch.jit.load(folder / "cpp_stack.pt").state_dict())
    input = torch.jit.load(folder / "python_example.pt").input
    assert_close(stack(input), torch.jit.load(folder / "cpp_example.pt").output)
    print("agrees   stack from C++")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("make", "check"):
        sys.exit(__doc__)
    {"make": make, "check": check}[sys.argv[1]](pathlib.Path(sys.argv[2]))
