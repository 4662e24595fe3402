"""Registers and memory of the CUDA kernels in the installed library, and the table of them that a test compares."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess

import wmha

ARCHITECTURE = "sm_80"
TABLE = pathlib.Path(__file__).resolve().parent.parent / "tests" / "cuda_resources.txt"
UPDATE = "python scripts/cuda_profile.py --resources --update"
HEAD = f"""\
# What each CUDA kernel takes on {ARCHITECTURE}: registers of a thread, bytes of its stack (spilled registers, local
# arrays), bytes of static shared memory. Written by `{UPDATE}`.
"""
SIMPLE = ("general_", "dropout")  # beginnings of the files whose kernels serve rare cases: they may have a stack


class Missing(Exception):
    """What is needed to know the kernels isn't here; the message says what."""


@dataclasses.dataclass(frozen=True)
class Resources:
    """One kernel, as it is in the library."""

    registers: int
    stack: int  # bytes of a thread: spilled registers and local arrays
    shared: int  # bytes, static
    entry: str = dataclasses.field(default="", compare=False)  # its mangled name; "" in the table


def cuobjdump() -> str:
    """The toolkit's, the one in CUDA_HOME, or the one that Triton brings along with torch."""
    triton = importlib.util.find_spec("triton")
    folders = [f"{os.environ['CUDA_HOME']}/bin"] if os.environ.get("CUDA_HOME") else []
    folders += [f"{folder}/backends/nvidia/bin" for folder in (triton.submodule_search_locations if triton else ())]
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if found is None:
        raise Missing("there is no cuobjdump: neither on the PATH nor in CUDA_HOME nor in Triton")
    return found


def readable(entries: list[str]) -> list[str]:
    """Mangled names -> "file: kernel<arguments>"."""
    try:
        done = subprocess.run(["c++filt"], input="\n".join(entries), capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise Missing("there is no c++filt (of binutils) on the PATH") from None
    names = []
    for entry, name in zip(entries, done.stdout.splitlines(), strict=True):
        name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("wmha::cuda::", "")
        name = re.sub(r"\((?!int\)|bool\)).*", "", name)  # the parameters; (int)64 and (bool)1 are template arguments
        file = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", entry)
        names.append(f"{file[1]}: {name}" if file else name)
    return names


def by_numbers(name: str) -> list[str]:
    """A key for sorting: 64 comes before 128."""
    return [part.zfill(6) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def of_library() -> dict[str, Resources]:
    """Every kernel of the installed library, by its readable name."""
    if wmha._build.cuda_version is None:
        raise Missing("wmha is built without CUDA")
    command = [cuobjdump(), "--gpu-architecture", ARCHITECTURE, "--dump-resource-usage", wmha.library_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    kernels = [
        Resources(int(registers), int(stack), int(shared), entry)
        for entry, registers, stack, shared in re.findall(pattern, done.stdout)
    ]
    if not kernels:
        said = (done.stderr or done.stdout).strip().partition("\n")[0]
        raise Missing(f"{wmha.library_path} has no code for {ARCHITECTURE}" + (f": {said}" if said else ""))
    names = readable([kernel.entry for kernel in kernels])
    assert len(set(names)) == len(names), names
    return dict(sorted(zip(names, kernels, strict=True), key=lambda item: by_numbers(item[0])))


def write_table(kernels: dict[str, Resources]) -> None:
    rows = [f"{k.registers:9} {k.stack:6} {k.shared:7}  {name}\n" for name, k in kernels.items()]
    TABLE.write_text(HEAD + f"#{'registers':>9}{'stack':>6} {'shared':>7}\n" + "".join(rows))


def read_table() -> dict[str, Resources]:
    kernels = {}
    for line in TABLE.read_text().splitlines():
        if not line.startswith("#"):
            registers, stack, shared, name = line.split(maxsplit=3)
            kernels[name] = Resources(int(registers), int(stack), int(shared))
    return kernels


def complaints(built: dict[str, Resources], recorded: dict[str, Resources]) -> list[str]:
    """What is worse than recorded, or isn't recorded, one sentence each."""
    found = []
    for name, kernel in built.items():
        if kernel.stack and not name.startswith(SIMPLE):
            found.append(f"{name} spills registers or has a local array: {kernel.stack} bytes of stack")
            continue
        before = recorded.get(name)
        if before is None:
            found.append(f"{name} is not in the table")
            continue
        for what in ("registers", "stack", "shared"):
            now, was = getattr(kernel, what), getattr(before, what)
            if now > was:
                found.append(f"{name}: {what} {now}, recorded are {was}")
    found += [f"{name} is in the table, but not in the library" for name in recorded if name not in built]
    return found
