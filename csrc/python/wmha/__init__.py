"""Windowed multi-head attention for PyTorch, on operators written in C++.

Importing the package loads the operators ``torch.ops.wmha.*``; the functions here are those operators with types and
documentation, and the modules in ``wmha.nn`` have them inside. They can be used in eager mode, in ``torch.jit.script``,
``torch.compile`` and ``torch.export``.
"""

from pathlib import Path as _Path

import torch as _torch

try:
    from . import _build
except ImportError as error:
    raise ImportError(
        "wmha is not built: this is its source folder. Install it with `pip install --no-build-isolation .`"
    ) from error


def _load() -> str:
    """Loads the library, after a check that torch is the one it was built against; returns its path."""
    built, found = _build.torch_version.split(".")[:2], _torch.__version__.split(".")[:2]
    if built != found:
        raise ImportError(
            f"wmha was built against torch {_build.torch_version}, but torch {_torch.__version__} is installed. "
            "Install that version of torch, or build wmha again with `pip install --no-build-isolation .`"
        )
    if _build.cuda_version and _build.cuda_version.split(".")[0] != (_torch.version.cuda or "").split(".")[0]:
        found_cuda = f"CUDA {_torch.version.cuda}" if _torch.version.cuda else "no CUDA"
        raise ImportError(
            f"wmha was built for CUDA {_build.cuda_version}, but torch {_torch.__version__} has {found_cuda}. "
            "Install a torch for that version of CUDA, or build wmha again with `pip install --no-build-isolation .`"
        )
    path = str(_Path(__file__).parent / "lib" / "libwmha.so")
    try:
        _torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(f"wmha can't load {path}, built against torch {_build.torch_version}: {error}") from error
    return path


__version__: str = _build.version
library_path: str = _load()
"""The shared library that holds the operators."""
cmake_prefix_path: str = str(_Path(__file__).parent / "share" / "cmake")
"""For CMAKE_PREFIX_PATH, so that ``find_package(wmha)`` finds the C++ library."""

from . import _vmap as _vmap  # noqa: E402  (the operators must be loaded first)
from . import nn as nn  # noqa: E402
from .functional import (  # noqa: E402
    attention,
    attention_weights,
    attention_with_lse,
    multi_head_attention,
)

__all__ = [
    "attention",
    "attention_weights",
    "attention_with_lse",
    "cmake_prefix_path",
    "library_path",
    "multi_head_attention",
    "nn",
]
