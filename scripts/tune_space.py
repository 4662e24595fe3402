"""What a study searches: a file like a configuration, in which a key may have a range in place of a value."""

import functools
import itertools
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import optuna
import pydantic
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

import training_config
from command import InputError
from training_config import SECTION_OF, SECTIONS, Config

LARGEST_GRID = 1000
# A trial is a short training.
TRIAL = Config(optimizer={"steps": 100, "warm_up": 10}, data={"validation_bytes": 2**15})


class Range(pydantic.BaseModel):
    """low to high, or choices."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    low: int | float | None = None
    high: int | float | None = None
    step: int | float | None = None
    log: bool = False
    choices: list[bool | int | float | str] | None = None
    per_layer: bool = False

    @pydantic.model_validator(mode="after")
    def check(self) -> "Range":
        _ = self.distribution  # its own errors say what is wrong
        return self

    @functools.cached_property
    def distribution(self) -> BaseDistribution:
        if self.choices is not None:
            if not self.choices or self.model_fields_set & {"low", "high", "step", "log"}:
                raise ValueError("choices must be one or more values, without low, high, step and log")
            return CategoricalDistribution(self.choices)
        if self.low is None or self.high is None:
            raise ValueError("a range must have low and high, or choices")
        if all(isinstance(value, int) for value in (self.low, self.high, self.step or 1)):
            return IntDistribution(self.low, self.high, self.log, self.step or 1)
        return FloatDistribution(self.low, self.high, self.log, self.step)

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        one = self.distribution
        if isinstance(one, CategoricalDistribution):
            return trial.suggest_categorical(name, one.choices)
        suggest = trial.suggest_int if isinstance(one, IntDistribution) else trial.suggest_float
        return suggest(name, one.low, one.high, step=one.step, log=one.log)

    def nearest(self, value: Any) -> Any:
        """The value if it is in the range, else one that is. Of a list, each value's."""
        one = self.distribution
        if isinstance(value, list):
            return [self.nearest(part) for part in value]
        if isinstance(one, CategoricalDistribution):
            return value if value in one.choices else one.choices[0]
        value = min(max(value, one.low), one.high)
        if one.step is None:
            return value
        point = one.low + round((value - one.low) / one.step) * one.step
        return value if math.isclose(point, value) else point

    def points(self) -> list[Any] | None:
        """All values, if they can be counted."""
        one = self.distribution
        if self.per_layer:
            return None
        if isinstance(one, CategoricalDistribution):
            return list(one.choices)
        if one.log or one.step is None:
            return None
        return [one.low + i * one.step for i in range(round((one.high - one.low) / one.step) + 1)]


class Space:
    """The ranges of a file by key, and the configuration that they vary: `base` with the file's values."""

    def __init__(self, file: pathlib.Path, base: Config):
        self.file = file
        self.ranges: dict[str, Range] = {}
        values = training_config.read_toml(file)
        for section, keys in values.items():
            if isinstance(keys, dict):
                for name in [name for name, value in keys.items() if isinstance(value, dict)]:
                    self.ranges[name] = self._range(section, name, keys.pop(name))
        if not self.ranges:
            raise InputError(f"{file}: no key has a range")
        fixed = training_config.validate(values, str(file)).model_dump(exclude_unset=True)
        self.base = training_config.merge(base, fixed, str(file))

    def _range(self, section: str, name: str, table: dict[str, Any]) -> Range:
        if SECTION_OF.get(name) != section:
            known = SECTIONS[section].model_fields if section in SECTIONS else SECTIONS
            raise InputError(f"{self.file}: unknown key {name} in [{section}]{training_config.meant(name, known)}")
        where = f"{self.file}: [{section}] {name}"
        try:
            made = Range.model_validate(table)
        except pydantic.ValidationError as error:
            one = error.errors()[0]
            raise InputError(f"{where}: {' '.join([*map(str, one['loc'][:1]), one['msg']])}, got {table}") from error
        if made.per_layer and name != "window":
            raise InputError(f"{where}: per_layer is for window alone")
        return made

    def suggest(self, trial: optuna.Trial) -> Config:
        """The configuration of a trial. InputError where its values don't go together."""
        values: dict[str, dict[str, Any]] = {}
        layers = self.base.model.num_layers
        for name in sorted(self.ranges, key=lambda name: name != "num_layers"):
            one = self.ranges[name]
            if one.per_layer:
                value: Any = [one.suggest(trial, f"{name}_{i}") for i in range(layers)]
            else:
                value = one.suggest(trial, name)
            if name == "num_layers":
                layers = value
            values.setdefault(SECTION_OF[name], {})[name] = value
        return training_config.check(training_config.merge(self.base, values, "trial"), "trial")

    def defaults(self) -> dict[str, Any]:
        """The base's value for each range, or the nearest in it, as a trial's parameters."""
        return {name: taken for name, (_, taken) in self._defaults.items()}

    def moved(self) -> dict[str, tuple[Any, Any]]:
        """Where the base's value isn't in the range: it, and what is taken in its place, by parameter."""
        return {name: (wanted, taken) for name, (wanted, taken) in self._defaults.items() if wanted != taken}

    @functools.cached_property
    def _defaults(self) -> dict[str, tuple[Any, Any]]:
        """-> by parameter, the base's value, and the nearest in its range."""
        given = self.base.table()
        inside: dict[str, dict[str, Any]] = {section: {} for section in given}
        for name, one in self.ranges.items():
            if (value := given[SECTION_OF[name]][name]) is not None:
                inside[SECTION_OF[name]][name] = one.nearest(value)
        first = training_config.check(training_config.merge(self.base, inside, str(self.file)), str(self.file))
        resolved = training_config.resolved(first).table()
        pairs: dict[str, tuple[Any, Any]] = {}
        for name, one in self.ranges.items():
            number = resolved[SECTION_OF[name]][name]
            wanted = given[SECTION_OF[name]][name]
            pair = (number if wanted is None else wanted, one.nearest(number))
            if one.per_layer:
                windows = (side * first.model.num_layers if len(side) == 1 else side for side in pair)
                pairs |= {f"{name}_{i}": pair for i, pair in enumerate(zip(*windows, strict=True))}
            else:
                pairs[name] = (pair[0][0], pair[1][0]) if name == "window" else pair
        return pairs

    def named(self) -> Iterator[tuple[str, Range]]:
        """Each range with its section and key, as errors name it."""
        for name, one in self.ranges.items():
            yield f"[{SECTION_OF[name]}] {name}", one

    def grid(self) -> Iterator[dict[str, Any]]:
        """The parameters of each of the grid's trials."""
        points = {}
        for name, one in self.ranges.items():
            points[name] = one.points()
            if points[name] is None:
                where = f"{self.file}: [{SECTION_OF[name]}] {name}"
                raise InputError(f"{where}: a grid needs choices, or a range with a step and without log and per_layer")
        count = math.prod(map(len, points.values()))
        if count > LARGEST_GRID:
            raise InputError(f"{self.file}: a grid of {count:,} trials; at most {LARGEST_GRID:,} make sense")
        for values in itertools.product(*points.values()):
            yield dict(zip(points, values, strict=True))
