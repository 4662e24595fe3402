"""scripts/train.py as a user runs it."""

import csv
import pathlib
import random
import signal
import sys
import time

import pytest
import torch

import checkpoint
import text
from command_line import finish, run, start
from language_model import LanguageModel
from training_config import Config, read

pytestmark = pytest.mark.cpu

SMALL = (
    "--num-layers 1 --embed-dim 16 --num-heads 2 --window 8 --dropout 0.1 --attention-dropout 0.1 --length 32 --batch-size 4 "
    "--steps 300 --warm-up 10 --validate-every 50 --validation-bytes 1000 --checkpoint-every 20"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "text.txt"
    training, _ = text.load([], 32, 1000)
    file.write_bytes(bytes(training[:100_000].tolist()))
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """The folder of a run from beginning to end."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    output = run("train.py", *SMALL, "--data", data, "--out", out, "--export")
    assert "300/300" in output and "best validation" in output
    return out


def curve(out: pathlib.Path) -> list[dict]:
    """The metrics without times."""
    with (out / "metrics.csv").open() as stream:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(stream)]


def same_weights(a: pathlib.Path, b: pathlib.Path) -> bool:
    first, second = checkpoint.load(a)["model"], checkpoint.load(b)["model"]
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run(whole, data):
    names = {file.name for file in whole.iterdir()}
    assert names >= {"config.toml", "metrics.csv", "tensorboard", "learning.png", "best.pt", "checkpoint.pt"}
    rows = curve(whole)
    assert [row["step"] for row in rows] == [str(i + 1) for i in range(300)]
    assert float(rows[-1]["loss"]) < 6 < 7 < float(rows[0]["loss"])
    config = read(whole / "config.toml")
    assert config.model.num_heads == 2 and config.data.data == [str(data)]
    validated = [float(row["validation"]) for row in rows if row["validation"]]
    assert len(validated) == 6 and checkpoint.load(whole / "best.pt")["progress"]["best"] == min(validated)


def test_exports(whole):
    """TorchScript and AOTInductor give what the best model gives, for any number and length of sequences."""
    state = checkpoint.load(whole / "best.pt")
    model = LanguageModel(**dict(Config.model_validate(state["config"]).model)).eval()
    model.load_state_dict(state["model"])
    scripted = torch.jit.load(str(whole / "model.pt"))
    package = torch._inductor.aoti_load_package(str(whole / "model.pt2"))
    for shape in ((1, 7), (3, 50)):
        tokens = torch.randint(256, shape)
        with torch.no_grad():
            torch.testing.assert_close(scripted(tokens), model(tokens))
            torch.testing.assert_close(package(tokens), model(tokens), rtol=1e-4, atol=1e-4)


def test_killed_twice_and_resumed(whole, data, tmp_path):
    out = tmp_path / "run"
    process = start("train.py", *SMALL, "--data", data, "--out", out)
    for _ in range(2):
        before = checkpoint_of(out)
        while checkpoint_of(out) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert checkpoint.load(out / "checkpoint.pt")["progress"]["steps"] < 300
        process = start("train.py", "--out", out, "--resume")
    finish(process)
    assert same_weights(out / "checkpoint.pt", whole / "checkpoint.pt")
    assert same_weights(out / "best.pt", whole / "best.pt")
    assert curve(out) == curve(whole)


def checkpoint_of(out: pathlib.Path) -> int | None:
    """Which one it is."""
    file = out / "checkpoint.pt"
    return file.stat().st_mtime_ns if file.exists() else None


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed(whole, data, tmp_path, how):
    out = tmp_path / "run"
    process = start("train.py", *SMALL, "--data", data, "--out", out, "--checkpoint-every", 10_000)
    while not (out / "metrics.csv").exists():
        time.sleep(0.01)
    process.send_signal(how)
    assert "saved; --resume continues" in finish(process, 128 + how)
    steps = checkpoint.load(out / "checkpoint.pt")["progress"]["steps"]
    assert 0 < steps < 300 and len(curve(out)) == steps
    run("train.py", "--out", out, "--resume", "--checkpoint-every", 20)
    assert same_weights(out / "checkpoint.pt", whole / "checkpoint.pt")
    assert curve(out) == curve(whole)


def test_processes(data, tmp_path):
    """Two of torchrun's learn what one learns."""
    words = [*SMALL, "--data", data, "--steps", 20, "--dropout", 0, "--attention-dropout", 0, "--accumulate", 2]
    run("train.py", *words, "--out", tmp_path / "one")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2)
    finish(start("train.py", *words, "--out", tmp_path / "two", through=torchrun))
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-4)
        assert float(two["validation"] or 0) == pytest.approx(float(one["validation"] or 0), rel=1e-4)


