"""Trains a small language model with wmha on Python's standard library, measures it, and runs it from C++.

One run shows what the plugin is for: a causal model with a sliding window, dropout on the attention weights and a
learned temperature for each head learns to predict the next byte; the same model on PyTorch's own attention shows what
a training step costs there; and the trained model leaves Python as TorchScript and as an AOTInductor package, which a
C++ program loads and agrees with.
"""

# ruff: noqa: E402  (imports below what has to come first)
import os
import signal

# The imports take seconds: Ctrl-C ends them without a traceback. main() puts Python's own handler back.
signal.signal(signal.SIGINT, signal.SIG_DFL)
# Read when OpenMP is loaded, with torch. Threads that wait would otherwise spin, and where other programs run as well,
# as on a shared machine, a step would take many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import json
import pathlib
import platform
import subprocess
import sys
import time

import torch
from torch import Tensor
from tqdm import tqdm

import demo_compare
import demo_export
import demo_options
import demo_text
from demo_model import LanguageModel, generate
from demo_training import Trainer, bits_per_byte, is_bf16_faster
from machine import processor

SHORTEST = 64  # bytes of text with which anything can be shown
VALIDATE_AT = (0.03, 0.1, 0.2, 0.4, 0.7)  # of the training, for the learning curve


def train(model: LanguageModel, text: Tensor, validation: Tensor, args: argparse.Namespace):
    """-> bits per byte of each training step, and [(steps, bits per byte of the validation text)]."""
    generator = torch.Generator().manual_seed(args.seed)
    trainer = Trainer(model, args.lr, args.dtype == "bf16")
    losses, points, spent = [], [(0, bits_per_byte(model, validation))], 0.0
    validate_at = list(VALIDATE_AT)
    model.train()
    with tqdm(total=args.steps, unit="step", dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10) as bar:
        while len(losses) < args.steps and spent < args.seconds:
            start = time.perf_counter()
            progress = max(len(losses) / args.steps, spent / args.seconds)
            first = torch.randint(len(text) - args.length, (args.batch, 1), generator=generator)
            losses.append(trainer.step(text[first + torch.arange(args.length + 1)].to(args.device), progress))
            if validate_at and progress >= validate_at[0]:
                del validate_at[0]
                points.append((len(losses), bits_per_byte(model, validation)))
            bar.set_postfix_str(f"{losses[-1]:.2f} bits per byte, validation {points[-1][1]:.2f}", refresh=False)
            bar.update()
            spent += time.perf_counter() - start
    points.append((len(losses), bits_per_byte(model, validation)))
    return losses, points


def compare(args: argparse.Namespace) -> dict[str, list[demo_compare.Step]]:
    shape = model_shape(args)
    difference = demo_compare.largest_difference(shape, 300, args.device)
    print(f"  same weights, without dropout: logits and gradients differ by {difference:.1g} of the largest")
    with tqdm(total=0, bar_format="  {desc}", leave=False, disable=None) as line:
        results = demo_compare.measure(
            shape, args.dropout, args.compare_lengths, args.compare_seconds,
            {"device": args.device, "threads": args.threads, "bf16": args.dtype == "bf16"}, line.set_description_str,
        )  # fmt: skip
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


def model_shape(args: argparse.Namespace) -> dict[str, int]:
    return {"layers": args.layers, "dim": args.dim, "heads": args.heads, "window": args.window}


def leave_python(model: LanguageModel, tokens: Tensor, folder: pathlib.Path) -> bool:
    """Saves the model in both forms and has the C++ program compare them with Python; did all agree?"""
    files = [folder / "model.pt", folder / "model.pt2", folder / "example.pt"]
    log = folder / "cpp_build.log"
    with demo_export.building(folder / "cpp_build", log) as build:
        demo_export.save(model, tokens, *files)
        if build.wait() != 0:
            print(f"  building the C++ program failed; see {log}")
            return False
    app = subprocess.run([folder / "cpp_build" / "cpp_app", *files], text=True, capture_output=True)
    print("  " + (app.stdout + app.stderr).strip().replace("\n", "\n  "))
    return app.returncode == 0


class Stages:
    """Headings with the time that has passed."""

    def __init__(self):
        self.start = time.perf_counter()

    def __call__(self, text: str) -> None:
        print(f"\n[{time.perf_counter() - self.start:3.0f} s] {text}", flush=True)


def run(parser: demo_options.Parser, args: argparse.Namespace) -> int:
    stage = Stages()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    if args.dtype == "auto":
        args.dtype = "bf16" if is_bf16_faster(args.device) else "fp32"

    try:
        text, validation = demo_text.load(args.text, args.validation)
    except OSError as error:
        parser.error(f"--text {args.text}: {error.strerror}")
    if len(text) <= args.length or len(validation) < SHORTEST:
        found = f"{len(text):,} bytes to train on and {len(validation):,} to validate on"
        parser.error(
            f"too little text for --length {args.length}: {found}; wanted are more than --length, and {SHORTEST}"
        )
    stage(f"Training on {len(text):,} bytes, {'of the standard library' if args.text is None else args.text}")
    baselines = demo_text.baselines(text, validation)
    model = LanguageModel(**model_shape(args), dropout=args.dropout).to(args.device)
    validation = validation.to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"  {parameters:,} parameters, window {args.window}, {args.dtype}, {args.threads} threads")
    losses, points = train(model, text, validation, args)
    print(f"  bits per byte of {len(validation):,} bytes of files it has not seen")
    for name, value in {"before training": points[0][1], **baselines, "after training": points[-1][1]}.items():
        print(f"    {name:18} {value:5.2f}")

    stage("Time and peak memory of a training step, beside scaled_dot_product_attention with a window mask")
    results = compare(args)

    stage("Leaving Python: TorchScript, AOTInductor, and a C++ program that loads both")
    model = model.cpu()
    tokens = validation[None, :300].cpu()
    agrees = leave_python(model, tokens, args.out)
    print("  C++ gets the same numbers as Python" if agrees else "  C++ DIFFERS from Python")

    stage("Pictures, and a sample")
    import demo_plots  # late: matplotlib takes a while, and the measuring processes import this file

    demo_plots.learning(args.out / "learning.png", losses, args.batch * args.length, points, baselines)
    demo_plots.cost(args.out / "cost.png", results, args.window, f"{args.dtype}, {args.threads} threads, one sequence")
    demo_plots.attention(args.out / "attention.png", model, validation[: 2 * args.window].cpu(), args.window)
    generator = torch.Generator().manual_seed(args.seed)
    sample = generate(model, b"\0class ", args.sample, args.layers * args.window, generator)[1:]
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
        return run(*demo_options.parse(__doc__))
    except KeyboardInterrupt:
        print("\ndemo.py: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
