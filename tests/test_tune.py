"""scripts/tune.py: search spaces, studies, and the command as a user runs it."""

import csv
import multiprocessing
import pathlib
import signal
import time
from collections import Counter

import optuna
import pytest

import training_config
import tune
import tune_explain
import tune_report
import tune_study
from command import InputError
from command_line import SCRIPTS, finish, run, start
from training_config import Config
from tune_space import TRIAL, Space
from tune_worker import Failed, Pruned, Result, Worker

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")]

SPACE = """
[model]
num_layers = 1
embed_dim = 16
num_heads = { choices = [2, 4] }
window = { low = 4, high = 32, log = true }

[optimizer]
learning_rate = { low = 1e-3, high = 3e-2, log = true }
"""
FEW = ("--steps", 20, "--warm-up", 2, "--length", 32, "--batch-size", 2)


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes((SCRIPTS / "tune.py").read_bytes() * 3)
    return file


@pytest.fixture
def space(tmp_path):
    """A function that writes a space and reads it."""

    def make(content: str = SPACE, **base) -> Space:
        (tmp_path / "space.toml").write_text(content)
        return Space(tmp_path / "space.toml", Config.model_validate(base))

    make()
    return make


def trials(out: pathlib.Path) -> list[dict]:
    with (out / "trials.csv").open() as stream:
        return list(csv.DictReader(stream))


