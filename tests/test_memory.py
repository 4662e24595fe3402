"""Memory is linear in the sequence: peaks of a process of its own."""

import pytest

pytestmark = pytest.mark.cpu

MEASURE = """
import torch
import wmha

def peak():  # kB that were resident at most, since the start
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

def train(query, key, value, grad_output):
    output = torch.ops.wmha.attention(
        query, key, value, window_left={left}, window_right={right}, dropout_p=0.1, temperature=temperature
    )
    output.backward(grad_output)

def tensors(n):
    shape = (1, n, 4, 32) if {by_position} else (1, 4, n, 32)
    inputs = [torch.randn(shape, dtype=torch.{dtype}) for _ in range(4)]
    inputs = [tensor.transpose(1, 2) if {by_position} else tensor for tensor in inputs]
    return [tensor.requires_grad_(i < 3) for i, tensor in enumerate(inputs)]

temperature = torch.ones(4, requires_grad=True)
train(*tensors(100))  # what is allocated once
inputs = tensors({n})
before = peak()
train(*inputs)
used = (peak() - before) * 1024
size = inputs[0].numel() * inputs[0].element_size()
print(used / size)
"""


def tensors_used(run_python, n, window, dtype, by_position=False):
    left, right = window
    code = MEASURE.format(n=n, left=left, right=right, dtype=dtype, by_position=by_position)
    return float(run_python(code))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window, by_position", [((128, 0), True), ((64, 64), False)], ids=["causal", "centred"])
def test_forward_and_backward_of_a_long_sequence(window, by_position, dtype, run_python):
    """Above the inputs: output, three gradients, and less than as much again."""
    used = tensors_used(run_python, 131072, window, dtype, by_position)
    assert 4 <= used < 8, f"{used:.2f} tensors of the input's size"


@pytest.mark.parametrize("window", [(-1, 0), (-1, -1)], ids=["causal", "dense"])
def test_unbounded_windows_take_no_more_for_each_key(window, run_python):
    """A matrix of 8192 x 8192 numbers would be 64 inputs for each head."""
    assert tensors_used(run_python, 8192, window, "float32") < 20
