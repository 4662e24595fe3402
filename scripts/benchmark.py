"""Measures wmha beside other ways to windowed attention.

Every result is checked against an fp64 reference before it is timed. All ways to one case take turns in one process, so
that a busy moment of the machine hits all of them. In a turn, the first call isn't timed: it finds the caches as the
way before left them. A time is the minimum over the rounds. Ratios are what to look at: how many times as long another
way takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

import benchmark_cases as cases
import benchmark_peers
import benchmark_plots
import benchmark_reference
import wmha
from benchmark_cases import Case
from machine import processor

OURS = "wmha"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHORTEST_SAMPLE = 20e-3  # seconds: shorter calls are repeated within a sample
LEAST_ROUNDS = 3
DEFAULT_DTYPES = {"cpu": ["fp32", "bf16"], "cuda": ["fp32", "bf16", "fp16"]}


@dataclasses.dataclass
class Result:
    """One way to one case."""

    case: str
    shape: str
    dtype: str
    backward: bool
    way: str
    heads: int  # of all batches
    length: int
    left: int
    error: float | None  # of the largest exact number
    minimum: float  # seconds
    median: float
    rate: float  # useful flops a second
    cache: float  # bytes a second of the keys and values of few queries; else 0


def call(attention: Callable, inputs: tuple[Tensor, ...], backward: bool) -> list[Tensor]:
    query, key, value, grad_output = inputs
    if not backward:
        with torch.no_grad():
            return [attention(query, key, value)]
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    output = attention(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def seconds_of(function: Callable, repeats: int, device: str) -> float:
    """Of one call, after one that isn't timed. On CUDA: from the start of the first on the device to the end of the
    last.
    """
    function()
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def ways_to(case: Case, dtype: torch.dtype, backward: bool, device: str) -> dict[str, Callable]:
    ways = {OURS: benchmark_peers.ours(case, dtype, device)}
    for name, peer in benchmark_peers.PEERS.items():
        if backward and device == "cpu" and name in benchmark_peers.FORWARD_ONLY_ON_CPU:
            continue
        try:
            attention = peer(case, dtype, device)
        except Exception as error:
            leave_out(name, case, dtype, error)
            continue
        if attention is not None:
            ways[name] = attention
    return ways


@functools.cache
def say(message: str) -> None:
    """On stderr, once."""
    tqdm.write(f"benchmark.py: {message}", file=sys.stderr)


def leave_out(name: str, case: Case, dtype: torch.dtype, error: Exception) -> None:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    say(f"{name} is left out of {case}, {dtype}: {reason}")


def check(case: Case, dtype: torch.dtype, backward: bool, ways: dict, inputs: tuple) -> dict[str, float | None]:
    """The errors of all ways, less those that can't run here or are wrong; ends the program if ours is."""
    errors = {}
    plain = benchmark_reference.exact(case, inputs, backward)
    for name, attention in ways.items():
        expected = plain
        if name == OURS and case.dropout_p:
            torch.manual_seed(0)
            options = {"window_left": case.left, "window_right": 0, "dropout_p": case.dropout_p}
            rng_state = torch.ops.wmha._attention_forward(*inputs[:3], **options)[2]
            expected = benchmark_reference.exact(case, inputs, backward, rng_state)
            torch.manual_seed(0)
        try:
            error = benchmark_reference.largest_error(call(attention, inputs, backward), expected)
            if not error <= benchmark_reference.TOLERANCE[dtype]:
                raise ArithmeticError(f"the result is wrong by {error:.2g} of the largest")
        except Exception as reason:
            if name == OURS:
                sys.exit(f"benchmark.py: {name}, {case}, {dtype}: {reason}")
            leave_out(name, case, dtype, reason)
        else:
            errors[name] = error
    return errors


