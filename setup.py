"""Builds the wheel: CMake builds and installs the plugin into the package.

Environment: MAX_JOBS (parallel compilations), DEBUG=1 (debug build), CMAKE_ARGS (more arguments for CMake),
FORCE_CUDA=1 and TORCH_CUDA_ARCH_LIST (reserved for the CUDA kernels).
"""

import os
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


class CMakeBuild(build_ext):
    def run(self) -> None:
        if enabled("FORCE_CUDA"):
            sys.exit("wmha: FORCE_CUDA is set, but this version has no CUDA kernels")
        package = (ROOT / "csrc/python/wmha") if self.editable_mode else Path(self.build_lib).resolve() / "wmha"
        build = Path(self.build_temp).resolve()
        build_type = "Debug" if enabled("DEBUG") else "Release"
        subprocess.check_call(
            [
                "cmake",
                f"-S{ROOT}",
                f"-B{build}",
                f"-DCMAKE_BUILD_TYPE={build_type}",
                f"-DCMAKE_INSTALL_PREFIX={package}",
                f"-DTORCH_ROOT={Path(torch.__file__).parent}",
                *os.environ.get("CMAKE_ARGS", "").split(),
            ]
        )
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.check_call(["cmake", "--build", str(build), "--parallel", jobs])
        subprocess.check_call(["cmake", "--install", str(build)])
        (package / "_build.py").write_text(
            "# Written by setup.py.\n"
            f'version = "{self.distribution.get_version()}"\n'
            f'torch_version = "{torch.__version__}"\n'
        )

    def get_outputs(self) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """The plugin is a plain shared library: any Python 3, this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=["wmha"],
    package_dir={"": "csrc/python"},
    package_data={"wmha": ["py.typed"]},
    ext_modules=[Extension("wmha.lib", [])],  # makes the wheel a platform's own; CMakeBuild knows the sources
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
