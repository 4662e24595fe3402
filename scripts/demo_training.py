"""One training step, the same for the demo's training and for its measurements."""

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Trainer:
    """A model and its optimisers: Muon for the matrices of the layers, AdamW for everything else."""

    def __init__(self, model: nn.Module, rate: float = 3e-3, bf16: bool = False):
        self.model, self.rate, self.bf16 = model, rate, bf16
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        tables = [p for p in model.parameters() if p.dim() == 2 and all(p is not matrix for matrix in matrices)]
        groups = [{"params": tables}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizers = [
            torch.optim.Muon(matrices, rate, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
        ]

    def step(self, tokens: Tensor, progress: float) -> float:
        """Learns from tokens (B, N + 1), with `progress` of the training behind it -> bits per byte before the step."""
        warm_up = min(1.0, 0.02 + 20 * progress)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = self.rate * warm_up * (0.5 + 0.5 * math.cos(math.pi * progress))
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item() / math.log(2)


def is_bf16_faster(device: str) -> bool:
    """Some processors multiply bfloat16 several times as fast as float32, others many times slower."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(512, 512, dtype=dtype, device=device)
        times = []
        for _ in range(30):
            start = time.perf_counter()
            (matrix @ matrix)[0, 0].item()
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


def bits_per_byte(model: nn.Module, text: Tensor) -> float:
    """What the model needs to encode `text` (N,), each byte from those before it; a 0 byte stands in front."""
    training, length = model.training, 4096
    model.eval()
    total = 0.0
    with torch.no_grad():
        inputs = F.pad(text, (1, -1))
        for first in range(0, len(text), length):
            part = slice(first, first + length)
            logits = model(inputs[None, part])[0]
            total += F.cross_entropy(logits, text[part], reduction="sum").item()
    model.train(training)
    return total / math.log(2) / len(text)
