#!/usr/bin/env python3
"""What the tensor-core kernels execute for the work they are useful for, beside FlashAttention-2's: one head of 1,024
positions in fp16. Nothing is timed; a profiler or an interpreter counts.

    python scripts/cuda_profile.py --run COMMAND       tables on the terminal, and profile.json and profile.md in --out
    python scripts/cuda_profile.py --resources         compares the library's kernels with tests/cuda_resources.txt;
                                                       exit status 1 if one of them takes more
    python scripts/cuda_profile.py --resources --update    writes that file

COMMAND is put before a Python process that makes the calls. There, something must append a line of JSON for each
kernel, before its stream is synchronised, to the file that the environment variable --variable names; other lines are
skipped. Fields: entry (the kernel's mangled name), dynamic_shared (bytes), warp_instructions (executed by warps),
mma (of them, m16n8k16 on tensor cores), shared_wavefronts and shared_wavefronts_ideal (needed, and the fewest for these
accesses), global_sectors and global_sectors_ideal (of 32 bytes, the same; lanes that read the same bytes need fewer).

Exit status 2: something is missing, and the message says what.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

import torch

import cuda_resources
import wmha
from cuda_resources import Missing, Resources

LENGTH = 1024  # positions
DIMS = (64, 128)  # of a head
MMA_FLOPS = 4096  # of one m16n8k16
USEFUL_FLOPS = {"forward": 4, "backward": 10}  # for each visible pair of a query and a key, and each feature
COUNTS = ("warp_instructions", "mma", "shared_wavefronts", "shared_wavefronts_ideal", "global_sectors",
          "global_sectors_ideal")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A kind of call; and FlashAttention-2 there, its sm_80 kernels counted in the same way: executed instructions for
    each useful mma by (pass, head dimension), and executed mma over useful mma in both passes."""

    name: str
    window: tuple[int, int]
    flash: dict[tuple[str, int], float]
    flash_mma: float | None
    dropout_p: float = 0.0

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        left, right = (LENGTH if side < 0 else side for side in self.window)
        return sum(min(i + right, LENGTH - 1) - max(i - left, 0) + 1 for i in range(LENGTH))

    def useful_mma(self, part: str, dim: int) -> float:
        return USEFUL_FLOPS[part] * self.pairs() * dim / MMA_FLOPS


def flash(*figures: float) -> dict[tuple[str, int], float]:
    return dict(zip([(part, dim) for dim in DIMS for part in USEFUL_FLOPS], figures, strict=True))


ROWS = [
    Row("window (256, 0)", (256, 0), flash(12.2, 8.8, 8.1, 6.4), 1.49),
    Row("window (128, 0)", (128, 0), flash(17.1, 12.5, 11.4, 9.1), 1.98),
    Row("causal", (-1, 0), flash(6.2, 5.1, 4.6, 4.0), 1.12),
    Row("no window", (-1, -1), flash(5.1, 4.2, 3.9, 3.4), 1.00),
    Row("window (256, 0), dropout 0.1", (256, 0), flash(18.3, 12.4, 12.1, 8.3), None, dropout_p=0.1),
]
# What its kernels before and after the main one of a backward pass add, by head dimension, counted in the first row.
# They do the same for any window. All of our kernels are counted.
FLASH_HELPERS = {64: 10.4 - 8.8, 128: 7.8 - 6.4}
GOALS = {
    ("window (256, 0)", "forward", 64): 9.0,
    ("window (256, 0)", "forward", 128): 6.5,
    ("window (256, 0)", "backward", 64): 10.0,
    ("window (256, 0)", "backward", 128): 7.8,
}
MMA_GOALS = {("window (256, 0)", "forward"): 1.25}
# Elsewhere: forward no more than FlashAttention-2, backward no more than this many times all of its kernels. Two passes
# without atomics make seven products where atomics make five.
BACKWARD_GOAL = 1.4


def flash_backward(row: Row, dim: int) -> float:
    """FlashAttention-2's figure with its helper kernels."""
    return row.flash["backward", dim] + FLASH_HELPERS[dim] * ROWS[0].pairs() / row.pairs()