class TestSpace:
    def test_suggests(self, space):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(20):
            model = space().suggest(trial := study.ask()).model
            assert model.num_layers == 1 and model.num_heads in (2, 4) and 4 <= model.window[0] <= 32
            study.tell(trial, 0.0)
        assert trial.params.keys() == {"num_heads", "window", "learning_rate"}

    def test_windows_of_layers(self, space):
        one = space("[model]\nnum_layers = { low = 1, high = 4 }\nwindow = { low = 1, high = 9, per_layer = true }")
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        lengths = set()
        for _ in range(20):
            model = one.suggest(study.ask()).model
            assert len(model.window) == model.num_layers
            lengths.add(model.num_layers)
        assert lengths == {1, 2, 3, 4}
        assert one.defaults() == {"num_layers": 4, "window_0": 9, "window_1": 9, "window_2": 9, "window_3": 9}

    def test_defaults(self, space):
        base = {"model": {"num_heads": 4, "window": [8]}, "optimizer": {"learning_rate": 1.0}}
        assert space(**base).defaults() == {"num_heads": 4, "window": 8, "learning_rate": 3e-2}

    def test_defaults_outside_of_the_range(self, space):
        one = space("[model]\nembed_dim = 30\nnum_heads = { choices = [3, 5] }\nhead_dim = { low = 4, high = 8 }")
        assert one.defaults() == {"num_heads": 3, "head_dim": 8}
        assert one.moved() == {"num_heads": (4, 3), "head_dim": (10, 8)}
        with pytest.raises(InputError, match="space.toml: embed_dim must be a multiple of num_heads, 4"):
            space("[model]\nembed_dim = 30\nwindow = { choices = [3, 5] }").defaults()

    def test_defaults_where_none_is_the_value(self, space):
        one = space("[model]\nhead_dim = { low = 8, high = 64 }\nscale = { low = 0.01, high = 1.0 }")
        assert one.defaults() == {"head_dim": 32, "scale": pytest.approx(32**-0.5)}

    @pytest.mark.parametrize("name", ["default", "grid", "architecture"])
    def test_ours(self, name):
        """Every trial can be trained, and the defaults are in the space."""
        one = Space(SCRIPTS / "spaces" / f"{name}.toml", TRIAL)
        defaults = {
            name: value for keys in training_config.resolved(TRIAL).table().values() for name, value in keys.items()
        }
        for parameter, value in one.defaults().items():
            expected = 128 if parameter.startswith("window") else defaults[parameter]
            assert value == (pytest.approx(expected) if isinstance(value, float) else expected), parameter
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(50):
            one.suggest(study.ask())

    def test_ours_has_every_hyper_parameter(self):
        one = Space(SCRIPTS / "spaces" / "default.toml", Config())
        assert one.ranges.keys() >= training_config.Model.model_fields.keys()
        assert one.ranges.keys() >= {"optimizer", "learning_rate", "weight_decay", "batch_size"}

    def test_grid(self, space):
        one = space("[model]\nnum_heads = { choices = [2, 4] }\ndropout = { low = 0.0, high = 0.2, step = 0.1 }")
        points = list(one.grid())
        assert len(points) == 6 and {point["dropout"] for point in points} == {0.0, 0.1, 0.2}
        for content, words in (
            (SPACE, r"\[model\] window: a grid needs choices, or a range with a step"),
            ("[model]\nembed_dim = { low = 1, high = 2000 }", "a grid of 2,000 trials; at most 1,000"),
        ):
            with pytest.raises(InputError, match=f"space.toml: {words}"):
                list(space(content).grid())

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (
                "[model]\nnum_head = { choices = [1] }",
                r"unknown key num_head in \[model\]; is num_heads in \[model\] meant",
            ),
            ("[modle]\nnum_heads = { choices = [1] }", r"unknown key num_heads in \[modle\]"),
            ("[model]\nnum_head = 3\nwindow = { low = 1, high = 2 }", r"unknown key num_head in \[model\]"),
            ("[model]\nnum_heads = 4", "no key has a range"),
            ("[model]\nwindow = { low = 1 }", r"\[model\] window: .*low and high, or choices, got {'low': 1}"),
            ("[model]\nwindow = { low = 3, high = 1 }", r"\[model\] window: .*got"),
            ("[model]\nwindow = { low = 'a', high = 1 }", r"\[model\] window: low .*got"),
            ("[model]\nwindow = { low = 1, hihg = 2 }", r"\[model\] window: hihg .*got"),
            ("[model]\nwindow = { choices = [] }", r"\[model\] window: .*choices must be one or more"),
            ("[model]\nwindow = { choices = [1], low = 1 }", r"\[model\] window: .*without low"),
            ("[model]\nscale = { low = 0.0, high = 1.0, log = true }", r"\[model\] scale: .*got"),
            (
                "[model]\nnum_heads = { low = 1, high = 2, per_layer = true }",
                r"\[model\] num_heads: per_layer is for window alone",
            ),
            ("[model", "not TOML"),
        ],
    )
    def test_errors_name_file_and_key(self, space, content, words):
        with pytest.raises(InputError, match=f"space.toml: {words}"):
            space(content)


class TestExplanation:
    def test_each_change_is_tried_once(self):
        defaults = {
            "num_layers": 4,
            "num_heads": 4,
            "window": 128,
            "dropout": 0.0,
            "learning_rate": 3e-3,
            "warm_up": 10,
        }
        best = optuna.trial.create_trial(
            params={**defaults, "num_heads": 8, "learning_rate": 1e-2, "warm_up": 5},
            distributions={name: optuna.distributions.FloatDistribution(0, 1000) for name in defaults},
            value=1.0,
        )
        assert list(tune_explain.planned(defaults, best)) == [
            (defaults, {"group": "defaults"}),
            (
                {**defaults, "learning_rate": 1e-2, "warm_up": 5},
                {"group": "learning rate", "changed": {"learning_rate": 1e-2, "warm_up": 5}},
            ),
            ({**defaults, "num_heads": 8}, {"group": "heads", "changed": {"num_heads": 8}}),
        ]

    def test_groups_have_every_key_that_can_be_searched_once(self):
        names = Counter(name for names in tune_explain.GROUPS.values() for name in names)
        searched = Space(SCRIPTS / "spaces" / "default.toml", TRIAL).ranges
        assert set(names.values()) == {1} and names.keys() >= searched.keys()
        assert names.keys() <= training_config.SECTION_OF.keys()


