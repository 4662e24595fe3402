"""TorchScript: scripted, traced, frozen, saved and loaded, trained, and called often enough to be optimised."""

import io

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import wmha

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")

CALLS = 5  # the profiling executor changes the graph after two


def inputs_of(device, n=12, gradients=True):
    shapes = [(2, 4, n, 8), (2, 2, n + 3, 8), (2, 2, n + 3, 5)]
    return [torch.randn(shape, device=device, requires_grad=gradients) for shape in shapes]


def through_a_file(module):
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


def with_number(query: Tensor, key: Tensor, value: Tensor, temperature: float) -> Tensor:
    return torch.ops.wmha.attention(query, key, value, window_left=4, window_right=1, temperature=temperature)


def with_tensor(query: Tensor, key: Tensor, value: Tensor, temperature: Tensor) -> Tensor:
    return torch.ops.wmha.attention(query, key, value, window_left=4, window_right=1, temperature=temperature)


def with_lse(query: Tensor, key: Tensor, value: Tensor, temperature: Tensor) -> Tensor:
    output, logsumexp = torch.ops.wmha.attention_with_lse(query, key, value, temperature=temperature, softcap=2.0)
    return output + logsumexp.unsqueeze(-1)


def with_options(query: Tensor, key: Tensor, value: Tensor, temperature: Tensor) -> Tensor:
    offset: int | None = None
    scale: float | None = None
    if query.size(2) > 5:
        offset = 2
        scale = 0.3
    weights = torch.ops.wmha.attention_weights(query, key, temperature=temperature, scale=scale, query_offset=offset)
    return weights @ value.repeat_interleave(2, 1)


def with_python_functions(query: Tensor, key: Tensor, value: Tensor, temperature: Tensor) -> Tensor:
    output = wmha.attention(query, key, value, window=(4, 0), temperature=temperature)
    other, logsumexp = wmha.attention_with_lse(query, key, value, window=(-1, 3), temperature=0.5, softcap=3.0)
    weights = wmha.attention_weights(query, key, window=(2, 2))
    return output + other * logsumexp.unsqueeze(-1) + weights.sum()


FUNCTIONS = [with_number, with_tensor, with_lse, with_options, with_python_functions]