def test_early_stopping(data, tmp_path):
    out = tmp_path / "run"
    run("train.py", *SMALL, "--data", data, "--out", out, "--learning-rate", 0, "--validate-every", 5, "--patience", 2)
    assert len(curve(out)) == 15  # the first validation is the best


def test_diverged(data, tmp_path):
    """Says so, and keeps the last checkpoint."""
    out = tmp_path / "run"
    words = ["--learning-rate", 1e30, "--clip-norm", 0, "--checkpoint-every", 1, "--warm-up", 0]
    assert "the loss is" in run("train.py", *SMALL, *words, "--data", data, "--out", out, status=1)
    assert checkpoint.load(out / "checkpoint.pt")["progress"]["steps"] >= 1


class TestBadInput:
    """One line that names what is wrong, exit status 2, and nothing overwritten."""

    def error(self, *words: object) -> str:
        output = run("train.py", *words, status=2)
        assert output.startswith("train.py: error: ") and "Traceback" not in output
        return output

    def test_configuration(self, data, tmp_path):
        file, out = tmp_path / "my.toml", tmp_path / "run"
        file.write_text("[model]\nnum_head = 3\n")
        assert "my.toml: unknown key num_head" in self.error("--config", file, "--data", data, "--out", out)
        file.write_text("[model]\nnum_heads = 3\n")
        assert "my.toml: embed_dim must be a multiple of num_heads" in self.error("--config", file, "--out", out)
        assert "--num-heads: [model] num_heads: input should be a valid integer" in self.error(
            "--num-heads", "x", "--out", out
        )
        assert "unrecognized arguments: --num-head-s" in self.error("--num-head-s", 3)
        assert not out.exists()

    def test_data(self, tmp_path):
        out = tmp_path / "run"
        assert "none.txt: No such file" in self.error("--data", tmp_path / "none.txt", "--out", out)
        (tmp_path / "short.txt").write_text("short")
        assert "short.txt: too short" in self.error("--data", tmp_path / "short.txt", "--out", out)
        assert not out.exists()

    def test_a_second_run_in_the_same_folder(self, whole, data):
        before = {file: file.read_bytes() for file in whole.iterdir() if file.is_file()}
        assert "holds a run already; --resume continues it" in self.error(*SMALL, "--data", data, "--out", whole)
        assert before == {file: file.read_bytes() for file in whole.iterdir() if file.is_file()}

    def test_resuming(self, whole, data, tmp_path):
        out = tmp_path / "run"
        assert "config.toml: No such file" in self.error("--resume", "--out", out)
        out.mkdir()
        for name in ("config.toml", "checkpoint.pt"):
            (out / name).write_bytes((whole / name).read_bytes())
        assert "[model] embed_dim: is 32, but" in self.error("--resume", "--out", out, "--embed-dim", 32)
        assert "[optimizer] optimizer: is sgd, but" in self.error("--resume", "--out", out, "--optimizer", "sgd")
        changed = tmp_path / "changed.txt"
        changed.write_bytes(data.read_bytes()[::-1])
        assert "not the text that" in self.error("--resume", "--out", out, "--data", changed)
        assert "--config: --resume goes on" in self.error("--resume", "--out", out, "--config", out / "config.toml")
        damaged = (whole / "checkpoint.pt").read_bytes()[:-1000]
        (out / "checkpoint.pt").write_bytes(damaged)
        assert "checkpoint.pt: damaged" in self.error("--resume", "--out", out)
        assert (out / "checkpoint.pt").read_bytes() == damaged