class TestWorker:
    def config(self, data: pathlib.Path, **more) -> Config:
        base = Config(
            model={"num_layers": 1, "embed_dim": 16, "num_heads": 2}, data={"data": [str(data)], "length": 32}
        )
        return training_config.merge(base, {"optimizer": {"steps": 20, "warm_up": 2}, **more}, "test")

    def test_trains_prunes_and_survives(self, data):
        told = []
        with Worker() as worker:
            result = worker.train(self.config(data), lambda *report: told.append(report))
            assert isinstance(result, Result) and 0 < result.loss < 8 and result.microseconds_per_byte > 0
            assert [steps for steps, _ in told] == [4, 8, 12, 16]
            with pytest.raises(Pruned):
                worker.train(self.config(data), lambda *report: True)
            with pytest.raises(Failed, match="Diverged: step .: the loss is"):
                worker.train(self.config(data, optimizer={"learning_rate": 1e30, "steps": 20}), lambda *report: False)
            with pytest.raises(Failed, match="the training's process ended by SIGKILL"):
                worker.train(self.config(data), lambda *report: worker.process.kill())
            assert worker.train(self.config(data), lambda *report: False).loss == result.loss


def take(url: str, count: int, results: multiprocessing.Queue) -> None:
    study = optuna.load_study(study_name="x", storage=tune_study.database(url))
    for _ in range(count):
        trial = study.ask()
        results.put((trial.number, trial.user_attrs.get("planned", False)))
        study.tell(trial, 0.0)


def test_no_two_processes_take_the_same_trial(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(storage=tune_study.database(url), study_name="x")
    for i in range(25):
        study.enqueue_trial({"i": i}, user_attrs={"planned": True})
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=take, args=(url, 10, results)) for _ in range(3)]
    for process in processes:
        process.start()
    taken = [results.get(timeout=120) for _ in range(30)]
    for process in processes:
        process.join()
    assert sorted(number for number, _ in taken) == list(range(30))
    assert Counter(planned for _, planned in taken) == {True: 25, False: 5}


class Stub:
    """In place of a Worker: trains nothing."""

    def train(self, config: Config, prune) -> Result:
        return Result(loss=config.optimizer.learning_rate, microseconds_per_byte=1.0, parameters=1, bytes_read=1)


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_the_last_trial_is_begun_twice(space, tmp_path, sampler):
    """Two processes find at the same time that one more is wanted: what the second begins is none of the study's."""
    one = space("[model]\nnum_heads = { choices = [2, 4, 8] }\nembed_dim = 16\n")
    grid = sampler == "grid"
    planned = [(point, {}) for point in one.grid()] if grid else []
    storage = tune_study.database(f"sqlite:///{tmp_path / 'study.db'}")
    study = tune_study.begin(storage, "x", {}, planned, sampler, 0, optuna.pruners.NopPruner())
    tuning = tune.Tuning(study, one, Stub(), None if grid else 3, grid, float("inf"))
    tuning.run()
    tuning.one_trial()  # as a process does that looked before the last was begun
    tuning.run()
    tune_report.write(study, None, tmp_path)
    assert [row["state"] for row in trials(tmp_path)] == ["COMPLETE"] * 3
    assert (tmp_path / "report.md").read_text().splitlines()[2] == "3 trials: 3 complete."