def goal(row: Row, part: str, dim: int) -> float:
    """Instructions for each useful mma, at most."""
    elsewhere = row.flash[part, dim] if part == "forward" else BACKWARD_GOAL * flash_backward(row, dim)
    return GOALS.get((row.name, part, dim), elsewhere)


def run_calls(profile: pathlib.Path) -> None:
    """In the process under the user's command: makes every call, and prints what each left in the profile."""
    from tqdm import tqdm  # which --resources does without

    def launches() -> list[dict]:
        torch.cuda.synchronize()
        lines = file.read().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    torch.autograd.set_multithreading_enabled(False)  # a thread letting go of tensors may abort an ending process
    profile.touch()
    with open(profile) as file, tqdm(total=len(ROWS) * len(DIMS), unit="call", dynamic_ncols=True) as bar:
        for row in ROWS:
            for dim in DIMS:
                bar.set_postfix_str(f"{row.name}, D={dim}")
                torch.manual_seed(0)
                *leaves, grad_output = torch.randn(4, 1, 1, LENGTH, dim, dtype=torch.half, device="cuda").unbind()
                leaves = [leaf.requires_grad_() for leaf in leaves]
                launches()
                output = wmha.attention(*leaves, window=row.window, dropout_p=row.dropout_p)
                forward = launches()
                torch.autograd.grad(output, leaves, grad_output)
                for part, found in (("forward", forward), ("backward", launches())):
                    print(json.dumps({"row": row.name, "pass": part, "dim": dim, "launches": found}), flush=True)
                bar.update()


def profile_calls(prefix: list[str], variable: str) -> list[dict]:
    """The calls, each with all the launches of wmha's kernels in it."""
    with tempfile.TemporaryDirectory() as folder:
        profile = pathlib.Path(folder) / "profile"
        command = [*prefix, sys.executable, __file__, "--calls", str(profile)]
        try:
            done = subprocess.run(
                command,
                env=os.environ | {variable: str(profile)},
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
        except OSError as error:
            raise Missing(f"--run: can't start `{prefix[0]}`: {error.strerror}") from None
    if done.returncode != 0:
        raise Missing(f"`{shlex.join(prefix)}`: the process that makes the calls ended with {done.returncode}")
    calls = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"row"')]
    for call in calls:
        call["launches"] = [launch for launch in call["launches"] if "wmha" in launch.get("entry", "")]
        if not call["launches"]:
            raise Missing(f"`{shlex.join(prefix)}` left no profile of a kernel of wmha in the file {variable}")
        if lacking := {"dynamic_shared", *COUNTS} - call["launches"][0].keys():
            raise Missing(f"the profile has no {', '.join(sorted(lacking))}")
    return calls


def evaluate(calls: list[dict], kernels: dict[str, Resources]) -> None:
    """Adds to each call its ratios, and to each launch the kernel's name."""
    names = {kernel.entry: name for name, kernel in kernels.items()}
    rows = {row.name: row for row in ROWS}
    for call in calls:
        row, part, dim = rows[call["row"]], call["pass"], call["dim"]
        useful = row.useful_mma(part, dim)
        sums = {count: sum(launch[count] for launch in call["launches"]) for count in COUNTS}
        call["instructions"] = sums["warp_instructions"] / useful
        call["mma"] = sums["mma"] / useful
        for what in ("shared_wavefronts", "global_sectors"):
            call[what] = sums[what] / sums[f"{what}_ideal"] if sums[f"{what}_ideal"] else 1.0
        for launch in call["launches"]:
            if launch["entry"] not in names:
                raise Missing(f"the library has no code of {launch['entry']} for {cuda_resources.ARCHITECTURE}")
            launch["name"] = names[launch["entry"]]
            launch["instructions"] = launch["warp_instructions"] / useful


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}" if number < 2 else f"{number:.1f}"


def table_of_calls(calls: list[dict]) -> str:
    """Row by row what all kernels of a call execute; FlashAttention-2 and the goal beside it."""
    found = {(call["row"], call["pass"], call["dim"]): call for call in calls}
    lines = []
    for part in USEFUL_FLOPS:
        for row in ROWS:
            for dim in DIMS:
                call = found[row.name, part, dim]
                flash_figure = figure(row.flash[part, dim])
                if part == "backward":
                    flash_figure += f" ({figure(flash_backward(row, dim))})"
                lines.append([
                    f"{row.name}, D={dim}", part,
                    figure(call["instructions"]), flash_figure, figure(goal(row, part, dim)),
                    figure(call["mma"]), figure(row.flash_mma), figure(MMA_GOALS.get((row.name, part))),
                    figure(call["shared_wavefronts"]), figure(call["global_sectors"]), str(len(call["launches"])),
                ])  # fmt: skip
    head = ["call", "pass", "instructions / useful mma", "FlashAttention-2", "goal", "mma / useful", "FlashAttention-2",
            "goal", "wavefronts / ideal", "sectors / ideal", "kernels"]  # fmt: skip
    return markdown(head, lines)


def table_of_kernels(calls: list[dict], kernels: dict[str, Resources]) -> str:
    """What each kernel that was launched takes, and its part of the instructions of the first call that launches it."""
    launches: dict[tuple[str, int], tuple[dict, dict]] = collections.OrderedDict()
    for call in calls:
        for launch in call["launches"]:
            launches.setdefault((launch["name"], launch["dynamic_shared"]), (call, launch))
    lines = []
    for (name, dynamic_shared), (call, launch) in launches.items():
        kernel = kernels[name]
        lines.append([
            f"`{name}`", f"{call['pass']}, D={call['dim']}", str(kernel.registers), str(kernel.stack),
            str(kernel.shared + dynamic_shared), f"{figure(launch['instructions'])} of {figure(call['instructions'])}",
        ])  # fmt: skip
    head = [
        "kernel",
        "first in",
        "registers",
        "stack (spills), bytes",
        "shared memory, bytes",
        "instructions / useful mma there",
    ]
    return markdown(head, lines)


def profile(prefix: list[str], variable: str, out: pathlib.Path) -> None:
    kernels = cuda_resources.of_library()
    calls = profile_calls(prefix, variable)
    evaluate(calls, kernels)
    tables = f"{table_of_calls(calls)}\n\n{table_of_kernels(calls, kernels)}\n"
    print(tables)
    out.mkdir(parents=True, exist_ok=True)
    (out / "profile.md").write_text(tables)
    resources = {name: dataclasses.asdict(kernel) for name, kernel in kernels.items()}
    (out / "profile.json").write_text(json.dumps({"calls": calls, "kernels": resources}, indent=1))
    print(f"profile.md and profile.json are in {out.resolve()}")


def check_resources(update: bool) -> int:
    kernels = cuda_resources.of_library()
    if update:
        cuda_resources.write_table(kernels)
        return 0
    worse = cuda_resources.complaints(kernels, cuda_resources.read_table())
    print("\n".join(worse) if worse else f"{len(kernels)} kernels take no more than recorded")
    return 1 if worse else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cuda_profile.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", metavar="COMMAND", help="under which the calls are profiled, with its arguments")
    what.add_argument("--resources", action="store_true", help="registers, stack and shared memory only; no call")
    what.add_argument("--calls", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--variable", default="KERNEL_PROFILE", help="names the profile's file; default: %(default)s")
    parser.add_argument("--update", action="store_true", help="with --resources: record what the library has")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("wmha-cuda-profile"), help="default: %(default)s"
    )
    args = parser.parse_args()
    if args.update and not args.resources:
        parser.error("--update goes with --resources")
    return args


def main() -> int:
    args = parse()
    try:
        if args.calls:
            run_calls(args.calls)
        elif args.resources:
            return check_resources(args.update)
        else:
            profile(shlex.split(args.run), args.variable, args.out)
    except Missing as missing:
        print(f"cuda_profile.py: {missing}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
