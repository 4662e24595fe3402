"""What scripts/train.py is made of: configurations, text, steps, validation, metrics and checkpoints."""

import argparse
import csv
import math
import pathlib
import types

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import metrics
import text
import training
import training_config
from command import InputError
from processes import Processes
from training import Training
from training_config import Config

TEXT = torch.arange(5000).mul(7919).remainder(251).byte()
VALIDATION = TEXT[:600].flip(0)
SMALL = {
    "model": {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "window": 8},
    "optimizer": {"steps": 6, "warm_up": 2},
    "data": {"length": 32, "batch_size": 4},
}


def small(**changes) -> Config:
    """SMALL with other values, by key."""
    table = {section: dict(keys) for section, keys in SMALL.items()}
    for name, value in changes.items():
        table.setdefault(training_config.SECTION_OF[name], {})[name] = value
    return Config.model_validate(table)


def begin(config: Config) -> Training:
    return Training(config, TEXT, VALIDATION, Processes("cpu"))


class TestConfig:
    def test_file_and_back(self, tmp_path):
        config = small(window=[4], head_dim=8, learned_temperature="none", data=["a b", 'c"'], bias=True)
        training_config.write(config, tmp_path / "config.toml")
        assert training_config.read(tmp_path / "config.toml") == config

    def test_keys_are_unique(self):
        sections = training_config.SECTIONS.values()
        assert len(training_config.SECTION_OF) == sum(len(section.model_fields) for section in sections)

    def test_command_line_wins(self, tmp_path):
        parser = argparse.ArgumentParser()
        training_config.add_options(parser)
        words = (
            "--num-heads 8 --window 4 -1 --learning-rate 1e-2 --bias true --head-dim none --learned-temperature none"
        )
        config = training_config.override(small(head_dim=4), parser.parse_args(words.split()))
        assert config.model.num_heads == 8 and config.model.window == [4, -1] and config.model.bias
        assert config.model.head_dim is None and config.model.learned_temperature == "none"
        assert config.optimizer.learning_rate == 0.01 and config.optimizer.steps == 6

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("[model]\nnum_head = 3", r"unknown key num_head in \[model\]; is num_heads in \[model\] meant"),
            (
                "[model]\nlearning_rate = 3",
                r"unknown key learning_rate in \[model\]; is learning_rate in \[optimizer\] meant",
            ),
            ("[modle]\nnum_heads = 3", r"unknown section \[modle\]; is model meant"),
            ("num_heads = 3", r"unknown section \[num_heads\]"),
            ("[model]\nnum_heads = 0", r"\[model\] num_heads: .*greater than or equal to 1, got 0"),
            ("[model]\nnum_heads = 'x'", r"\[model\] num_heads: .*integer.*got 'x'"),
            ("[model]\ndropout = 1.5", r"\[model\] dropout: .*less than or equal to 1, got 1.5"),
            ("[model]\nactivation = 'x'", r"\[model\] activation: .*'gelu', 'relu'.*got 'x'"),
            ("[optimizer]\nlearning_rate = nan", r"\[optimizer\] learning_rate: .*got nan"),
            ("[training]\nseed = -1", r"\[training\] seed: .*got -1"),
            ("model = 3", r"\[model\].*got 3"),
            ("[model", "not TOML"),
            ("[model]\nbias = 1\nbias = 2", "not TOML"),
        ],
    )
    def test_errors_name_file_and_key(self, tmp_path, content, words):
        file = tmp_path / "my.toml"
        file.write_text(content)
        with pytest.raises(InputError, match=f"my.toml: {words}"):
            training_config.read(file)

    def test_missing_file(self, tmp_path):
        with pytest.raises(InputError, match="none.toml: No such file"):
            training_config.read(tmp_path / "none.toml")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"num_heads": 3}, "embed_dim must be a multiple of num_heads, 3, without head_dim, got 16"),
            ({"num_heads": 129, "head_dim": 4}, "num_heads must be between 1 and 128, got 129"),
            ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, 2, got 3"),
            ({"temperature": 0}, "temperature must be positive"),
            ({"window": [-2]}, "window_left must be -1"),
            ({"window": [3, 3]}, "window must be one number or one for each of 1 layers, got 2"),
            ({"softcap": -1}, "softcap must be 0"),
            ({"warm_up": 7}, "warm_up must be at most steps, 6, got 7"),
            (
                {"accumulate": 3},
                "batch_size must be a multiple of accumulate times the number of processes, 3 x 1, got 4",
            ),
        ],
    )
    def test_values_that_do_not_go_together(self, changes, words):
        with pytest.raises(InputError, match=f"^my.toml: {words}"):
            training_config.check(small(**changes), "my.toml")

    def test_resolved(self):
        model = training_config.resolved(small()).model
        assert (model.num_kv_heads, model.head_dim, model.value_dim, model.dim_feedforward) == (2, 8, 8, 64)
        assert model.scale == 8**-0.5


