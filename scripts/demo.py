"""Trains a small language model with wmha on Python's standard library, measures it, and runs it from C++.

One run shows what the plugin is for: a causal model with a sliding window, dropout on the attention weights and a
learned temperature for each head learns to predict the next byte; the same model on PyTorch's own attention shows what
a training step costs there; and the trained model leaves Python as TorchScript and as an AOTInductor package, which a
C++ program loads and agrees with.
"""

# ruff: noqa: E402  (imports below what has to come first)
import command

command.prepare()

import argparse
import json
import math
import platform
import signal
import sys
import time

import torch
from tqdm import tqdm

import demo_compare
import demo_cpp
import demo_options
import text
from language_model import generate
from machine import processor
from processes import Processes
from training import Diverged, Training
from training_config import Config

VALIDATE_AT = (0.03, 0.1, 0.2, 0.4, 0.7, 1)  # of the training, for the learning curve


def train(training: Training, seconds: float) -> tuple[list[float], list[tuple[int, float]]]:
    """-> bits per byte of each training step, and [(steps, bits per byte of the validation text)].

    The learning rate falls with the steps: they become as many as fit into the seconds at the pace so far.
    """
    optimizer = training.config.optimizer
    most = optimizer.steps
    training.validate()
    losses, points, validate_at = [], [(0, training.validation_loss)], list(VALIDATE_AT)
    start = time.perf_counter()
    with command.progress("step", total=most) as bar:
        while not training.finished:
            losses.append(training.step().loss)
            left = max(0, seconds - (time.perf_counter() - start))
            fit = training.steps + left / (training.seconds / training.steps)
            optimizer.steps = bar.total = math.ceil(min(most, fit))
            optimizer.warm_up = int(demo_options.WARM_UP * optimizer.steps)
            if training.steps >= validate_at[0] * optimizer.steps:
                del validate_at[0]
                training.validate()
                points.append((training.steps, training.validation_loss))
            bar.set_postfix_str(f"{losses[-1]:.2f} bits per byte, validation {points[-1][1]:.2f}", refresh=False)
            bar.update()
    return losses, points


def compare(config: Config, args: argparse.Namespace) -> dict[str, list[demo_compare.Step]]:
    difference = demo_compare.largest_difference(config, 300, args.device)
    print(f"  same weights, without dropout: logits and gradients differ by {difference:.1g} of the largest")
    with tqdm(total=0, bar_format="  {desc}", leave=False, disable=None) as line:
        results = demo_compare.measure(
            config, args.compare_lengths, args.compare_seconds, args.device, line.set_description_str
        )
    for name, steps in results.items():
        print(f"  {name}")
        for step in steps:
            print(f"    {step.length:7,} bytes: {1000 * step.seconds:9,.1f} ms {step.mebibytes:9,.0f} MiB")
    for p in dict.fromkeys((args.dropout, 0.0)):
        ours, theirs = ({step.length: step for step in results[demo_compare.Variant(name, p).name]} for name in
                        demo_compare.ATTENTIONS)  # fmt: skip
        length = max(ours.keys() & theirs.keys(), default=None)
        if length is None:
            continue
        faster = theirs[length].seconds / ours[length].seconds
        smaller = theirs[length].mebibytes / ours[length].mebibytes
        print(f"  {length:,} bytes, dropout {p:g}: SDPA takes {faster:.1f} x the time, {smaller:.1f} x the memory")
    return results


class Stages:
    """Headings with the time that has passed."""

    def __init__(self):
        self.start = time.perf_counter()

    def __call__(self, text: str) -> None:
        print(f"\n[{time.perf_counter() - self.start:3.0f} s] {text}", flush=True)


def run(args: argparse.Namespace) -> int:
    stage = Stages()
    torch.set_num_threads(args.threads)
    if args.dtype == "auto":
        args.dtype = "bf16" if demo_options.is_bf16_faster(args.device) else "fp32"
    config = demo_options.configuration(args)
    training_text, validation = text.load([str(args.text)] if args.text else [], args.length, args.validation)
    stage(f"Training on {len(training_text):,} bytes, {args.text or 'of the standard library'}")
    baselines = text.baselines(training_text, validation)
    training = Training(config, training_text, validation, Processes(args.device))
    model = training.model
    print(f"  {training.parameters:,} parameters, window {args.window}, {args.dtype}, {args.threads} threads")
    losses, points = train(training, args.seconds)
    print(f"  bits per byte of {len(validation):,} bytes of files it has not seen")
    for name, value in {"before training": points[0][1], **baselines, "after training": points[-1][1]}.items():
        print(f"    {name:18} {value:5.2f}")

    stage("Time and peak memory of a training step, beside scaled_dot_product_attention with a window mask")
    results = compare(config, args)

    stage("Leaving Python: TorchScript, AOTInductor, and a C++ program that loads both")
    model.cpu()
    agrees = demo_cpp.leave_python(model, validation[None, :300].long(), args.out)
    print("  C++ gets the same numbers as Python" if agrees else "  C++ DIFFERS from Python")

    stage("Pictures, and a sample")
    import demo_plots  # late: matplotlib takes a while, and the measuring processes import this file
    import plots

    plots.learning(args.out / "learning.png", losses, config.data.step_bytes, points, baselines)
    demo_plots.cost(args.out / "cost.png", results, args.window, f"{args.dtype}, {args.threads} threads, one sequence")
    demo_plots.attention(args.out / "attention.png", model, validation[: 2 * args.window], args.window)
    generator = torch.Generator().manual_seed(args.seed)
    sample = generate(model, b"\0class ", args.sample, generator)[1:]
    sample = sample.decode(errors="replace")
    (args.out / "sample.txt").write_text(sample)
    print("  | " + sample.replace("\n", "\n  | "))

    numbers = {
        "machine": {"processor": processor(), "torch": torch.__version__, "python": platform.python_version()},
        "options": {name: str(value) for name, value in vars(args).items()},
        "bits_per_byte": {"before": points[0][1], "after": points[-1][1], **baselines},
        "validation": points,
        "steps": {name: [vars(step) for step in steps] for name, steps in results.items()},
        "cpp_agrees": agrees,
    }
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=1))
    stage(f"Everything is in {args.out.resolve()}")
    for name, what in (
        ("learning.png", "bits per byte while it learned, beside what others need"),
        ("attention.png", "what four of its heads look at"),
        ("cost.png", "time and memory of a training step over the length of the sequence"),
        ("sample.txt", "text that it wrote"),
        ("model.pt", "the model as TorchScript"),
        ("model.pt2", "the model as an AOTInductor package"),
        ("example.pt", "an input, and the output that all of them get"),
        ("cpp_build/cpp_app", "the C++ program: cpp_app model.pt model.pt2 example.pt"),
        ("numbers.json", "all numbers and options"),
    ):
        print(f"  {name:18} {what}")
    return 0 if agrees else 1


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run(demo_options.parse(__doc__))
    except Diverged as error:
        print(f"demo.py: {error}; a lower --lr may help", file=sys.stderr)
        return 1


if __name__ == "__main__":
    command.run("demo.py", main)
