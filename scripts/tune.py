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
import command

command.prepare()

import argparse
import dataclasses
import math
import pathlib
import signal
import statistics
import time
import warnings
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

import text
import training_config
import tune_explain
import tune_report
import tune_study
from command import InputError
from tune_space import TRIAL, Space
from tune_worker import Failed, Pruned, Result, Worker

SPACES = pathlib.Path(__file__).parent / "spaces"
SPACE_OF = {"grid": SPACES / "grid.toml", "nsga2": SPACES / "architecture.toml"}
TRIALS = 50
SEARCH_SHARE = 0.65  # of --minutes; the rest is for what explains the best trial


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
    add("--minutes", type=command.between(0, math.inf), help="time for it; no trial begins that would end later")
    add("--storage", help="URL of the database (default: SQLite, in study.db in --out)")
    add("--study", default="wmha", help="name of the study in the database (default: %(default)s)")
    add(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("wmha-tune"),
        help="folder of the report (default: %(default)s)",
    )
    add("--explain", action=argparse.BooleanOptionalAction, default=True, help="afterwards, train what shows why the best trial "
        "is better than the defaults (not for a grid, which shows it, and nsga2; default: %(default)s)")  # fmt: skip
    add("--report", action="store_true", help="only write the report of the study as it is")
    training_config.add_options(parser)
    return parser.parse_args()


class Tuning:
    """This process's part in a study: as many trials as `trials` says, or those that wait in it, and until `deadline`
    (of time.monotonic())."""

    def __init__(
        self, study: optuna.Study, space: Space, worker: Worker, trials: int | None, waiting: bool, deadline: float
    ):
        self.study, self.space, self.worker = study, space, worker
        self.trials, self.waiting, self.deadline = trials, waiting, deadline
        self.seconds: list[float] = []  # of the trials so far

    def run(self) -> None:
        with command.progress("trial") as self.bar:
            while True:
                optuna.storages.fail_stale_trials(self.study)  # and lets them wait to be begun anew
                self.show()
                trials = tune_study.trials(self.study)
                running = any(trial.state == TrialState.RUNNING for trial in trials)
                done = self.are_enough(trials)
                late = time.monotonic() + statistics.median(self.seconds or [0]) > self.deadline
                if late or (done and not running):
                    return
                if done:
                    time.sleep(1)  # another process trains the last; should it die, this one takes over
                else:
                    self.one_trial()

    def one_trial(self) -> None:
        start = time.monotonic()
        try:
            self.study.optimize(self.objective, n_trials=1, catch=(Failed,))
        except Exception:
            # Of this process nothing was heard for long, perhaps the machine slept: another has the trial now.
            if self.study.get_trials(deepcopy=False)[self.number].state != TrialState.FAIL:
                raise
            self.bar.write(f"trial {self.number} was taken over by another process")
        self.seconds.append(time.monotonic() - start)

    def are_enough(self, trials: list[FrozenTrial]) -> bool:
        """With those that are running."""
        if self.waiting:
            return all(trial.state != TrialState.WAITING for trial in trials)
        begun = [trial for trial in trials if trial.state != TrialState.WAITING and not tune_study.lost(trial)]
        return self.trials is not None and len(begun) >= self.trials

    def is_surplus(self, trial: optuna.Trial) -> bool:
        """Did another process begin the last one, at the same time?"""
        if self.waiting:
            return "planned" not in trial.user_attrs
        return self.are_enough([other for other in tune_study.trials(self.study) if other.number < trial.number])

    def objective(self, trial: optuna.Trial) -> float | tuple[float, float]:
        self.number = trial.number
        if self.is_surplus(trial):
            trial.set_user_attr(tune_study.SURPLUS, True)
            raise Failed
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
        config = self.space.suggest(trial)
        trial.set_user_attr("config", config.table())

        def prune(steps: int, loss: float) -> bool:
            self.bar.set_postfix_str(f"{self.best()}; trial {trial.number}, step {steps}: {loss:.3f}", refresh=False)
            self.bar.update(0)
            if len(self.study.directions) > 1:
                return False
            trial.report(loss, steps)
            return trial.should_prune()

        try:
            result = self.known(trial) or self.worker.train(config, prune)
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
        best = tune_study.best(self.study)
        return f"best {best.values[0]:.3f} bits per byte" if best else "no result yet"


