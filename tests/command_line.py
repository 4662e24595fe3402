"""Runs the commands of scripts/ as a user does."""

import os
import pathlib
import subprocess
import sys

SCRIPTS = pathlib.Path(__file__).parent.parent / "scripts"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(script: str, *words: object, through: tuple[object, ...] = (sys.executable,)) -> subprocess.Popen:
    command = [str(word) for word in (*through, SCRIPTS / script, *words)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """What the command printed; it must end with this exit status."""
    output, errors = process.communicate(timeout=600)
    assert process.returncode == status, f"exit status {process.returncode}\n{output}\n{errors}"
    return output + errors


def run(script: str, *words: object, status: int = 0) -> str:
    return finish(start(script, *words), status)
