"""What a study found, as a folder: report.md with pictures, best.toml for train.py, trials.csv."""

import csv
import io
import pathlib
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as draw

import checkpoint
import plots
import training_config
import tune_study

BEST_SHOWN, SLICES_SHOWN = 10, 6
OBJECTIVES = ("validation loss, bits per byte", "training time, µs per byte")


def write(study: optuna.Study, why: optuna.Study | None, out: pathlib.Path) -> None:
    """Also of a study in which little has happened yet. why: the study that explains its best trial."""
    out.mkdir(parents=True, exist_ok=True)
    trials = tune_study.trials(study)
    checkpoint.write(table_of(trials), out / "trials.csv")
    complete = sorted(
        (trial for trial in trials if trial.state == TrialState.COMPLETE), key=lambda trial: trial.values[0]
    )
    lines = [f"# Study {study.study_name}", "", summary(trials), ""]
    if complete:
        best = complete[0]
        write_config(best, out / "best.toml")
        default = next((trial for trial in complete if trial.user_attrs.get("default")), None)
        importances = importance(study, complete)
        lines += verdict(best, default)
        lines += [] if why is None else explanation(why, best, out)
        lines += ["## What it changed", "", *comparison(best, default, importances), ""]
        lines += [f"The importances are estimates from {len(complete)} complete trials.", ""] if importances else []
        lines += front(study, out) if len(study.directions) > 1 else []
        lines += pictures(study, importances, out)
        lines += ["## The best trials", "", *best_trials(complete[:BEST_SHOWN]), ""]
    if failed := [trial for trial in trials if trial.state == TrialState.FAIL]:
        reasons = (
            f"- trial {t.number}: {t.user_attrs.get('failure', 'was interrupted, or its process killed')}"
            for t in failed
        )
        lines += ["## Failed trials", "", *reasons, ""]
    checkpoint.write("\n".join(lines), out / "report.md")
    print(f"{summary(trials)} {lines[4] if complete else ''}\nThe report is {out / 'report.md'}")


def summary(trials: list[FrozenTrial]) -> str:
    counts = Counter(trial.state.name.lower() for trial in trials)
    return f"{len(trials)} trials: {', '.join(f'{count} {state}' for state, count in counts.items())}."


def verdict(best: FrozenTrial, default: FrozenTrial | None) -> list[str]:
    text = f"The best, trial {best.number}, reached {best.values[0]:.3f} bits per byte on the validation text"
    if default is not None:
        text += f"; the defaults, trial {default.number}, {default.values[0]:.3f}"
    return [f"{text}. `best.toml` has it, for `train.py --config`.", ""]


def explanation(why: optuna.Study, best: FrozenTrial, out: pathlib.Path) -> list[str]:
    """What each group of the best trial's values does alone, the one that helps most first."""
    trials = {
        trial.user_attrs["group"]: trial for trial in why.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    }
    if "defaults" not in trials:
        return []
    before = trials.pop("defaults").value
    gains = {group: before - trial.value for group, trial in sorted(trials.items(), key=lambda item: item[1].value)}
    plots.bars(
        out / "why.png", gains | {"all together": before - best.values[0]},
        f"What each group of trial {best.number}'s values does alone", "bits per byte less than with the defaults",
    )  # fmt: skip
    lines = [
        "## Why it is better",
        "",
        f"The defaults reach {before:.3f}. With one group of the best trial's values:",
        "",
    ]
    lines += [f"| group | values | {OBJECTIVES[0]} | better by |", "|---|---|---|---|"]
    for group, gain in gains.items():
        values = ", ".join(f"{name} {number(value)}" for name, value in trials[group].user_attrs["changed"].items())
        lines.append(f"| {group} | {values} | {trials[group].value:.3f} | {gain:+.3f} |")
    lines += [f"| all together | | {best.values[0]:.3f} | {before - best.values[0]:+.3f} |", ""]
    if left := [t.user_attrs["group"] for t in why.get_trials(deepcopy=False) if t.state == TrialState.WAITING]:
        lines += [f"There was no time for: {', '.join(left)}.", ""]
    return [*lines, "![why](why.png)", ""]


