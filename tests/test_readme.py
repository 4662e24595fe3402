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
    run_python("\n".join(blocks("python")))
    assert (tmp_path / "layer.pt").exists()


@pytest.mark.cpu
def test_cpp(tmp_path):
    (tmp_path / "main.cpp").write_text("".join(blocks("cpp")))
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(program LANGUAGES CXX)\nadd_executable(program main.cpp)\n"
        + "".join(blocks("cmake"))
    )
    build = tmp_path / "build"
    for command in (
        [
            shutil.which("cmake", path=PATH),
            "-S",
            tmp_path,
            "-B",
            build,
            f"-DCMAKE_PREFIX_PATH={wmha.cmake_prefix_path}",
        ],
        [shutil.which("cmake", path=PATH), "--build", build],
        [build / "program"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
