"""A model outside of Python: TorchScript, and an AOTInductor package."""

import os
import pathlib
import shutil
import sys
import tempfile
import warnings

import torch
from torch import nn

import checkpoint


def tool(name: str) -> str | None:
    """On the path or, for those that pip installs, beside this Python."""
    return shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))


def compiler() -> str | None:
    """What compiles an AOTInductor package."""
    return next(filter(None, map(tool, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


def script(model: nn.Module, file: pathlib.Path) -> None:
    with checkpoint.replacing(file) as stream:
        torch.jit.save(torch.jit.script(model.eval()), stream)


@torch.no_grad()
def package(model: nn.Module, file: pathlib.Path) -> None:
    """Its forward, for sequences of any number and length, on the model's device."""
    tokens = torch.zeros(2, 300, dtype=torch.int64, device=next(model.parameters()).device)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=2**20)}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=file.parent) as folder:
        warnings.simplefilter("ignore", FutureWarning)  # of torch about torch
        exported = torch.export.export(model.eval(), (tokens,), dynamic_shapes={"tokens": sizes})
        made = torch._inductor.aoti_compile_and_package(exported, package_path=f"{folder}/{file.name}")
        os.replace(made, file)
