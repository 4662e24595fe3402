"""Builds the wheel: CMake builds and installs the plugin into the package.

Environment: MAX_JOBS (parallel compilations), DEBUG=1 (debug build), CMAKE_ARGS (more arguments for CMake),
TORCH_CUDA_ARCH_LIST (what the CUDA kernels are compiled for, default "8.0;9.0;10.0;12.0+PTX"), FORCE_CUDA (1 or 0: with
or without CUDA kernels; by default with them if torch is built with CUDA and nvcc is there).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "0").upper() in ("1", "ON", "YES", "TRUE")


def with_cuda() -> bool:
    if "FORCE_CUDA" in os.environ:
        return enabled("FORCE_CUDA")
    home = os.environ.get("CUDA_HOME")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=f"{home}/bin" if home else None)
    return torch.version.cuda is not None and nvcc is not None


def cmake(*arguments: object) -> None:
    """Runs CMake; ends with a sentence if it fails, since its own message says why."""
    try:
        code = subprocess.call(["cmake", *map(str, arguments)])
    except FileNotFoundError:
        sys.exit("wmha: building needs CMake, and there is none on the PATH: `pip install cmake ninja`")
    if code != 0:
        sys.exit("wmha: CMake failed; its message is above")


class CMakeBuild(build_ext):
    def run(self) -> None:
        package = (ROOT / "csrc/python/wmha") if self.editable_mode else Path(self.build_lib).resolve() / "wmha"
        build = Path(self.build_temp).resolve()
        # A build folder keeps the generator that it began with.
        generator = ["-GNinja"] if shutil.which("ninja") and not (build / "CMakeCache.txt").exists() else []
        cmake(
            f"-S{ROOT}",
            f"-B{build}",
            *generator,
            f"-DCMAKE_BUILD_TYPE={'Debug' if enabled('DEBUG') else 'Release'}",
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DTORCH_ROOT={Path(torch.__file__).parent}",
            f"-DWMHA_CUDA={'ON' if with_cuda() else 'OFF'}",
            f"-DWMHA_RPATH_TO_TORCH={'ON' if self.editable_mode else 'OFF'}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        )
        cmake("--build", build, "--parallel", os.environ.get("MAX_JOBS") or os.cpu_count())
        cmake("--install", build)
        (package / "_build.py").write_text(
            "# Written by setup.py.\n"
            f'version = "{self.distribution.get_version()}"\n'
            f'torch_version = "{torch.__version__}"\n'
            f"cuda_version = {torch.version.cuda if with_cuda() else None!r}\n"
        )

    def get_outputs(self) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """The plugin is a plain shared library: any Python 3, this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=["wmha", "wmha.nn"],
    package_dir={"": "csrc/python"},
    package_data={"wmha": ["py.typed"]},
    ext_modules=[Extension("wmha.lib", [])],  # makes the wheel a platform's own; CMakeBuild knows the sources
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
