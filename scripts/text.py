"""Text to train on: files and folders of the user's or, on every machine, the sources of Python's standard library."""

import gzip
import hashlib
import lzma
import pathlib
import sysconfig

import torch
from torch import Tensor

from command import InputError

# Not the library's own code (what pip installed), or tables rather than text.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
TEXT_SUFFIXES = {".py", ".txt", ".md", ".rst", ".c", ".h", ".cpp", ".hpp", ".cu", ".java", ".js", ".json", ".html"}
HELD_OUT = 16  # every 16th file is for validation; with fewer files, the last tenth of each
SHORTEST = 64  # bytes to validate on with which anything can be shown


def load(paths: list[str], length: int, most: int) -> tuple[Tensor, Tensor]:
    """Bytes (N,), as uint8, to train on, N > length, and at most `most` others for validation.

    Of a folder all files that look like text by their names are taken, of the library its Python files.
    """
    files = [file for path in paths for file in files_of(pathlib.Path(path))] if paths else library_files()
    training, validation = [], []
    for i, file in enumerate(files):
        content = read(file)
        part = len(content) // 10 if len(files) < HELD_OUT else len(content) * (i % HELD_OUT == HELD_OUT // 2)
        split = len(content) - part
        training.append(content[:split])
        validation.append(content[split:])
    # A 0 byte, which no text holds, stands between files.
    training, validation = (to_tensor(b"\0".join(part for part in parts if part)) for parts in (training, validation))
    if len(training) <= length or len(validation) < SHORTEST:
        raise InputError(
            f"{named(paths)}: too short: {len(training):,} bytes to train on and "
            f"{len(validation):,} to validate on; wanted are more than length, {length:,}, and {SHORTEST}"
        )
    return training, validation[:most]


def named(paths: list[str]) -> str:
    """The text, as errors name it."""
    return f"data {' '.join(paths) or 'of the standard library'}"


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.is_dir():
        return [path]
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in TEXT_SUFFIXES and file.is_file()]
    if not files:
        raise InputError(f"data {path}: no files of text in this folder, such as .txt or .py")
    return files


def library_files() -> list[pathlib.Path]:
    folder = pathlib.Path(sysconfig.get_path("stdlib"))

    def is_text(file: pathlib.Path) -> bool:
        # _sysconfigdata*.py is written when Python is built: it differs from machine to machine.
        return not SKIPPED.intersection(file.relative_to(folder).parts) and not file.name.startswith("_sysconfigdata")

    return [file for file in sorted(folder.rglob("*.py")) if is_text(file)]


def read(file: pathlib.Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"data {file}: {error.strerror}") from error


def to_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def digest(text: Tensor) -> str:
    """Tells one text from another."""
    return hashlib.sha256(text.numpy()).hexdigest()


def baselines(training: Tensor, validation: Tensor) -> dict[str, float]:
    """Bits per byte of the validation text without a model."""
    text = bytes(validation.tolist())
    counts = torch.bincount(training, minlength=256) + 1.0  # one more of each byte, so that none is impossible
    return {
        "byte frequencies": -(counts / counts.sum()).log2()[validation.int()].mean().item(),
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9e": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }
