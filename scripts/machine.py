"""The machine that something was measured on."""

import os
import platform

import torch


def processor(device: str = "cpu") -> str:
    """What computes there: its name and what it can do, as far as the system tells."""
    if device != "cpu":
        gpu = torch.cuda.get_device_properties(device)
        return (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
            f"{gpu.total_memory / 2**30:.0f} GiB"
        )
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
