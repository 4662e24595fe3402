"""What a call asks of PyTorch beside its own kernels, and where it launches them."""

import pytest
import torch

import wmha

ALLOCATIONS = {"aten::empty", "aten::empty_strided", "aten::empty_like"}
VIEWS = {"aten::transpose", "aten::as_strided", "aten::detach"}  # launch nothing


def launches_nothing(event) -> bool:
    return event.name in ALLOCATIONS | VIEWS or (
        event.name == "aten::to" and not event.cpu_children
    )  # the dtype is right


def inputs_on(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """query, key, value and the output's gradient."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 80, 32, device=device, dtype=dtype) for _ in range(4)]
    return [tensor.requires_grad_(i < 3) for i, tensor in enumerate(inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("learned", [False, True], ids=["number", "learned"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_nothing_but_allocations_around_the_kernels(dropout_p, learned, dtype, device):
    """And with dropout one random operator, for the seed; on the CPU another one, for an offset of 0, and one for the
    temperature's gradient."""
    wanted_operators = ["aten::randint"] if dropout_p else []
    if device == "cpu":
        wanted_operators += (["aten::constant_pad_nd"] if dropout_p else []) + (["aten::copy_"] if learned else [])
    *leaves, grad_output = inputs_on(device, dtype)
    temperature = torch.ones(2, device=device, requires_grad=True) if learned else 1.0
    inputs = [*leaves, temperature] if learned else leaves
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = wmha.attention(*leaves, window=(16, 0), dropout_p=dropout_p, temperature=temperature)
        torch.autograd.grad(output, inputs, grad_output)
    events = profile.events()
    assert {"wmha::_attention_forward", "wmha::_attention_backward"} <= {event.name for event in events}
    operators = [event for event in events if event.name.startswith("aten::")]
    called = [event for event in operators if event.cpu_parent not in operators]  # by wmha or autograd
    assert [event.name for event in called if not launches_nothing(event)] == wanted_operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_run_on_the_current_stream(dtype, device):
    """A stream is busy before it gives the inputs their values: kernels on another one would see what was there."""
    if device == "cpu":
        pytest.skip("about CUDA alone")
    temperature = torch.ones(2, device=device, requires_grad=True)

    def train(leaves, grad_output):
        output = wmha.attention(*leaves, window=(16, 0), temperature=temperature)
        return output.detach(), *torch.autograd.grad(output, (*leaves, temperature), grad_output)

    *leaves, grad_output = inputs_on(device, dtype)
    expected = train(leaves, grad_output)
    late = [torch.zeros_like(tensor) for tensor in (*leaves, grad_output)]
    work = torch.zeros(2**22, device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(50):
            work.add_(1)
        for tensor, values in zip(late, (*leaves, grad_output), strict=True):
            tensor.copy_(values.detach())
        results = train([tensor.requires_grad_() for tensor in late[:3]], late[3])
    torch.cuda.synchronize()
    for result, exact in zip(results, expected, strict=True):
        assert torch.equal(result, exact)