class TestCommand:
    """As a user runs it."""

    def words(self, data: pathlib.Path, out: pathlib.Path, *more: object) -> list[object]:
        return [*FEW, "--data", data, "--space", data.parent / "space.toml", "--out", out, *more]

    @pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
    def test_one_objective(self, space, data, tmp_path, sampler):
        out = tmp_path / sampler
        pruner = "hyperband" if sampler == "tpe" else "median"
        output = run("tune.py", *self.words(data, out, "--sampler", sampler, "--trials", 12, "--pruner", pruner))
        rows = trials(out)
        assert len(rows) == 12 and {row["state"] for row in rows} <= {"COMPLETE", "PRUNED"}
        assert (rows[0]["num_heads"], rows[0]["window"], float(rows[0]["learning_rate"])) == ("4", "32", 3e-3)
        best = min((row for row in rows if row["state"] == "COMPLETE"), key=lambda row: float(row["loss"]))
        assert f"The best, trial {best['trial']}, reached {float(best['loss']):.3f}" in output
        config = training_config.read(out / "best.toml")
        assert str(config.model.num_heads) == best["num_heads"] and str(config.model.window) == f"[{best['window']}]"
        report = (out / "report.md").read_text()
        for picture in ("history", "learning", "importances", "slices", "why"):
            assert f"({picture}.png)" in report and (out / f"{picture}.png").stat().st_size > 1000
        assert f"| learning rate | learning_rate {float(best['learning_rate']):.3g} |" in report
        # train.py takes the file, and gets what the trial got.
        run("train.py", "--config", out / "best.toml", "--out", tmp_path / "run", "--validate-every", 2)
        with (tmp_path / "run" / "metrics.csv").open() as stream:
            validated = [float(row["validation"]) for row in csv.DictReader(stream) if row["validation"]]
        assert min(validated) == pytest.approx(float(best["loss"]), rel=1e-5)

    def test_two_objectives(self, space, data, tmp_path):
        out = tmp_path / "out"
        space(
            "[model]\nnum_layers = { low = 1, high = 2 }\nembed_dim = 16\nwindow = { low = 4, high = 32, per_layer = true }"
        )
        run("tune.py", *self.words(data, out, "--sampler", "nsga2", "--trials", 6))
        rows = trials(out)
        assert len(rows) == 6 and all(float(row["microseconds_per_byte"]) > 0 for row in rows)
        assert (out / "front.png").exists()
        front = [row for row in rows if (out / f"trial{row['trial']}.toml").exists()]
        for one in front:
            for other in rows:
                names = ("loss", "microseconds_per_byte")
                assert not all(float(other[name]) < float(one[name]) for name in names)
        assert front

    def test_two_processes_share_a_grid(self, space, data, tmp_path):
        """Started at the same time, on one database."""
        space(
            "[model]\nnum_layers = 1\nembed_dim = 16\nnum_heads = { choices = [1, 2, 4, 8] }\nwindow = { choices = [4, 32] }\n"
        )
        words = self.words(data, tmp_path / "a", "--sampler", "grid", "--storage", f"sqlite:///{tmp_path / 'study.db'}")
        processes = [start("tune.py", *words), start("tune.py", *words, "--out", tmp_path / "b")]
        for process in processes:
            finish(process)
        for out in ("a", "b"):
            rows = trials(tmp_path / out)
            assert sorted(int(row["trial"]) for row in rows) == list(range(8))
            assert len({(row["num_heads"], row["window"]) for row in rows}) == 8
            assert all(row["state"] == "COMPLETE" for row in rows)

    def test_killed_and_resumed(self, space, data, tmp_path):
        """The trial that was cut off is begun again, once; no other is."""
        out = tmp_path / "out"
        space("[model]\nnum_layers = 1\nembed_dim = 16\nnum_heads = { choices = [1, 2, 4, 8] }\n")
        words = self.words(data, out, "--sampler", "grid", "--steps", 600, "--validation-bytes", 100)
        process = start("tune.py", *words)
        storage = wait_for_trials(out, 2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        (cut_off,) = [t for t in storage.get_all_trials(1) if t.state == optuna.trial.TrialState.RUNNING]
        run("tune.py", *words)
        rows = trials(out)
        (lost,) = [row for row in rows if row["state"] == "FAIL"]
        assert int(lost["trial"]) == cut_off.number
        complete = [row for row in rows if row["state"] == "COMPLETE"]
        assert sorted(row["num_heads"] for row in complete) == ["1", "2", "4", "8"]

    def test_interrupted(self, space, data, tmp_path):
        """Ctrl-C writes the report; the trial that it cut off is begun again."""
        out = tmp_path / "out"
        words = self.words(
            data, out, "--sampler", "random", "--trials", 3, "--no-explain", "--steps", 600, "--validation-bytes", 100
        )
        process = start("tune.py", *words)
        wait_for_trials(out, 2)
        process.send_signal(signal.SIGINT)
        assert "interrupted" in finish(process, 130)
        assert (out / "report.md").exists()
        run("tune.py", *words)
        states = Counter(row["state"] for row in trials(out))
        assert states["FAIL"] == 1 and states["COMPLETE"] + states["PRUNED"] == 3

    def test_no_trial_is_trained_twice(self, space, data, tmp_path):
        """One with the parameters of an earlier one has its result, its time included."""
        space("[model]\nnum_layers = 1\nembed_dim = 16\nnum_heads = { choices = [2, 4] }\n")
        out = tmp_path / "out"
        words = self.words(data, out, "--sampler", "random", "--trials", 5, "--pruner", "none", "--no-explain")
        run("tune.py", *words)
        results = {(row["num_heads"], row["loss"], row["microseconds_per_byte"]) for row in trials(out)}
        assert len(trials(out)) == 5 and len(results) == len({heads for heads, _, _ in results})

    def test_failed_trials_are_recorded(self, space, data, tmp_path):
        out = tmp_path / "out"
        space("[model]\nnum_layers = 1\nembed_dim = 16\n[optimizer]\nlearning_rate = { choices = [0.003, 1e30] }\n")
        assert "trial 1 failed: Diverged" in run("tune.py", *self.words(data, out, "--sampler", "grid"))
        assert [row["state"] for row in trials(out)] == ["COMPLETE", "FAIL"]
        assert "the loss is" in trials(out)[1]["failure"] and "the loss is" in (out / "report.md").read_text()

    def test_bad_input(self, space, data, tmp_path):
        """One line that names what is wrong, exit status 2, and nothing changed."""
        out = tmp_path / "out"
        words = self.words(data, out, "--sampler", "random", "--trials", 1, "--no-explain")
        run("tune.py", *words)
        before = {file: file.read_bytes() for file in out.iterdir() if file.suffix != ".db"}

        def error(*more: object) -> str:
            output = run("tune.py", *words, *more, status=2)
            assert output.startswith("tune.py: error: ") and "Traceback" not in output
            assert before == {file: file.read_bytes() for file in out.iterdir() if file.suffix != ".db"}
            return output

        assert "--study wmha: [optimizer] steps: the study has 20, now it is 30" in error("--steps", 30)
        assert "--sampler: the study has loss, now it is loss and time" in error("--sampler", "nsga2")
        assert "nsga2 has two objectives" in error("--sampler", "nsga2", "--pruner", "median")
        assert "--storage nonsense: " in error("--storage", "nonsense")
        assert "none.toml: No such file" in error("--space", tmp_path / "none.toml")
        assert "--study other: there is none of this name" in error("--study", "other", "--report")
        space(SPACE.replace("high = 32", "high = 64"))
        assert "[model] window: the study has" in error()
        (out / "damaged.db").write_bytes(b"not a database" * 100)
        assert "damaged.db: " in error("--storage", f"sqlite:///{out / 'damaged.db'}")
        assert (out / "damaged.db").read_bytes() == b"not a database" * 100


def wait_for_trials(out: pathlib.Path, count: int) -> optuna.storages.RDBStorage:
    """Until that many have begun, and the last is on its way."""
    while not (out / "study.db").exists():
        time.sleep(0.05)
    time.sleep(1)
    storage = tune_study.database(f"sqlite:///{out / 'study.db'}")
    while True:
        begun = [trial for trial in storage.get_all_trials(1, deepcopy=False) if trial.state.name != "WAITING"]
        if len(begun) >= count and begun[-1].intermediate_values:
            return storage
        time.sleep(0.05)
