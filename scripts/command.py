"""What the scripts' commands share: one-line errors, and Ctrl-C without a traceback."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class InputError(Exception):
    """Something that the user gave is wrong; the message says which, what was expected and what came."""


class Parser(argparse.ArgumentParser):
    """An error is one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.lstrip("+-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got '{text}'")
        return int(text)

    return convert


def between(low: float, high: float) -> Callable[[str], float]:
    """A number x with low <= x < high."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= float(text) < high:
                return float(text)
        raise argparse.ArgumentTypeError(f"expected a number in [{low:g}, {high:g}), got '{text}'")

    return convert


def run(name: str, main: Callable[[], int]) -> NoReturn:
    """Ends the program with main's exit status; 2 for an InputError, 130 for Ctrl-C."""
    try:
        status = main()
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
