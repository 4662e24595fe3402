#!/usr/bin/env python3
"""Does everything on a fresh machine that has Python and a C++ compiler.

    python3 scripts/dev.py demo       train, measure and export a small model; see demo --help
    python3 scripts/dev.py train      train a language model of wmha's layers; see train --help
    python3 scripts/dev.py tune       search good hyper-parameters for it; see tune --help
    python3 scripts/dev.py test       build and run all tests; further arguments go to pytest
    python3 scripts/dev.py lint       formatting and static checks
    python3 scripts/dev.py bench      speed against other attention operators; see bench --help
    python3 scripts/dev.py sanitize   the C++ tests under ASan + UBSan and TSan
    python3 scripts/dev.py clean      removes the builds and the virtual environment that this made

The first run makes a virtual environment in .venv and installs what is needed; later runs only build what has changed.
Environment: TORCH_VERSION (default 2.13.0), MAX_JOBS. Where packages come from is pip's own configuration:
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu TORCH_VERSION=2.13.0+cpu saves the gigabytes of a torch with
CUDA.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
MARK = VENV / ".made-by-wmha"  # clean removes no environment that was there before
BUILD = ROOT / "build"
PYTHON = VENV / "bin" / "python"
TORCH = os.environ.get("TORCH_VERSION", "2.13.0")
JOBS = os.environ.get("MAX_JOBS") or str(os.cpu_count())

SOURCES = (".cpp", ".h", ".cu", ".cuh", ".py")
BUILD_PACKAGES = [f"torch=={TORCH}", "numpy", "setuptools>=77", "wheel", "cmake>=3.24", "ninja"]
TEST_PACKAGES = ["pytest", "expecttest"]
# scipy is for optuna's samplers.
SCRIPT_PACKAGES = ["matplotlib", "tqdm", "pydantic>=2", "tomlkit", "tensorboard", "optuna>=5,<6", "scipy"]
LINT_PACKAGES = ["ruff==0.17.6", "clang-format==23.1.5", "clang-tidy==23.1.4"]


def run(*command: object, **options: object) -> None:
    """Runs a command in the virtual environment; ends the program if it fails."""
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    environment = {**os.environ, "PATH": search_path(), **options.pop("environment", {})}
    start = time.monotonic()
    code = subprocess.run(words, cwd=ROOT, env=environment, **options).returncode
    print(f"  {time.monotonic() - start:.0f} s", flush=True)
    if code != 0:
        sys.exit(f"dev.py: `{' '.join(words[:4])} …` failed with exit status {code}")


def search_path() -> str:
    return f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}"


def fingerprint(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def sources() -> list[tuple[str, bytes]]:
    """All that the wheel is made of."""
    folders = [ROOT / "csrc", ROOT / "include"]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in SOURCES]
    files += [ROOT / name for name in ("CMakeLists.txt", "setup.py", "pyproject.toml")]
    files += list((ROOT / "scripts").glob("*.cmake*"))
    return [(str(path), path.read_bytes()) for path in sorted(files)]


def once(name: str, key: str) -> Path | None:
    """The stamp to write after a step with this key, or None if the step has been done."""
    stamp = VENV / f".{name}"
    return None if stamp.exists() and stamp.read_text() == key else stamp


def install(*packages: str) -> None:
    if not PYTHON.exists():
        print(f"making a virtual environment in {VENV}", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", str(VENV)]).returncode != 0:
            shutil.rmtree(VENV, ignore_errors=True)  # half of one would be taken for whole on the next run
            sys.exit("dev.py: can't make a virtual environment; Debian and Ubuntu need the package python3-venv for it")
        MARK.touch()
    name = "installed-" + fingerprint(packages)[:8]
    if stamp := once(name, fingerprint(packages)):
        run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
        stamp.write_text(fingerprint(packages))


def install_wmha() -> None:
    install(*BUILD_PACKAGES)
    key = fingerprint(TORCH, sources())
    if stamp := once("wmha", key):
        run(PYTHON, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--force-reinstall", ROOT)
        stamp.write_text(key)


def cmake_build(folder: Path, *options: str, target: str = "all") -> None:
    torch_root = subprocess.check_output(
        [PYTHON, "-c", "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"],
        text=True,
    ).strip()
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DTORCH_ROOT={torch_root}", *options)
    run("cmake", "--build", folder, "--target", target, "--parallel", JOBS)


def googletest() -> list[str]:
    """CMake's options for GoogleTest: the system's, or the sources of Debian's package (which takes no root), or none,
    and CMake downloads it."""
    if Path("/usr/include/gtest/gtest.h").exists() or not shutil.which("apt-get"):
        return []
    folder = VENV / "googletest"
    source = folder / "usr" / "src" / "googletest"
    if not source.exists():
        folder.mkdir(exist_ok=True)
        if subprocess.run(["apt-get", "download", "googletest"], cwd=folder).returncode == 0:
            run("dpkg", "-x", next(folder.glob("*.deb")), folder)
    return [f"-DFETCHCONTENT_SOURCE_DIR_GTEST={source}"] if source.exists() else []


def test(arguments: list[str]) -> None:
    install_wmha()
    install(*TEST_PACKAGES, *SCRIPT_PACKAGES)
    cmake_build(BUILD / "tests", "-DWMHA_TESTS=ON", *googletest())
    run("ctest", "--test-dir", BUILD / "tests", "--output-on-failure", "--parallel", JOBS)
    prefix = subprocess.check_output([PYTHON, "-c", "import wmha; print(wmha.cmake_prefix_path)"], text=True).strip()
    app = BUILD / "cpp_app"
    run("cmake", "-S", ROOT / "tests" / "cpp_app", "-B", app, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", app, "--target", "check")
    run(PYTHON, "-m", "pytest", *arguments)


def lint(_: list[str]) -> None:
    install(*BUILD_PACKAGES)
    install(*LINT_PACKAGES)
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    code = [name for name in tracked if name.endswith((".cpp", ".h", ".cu", ".cuh"))]
    run("clang-format", "--dry-run", "-Werror", *code)
    run("ruff", "check", ".")
    run("ruff", "format", "--check", ".")
    cmake_build(BUILD / "lint", target="help")
    checked = [name for name in code if name.startswith("csrc/") and name.endswith(".cpp") and "/cuda/" not in name]
    run("clang-tidy", "--quiet", "--extra-arg=-fno-openmp", "-p", BUILD / "lint", *checked)  # it has no omp.h


def sanitize(_: list[str]) -> None:
    install(*BUILD_PACKAGES)
    # One definition of a type in two libraries is torch's own; leaks at exit are Python-less LibTorch's singletons.
    asan = {"ASAN_OPTIONS": "detect_odr_violation=0:detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    folder = BUILD / "asan"
    cmake_build(folder, "-DWMHA_TESTS=ON", "-DWMHA_SANITIZE=address,undefined", *googletest())
    run("ctest", "--test-dir", folder, "--output-on-failure", "--parallel", JOBS, environment=asan)
    folder = BUILD / "tsan"
    cmake_build(folder, "-DWMHA_TESTS=ON", "-DWMHA_SANITIZE=thread", *googletest(), target="wmha_kernel_tests")
    run("ctest", "--test-dir", folder, "--output-on-failure", "--no-tests=error", "--tests-regex", "^threads$")


def script(name: str) -> Callable[[list[str]], None]:
    def command(arguments: list[str]) -> None:
        install_wmha()
        install(*SCRIPT_PACKAGES)
        words = [str(PYTHON), str(ROOT / "scripts" / name), *arguments]
        print("+", " ".join(words), flush=True)
        # In place of this process: the script's exit status is the command's, and Ctrl-C is the script's to handle.
        os.execve(PYTHON, words, {**os.environ, "PATH": search_path()})

    return command


def clean(_: list[str]) -> None:
    for folder in (BUILD, ROOT / "csrc" / "python" / "wmha.egg-info", *([VENV] if MARK.exists() else [])):
        shutil.rmtree(folder, ignore_errors=True)


COMMANDS = {
    "demo": script("demo.py"),
    "train": script("train.py"),
    "tune": script("tune.py"),
    "test": test,
    "lint": lint,
    "bench": script("benchmark.py"),
    "sanitize": sanitize,
    "clean": clean,
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        wanted = len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help", "help")
        print(__doc__, file=sys.stdout if wanted else sys.stderr)
        sys.exit(0 if wanted else 2)
    try:
        COMMANDS[sys.argv[1]](sys.argv[2:])
    except KeyboardInterrupt:
        sys.exit("dev.py: interrupted")


if __name__ == "__main__":
    main()
