"""Searches good hyper-parameters of a language model of wmha's layers, with Optuna.

A file says what is searched (--space; scripts/spaces/ has some to start from), a configuration what stays the same. The
first trial has the configuration's own values. Trials are kept in a database: a study that was interrupted or killed goes
on when it is started again, and processes that name the same database, on one machine or several, share its trials.
The folder --out gets report.md with pictures, best.toml for train.py, and trials.csv.

    python scripts/tune.py --minutes 10
    python scripts/tune.py --sampler nsga2 --trials 60 --num-heads 8
    python scripts/tune.py --storage postgresql://host/studies --out node1   # and the same on other machines
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
import dataclasses
import math
import pathlib
import statistics
import sys
import time
import warnings

import optuna
from optuna.trial import TrialState
from tqdm import tqdm

import command
import text
import training_config
import tune_report
import tune_study
from command import InputError
from tune_space import TRIAL, Space
from tune_worker import Failed, Pruned, Result, Worker

SPACES = pathlib.Path(__file__).parent / "spaces"
SPACE_OF = {"grid": SPACES / "grid.toml", "nsga2": SPACES / "architecture.toml"}
TRIALS = 50


def options() -> argparse.Namespace:
    parser = command.Parser(prog="tune.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--space", type=pathlib.Path, help="what is searched (default: default.toml, grid.toml or architecture.toml in "
        "scripts/spaces, by the sampler)")  # fmt: skip
    add("--config", type=pathlib.Path, help="a configuration file; what it leaves out has the default")
    add("--sampler", choices=tune_study.SAMPLERS, default="tpe", help="how trials are chosen: a grid; at random; Bayesian, by "
        "TPE or a Gaussian process; or NSGA-II, for loss and time at once (default: %(default)s)")  # fmt: skip
    add("--pruner", choices=tune_study.PRUNERS, help="what gives up bad trials early (default: median; none for a grid, and for nsga2, "
        "which has two objectives)")  # fmt: skip
    add(
        "--trials",
        type=command.at_least(1),
        help="of the study, all processes together (default: 50 without --minutes)",
    )
    add("--minutes", type=command.between(0, math.inf), help="no trial begins that would end later")
    add("--storage", help="URL of the database (default: SQLite, in study.db in --out)")
    add("--study", default="wmha", help="name of the study in the database (default: %(default)s)")
    add(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("wmha-tune"),
        help="folder of the report (default: %(default)s)",
    )
    add("--report", action="store_true", help="only write the report of the study as it is")
    training_config.add_options(parser)
    return parser.parse_args()


class Tuning:
    """This process's part in a study."""

    def __init__(self, study: optuna.Study, space: Space, args: argparse.Namespace, worker: Worker):
        self.study, self.space, self.worker = study, space, worker
        self.grid, self.trials = args.sampler == "grid", args.trials
        if not self.grid and self.trials is None and args.minutes is None:
            self.trials = TRIALS
        self.deadline = time.monotonic() + 60 * (math.inf if args.minutes is None else args.minutes)
        self.seconds: list[float] = []  # of the trials so far

    def run(self) -> None:
        with tqdm(unit="trial", dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10) as self.bar:
            while True:
                optuna.storages.fail_stale_trials(self.study)  # and lets them wait to be begun anew
                states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
                self.show()
                waiting, running = TrialState.WAITING in states, states.count(TrialState.RUNNING)
                if self.grid:
                    done = not waiting
                else:
                    done = self.trials is not None and len(tune_study.ended(self.study)) + running >= self.trials
                late = time.monotonic() + statistics.median(self.seconds or [0]) > self.deadline
                if late or (done and running == 0):
                    return
                if done:
                    time.sleep(1)  # another process trains the last; should it die, this one takes over
                    continue
                start = time.monotonic()
                try:
                    self.study.optimize(self.objective, n_trials=1, catch=(Failed,))
                except Exception:
                    # Of this process nothing was heard for long, perhaps the machine slept: another has the trial now.
                    if self.study.get_trials(deepcopy=False)[self.number].state != TrialState.FAIL:
                        raise
                    self.bar.write(f"trial {self.number} was taken over by another process")
                self.seconds.append(time.monotonic() - start)

    def objective(self, trial: optuna.Trial) -> float | tuple[float, float]:
        self.number = trial.number
        try:
            return self.train(trial)
        except KeyboardInterrupt:
            self.study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)  # for whoever goes on
            raise
        except (Failed, InputError) as error:
            trial.set_user_attr("failure", str(error))
            self.bar.write(f"trial {trial.number} failed: {error}")
            raise Failed from error

    def train(self, trial: optuna.Trial) -> float | tuple[float, float]:
        if self.grid and not trial.user_attrs.get("planned"):
            raise Failed("another process took the last of the grid")
        config = self.space.suggest(trial)
        trial.set_user_attr("config", config.table())

        def prune(steps: int, loss: float) -> bool:
            self.bar.set_postfix_str(f"{self.best()}; trial {trial.number}, step {steps}: {loss:.3f}", refresh=False)
            self.bar.update(0)
            if len(self.study.directions) > 1:
                return False
            trial.report(loss, steps)
            return trial.should_prune()

        result = self.known(trial)
        try:
            result = result or self.worker.train(config, prune)
        except Pruned as error:
            raise optuna.TrialPruned from error
        for name, value in vars(result).items():
            trial.set_user_attr(name, value)
        if len(self.study.directions) == 1:
            trial.report(result.loss, config.optimizer.steps)
            return result.loss
        return result.loss, result.microseconds_per_byte

    def known(self, trial: optuna.Trial) -> Result | None:
        """That of an earlier trial with the same parameters."""
        for earlier in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if earlier.params == trial.params:
                return Result(**{field.name: earlier.user_attrs[field.name] for field in dataclasses.fields(Result)})
        return None

    def show(self) -> None:
        self.bar.total, self.bar.n = self.trials, len(tune_study.ended(self.study))
        self.bar.set_postfix_str(self.best())

    def best(self) -> str:
        losses = [t.values[0] for t in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
        return f"best {min(losses, default=math.nan):.3f} bits per byte"


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats among them, for years
    args = options()
    if args.sampler == "nsga2" and args.pruner not in (None, "none"):
        raise InputError(f"--pruner {args.pruner}: nsga2 has two objectives, with which nothing is pruned")
    storage_url = args.storage or f"sqlite:///{args.out / 'study.db'}"
    if args.report:
        tune_report.write(tune_study.load(tune_study.database(storage_url), args.study), args.out)
        return 0
    base = TRIAL if args.config is None else training_config.read(args.config)
    space = Space(
        args.space or SPACE_OF.get(args.sampler, SPACES / "default.toml"), training_config.override(base, args)
    )
    data = space.base.data
    training, _ = text.load(data.data, data.length, data.validation_bytes)
    asked = tune_study.question(space, args.sampler, text.digest(training))
    args.out.mkdir(parents=True, exist_ok=True)
    pruner = tune_study.pruner(
        args.pruner or ("none" if args.sampler in ("grid", "nsga2") else "median"), space.base.optimizer.steps
    )
    study = tune_study.begin(
        tune_study.database(storage_url), args.study, space, asked, args.sampler, space.base.training.seed, pruner
    )
    for name, (wanted, taken) in space.moved().items():
        print(f"{space.file}: {name}: {wanted} isn't in the range; the first trial has {taken} instead")
    try:
        with Worker() as worker:
            Tuning(study, space, args, worker).run()
    finally:
        tune_report.write(study, args.out)
    return 0


if __name__ == "__main__":
    command.run("tune.py", main)
