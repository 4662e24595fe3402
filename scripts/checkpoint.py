"""Files that a run can be continued from: whole, or not there."""

import contextlib
import os
import pathlib
import pickle
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch

from command import InputError

FORMAT = "wmha-train 1"


@contextlib.contextmanager
def replacing(file: pathlib.Path) -> Iterator[BinaryIO]:
    """A stream to write the file's new content to. Whoever reads it, also after a crash, finds the old or the new."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.new")
    with temporary.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def write(content: str, file: pathlib.Path) -> None:
    with replacing(file) as stream:
        stream.write(content.encode())


def save(state: dict[str, Any], file: pathlib.Path) -> None:
    with replacing(file) as stream:
        torch.save({"format": FORMAT, **state}, stream)


def load(file: pathlib.Path) -> dict[str, Any]:
    """On the CPU. InputError where the file can't be read, is damaged, or isn't one that `save` wrote."""
    try:
        with zipfile.ZipFile(file) as parts:  # what torch.save writes; torch.load doesn't look at its checksums
            damaged = parts.testzip()
        state = {} if damaged else torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{file}: damaged, or not a checkpoint: {str(error).partition('. ')[0]}") from error
    if damaged:
        raise InputError(f"{file}: damaged: {damaged} is not what was saved")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{file}: not a checkpoint of this program, whose format is {FORMAT}")
    return state
