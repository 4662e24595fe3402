"""The demo's text, real and on every machine: the source files of Python's own standard library."""

import collections
import errno
import gzip
import lzma
import math
import os
import pathlib
import sysconfig

import torch
from torch import Tensor

# Not the library's own code (what pip installed), or tables rather than text.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
HELD_OUT = 16  # every 16th file is for validation


def load(source: pathlib.Path | None, most: int) -> tuple[Tensor, Tensor]:
    """Bytes (N,), as int64, to train on, and at most `most` others: of a file, a folder's text, or the library."""
    if source is not None and source.is_file():
        text = source.read_bytes()
        split = len(text) - min(most, len(text) // 10)
        return to_tensor(text[:split]), to_tensor(text[split:])
    if source is not None and not source.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source)
    files = library_files() if source is None else folder_files(source)
    # A 0 byte, which no source file holds, stands between files.
    training = b"\0".join(file.read_bytes() for i, file in enumerate(files) if i % HELD_OUT != HELD_OUT // 2)
    validation = b"\0".join(file.read_bytes() for i, file in enumerate(files) if i % HELD_OUT == HELD_OUT // 2)
    return to_tensor(training), to_tensor(validation[:most])


def library_files() -> list[pathlib.Path]:
    folder = pathlib.Path(sysconfig.get_path("stdlib"))

    def is_text(file: pathlib.Path) -> bool:
        # _sysconfigdata*.py is written when Python is built: it differs from machine to machine.
        return not SKIPPED.intersection(file.relative_to(folder).parts) and not file.name.startswith("_sysconfigdata")

    return [file for file in sorted(folder.rglob("*.py")) if is_text(file)]


def folder_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [file for file in sorted(folder.rglob("*")) if file.suffix in {".py", ".txt", ".md"} and file.is_file()]


def to_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long() if text else torch.empty(0, dtype=torch.int64)


def baselines(training: Tensor, validation: Tensor) -> dict[str, float]:
    """Bits per byte of the validation text without a model."""
    text = bytes(validation.tolist())
    counts = collections.Counter(training.tolist())
    total = len(training) + 256  # one more of each byte, so that none is impossible
    unigram = -sum(math.log2((counts[byte] + 1) / total) for byte in text) / len(text)
    return {
        "byte frequencies": unigram,
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9e": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }
