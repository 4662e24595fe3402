"""The numerics once more for each instruction set that PyTorch can choose here, each in a process of its own."""

import pathlib

import pytest
import torch

pytestmark = pytest.mark.cpu

NAMES = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}
PRINT = "import torch; print(torch.backends.cpu.get_cpu_capability())"


@pytest.mark.parametrize("capability", NAMES)
def test_numerics(capability, run_python):
    if torch.backends.cpu.get_cpu_capability() == NAMES[capability]:
        pytest.skip("what this process itself runs with")
    if run_python("-c", PRINT, ATEN_CPU_CAPABILITY=capability).strip() != NAMES[capability]:
        pytest.skip("this CPU doesn't have it")
    tests = str(pathlib.Path(__file__).parent)
    # The exit status tells: pytest's isn't 0 if tests fail, nor if there are none.
    run_python("-m", "pytest", "-p", "no:cacheprovider", "-m", "numerics", tests, ATEN_CPU_CAPABILITY=capability)


BITS = """
import torch, wmha
torch.manual_seed(0)
query = torch.randn(1, 2, 60, 20)
print(torch.ops.wmha.attention(query, query, query, window_left=9).double().sum().item())
"""


def test_the_chosen_kernels_run(run_python):
    """Vectors of different lengths sum in different orders: if no bit ever differs, the choice has no effect."""
    results = {capability: run_python("-c", BITS, ATEN_CPU_CAPABILITY=capability) for capability in NAMES}
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert len(set(results.values())) > 1
