"""The C++ program of tests/cpp_app, which loads the exported model and compares what it gets with Python."""

import contextlib
import os
import pathlib
import shlex
import signal
import subprocess
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import export
import wmha

APP = pathlib.Path(__file__).resolve().parent.parent / "tests" / "cpp_app"


class Example(nn.Module):
    """A file of two tensors that C++ reads without further ado."""

    def __init__(self, input: Tensor, output: Tensor):
        super().__init__()
        self.register_buffer("input", input)
        self.register_buffer("output", output)


def missing_tools() -> list[str]:
    """What compiles the package and the program, and is not there."""
    return ([] if export.tool("cmake") else ["cmake"]) + ([] if export.compiler() else ["a C++ compiler"])


def leave_python(model: nn.Module, tokens: Tensor, folder: pathlib.Path) -> bool:
    """Saves the model in both forms, and tokens (1, N) with what it makes of them; does the program get the same?"""
    files = [folder / "model.pt", folder / "model.pt2", folder / "example.pt"]
    log = folder / "cpp_build.log"
    with building(folder / "cpp_build", log) as build:
        export.script(model, files[0])
        export.package(model, files[1])
        with torch.no_grad():
            torch.jit.script(Example(tokens, model(tokens))).save(str(files[2]))
        if build.wait() != 0:
            print(f"  building the C++ program failed; see {log}")
            return False
    app = subprocess.run([folder / "cpp_build" / "cpp_app", *files], text=True, capture_output=True)
    print("  " + (app.stdout + app.stderr).strip().replace("\n", "\n  "))
    return app.returncode == 0


@contextlib.contextmanager
def building(folder: pathlib.Path, log: pathlib.Path) -> Iterator[subprocess.Popen]:
    """Builds the program in `folder` while the body of the with statement runs."""
    cmake, ninja = export.tool("cmake"), export.tool("ninja")
    configure = [cmake, "-S", APP, "-B", folder, f"-DCMAKE_PREFIX_PATH={wmha.cmake_prefix_path}"]
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    build = [cmake, "--build", folder, "--target", "cpp_app"]
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