class TestText:
    def test_library(self):
        train, validation = text.load([], 256, 10_000)
        assert train.dtype == torch.uint8 and len(train) > 1e6 and len(validation) == 10_000

    def test_files_and_folders(self, tmp_path):
        (tmp_path / "folder" / "deep").mkdir(parents=True)
        (tmp_path / "one.bin").write_bytes(b"1" * 1000)
        (tmp_path / "folder" / "deep" / "two.txt").write_bytes(b"2" * 2000)
        (tmp_path / "folder" / "picture.png").write_bytes(b"3" * 3000)
        train, validation = text.load([str(tmp_path / "one.bin"), str(tmp_path / "folder")], 64, 10**6)
        assert bytes(train.tolist()) == b"1" * 900 + b"\0" + b"2" * 1800
        assert bytes(validation.tolist()) == b"1" * 100 + b"\0" + b"2" * 200

    def test_whole_files_are_held_out(self, tmp_path):
        for i in range(32):
            (tmp_path / f"{i:02}.txt").write_bytes(bytes([65 + i]) * 100)
        train, validation = text.load([str(tmp_path)], 64, 10**6)
        assert set(validation.tolist()) == {0, 65 + 8, 65 + 24}
        assert set(train.tolist()) == {0, *range(65, 65 + 32)} - {65 + 8, 65 + 24}

    @pytest.mark.parametrize("content", [b"", b"x" * 500])
    def test_too_short(self, tmp_path, content):
        (tmp_path / "short.txt").write_bytes(content)
        with pytest.raises(InputError, match="short.txt: too short: .* bytes to train on"):
            text.load([str(tmp_path / "short.txt")], 64, 100)

    def test_unreadable(self, tmp_path):
        with pytest.raises(InputError, match="data .*none.txt: No such file"):
            text.load([str(tmp_path / "none.txt")], 64, 100)
        with pytest.raises(InputError, match="no files of text"):
            text.load([str(tmp_path)], 64, 100)

    def test_baselines(self):
        validation = torch.tensor([0, 1] * 500, dtype=torch.uint8)
        lines = text.baselines(torch.tensor([0, 1] * 10**5, dtype=torch.uint8), validation)
        assert lines["byte frequencies"] == pytest.approx(1, abs=0.01) and lines["gzip -9"] < 0.5


