"""A study in its database: begun by the first process, joined by all others."""

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterable
from typing import Any

import optuna
import sqlalchemy
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from command import InputError
from tune_space import Space

SAMPLERS = ("grid", "random", "tpe", "gp", "nsga2")
PRUNERS = ("median", "hyperband", "none")
HEARTBEAT = 5  # seconds: a trial whose process hasn't been heard of for three of these is begun anew
PATIENCE = 60  # seconds that the process that begins a study has for it
QUESTION = "question"
SURPLUS = "surplus"  # the mark of a trial that is none of the study's


def database(url: str) -> RDBStorage:
    options = {"connect_args": {"timeout": PATIENCE}} if url.startswith("sqlite") else {}
    for attempts_left in (2, 1, 0):
        try:
            storage = RDBStorage(
                url,
                engine_kwargs=options,
                heartbeat_interval=HEARTBEAT,
                grace_period=3 * HEARTBEAT,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=3),
            )
            break
        except sqlalchemy.exc.SQLAlchemyError as error:  # perhaps another process made the tables at the same time
            if attempts_left == 0:
                raise InputError(f"--storage {url}: {str(error).splitlines()[0]}") from error
            time.sleep(1)
        except (ImportError, RuntimeError) as error:
            raise InputError(f"--storage {url}: {str(error).splitlines()[0]}") from error
    if storage.engine.dialect.name == "sqlite":
        lock_in_turns(storage.engine)
    return storage


def lock_in_turns(engine: sqlalchemy.Engine) -> None:
    """Lets each transaction lock the whole database from its beginning.

    Optuna looks whether a trial waits, and takes it, in one transaction. SQLite would lock the database only when
    something is written, and two processes could take the same trial.
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    def begin_nothing_unasked(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, "begin")
    def lock(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections from before


def sampler(name: str, seed: int | None) -> BaseSampler:
    """seed None: another one in each process."""
    if name == "tpe":
        return TPESampler(seed=seed, multivariate=True, group=True)
    if name == "gp":
        return GPSampler(seed=seed)
    if name == "nsga2":
        return NSGAIISampler(seed=seed, population_size=16)
    return RandomSampler(seed)  # the trials of a grid wait in the study


def pruner(name: str, steps: int) -> BasePruner:
    if name == "median":
        return MedianPruner(n_startup_trials=5, n_warmup_steps=steps // 4)
    if name == "hyperband":
        return HyperbandPruner(min_resource=max(1, steps // 9), max_resource=steps)
    return NopPruner()


def question(space: Space, sampler: str, text: str) -> dict[str, Any]:
    """What a study asks, by key. All trials must have been made for the same. text: tells one text from another, since
    it may have another path on another machine."""
    table = space.base.table()
    del table["data"]["data"]
    table["training"] = {name: table["training"][name] for name in ("seed", "bf16")}
    asked = {f"[{section}] {name}": value for section, keys in table.items() for name, value in keys.items()}
    asked |= {name: one.model_dump(exclude_unset=True) for name, one in space.named()}
    kind = {"grid": "a grid", "nsga2": "loss and time"}.get(sampler, "loss")
    return asked | {"--sampler": kind, "text to train on": text}


def begin(
    storage: RDBStorage,
    name: str,
    asked: dict[str, Any],
    planned: Iterable[tuple[dict[str, Any], dict[str, Any]]],
    how: str,
    seed: int,
    pruner: BasePruner,
) -> optuna.Study:
    """The study: a new one, in which first trials wait (planned: their parameters and attributes), or one that asks the
    same."""
    directions = ["minimize"] * (2 if how == "nsga2" else 1)
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, directions=directions, sampler=sampler(how, seed), pruner=pruner
        )
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=storage, sampler=sampler(how, None), pruner=pruner)
        compare(study, asked)
        return study
    for parameters, attributes in planned:
        study.enqueue_trial(parameters, user_attrs={"planned": True, **attributes})
    study.set_user_attr(QUESTION, json.dumps(asked))  # the last step, which others wait for
    return study


def compare(study: optuna.Study, asked: dict[str, Any]) -> None:
    """InputError where the study asks something else."""
    deadline = time.monotonic() + PATIENCE
    while QUESTION not in study.user_attrs:
        if time.monotonic() > deadline:
            raise InputError(
                f"--study {study.study_name}: the process that began it did not finish; choose another name"
            )
        time.sleep(0.2)
    before, now = json.loads(study.user_attrs[QUESTION]), json.loads(json.dumps(asked))
    for key in dict.fromkeys((*before, *now)):
        if before.get(key) != now.get(key):
            raise InputError(
                f"--study {study.study_name}: {key}: the study has {before.get(key)}, now it is {now.get(key)}; go on with "
                "the same, or begin another study"
            )


def load(storage: RDBStorage, name: str) -> optuna.Study | None:
    """None if there is none of this name."""
    with contextlib.suppress(KeyError):
        return optuna.load_study(study_name=name, storage=storage)


def trials(study: optuna.Study) -> list[FrozenTrial]:
    """All that are the study's: where two processes begin the last one at the same time, the second is not."""
    return [trial for trial in study.get_trials(deepcopy=False) if SURPLUS not in trial.user_attrs]


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that came to an end of their own, also a bad one; not those whose process was killed or interrupted."""
    return [trial for trial in trials(study) if trial.state.is_finished() and not lost(trial)]


def lost(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and "failure" not in trial.user_attrs


def best(study: optuna.Study) -> FrozenTrial | None:
    """The complete trial with the lowest loss."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return min(complete, key=lambda trial: trial.values[0], default=None)
