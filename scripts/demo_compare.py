"""Time and memory of training steps: the model on wmha beside the same model on scaled_dot_product_attention.

Each variant lives in a process of its own, so that its peak memory is its own; they take turns, step by step, so that
a busy moment of the machine hits all of them.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver

import torch
import torch.nn.functional as F
from torch import Tensor

from language_model import LanguageModel
from processes import Processes
from training import Training
from training_config import Config
from wmha.nn import MultiheadAttention


class MaskedAttention(MultiheadAttention):
    """The same numbers from PyTorch's own attention, which takes a window as a mask of N x N booleans."""

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.num_heads, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (project(x).unflatten(-1, heads).transpose(1, 2) for project in projections)
        query = query / self.log_temperature.exp()[:, None, None]
        mask = window_mask(x.size(1), self.window[0], x.device)
        dropout = self.dropout if self.training else 0.0
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(output.transpose(1, 2).flatten(2))


@functools.lru_cache(maxsize=1)  # as a careful user would: one mask for all layers and steps
def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    back = position[:, None] - position
    return (back >= 0) & (back <= window)


ATTENTIONS = {"wmha": MultiheadAttention, "SDPA with a mask": MaskedAttention}
WARM_UP_LENGTH = 16
MEMORY_SHARE = 0.5  # of what is free: a step expected to need more is left out
PATIENCE = 0.25  # of the whole time: a step expected to take longer is left out
ROUNDS = 10


@dataclasses.dataclass
class Variant:
    """One line of the picture."""

    attention: str  # of ATTENTIONS
    dropout: float

    @property
    def name(self) -> str:
        return f"{self.attention}, {'dropout' if self.dropout > 0 else 'no dropout'}"


@dataclasses.dataclass
class Step:
    """What one training step on a sequence took."""

    length: int
    seconds: float  # the fastest of the rounds
    mebibytes: float  # peak above what model, gradients and optimiser hold between steps


def measure(config: Config, lengths: list[int], seconds: float, device: str, tell: Callable) -> dict[str, list[Step]]:
    """The steps of each variant, by name, up to the lengths that memory and patience allow."""
    dropout = config.model.attention_dropout
    variants = [Variant(attention, p) for p in dict.fromkeys((dropout, 0.0)) for attention in ATTENTIONS]
    results: dict[str, list[Step]] = {variant.name: [] for variant in variants}
    start_server()
    with contextlib.ExitStack() as stack:
        workers = {v.name: stack.enter_context(worker(v, config, device)) for v in variants}
        for connection in workers.values():
            ask(connection, WARM_UP_LENGTH)  # answered when the process has begun
        start = time.perf_counter()
        for i, length in enumerate(lengths):
            deadline = start + seconds * (i + 1) / len(lengths)
            running = [name for name in workers if affordable(results[name], length, PATIENCE * seconds)]
            if not running:
                break
            for round_ in range(ROUNDS):
                if round_ > 0 and time.perf_counter() > deadline:
                    break
                for name in list(running):
                    tell(f"{length} bytes, {name}")
                    answer = ask(workers[name], length)
                    if answer is None:  # it wrote why, or was ended from outside, perhaps for its memory
                        running.remove(name)
                        results[name] = [step for step in results[name] if step.length < length]
                        continue
                    step = Step(length, *answer)
                    if round_ == 0:
                        results[name].append(step)
                    else:  # the first round also warmed up, so it counts only if it was the fastest
                        best = results[name][-1]
                        best.seconds = min(best.seconds, step.seconds)
                        best.mebibytes = max(best.mebibytes, step.mebibytes)
    return results


def affordable(steps: list[Step], length: int, patience: float) -> bool:
    """Can a step of this length be expected to fit, if it grows with the square of the length?"""
    if not steps:
        return True
    growth = (length / steps[-1].length) ** 2
    memory = steps[-1].mebibytes * growth < MEMORY_SHARE * free_mebibytes()
    return steps[-1].length * 2 >= length and memory and steps[-1].seconds * growth < patience


def free_mebibytes() -> float:
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**21  # half of all


def start_server() -> None:
    """Starts what workers are forked from. It doesn't hear Ctrl-C, which is for this process: it ends the workers."""
    multiprocessing.set_forkserver_preload(["torch", "torch._dynamo"])  # seconds for each worker otherwise
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def worker(variant: Variant, config: Config, device: str) -> Iterator:
    """A connection that takes a length and answers (seconds, mebibytes) of a training step."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, variant, config, device), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.terminate()
        process.join()


def ask(connection, length: int) -> tuple[float, float] | None:
    """None if the worker has ended."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        connection.send(length)
        return connection.recv()


def serve(connection, variant: Variant, config: Config, device: str) -> None:
    """The worker's side: trains on random bytes until nobody asks any more."""
    torch.set_num_threads(config.training.threads)
    config.model.attention_dropout = variant.dropout
    config.data.batch_size = 1
    training = Training(config, torch.empty(0), torch.empty(0), Processes(device))
    attend_with(ATTENTIONS[variant.attention], training.model)
    step(training, WARM_UP_LENGTH)
    before = memory(device)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            seconds = step(training, connection.recv())
            connection.send((seconds, peak_memory(device) - before))


def attend_with(attention: type[MultiheadAttention], model: LanguageModel) -> None:
    """The model's attention becomes one of this class, with the same parameters, which an optimizer may hold."""
    for layer in model.stack.layers:
        layer.self_attn.__class__ = attention


def step(training: Training, length: int) -> float:
    """The seconds of a training step on `length` random bytes."""
    training.config.data.length = length
    training.text = torch.randint(256, (length + 1,), dtype=torch.uint8)
    start = time.perf_counter()
    training.step()
    training.model.embedding.weight[0, 0].item()  # waits for the device
    return time.perf_counter() - start


def memory(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated() / 2**20
    return status("VmRSS")


def peak_memory(device: str) -> float:
    """Since the process began: lengths that only grow make it the last one's."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return status("VmHWM")


def status(field: str) -> float:
    """Of this process, in MiB. Not getrusage's ru_maxrss, which a child takes over from its parent."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def largest_difference(config: Config, length: int, device: str) -> float:
    """Of the logits and of all gradients of both models with the same weights, relative to the largest number."""
    torch.manual_seed(0)
    model = LanguageModel(**dict(config.model)).to(device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # none is zero, no two heads are alike
    tokens = torch.randint(256, (1, length), device=device)
    numbers = []
    for attention in ATTENTIONS.values():
        attend_with(attention, model)
        model.zero_grad()
        logits = model(tokens)
        logits.square().mean().backward()
        numbers.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*numbers, strict=True))
