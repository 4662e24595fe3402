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
    (tmp_path / "main.cpp").write_text("".join(blocks("cpp")))
    project = "cmake_minimum_required(VERSION 3.18)\nproject(program LANGUAGES CXX)\nadd_executable(program main.cpp)\n"
    (tmp_path / "CMakeLists.txt").write_text(project + "".join(blocks("cmake")))
    cmake = shutil.which("cmake", path=PATH)
    build = tmp_path / "build"
    for command in (
        [cmake, "-S", tmp_path, "-B", build, f"-DCMAKE_PREFIX_PATH={wmha.cmake_prefix_path}"],
        [cmake, "--build", build],
        [build / "program"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
