"""A process that trains the trials of a study, so that one that takes all memory, or crashes, ends nothing but itself."""

import contextlib
import dataclasses
import functools
import multiprocessing
import signal
import statistics
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from torch import Tensor

import text
from command import InputError
from processes import Processes
from training import Diverged, Training
from training_config import Config

REPORTS = 5  # validations of a trial


class Failed(Exception):
    """A trial came to no result; the message says why."""


class Pruned(Exception):
    """A trial was given up."""


@dataclasses.dataclass
class Result:
    loss: float  # the best validation, in bits per byte
    microseconds_per_byte: float  # of training, the median over the steps
    parameters: int
    bytes_read: int


class Worker:
    """Used as a context, which ends the process."""

    def __enter__(self) -> "Worker":
        self.process = None
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.connection.close()
            self.process.terminate()
            self.process.join()

    def train(self, config: Config, prune: Callable[[int, float], bool]) -> Result:
        """prune: told (steps, validation loss) now and then; ends the trial with Pruned by returning True."""
        if self.process is None:
            self._start()
        try:
            self.connection.send(config)
            while True:
                answer = self.connection.recv()
                if isinstance(answer, Result):
                    return answer
                if isinstance(answer, str):
                    raise Failed(answer)
                given_up = prune(*answer)
                self.connection.send(given_up)
                if given_up:
                    raise Pruned
        except (EOFError, ConnectionError) as error:
            self.process.join()
            code, self.process = self.process.exitcode, None
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
            raise Failed(f"the training's process ended {how}; perhaps it took too much memory") from error

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()


@functools.lru_cache(maxsize=1)
def texts(paths: tuple[str, ...], length: int, most: int) -> tuple[Tensor, Tensor]:
    return text.load(list(paths), length, most)


def serve(connection: Connection) -> None:
    """The process's side: until the other one is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other one, which ends this
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            config = connection.recv()
            try:
                answer = train(config, connection)
            except (RuntimeError, MemoryError, ValueError, Diverged, InputError) as error:
                answer = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            if answer is not None:
                connection.send(answer)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def train(config: Config, connection: Connection) -> Result | None:
    """None where the trial was given up."""
    if config.training.threads > 0:
        torch.set_num_threads(config.training.threads)
    data, steps = config.data, config.optimizer.steps
    with Processes(config.training.device) as processes:
        training = Training(config, *texts(tuple(data.data), data.length, data.validation_bytes), processes)
        seconds, every = [], max(1, steps // REPORTS)
        while not training.finished:
            before = training.seconds
            training.step()
            seconds.append(training.seconds - before)
            if training.steps % every == 0 or training.steps == steps:
                training.validate()
                if training.steps < steps:
                    connection.send((training.steps, training.validation_loss))
                    if connection.recv():
                        return None
    microseconds = 1e6 * statistics.median(seconds) / data.step_bytes
    return Result(training.best, microseconds, training.parameters, training.steps * data.step_bytes)
