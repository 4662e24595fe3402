"""The processes that train one model together: one, or as many as torchrun started."""

import datetime
import os

import torch
import torch.distributed as dist
from torch import nn


def started() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


class Processes:
    """This process among those of a run. Used as a context, which ends what joins them."""

    def __init__(self, device: str = "auto"):
        """device: auto, cpu or cuda. With several processes on cuda, each takes the GPU of its local rank."""
        self.count, self.rank = started(), int(os.environ.get("RANK", 0))
        kind = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        index = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device(kind, index) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        if self.count > 1:
            backend = "nccl" if kind == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if self.count > 1:
            if failure is None:
                dist.barrier()  # one that left early might take with it what another still waits for
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def joined(self, model: nn.Module) -> nn.Module:
        """The model, whose gradients are the means over the processes."""
        return model if self.count == 1 else nn.parallel.DistributedDataParallel(model)

    def sum(self, number: float) -> float:
        """Of this number over all processes."""
        if self.count == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()
