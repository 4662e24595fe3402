"""The compilers: opcheck, torch.compile, compiled autograd, torch.export and AOTInductor."""

import pytest
import torch
from torch.testing import assert_close

import wmha
from cases import Case, make_inputs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CASES = [
    Case("plain", queries=9),
    Case("groups", heads=4, kv_heads=2, queries=9, keys=12, window=(3, 1), temperature="(Hq,)", value_dim=5),
    Case("by_position", queries=7, layout="by_position", temperature="()", softcap=2.0),
    Case("empty", queries=0, keys=4),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors_of(case, device, dtype=torch.float32, gradients=True):
    leaves = make_inputs(case, dtype, device).leaves
    return [leaf.detach().requires_grad_(gradients) for leaf in leaves]


class TestOpcheck:
    @pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
    @pytest.mark.parametrize("function", ["attention", "attention_with_lse", "attention_weights"])
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_public_operators(self, case, function, gradients, device):
        query, key, value, *temperature = tensors_of(case, device, gradients=gradients)
        options = case.options(*temperature)
        tensors = [query, key, value]
        if function == "attention_weights":
            del options["dropout_p"], tensors[2]
        overload = "temperature_tensor" if temperature else "default"
        torch.library.opcheck(getattr(getattr(torch.ops.wmha, function), overload), tensors, options)
        if not temperature:
            options["temperature"] = torch.tensor(0.7, device=device, requires_grad=gradients)
            torch.library.opcheck(getattr(torch.ops.wmha, function).temperature_tensor, tensors, options)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_dtypes(self, dtype, device):
        case = CASES[1]
        query, key, value, temperature = tensors_of(case, device, dtype)
        operator = torch.ops.wmha.attention_with_lse.temperature_tensor
        torch.library.opcheck(operator, (query, key, value), case.options(temperature), atol=1e-2, rtol=1e-2)

    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_private_operators(self, case, dropout_p, device):
        query, key, value, *temperature = tensors_of(case, device, gradients=False)
        options = case.options(*temperature) | {"dropout_p": dropout_p}
        overload = "temperature_tensor" if temperature else "default"
        forward = getattr(torch.ops.wmha._attention_forward, overload)
        output, logsumexp, rng_state = forward(query, key, value, **options)
        if dropout_p == 0:  # with a seed of its own, two calls are never equal
            torch.library.opcheck(forward, (query, key, value), options)
        backward = getattr(torch.ops.wmha._attention_backward, overload)
        for grad_logsumexp in (None, logsumexp):
            results = (output, grad_logsumexp, query, key, value, output, logsumexp, rng_state)
            torch.library.opcheck(backward, results, options)

    def test_mask(self, device):
        options = {"batch": 1, "heads": 2, "queries": 5, "keys": 9, "dropout_p": 0.3}
        torch.library.opcheck(torch.ops.wmha._dropout_mask.default, (torch.tensor([3, 0], device=device),), options)

    @pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
    def test_multi_head_attention(self, gradients, device):
        x = torch.randn(2, 5, 8, device=device, requires_grad=gradients)
        weight = torch.randn(8, 8, device=device, requires_grad=gradients)
        tensors = (x, x, x, weight, weight, weight, None, None, None, weight, None)
        torch.library.opcheck(torch.ops.wmha.multi_head_attention.default, tensors, {"num_heads": 2, "window_left": 2})


def model(query, key, value, temperature, dropout_p=0.0):
    output, logsumexp = wmha.attention_with_lse(
        query * 2, key, value, window=(3, 1), temperature=temperature, softcap=5.0, dropout_p=dropout_p
    )
    return output.sin() + logsumexp.unsqueeze(-1)


def inputs_of_length(n, device):
    case = Case("length", heads=4, kv_heads=2, queries=n, keys=n + 2, temperature="(Hq,)")
    return tensors_of(case, device)


def assert_same_with_gradients(compiled, inputs):
    one, other = compiled(*inputs), model(*inputs)
    assert_close(one, other)
    for first, second in zip(
        torch.autograd.grad(one.square().sum(), inputs), torch.autograd.grad(other.square().sum(), inputs), strict=True
    ):
        assert_close(first, second, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_dynamic_shapes(backend, device):
    """One graph for any length. The first has no size in common with another dimension, which would tie the two."""
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    assert_same_with_gradients(compiled, inputs_of_length(11, device))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (5, 20, 64):
            assert_same_with_gradients(compiled, inputs_of_length(n, device))


def test_static_shapes(device):
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    for n in (6, 9):
        assert_same_with_gradients(compiled, inputs_of_length(n, device))


def test_compiled_dropout(device):
    """A new mask on each call, the same one in backward, and torch.manual_seed repeats it."""
    compiled = torch.compile(
        lambda *inputs: model(*inputs, dropout_p=0.5), backend="aot_eager", fullgraph=True, dynamic=True
    )
    inputs = inputs_of_length(20, device)
    torch.manual_seed(0)
    first, second = compiled(*inputs), compiled(*inputs)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, compiled(*inputs))
    assert torch.equal(second, compiled(*inputs))
    torch.manual_seed(0)
    eager = model(*inputs, dropout_p=0.5)
    assert_close(first, eager)
    for one, other in zip(
        torch.autograd.grad(first.sum(), inputs), torch.autograd.grad(eager.sum(), inputs), strict=True
    ):
        assert_close(one, other)


def test_two_dropouts_in_one_graph(device):
    """Equal calls in one graph aren't one call: each draws a seed."""
    x = torch.randn(1, 2, 20, 8, device=device)

    def twice(x):
        return wmha.attention(x, x, x, dropout_p=0.5), wmha.attention(x, x, x, dropout_p=0.5)

    first, second = torch.compile(twice, backend="inductor", fullgraph=True)(x)
    assert not torch.equal(first, second)


def test_compiled_autograd(device):
    inputs = inputs_of_length(11, device)
    expected = torch.autograd.grad(model(*inputs).square().sum(), inputs)
    graphs = []

    def compiler(graph):
        graphs.append(graph)
        return torch.compile(graph, backend="aot_eager", fullgraph=True, dynamic=True)

    for n in (11, 11, 15):
        inputs = inputs_of_length(n, device)
        expected = torch.autograd.grad(model(*inputs).square().sum(), inputs)
        with torch._dynamo.compiled_autograd._enable(compiler):
            model(*inputs).square().sum().backward()
        for leaf, gradient in zip(inputs, expected, strict=True):
            assert_close(leaf.grad, gradient)
    assert graphs


def test_compiled_autograd_of_a_compiled_forward(device):
    inputs = inputs_of_length(11, device)
    expected = torch.autograd.grad(model(*inputs).square().sum(), inputs)
    with torch._dynamo.config.patch(compiled_autograd=True):

        @torch.compile(backend="aot_eager")
        def train(inputs):
            model(*inputs).square().sum().backward()

        train(inputs)
    for leaf, gradient in zip(inputs, expected, strict=True):
        assert_close(leaf.grad, gradient)


class Block(torch.nn.Module):
    def __init__(self, dropout_p=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.projections = torch.nn.ModuleList(torch.nn.Linear(16, rows) for rows in (16, 8, 8))
        self.out = torch.nn.Linear(16, 16)
        self.temperature = torch.nn.Parameter(torch.ones(4))
        self.dropout_p = dropout_p

    def forward(self, x):
        weights = [layer.weight for layer in self.projections]
        q_bias, k_bias, v_bias = (layer.bias for layer in self.projections)
        return wmha.multi_head_attention(
            x, x, x, *weights, self.out.weight, num_heads=4, num_kv_heads=2, window=(4, 0),
            q_bias=q_bias, k_bias=k_bias, v_bias=v_bias, out_bias=self.out.bias,
            temperature=self.temperature, dropout_p=self.dropout_p if self.training else 0.0,
        )  # fmt: skip


@pytest.fixture
def dynamic():
    return {"x": {1: torch.export.Dim("length", min=2, max=4096)}}


def test_export(dynamic, tmp_path, device):
    block = Block(0.3).eval().to(device)
    program = torch.export.export(block, (torch.randn(2, 10, 16, device=device),), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    for n in (2, 10, 33):
        x = torch.randn(2, n, 16, device=device)
        assert_close(loaded(x), block(x))
    names = {str(node.target) for node in program.run_decompositions().graph.nodes}
    assert any("wmha" in name for name in names)


def test_export_in_training(dynamic, device):
    """Dropout in an exported program draws a new mask on each call; the program can be trained."""
    block = Block(0.5).train().to(device)
    program = torch.export.export(block, (torch.randn(2, 10, 16, device=device),), dynamic_shapes=dynamic)
    module = program.module()
    x = torch.randn(2, 12, 16, device=device)
    assert not torch.equal(module(x), module(x))
    torch.manual_seed(0)
    module(x).sum().backward()
    torch.manual_seed(0)
    block(x).sum().backward()
    for (name, one), other in zip(module.named_parameters(), block.parameters(), strict=True):
        assert_close(one.grad, other.grad, msg=name)


def test_aot_inductor_package(dynamic, tmp_path, device):
    block = Block().eval().to(device)
    with torch.no_grad():
        program = torch.export.export(block, (torch.randn(2, 10, 16, device=device),), dynamic_shapes=dynamic)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        for n in (2, 10, 33):
            x = torch.randn(2, n, 16, device=device)
            assert_close(compiled(x), block(x))
