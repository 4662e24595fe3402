"""The README's examples run as they stand."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import wmha

README = (Path(__file__).parent.parent / "README.md").read_text()
PATH = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]  # CMake, where pip installed it


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.cpu
def test_python_and_torchscript(run_python, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text("\n".join(blocks("python")))  # TorchScript reads the source from a file
    run_python("-W", "ignore", "example.py")
    assert (tmp_path / "layer.pt").exists()


@pytest.mark.cpu
def test_cpp(tmp_path):
    """Each example is a program."""
    project = "cmake_minimum_required(VERSION 3.18)\nproject(programs LANGUAGES CXX)\n"
    programs = [f"program{i}" for i in range(len(blocks("cpp")))]
    for program, code in zip(programs, blocks("cpp"), strict=True):
        (tmp_path / f"{program}.cpp").write_text(code)
        project += f"add_executable({program} {program}.cpp)\n"
        project += "".join(blocks("cmake")).replace("program ", f"{program} ")
    (tmp_path / "CMakeLists.txt").write_text(project)
    cmake = shutil.which("cmake", path=PATH)
    build = tmp_path / "build"
    for command in (
        [cmake, "-S", tmp_path, "-B", build, f"-DCMAKE_PREFIX_PATH={wmha.cmake_prefix_path}"],
        [cmake, "--build", build],
        *([build / program] for program in programs),
    ):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