def configured(args: argparse.Namespace) -> Space:
    base = TRIAL if args.config is None else training_config.read(args.config)
    file = args.space or SPACE_OF.get(args.sampler, SPACES / "default.toml")
    return Space(file, training_config.override(base, args))


def question(args: argparse.Namespace, space: Space) -> dict[str, Any]:
    data = space.base.data
    training, _ = text.load(data.data, data.length, data.validation_bytes)
    return tune_study.question(space, args.sampler, text.digest(training))


def first_trials(args: argparse.Namespace, space: Space) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Parameters and attributes."""
    grid = space.grid() if args.sampler == "grid" else ()
    return [(space.defaults(), {"default": True}), *((point, {}) for point in grid if point != space.defaults())]


def search(args: argparse.Namespace, storage: RDBStorage, space: Space, planned: list, asked: dict) -> optuna.Study:
    """Begins the study or joins it."""
    pruner = args.pruner or ("none" if args.sampler in ("grid", "nsga2") else "median")
    return tune_study.begin(
        storage, args.study, asked, planned, args.sampler, space.base.training.seed,
        tune_study.pruner(pruner, space.base.optimizer.steps),
    )  # fmt: skip


def explain(study: optuna.Study, storage: RDBStorage, space: Space, worker: Worker, deadline: float) -> None:
    """Trains what shows why the best trial is the best, in a study of its own, which other processes share."""
    best = tune_study.best(study)
    if best is None or best.user_attrs.get("default"):
        return
    name, planned = tune_explain.name_of(study.study_name, best), tune_explain.planned(space.defaults(), best)
    why = tune_study.begin(storage, name, {}, planned, "random", 0, tune_study.pruner("none", 0))
    print(f"why trial {best.number} is better: what its values do, one group at a time", flush=True)
    Tuning(why, space, worker, None, True, deadline).run()


def report(study: optuna.Study, storage: RDBStorage, out: pathlib.Path) -> None:
    best = tune_study.best(study)
    why = best and tune_study.load(storage, tune_explain.name_of(study.study_name, best))
    tune_report.write(study, why, out)


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats among them, for years
    args = options()
    if args.sampler == "nsga2" and args.pruner not in (None, "none"):
        raise InputError(f"--pruner {args.pruner}: nsga2 has two objectives, with which nothing is pruned")
    url = args.storage or f"sqlite:///{args.out / 'study.db'}"
    if args.report:
        storage = tune_study.database(url)
        if (study := tune_study.load(storage, args.study)) is None:
            raise InputError(f"--study {args.study}: there is none of this name in {url}")
        report(study, storage, args.out)
        return 0
    space = configured(args)
    planned, asked = first_trials(args, space), question(args, space)
    args.out.mkdir(parents=True, exist_ok=True)
    storage = tune_study.database(url)
    study = search(args, storage, space, planned, asked)
    for name, (wanted, taken) in space.moved().items():
        print(f"{space.file}: {name}: {wanted} isn't in the range; the first trial has {taken} instead")
    grid, minutes = args.sampler == "grid", math.inf if args.minutes is None else args.minutes
    trials = TRIALS if args.trials is None and args.minutes is None and not grid else args.trials
    explains = args.explain and args.sampler not in ("grid", "nsga2")
    start = time.monotonic()
    try:
        with Worker() as worker:
            deadline = start + 60 * minutes * (SEARCH_SHARE if explains else 1)
            Tuning(study, space, worker, trials, grid, deadline).run()
            if explains:
                explain(study, storage, space, worker, start + 60 * minutes)
    finally:
        report(study, storage, args.out)
    return 0


if __name__ == "__main__":
    command.run("tune.py", main)
