"""Trains a language model of wmha's layers on bytes of text.

Every hyper-parameter is a key of a configuration file and an option here, which wins. The folder --out gets
config.toml (all keys), metrics.csv and tensorboard/, learning.png, best.pt (the model that did best on the validation
text), checkpoint.pt (what --resume continues from, exactly) and, with --export, model.pt (TorchScript) and model.pt2
(AOTInductor). Ctrl-C saves before it ends.

    python scripts/train.py --config my.toml --data texts/ --num-heads 8 --learning-rate 2e-3
    python scripts/train.py --resume
    torchrun --nproc-per-node 2 scripts/train.py
"""

# ruff: noqa: E402  (imports below what has to come first)
import command

command.prepare()

import argparse
import pathlib
import signal
import sys

import torch

import checkpoint
import export
import metrics
import text
import training_config
from command import InputError
from processes import Processes, started
from training import Diverged, Training
from training_config import SECTION_OF, Config, Model

# What a run keeps from beginning to end; the rest may be changed where it is resumed.
FIXED = (*Model.model_fields, "optimizer", "length", "batch_size", "validation_bytes")


def options() -> argparse.Namespace:
    parser = command.Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=pathlib.Path, help="a configuration file; what it leaves out has the default")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("wmha-train"), help="folder of the run (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, with its own configuration")
    parser.add_argument("--export", action="store_true", help="write the best model as model.pt and model.pt2, too")
    training_config.add_options(parser)
    return parser.parse_args()


def configuration(args: argparse.Namespace, processes: int) -> Config:
    file, own = args.config, args.out / "config.toml"
    if args.resume:
        if file is not None:
            raise InputError(f"--config: --resume goes on with the configuration of the run itself, {own}")
        file = own
    elif own.exists():
        raise InputError(f"--out {args.out}: holds a run already; --resume continues it, another folder begins one")
    config = training_config.override(Config() if file is None else training_config.read(file), args)
    return training_config.check(config, "options" if file is None else str(file), processes)


def begin(args: argparse.Namespace, config: Config, processes: Processes) -> Training:
    """A training at its beginning or, with --resume, where its checkpoint left it."""
    data = config.data
    training = Training(config, *text.load(data.data, data.length, data.validation_bytes), processes)
    file = args.out / "checkpoint.pt"
    if args.resume and file.exists():
        state = checkpoint.load(file)
        for name in FIXED:
            section = SECTION_OF[name]
            now, before = config.table()[section][name], state["config"][section][name]
            if now != before:
                raise InputError(f"{args.out / 'config.toml'}: [{section}] {name}: is {now}, but {file} has {before}")
        if state["text"] != training.digest:
            raise InputError(f"{text.named(data.data)}: not the text that {file} learned")
        training.load_state(state)
    return training


class Interruptions:
    """Notes SIGINT and SIGTERM, so that the training can end between two steps. A second Ctrl-C ends the program."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, _: object) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def train(training: Training, out: pathlib.Path, interruptions: Interruptions) -> None:
    """Trains to the end, until validation no longer gets better, or until it is interrupted; then saves."""
    steps, settings, processes = training.config.optimizer.steps, training.config.training, training.processes
    log = metrics.Metrics(out, training.steps) if processes.first else None
    bar = command.progress("step", total=steps, initial=training.steps, disable=not processes.first)
    interrupted = False
    with bar:
        while not (training.finished or interrupted):
            step = training.step()
            validated = training.steps % settings.validate_every == 0 or training.steps == steps
            if validated and training.validate() and processes.first:
                checkpoint.save(training.state(), out / "best.pt")
            interrupted = processes.sum(interruptions.signal) > 0
            if log is not None:
                log.add(training, step, validated)
                if training.steps % settings.checkpoint_every == 0 or training.finished or interrupted:
                    log.flush()
                    checkpoint.save(training.state(), out / "checkpoint.pt")
            bar.set_postfix_str(
                f"{step.loss:.3f} bits per byte, validation {training.validation_loss:.3f}", refresh=False
            )
            bar.update()
    if log is not None:
        log.close()


def describe(training: Training) -> None:
    config, processes = training.config, training.processes
    where = f"{torch.get_num_threads()} threads" if processes.device.type == "cpu" else str(processes.device)
    print(
        f"{training.parameters:,} parameters on {len(training.text):,} bytes of {' '.join(config.data.data) or 'the standard library'}; "
        f"{'bf16' if config.training.bf16 else 'fp32'}, {processes.count} x {where}"
        f"{f'; continues after step {training.steps}' if training.steps else ''}",
        flush=True,
    )


def conclude(training: Training, out: pathlib.Path, exports: bool) -> None:
    """The picture and the exported model."""
    import plots  # late: matplotlib takes a while

    rows = metrics.read(out / "metrics.csv")
    points = [(int(row["step"]), float(row["validation"])) for row in rows if row["validation"]]
    lines = text.baselines(training.text, training.validation)
    losses = [float(row["loss"]) for row in rows]
    plots.learning(out / "learning.png", losses, training.config.data.step_bytes, points, lines)
    best = checkpoint.load(out / "best.pt")
    print(f"best validation: {best['progress']['best']:.3f} bits per byte, after step {best['progress']['steps']}")
    if exports:
        training.model.load_state_dict(best["model"])
        export.script(training.model, out / "model.pt")
        export.package(training.model, out / "model.pt2")
    print(f"{out} holds {', '.join(sorted(file.name for file in out.iterdir()))}")


def main() -> int:
    args = options()
    config = configuration(args, started())
    if args.export and not export.compiler():
        raise InputError("--export: needs a C++ compiler for the AOTInductor package, and there is none on the PATH")
    if config.training.threads > 0:
        torch.set_num_threads(config.training.threads)
    with Processes(config.training.device) as processes:
        training = begin(args, config, processes)
        interruptions = Interruptions()
        if processes.first:
            args.out.mkdir(parents=True, exist_ok=True)
            training_config.write(config, args.out / "config.toml")
            describe(training)
        try:
            train(training, args.out, interruptions)
        except Diverged as error:
            print(f"train.py: {error}; the last checkpoint is kept", file=sys.stderr)
            return 1
        if not training.finished:
            if processes.first:
                print(f"interrupted after step {training.steps} and saved; --resume continues", file=sys.stderr)
            return 128 + (interruptions.signal or signal.SIGINT)
        if processes.first:
            conclude(training, args.out, args.export)
    return 0


if __name__ == "__main__":
    command.run("train.py", main)
