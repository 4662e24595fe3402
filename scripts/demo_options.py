"""The demo's options."""

import argparse
import math
import pathlib
import time

import torch

import command
import demo_cpp
import training_config
import wmha
from command import InputError, at_least, between
from training_config import Config

QUICK = {  # what --quick makes the defaults: every part of the demo, each too short to impress
    "seconds": 10.0,
    "layers": 2,
    "dim": 64,
    "length": 128,
    "window": 64,
    "compare_seconds": 8.0,
    "compare_lengths": [256, 512, 1024],
    "validation": 2**14,
    "sample": 120,
}

WARM_UP = 0.05  # of the training


def parse(description: str) -> argparse.Namespace:
    """The checked options."""
    parser = command.Parser(
        prog="demo.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(group, name, default, type, text, **more):
        shown = "" if default is None else " (default: %(default)s)"
        group.add_argument(name, default=default, type=type, help=text + shown, **more)

    model = parser.add_argument_group("model")
    add(model, "--layers", 4, at_least(1), "number of layers")
    add(model, "--dim", 128, at_least(2), "width of the model, a multiple of --heads")
    add(model, "--heads", 4, at_least(1), "attention heads in each layer")
    add(model, "--window", 128, at_least(1), "how many bytes before its own a byte sees")
    add(model, "--dropout", 0.1, between(0, 1), "probability with which an attention weight is dropped in training")
    training = parser.add_argument_group("training")
    add(training, "--steps", None, at_least(1), "training steps (default: 2000, or as many as --seconds allows)")
    add(training, "--seconds", 130.0, between(0.1, math.inf), "time for training, in seconds; with --steps, no limit")
    add(training, "--batch", 8, at_least(1), "sequences in a step")
    add(training, "--length", 256, at_least(2), "bytes in a sequence")
    add(training, "--lr", 3e-3, between(0, math.inf), "highest learning rate")
    add(training, "--text", None, pathlib.Path, "a file or a folder of text to train on instead")
    add(training, "--validation", 2**17, at_least(1), "bytes of text held out for validation, at most")
    compare = parser.add_argument_group("comparison with scaled_dot_product_attention")
    add(compare, "--compare-lengths", [512, 1024, 2048, 4096, 8192, 16384], at_least(2), "lengths, in bytes", nargs="+")
    add(compare, "--compare-seconds", 45.0, between(0, math.inf), "time for it, in seconds")
    general = parser.add_argument_group("general")
    add(general, "--sample", 400, at_least(0), "bytes of text that the trained model writes")
    add(general, "--seed", 0, at_least(0), "of everything random")
    add(general, "--device", "cpu", str, "where to train and measure, as PyTorch names it")
    dtypes = ["auto", "fp32", "bf16"]
    add(general, "--dtype", "auto", str, "of products in training; auto: bf16 where it is faster", choices=dtypes)
    add(general, "--threads", torch.get_num_threads(), at_least(1), "threads on the CPU")
    add(general, "--out", pathlib.Path("wmha-demo"), pathlib.Path, "folder for pictures, models and numbers")
    general.add_argument("--quick", action="store_true", help="every part, smaller, in about a minute")

    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args()
    if args.steps is not None and args.seconds == parser.get_default("seconds"):
        args.seconds = math.inf
    args.steps = args.steps or 2000
    args.compare_lengths = sorted(set(args.compare_lengths))
    if args.dim % args.heads != 0:
        raise InputError(f"--dim {args.dim} is not a multiple of --heads {args.heads}")
    if missing := demo_cpp.missing_tools():
        raise InputError(f"{' and '.join(missing)} not found: needed for the AOTInductor package and the C++ program")
    try:
        probe = torch.zeros(1, 1, 2, 8, device=torch.device(args.device))
        wmha.attention(probe, probe, probe, window=(1, 0)).sum().item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device} doesn't work here: {str(error).splitlines()[0]}") from error
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "numbers.json").write_text("{}")
    except OSError as error:
        raise InputError(f"--out {args.out}: {error.strerror}") from error
    return args


def is_bf16_faster(device: str) -> bool:
    """Some processors multiply bfloat16 several times as fast as float32, others many times slower."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(512, 512, dtype=dtype, device=device)
        times = []
        for _ in range(30):
            start = time.perf_counter()
            (matrix @ matrix)[0, 0].item()
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


def configuration(args: argparse.Namespace) -> Config:
    """What the options mean for the training."""
    table = {
        "model": {
            "num_layers": args.layers,
            "embed_dim": args.dim,
            "num_heads": args.heads,
            "window": args.window,
            "attention_dropout": args.dropout,
        },
        "optimizer": {"learning_rate": args.lr, "steps": args.steps, "warm_up": int(WARM_UP * args.steps)},
        "data": {"length": args.length, "batch_size": args.batch},
        "training": {"bf16": args.dtype == "bf16", "threads": args.threads, "seed": args.seed},
    }
    return training_config.check(training_config.validate(table, "options"), "options")