@pytest.mark.parametrize("transform", ["script", "save"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_scripted_functions(function, transform, device):
    """With gradients, many times, in more than one shape."""
    scripted = torch.jit.script(function)
    if transform == "save":
        scripted = through_a_file(scripted)
    temperature = torch.rand(4, device=device).add(0.5).requires_grad_()
    for call in range(CALLS):
        inputs = inputs_of(device, 12 if call < 3 else 9)
        arguments = [*inputs, 0.5 if function is with_number else temperature]
        leaves = [argument for argument in arguments if isinstance(argument, Tensor)]
        one, other = scripted(*arguments), function(*arguments)
        assert_close(one, other)
        gradients = torch.autograd.grad(one.square().sum(), leaves)
        for first, second in zip(gradients, torch.autograd.grad(other.square().sum(), leaves), strict=True):
            assert_close(first, second)


def test_0d_temperature_keeps_its_gradient(device):
    scripted = torch.jit.script(with_tensor)
    temperature = torch.tensor(0.7, device=device, requires_grad=True)
    inputs = inputs_of(device)
    for _ in range(CALLS):
        (gradient,) = torch.autograd.grad(scripted(*inputs, temperature).square().sum(), temperature)
        (expected,) = torch.autograd.grad(with_tensor(*inputs, temperature).square().sum(), temperature)
        assert_close(gradient, expected)


def two_dropouts(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    first = torch.ops.wmha.attention(query, key, value, dropout_p=0.5)
    second = torch.ops.wmha.attention(query, key, value, dropout_p=0.5)
    return first, second


def two_dropouts_with_lse(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    first = wmha.attention_with_lse(query, key, value, dropout_p=0.5)
    second = wmha.attention_with_lse(query, key, value, dropout_p=0.5)
    return first[0], second[0]


class TwoDropouts(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = torch.jit.script(function)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(query, key, value)


@pytest.mark.parametrize("transform", ["script", "save", "trace", "freeze", "optimize_for_inference"])
@pytest.mark.parametrize("function", [two_dropouts, two_dropouts_with_lse], ids=lambda function: function.__name__)
def test_equal_dropouts_stay_two(function, transform, device):
    """Equal arguments, different masks: nothing may take the second call for a common subexpression or a constant."""
    inputs = inputs_of(device, gradients=False)
    if transform == "trace":
        module = torch.jit.trace(function, inputs, check_trace=False)
    else:
        module = torch.jit.script(TwoDropouts(function).eval() if "e" in transform[-6:] else function)
    if transform == "save":
        module = through_a_file(module)
    if transform == "freeze":
        module = torch.jit.freeze(module)
    if transform == "optimize_for_inference":
        module = torch.jit.optimize_for_inference(module)
    seen = []
    for _ in range(CALLS):
        first, second = module(*inputs)
        seen += [first, second]
    for i, one in enumerate(seen):
        assert not any(torch.equal(one, other) for other in seen[:i])
    torch.manual_seed(3)
    first, second = module(*inputs)
    torch.manual_seed(3)
    assert torch.equal(first, torch.ops.wmha.attention(*inputs, dropout_p=0.5))
    assert torch.equal(second, torch.ops.wmha.attention(*inputs, dropout_p=0.5))


class Model(torch.nn.Module):
    """Everything that a model has: projections, a learned temperature, dropout while training, a residual."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(20, 16)
        self.projections = torch.nn.ModuleList([torch.nn.Linear(16, rows) for rows in (16, 8, 8)])
        self.out = torch.nn.Linear(16, 20)
        self.temperature = torch.nn.Parameter(torch.ones(4))
        self.dropout = 0.2

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        parts: list[Tensor] = []
        for layer in self.projections:
            parts.append(layer(x).unflatten(-1, (-1, 4)).transpose(1, 2))
        output = wmha.attention(
            parts[0],
            parts[1],
            parts[2],
            window=(5, 0),
            temperature=self.temperature,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(x + output.transpose(1, 2).flatten(2))


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    return Model().to(device)


@pytest.fixture
def tokens(device):
    return torch.randint(20, (4, 15), device=device)


@pytest.mark.parametrize("transform", ["script", "save"])
def test_training(transform, model, tokens):
    """Step by step the same as in eager mode, dropout included."""
    scripted = torch.jit.script(model)
    scripted = through_a_file(scripted) if transform == "save" else torch.jit.script(Model().to(tokens.device))
    scripted.load_state_dict(model.state_dict())
    models = model.train(), scripted.train()
    losses = [[], []]
    for one, record in zip(models, losses, strict=True):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.3)
        for step in range(8):
            torch.manual_seed(step)
            loss = torch.nn.functional.cross_entropy(one(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            record.append(loss.item())
    assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    assert losses[0][-1] < losses[0][0]
    assert model.temperature.grad is not None


@pytest.mark.parametrize("transform", ["script", "trace", "freeze", "optimize_for_inference", "freeze_save"])
def test_inference(transform, model, tokens):
    model.eval()
    with torch.no_grad():
        expected = model(tokens)
        scripted = torch.jit.trace(model, tokens) if transform == "trace" else torch.jit.script(model)
        if transform in ("freeze", "freeze_save"):
            scripted = torch.jit.freeze(scripted)
        if transform == "optimize_for_inference":
            scripted = torch.jit.optimize_for_inference(scripted)
        if transform == "freeze_save":
            scripted = through_a_file(scripted)
        for _ in range(CALLS):
            assert_close(scripted(tokens), expected)
        assert_close(scripted(tokens[:2, :7]), model(tokens[:2, :7]))


def test_traced_gradients(device):
    temperature = torch.rand(4, device=device).add(0.5).requires_grad_()
    traced = torch.jit.trace(with_tensor, (*inputs_of(device), temperature))
    for _ in range(CALLS):
        leaves = [*inputs_of(device), temperature]
        one, other = traced(*leaves), with_tensor(*leaves)
        assert_close(one, other)
        for first, second in zip(
            torch.autograd.grad(one.sum(), leaves), torch.autograd.grad(other.sum(), leaves), strict=True
        ):
            assert_close(first, second)


def test_saved_generator_free_call_has_no_python(model, tmp_path, tokens, run_python):
    """A file that another process loads after importing the package."""
    torch.jit.script(model.eval()).save(tmp_path / "model.pt")
    torch.save({"tokens": tokens.cpu(), "output": model.cpu()(tokens.cpu()).detach()}, tmp_path / "example.pt")
    code = f"""
import torch, wmha
example = torch.load({str(tmp_path / "example.pt")!r})
model = torch.jit.load({str(tmp_path / "model.pt")!r}, map_location="cpu")
torch.testing.assert_close(model(example["tokens"]), example["output"])
print("same")
"""
    assert run_python(code) == "same\n"


def test_errors_name_the_argument(device):
    scripted = torch.jit.script(with_number)
    with pytest.raises(RuntimeError, match="wmha: temperature must be positive and finite, got -1"):
        scripted(*inputs_of(device), -1.0)
