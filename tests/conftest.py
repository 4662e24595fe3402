import os
import subprocess
import sys

import pytest
import torch

import wmha  # noqa: F401  (registers torch.ops.wmha)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the operators run: cpu (default) or cuda")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "numerics: runs once more for each instruction set of the CPU")
    config.addinivalue_line("markers", "cpu: about the CPU alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        return
    for item in items:
        if item.get_closest_marker("cpu"):
            item.add_marker(pytest.mark.skip(reason="about the CPU alone"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """torch.compile logs its whole trace, which would bury a failure."""
    report.sections = [section for section in report.sections if "log" not in section[0]]


def pytest_report_header(config: pytest.Config) -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, device {config.getoption('--device')}, CPU capability {capability}"


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tensors are tiny here and threads cost more than they give; test_repeatable.py shows that they change no bit."""
    torch.set_num_threads(1)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def run_python():
    """Runs Python code, or arguments, in a process of its own and returns what it printed."""

    def run(*arguments: str, **environment: str) -> str:
        command = [sys.executable, *(arguments if len(arguments) > 1 else ("-c", *arguments))]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