def measure(case: Case, dtype_name: str, backward: bool, device: str, seconds: float) -> list[Result]:
    dtype = DTYPES[dtype_name]
    inputs = case.inputs(dtype, device)
    ways = ways_to(case, dtype, backward, device)
    errors = check(case, dtype, backward, ways, inputs)
    runs = {name: (lambda attention=ways[name]: call(attention, inputs, backward)) for name in errors}
    repeats = {name: max(1, math.ceil(SHORTEST_SAMPLE / seconds_of(run, 1, device))) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    while len(samples[OURS]) < LEAST_ROUNDS or time.perf_counter() - start < seconds:
        for name, run in runs.items():
            samples[name].append(seconds_of(run, repeats[name], device))
    flops, cache = case.flops(backward), case.cache_bytes(dtype)
    return [
        Result(case.name, str(case), dtype_name, backward, name, case.batch * case.heads, case.length, case.left,
               errors[name], min(times), statistics.median(times), flops / min(times), cache / min(times))
        for name, times in samples.items()
    ]  # fmt: skip


def machine_rates(dtypes: list[str], device: str, quick: bool) -> dict[str, float]:
    """Products of large matrices, in flops a second, and the rate at which memory is read, in bytes a second."""
    if device == "cpu":
        size, elements, rounds = 2048, 2**26, 8
    else:  # enough for all of a GPU, and more than its caches
        size, elements, rounds = (1024, 2**24, 2) if quick else (8192, 2**28, 8)
    rates = {}
    for name in dtypes:
        matrix = torch.ones(size, size, dtype=DTYPES[name], device=device)
        seconds = min(seconds_of(lambda: matrix @ matrix, 1, device) for _ in range(rounds))  # noqa: B023
        rates[name] = 2 * size**3 / seconds
    memory = torch.ones(elements, device=device)
    rates["read"] = memory.nbytes / min(seconds_of(memory.sum, 1, device) for _ in range(rounds))
    return rates


def table(results: list[Result], rates: dict[str, float]) -> str:
    """A row for each case, dtype and pass: our time and rate, and how many times as long the others take."""
    peers = list(dict.fromkeys(result.way for result in results if result.way != OURS))
    head = ["case (B x H x N x D)", "dtype", "pass", "wmha, ms", "GF/s", "of the machine's", *peers]
    rows = [head]
    for ours in (result for result in results if result.way == OURS):
        job = (ours.case, ours.shape, ours.dtype, ours.backward)
        same = {r.way: r for r in results if (r.case, r.shape, r.dtype, r.backward) == job}
        share = ""
        if ours.cache:
            share = f"{ours.cache / rates['read']:.0%} of reading"
        elif ours.dtype in rates:
            share = f"{ours.rate / rates[ours.dtype]:.0%} of matmul"
        ratios = [f"{same[peer].minimum / ours.minimum:.2f} x" if peer in same else "" for peer in peers]
        name = "training" if ours.backward else "forward"
        rows.append(
            [ours.shape, ours.dtype, name, f"{1e3 * ours.minimum:.3f}", f"{ours.rate / 1e9:.0f}", share, *ratios]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few small cases, within a minute; no pictures")
    parser.add_argument("--only", default="", help="cases whose description contains this, such as 'dropout' or '4096'")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: fp32 bf16, and on cuda fp16")
    parser.add_argument("--passes", nargs="+", choices=["forward", "training"], default=["forward", "training"])
    parser.add_argument("--seconds", type=float, help="for each case, dtype and pass (default: 2; --quick: 0.3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--device", choices=DEFAULT_DTYPES, default="cpu", help="default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("wmha-benchmark"), help="default: %(default)s")
    args = parser.parse_args()
    args.seconds = args.seconds or (0.3 if args.quick else 2.0)
    args.dtypes = args.dtypes or DEFAULT_DTYPES[args.device]
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    return args


def main() -> int:
    args = parse()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(args.threads)
    chosen = cases.QUICK if args.quick else cases.CUDA if args.device == "cuda" else cases.CPU
    chosen = [case for case in chosen if args.only in f"{case.name}: {case}"]
    jobs = [
        (case, dtype, backward)
        for case in chosen
        for dtype in args.dtypes
        for backward in (False, True)
        if ("training" if backward else "forward") in set(case.passes) & set(args.passes)
        and (not case.dtypes or DTYPES[dtype] in case.dtypes)
    ]
    if not jobs:
        sys.exit(f"benchmark.py: error: no case for --only {args.only!r} with the dtypes and passes asked for")
    rates = machine_rates(args.dtypes, args.device, args.quick)
    information = {
        "processor": processor(args.device),
        **({"threads": args.threads} if args.device == "cpu" else {}),
        "torch": torch.__version__,
        "wmha": wmha.__version__,
        "commit": commit(),
    }
    print(", ".join(f"{name} {value}" for name, value in information.items()))
    products = ", ".join(f"{name} {rates[name] / 1e9:.0f} GF/s" for name in args.dtypes)
    print(f"products of matrices: {products}; memory read at {rates['read'] / 1e9:.0f} GB/s")
    results: list[Result] = []
    with tqdm(jobs, unit="case", dynamic_ncols=True) as bar:
        for case, dtype, backward in bar:
            bar.set_postfix_str(f"{case}, {dtype}, {'training' if backward else 'forward'}")
            results += measure(case, dtype, backward, args.device, args.seconds)
    print(table(results, rates))
    everything = {"machine": information, "rates": rates, "results": [dataclasses.asdict(r) for r in results]}
    (args.out / "benchmark.json").write_text(json.dumps(everything, indent=1))
    if not args.quick:
        benchmark_plots.draw(args.out, results, information)
    print(f"everything is in {os.path.abspath(args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
