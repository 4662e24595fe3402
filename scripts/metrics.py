"""What a training run was like, step by step: a CSV file and, where the package tensorboard is installed, its events."""

import csv
import io
import os
import pathlib

import checkpoint
from training import Step, Training

COLUMNS = ("step", "bytes", "seconds", "learning_rate", "loss", "gradient_norm", "validation")


class Metrics:
    """Appends to DIR/metrics.csv and DIR/tensorboard. Losses are in bits per byte; `validation` is empty where the model
    wasn't validated. What stands there of steps that the training hasn't made yet is removed first."""

    def __init__(self, folder: pathlib.Path, steps: int):
        self.file = folder / "metrics.csv"
        kept = [row for row in read(self.file) if int(row["step"]) <= steps]
        checkpoint.write(render(kept, header=True), self.file)
        self.stream = self.file.open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(folder / "tensorboard", purge_step=steps + 1)
        except ImportError:
            self.events = None

    def add(self, training: Training, step: Step, validated: bool) -> None:
        row = {
            "step": training.steps,
            "bytes": training.steps * training.config.data.step_bytes,
            "seconds": round(training.seconds, 3),
            "learning_rate": step.learning_rate,
            "loss": step.loss,
            "gradient_norm": step.gradient_norm,
            "validation": training.validation_loss if validated else "",
        }
        self.stream.write(render([row]))
        if self.events is not None:
            for name in ("learning_rate", "loss", "gradient_norm", *(["validation"] if validated else [])):
                self.events.add_scalar(name, row[name], training.steps)

    def flush(self) -> None:
        """Everything is on the disk after it: a checkpoint never has more steps than the metrics."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        if self.events is not None:
            self.events.flush()

    def close(self) -> None:
        self.flush()
        self.stream.close()
        if self.events is not None:
            self.events.close()


def read(file: pathlib.Path) -> list[dict[str, str]]:
    """Whole rows; a last one that a crash cut off is left out."""
    if not file.exists():
        return []
    lines = file.read_text().splitlines(keepends=True)
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))


def render(rows: list[dict], header: bool = False) -> str:
    output = io.StringIO()
    writer = csv.DictWriter(output, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return output.getvalue()
