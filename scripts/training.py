"""A model in training: its steps, its validation, and the state from which it continues exactly."""

import contextlib
import dataclasses
import functools
import math
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import text
from language_model import LanguageModel
from processes import Processes
from training_config import Config, Optimizer

VALIDATION_LENGTH = 4096
PROGRESS = ("steps", "seconds", "best", "validations_since_best", "validation_loss")


class Diverged(Exception):
    """The loss is no longer a number."""


@dataclasses.dataclass
class Step:
    """What a training step was like. The loss is in bits per byte, before the step."""

    loss: float
    gradient_norm: float
    learning_rate: float


class Training:
    """Everything random in step n is a function of (seed, n) alone, so that a run continues from a checkpoint as if it
    hadn't been interrupted, and any number of processes sees the same sequences."""

    def __init__(self, config: Config, training: Tensor, validation: Tensor, processes: Processes):
        """training, validation: bytes (N,), uint8."""
        self.config, self.processes = config, processes
        self.text, self.validation = training, validation
        torch.manual_seed(config.training.seed)
        self.model = LanguageModel(**dict(config.model)).to(processes.device)
        self.optimizers = optimizers(self.model, config.optimizer)
        self.joined = processes.joined(self.model)
        self.steps, self.seconds = 0, 0.0
        self.best, self.validations_since_best, self.validation_loss = math.inf, 0, math.inf

    def step(self) -> Step:
        start = time.perf_counter()
        rate = learning_rate(self.config.optimizer, self.steps)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = 0.0
        parts = self._parts()
        self.model.train()
        for i, tokens in enumerate(parts):
            last = i == len(parts) - 1
            waiting = contextlib.nullcontext() if last or self.processes.count == 1 else self.joined.no_sync()
            with waiting:
                with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.config.training.bf16):
                    logits = self.joined(tokens[:, :-1])
                part = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()) / len(parts)
                part.backward()
            loss += part.item()
        longest = self.config.optimizer.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), longest).item()
        loss = self.processes.sum(loss) / self.processes.count
        if not math.isfinite(loss + norm):
            raise Diverged(f"step {self.steps + 1}: the loss is {loss}, the gradient's norm {norm}")
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps += 1
        self.seconds += time.perf_counter() - start
        return Step(loss / math.log(2), norm, rate)

    def _parts(self) -> list[Tensor]:
        """This process's sequences of the next step, (parts, sequences, length + 1), and its random numbers."""
        data, processes = self.config.data, self.processes
        generator = torch.Generator().manual_seed(random_seed(self.config.training.seed, self.steps))
        first = torch.randint(len(self.text) - data.length, (data.batch_size, 1), generator=generator)
        first = first.view(processes.count, data.accumulate, -1, 1)[processes.rank]
        torch.manual_seed(random_seed(self.config.training.seed, self.steps, 1 + processes.rank))
        return list(self.text[first + torch.arange(data.length + 1)].to(processes.device, torch.int64))

    @functools.cached_property
    def digest(self) -> str:
        """Tells the text from another."""
        return text.digest(self.text)

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def finished(self) -> bool:
        """All steps are made, or validation has not been better for as long as `patience` says."""
        patience = self.config.training.patience
        return self.steps >= self.config.optimizer.steps or 0 < patience <= self.validations_since_best

    def validate(self) -> bool:
        """Bits per byte of the validation text, into `validation_loss`; is it the best so far?"""
        self.validation_loss = bits_per_byte(self.model, self.validation, self.processes)
        if not math.isfinite(self.validation_loss):
            raise Diverged(f"step {self.steps}: the loss of the validation text is {self.validation_loss}")
        best = self.validation_loss < self.best
        self.best = min(self.best, self.validation_loss)
        self.validations_since_best = 0 if best else self.validations_since_best + 1
        return best

    def state(self) -> dict[str, Any]:
        """What `load_state` continues from."""
        return {
            "config": self.config.table(),
            "text": self.digest,
            "progress": {name: getattr(self, name) for name in PROGRESS},
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        for name, value in state["progress"].items():
            setattr(self, name, value)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def optimizers(model: LanguageModel, config: Optimizer) -> list[torch.optim.Optimizer]:
    """Weight decay is for matrices alone: a vector's entries, such as a temperature, have no reason to be small."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    rate, decay = config.learning_rate, config.weight_decay
    made: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        inner = [parameter for parameter in model.stack.layers.parameters() if parameter.dim() == 2]
        made.append(torch.optim.Muon(inner, rate, decay, momentum=config.momentum, adjust_lr_fn="match_rms_adamw"))
        taken = set(map(id, inner))
        matrices = [parameter for parameter in matrices if id(parameter) not in taken]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    if config.optimizer == "sgd":
        made.append(torch.optim.SGD(groups, rate, config.momentum))
    elif config.optimizer == "adam":
        made.append(torch.optim.Adam(groups, rate, betas, fused=True))
    else:
        made.append(torch.optim.AdamW(groups, rate, betas, fused=True))
    return made


def learning_rate(config: Optimizer, steps: int) -> float:
    """Of the step after `steps` steps: rises linearly in the first warm_up steps, then falls to final_rate."""
    if steps < config.warm_up:
        return config.learning_rate * (steps + 1) / config.warm_up
    progress = (steps - config.warm_up) / max(1, config.steps - config.warm_up)
    falling = {"cosine": 0.5 + 0.5 * math.cos(math.pi * progress), "linear": 1 - progress, "constant": 1.0}
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * falling[config.schedule])


def random_seed(*numbers: int) -> int:
    """Seeds of different numbers have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: Tensor, processes: Processes) -> float:
    """What the model needs to encode `text` (N,) in parts of VALIDATION_LENGTH bytes, each byte from those before it in
    its part and the one before that. Each process takes its share of the parts."""
    model.eval()
    inputs = F.pad(text, (1, -1))
    total = 0.0
    for first in range(processes.rank * VALIDATION_LENGTH, len(text), processes.count * VALIDATION_LENGTH):
        part = slice(first, first + VALIDATION_LENGTH)
        tokens, targets = (bytes_[part].to(processes.device, torch.int64) for bytes_ in (inputs, text))
        total += F.cross_entropy(model(tokens[None])[0], targets, reduction="sum").item()
    return processes.sum(total) / math.log(2) / len(text)