def comparison(best: FrozenTrial, default: FrozenTrial | None, importances: dict[str, float]) -> Iterable[str]:
    """A table of what was searched, the most important first."""
    yield "| hyper-parameter | default | best | importance |"
    yield "|---|---|---|---|"
    for name in sorted(best.params, key=lambda name: -importances.get(name, 0)):
        before = "" if default is None else default.params.get(name, "")
        yield f"| {name} | {number(before)} | {number(best.params[name])} | {importances.get(name, 0):.0%} |"
    for name, what in (
        ("parameters", "parameters"),
        ("bytes_read", "bytes read"),
        ("microseconds_per_byte", "µs per byte"),
    ):
        before = "" if default is None else default.user_attrs.get(name, "")
        yield f"| *{what}* | {number(before)} | {number(best.user_attrs.get(name, ''))} | |"


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def importance(study: optuna.Study, complete: list[FrozenTrial]) -> dict[str, float]:
    """Of each parameter for the loss, by Optuna's default evaluator; empty with too few trials."""
    if len(complete) < 4:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it asks whether low values are the good ones: they are
        return optuna.importance.get_param_importances(study, target=lambda trial: trial.values[0])


def front(study: optuna.Study, out: pathlib.Path) -> list[str]:
    """The trials that no other one beats in both objectives, each with its configuration."""
    best = sorted(study.best_trials, key=lambda trial: trial.values)
    for trial in best:
        write_config(trial, out / f"trial{trial.number}.toml")
    rows = [
        f"| {trial.number} | {trial.values[0]:.3f} | {trial.values[1]:.3g} | {number(trial.user_attrs.get('parameters', ''))} "
        f"| [trial{trial.number}.toml](trial{trial.number}.toml) |"
        for trial in best
    ]
    return ["## No other is better and faster", "", f"| trial | {' | '.join(OBJECTIVES)} | parameters | configuration |",
            "|---|---|---|---|---|", *rows, ""]  # fmt: skip


def pictures(study: optuna.Study, importances: dict[str, float], out: pathlib.Path) -> list[str]:
    plotted: dict[str, Any] = {}
    one = len(study.directions) == 1
    loss = {"target": None if one else lambda trial: trial.values[0], "target_name": OBJECTIVES[0]}
    with warnings.catch_warnings(), plt.rc_context():  # Optuna sets a style of its own
        warnings.simplefilter("ignore")  # these pictures are experimental in Optuna, and some ranges have one value
        plotted["history"] = draw.plot_optimization_history(study, **loss)
        if one:
            plotted["learning"] = draw.plot_intermediate_values(study)
            plotted["learning"].set(title="Validation while the trials learned", ylabel=OBJECTIVES[0])
            if legend := plotted["learning"].get_legend():  # dozens of trials
                legend.remove()
        else:
            plotted["front"] = draw.plot_pareto_front(study, target_names=list(OBJECTIVES))
        if importances:
            plotted["slices"] = draw.plot_slice(study, params=list(importances)[:SLICES_SHOWN], **loss)
            for axes in np.ravel(plotted["slices"]):
                axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())  # they would overlap
        for name, axes in plotted.items():
            figure = np.ravel(axes)[0].figure
            figure.set_size_inches(*((3 * SLICES_SHOWN, 4) if name == "slices" else (9, 4.5)))
            plots.finish(figure, out / f"{name}.png")
    names = list(plotted)
    if importances:
        names.append("importances")
        plots.bars(
            out / "importances.png", importances, "Importance of the hyper-parameters", "part of the variation in loss"
        )
    return ["## Pictures", "", *(f"![{name}]({name}.png)\n" for name in names)]


def best_trials(trials: list[FrozenTrial]) -> Iterable[str]:
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    yield f"| trial | {OBJECTIVES[0]} | {' | '.join(names)} |"
    yield "|---" * (2 + len(names)) + "|"
    for trial in trials:
        yield f"| {trial.number} | {trial.values[0]:.3f} | {' | '.join(number(trial.params.get(n, '')) for n in names)} |"


def table_of(trials: list[FrozenTrial]) -> str:
    """All trials as CSV."""
    params = list(dict.fromkeys(name for trial in trials for name in trial.params))
    measured = ["loss", "microseconds_per_byte", "parameters", "bytes_read", "failure"]
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(["trial", "state", "seconds", *measured, *params])
    for trial in trials:
        seconds = trial.duration.total_seconds() if trial.duration else ""
        writer.writerow([trial.number, trial.state.name, seconds, *(trial.user_attrs.get(name, "") for name in measured),
                         *(trial.params.get(name, "") for name in params)])  # fmt: skip
    return output.getvalue()


def write_config(trial: FrozenTrial, file: pathlib.Path) -> None:
    training_config.write(training_config.validate(trial.user_attrs["config"], f"trial {trial.number}"), file)