class TestSteps:
    def test_learns(self):
        run = begin(small(steps=60, learning_rate=1e-2))
        losses = [run.step().loss for _ in range(60)]
        assert losses[0] == pytest.approx(8, abs=0.5) and losses[-1] < losses[0] - 1

    def test_devices_agree(self, device):
        config = small(learned_temperature="per_head", warm_up=0)
        here, there = begin(config), Training(config, TEXT, VALIDATION, Processes(device))
        for _ in range(3):
            assert there.step().loss == pytest.approx(here.step().loss, rel=1e-3)
        there.validate()
        here.validate()
        assert there.validation_loss == pytest.approx(here.validation_loss, rel=1e-3)

    @pytest.mark.parametrize("optimizer", ["adamw", "adam", "muon", "sgd"])
    def test_every_optimizer(self, optimizer):
        run = begin(small(optimizer=optimizer, warm_up=0))
        before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
        for _ in range(2):
            run.step()
        for name, parameter in run.model.named_parameters():
            assert not torch.equal(parameter, before[name]), name

    @pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
    def test_weight_decay_is_for_matrices(self, optimizer):
        run = begin(small(optimizer=optimizer, bias=True, learned_temperature="per_head"))
        decayed = {
            id(p): group["weight_decay"]
            for one in run.optimizers
            for group in one.param_groups
            for p in group["params"]
        }
        names = dict(run.model.named_parameters())
        assert len(decayed) == len(names)
        for name, parameter in names.items():
            assert decayed[id(parameter)] == (0.1 if parameter.dim() >= 2 else 0), name
        assert any("log_temperature" in name for name in names) and any(name.endswith("bias") for name in names)

    def test_learning_rate(self):
        config = small(steps=110, warm_up=10, learning_rate=2.0, final_rate=0.25).optimizer
        rates = [training.learning_rate(config, step) for step in range(110)]
        assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
        assert rates[60] == pytest.approx(0.5 + 1.5 * 0.5) and rates[-1] == pytest.approx(0.5, abs=1e-3)
        assert training.learning_rate(small(schedule="linear", warm_up=0, steps=4).optimizer, 1) == pytest.approx(
            0.75 * 3e-3
        )
        assert training.learning_rate(small(schedule="constant", warm_up=0).optimizer, 5) == 3e-3

    def test_clipping(self):
        plain, clipped = begin(small(clip_norm=0)), begin(small(clip_norm=0.01))
        assert plain.step().gradient_norm == clipped.step().gradient_norm > 0.01
        lengths = [
            torch.stack([p.grad.norm() for p in run.model.parameters()]).norm().item() for run in (plain, clipped)
        ]
        assert lengths[0] > 0.1 and lengths[1] == pytest.approx(0.01, rel=1e-3)

    def test_accumulation_changes_nothing(self):
        """But the order in which numbers are added."""
        whole, parts = begin(small(warm_up=0)), begin(small(warm_up=0, accumulate=4))
        for _ in range(3):
            assert parts.step().loss == pytest.approx(whole.step().loss, rel=1e-5)
        for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    def test_processes_share_the_batch(self):
        run = begin(small(accumulate=2))
        run.steps = 3
        together = torch.cat(run._parts())
        shares = []
        for rank in range(2):
            run.processes = types.SimpleNamespace(count=2, rank=rank, device=torch.device("cpu"))
            shares += run._parts()
        assert torch.equal(together.sort(0).values, torch.cat(shares).sort(0).values)

    def test_bf16(self):
        run = begin(small(bf16=True))
        assert run.step().loss == pytest.approx(begin(small()).step().loss, rel=1e-2)

    def test_dropout_differs_between_steps_and_processes(self):
        def drawn(steps: int, rank: int) -> torch.Tensor:
            run = begin(small(batch_size=2))
            run.steps, run.processes = steps, types.SimpleNamespace(count=2, rank=rank, device=torch.device("cpu"))
            run._parts()
            return torch.rand(4)

        assert torch.equal(drawn(1, 0), drawn(1, 0)) and not torch.equal(drawn(1, 0), drawn(2, 0))
        assert not torch.equal(drawn(1, 0), drawn(1, 1))

    def test_seed_decides_everything(self):
        a, b, other = (begin(small(seed=seed, dropout=0.2)) for seed in (1, 1, 2))
        losses = [[run.step().loss for _ in range(3)] for run in (a, b, other)]
        assert losses[0] == losses[1] != losses[2]

    def test_diverged(self):
        run = begin(small(learning_rate=1e30, warm_up=0, clip_norm=0))
        with pytest.raises(training.Diverged, match="step .: the loss is"):
            for _ in range(6):
                run.step()

    def test_patience(self):
        run = begin(small(learning_rate=0, patience=2, steps=10))
        assert run.validate() and not run.finished
        assert not run.validate() and not run.finished
        assert not run.validate() and run.finished


