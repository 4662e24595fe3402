"""What the scripts' commands share: one-line errors, Ctrl-C without a traceback, progress."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from tqdm import tqdm


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


def prepare() -> None:
    """To be called before torch is imported."""
    # The imports take seconds: Ctrl-C ends them without a traceback. A main() puts a handler in place again.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Read when OpenMP is loaded, with torch. Threads that wait would otherwise spin, and where other programs run as
    # well, as on a shared machine, a step would take many times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def progress(unit: str, **options: Any) -> tqdm:
    """A progress bar; a line now and then where nobody watches."""
    return tqdm(unit=unit, dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10, **options)


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
