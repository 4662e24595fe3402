"""The trained model outside of Python: TorchScript, an AOTInductor package, and the C++ program that loads both."""

import contextlib
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import wmha

APP = pathlib.Path(__file__).resolve().parent.parent / "tests" / "cpp_app"


class Example(nn.Module):
    """A file of two tensors that C++ reads without further ado."""

    def __init__(self, input: Tensor, output: Tensor):
        super().__init__()
        self.register_buffer("input", input)
        self.register_buffer("output", output)


def tool(name: str) -> str | None:
    """On the path or, for those that pip installs, beside this Python."""
    return shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))


def missing_tools() -> list[str]:
    """What compiles the package and the C++ program, and is not there."""
    compiler = any(map(tool, (os.environ.get("CXX", "c++"), "g++", "clang++")))
    return ([] if tool("cmake") else ["cmake"]) + ([] if compiler else ["a C++ compiler"])


@torch.no_grad()
def save(model: nn.Module, tokens: Tensor, script: pathlib.Path, package: pathlib.Path, example: pathlib.Path) -> None:
    """The model, for sequences of any length, in two forms; and tokens (1, N) with what the model makes of them."""
    model.eval()
    torch.jit.script(Example(tokens, model(tokens))).save(str(example))
    torch.jit.script(model).save(str(script))
    length = torch.export.Dim("length", min=2, max=2**20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about torch
        exported = torch.export.export(model, (tokens,), dynamic_shapes={"tokens": {1: length}})
        torch._inductor.aoti_compile_and_package(exported, package_path=str(package))


@contextlib.contextmanager
def building(folder: pathlib.Path, log: pathlib.Path) -> Iterator[subprocess.Popen]:
    """Builds the C++ program in `folder` while the body of the with statement runs."""
    configure = [tool("cmake"), "-S", APP, "-B", folder, f"-DCMAKE_PREFIX_PATH={wmha.cmake_prefix_path}"]
    if tool("ninja"):
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    build = [tool("cmake"), "--build", folder, "--target", "cpp_app"]
    commands = " && ".join(shlex.join(map(str, command)) for command in (configure, build))
    with log.open("w") as output:
        process = subprocess.Popen(  # a session of its own, so that its compiler ends with it
            ["sh", "-c", commands], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