def test_bits_per_byte(monkeypatch):
    """As one would compute it, for any number of processes."""
    run = begin(small())
    monkeypatch.setattr(training, "VALIDATION_LENGTH", 100)
    total = 0.0
    for first in range(0, 600, 100):
        before = VALIDATION[first - 1 : first + 99] if first else torch.cat((torch.zeros(1), VALIDATION[:99]))
        with torch.no_grad():
            logits = run.model(before.long()[None])[0]
        total += F.cross_entropy(logits, VALIDATION[first : first + 100].long(), reduction="sum").item()
    expected = total / math.log(2) / 600
    assert training.bits_per_byte(run.model, VALIDATION, run.processes) == pytest.approx(expected, rel=1e-5)
    shares = [types.SimpleNamespace(count=4, rank=rank, device="cpu", sum=lambda x: x) for rank in range(4)]
    assert sum(training.bits_per_byte(run.model, VALIDATION, one) for one in shares) == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_state_continues_exactly(tmp_path, optimizer):
    config = small(optimizer=optimizer, dropout=0.1, attention_dropout=0.1)
    whole = begin(config)
    for _ in range(6):
        whole.step()
    first = begin(config)
    for _ in range(3):
        first.step()
    first.validate()
    checkpoint.save(first.state(), tmp_path / "half.pt")
    second = begin(config)
    second.load_state(checkpoint.load(tmp_path / "half.pt"))
    assert (second.steps, second.best) == (3, first.best)
    for _ in range(3):
        second.step()
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


class TestCheckpoint:
    def test_damage(self, tmp_path):
        file = tmp_path / "checkpoint.pt"
        checkpoint.save({"model": {"weight": torch.randn(10_000)}}, file)
        whole = file.read_bytes()
        assert checkpoint.load(file)["model"]["weight"].shape == (10_000,)
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1  # among the weights
        for content in (bytes(flipped), whole[: len(whole) // 2], b"", b"text", whole[:-10]):
            file.write_bytes(content)
            with pytest.raises(InputError, match="checkpoint.pt: damaged"):
                checkpoint.load(file)

    def test_other_files(self, tmp_path):
        torch.save({"model": 1}, tmp_path / "other.pt")
        with pytest.raises(InputError, match="other.pt: not a checkpoint of this program"):
            checkpoint.load(tmp_path / "other.pt")
        with pytest.raises(InputError, match="none.pt: No such file"):
            checkpoint.load(tmp_path / "none.pt")

    def test_a_write_that_fails_leaves_the_old_one(self, tmp_path):
        file = tmp_path / "checkpoint.pt"
        checkpoint.save({"steps": 1}, file)
        with pytest.raises(ZeroDivisionError), checkpoint.replacing(file) as stream:
            stream.write(b"half")
            raise ZeroDivisionError
        assert checkpoint.load(file)["steps"] == 1


class TestMetrics:
    def rows(self, folder: pathlib.Path) -> list[dict]:
        with (folder / "metrics.csv").open() as stream:
            return list(csv.DictReader(stream))

    def run(self, folder: pathlib.Path, run: Training, steps: int) -> None:
        log = metrics.Metrics(folder, run.steps)
        for _ in range(steps):
            step = run.step()
            validated = run.steps % 2 == 0
            if validated:
                run.validate()
            log.add(run, step, validated)
        log.close()

    def test_csv(self, tmp_path):
        run = begin(small())
        self.run(tmp_path, run, 4)
        rows = self.rows(tmp_path)
        assert list(rows[0]) == list(metrics.COLUMNS)
        assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
        assert [bool(row["validation"]) for row in rows] == [False, True, False, True]
        assert rows[3]["bytes"] == str(4 * 4 * 32) and float(rows[3]["validation"]) == run.validation_loss

    def test_resumed(self, tmp_path):
        """Steps after the checkpoint go, also a row that a crash cut off."""
        self.run(tmp_path, begin(small()), 5)
        with (tmp_path / "metrics.csv").open("a") as stream:
            stream.write("6,12")
        run = begin(small())
        for _ in range(3):
            run.step()
        self.run(tmp_path, run, 2)
        assert [row["step"] for row in self.rows(tmp_path)] == ["1", "2", "3", "4", "5"]

    def test_tensorboard(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        run = begin(small())
        self.run(tmp_path, run, 4)
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
        assert [event.step for event in events.Scalars("validation")] == [2, 4]
