"""wmha.nn's layer and stack, against plain PyTorch; scripted, compiled and exported modules."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from reference import visible_keys
from wmha.nn import MultiheadAttention, TransformerLayer, TransformerStack

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

E, HEADS = 24, 4


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def stack_of(device, dtype=torch.float32, **options):
    """Layers with all that a stack has, and parameters away from their first values."""
    torch.manual_seed(0)
    options = {"num_kv_heads": 2, "learned_temperature": "per_head", "softcap": 20.0, "final_norm": True} | options
    if "window" not in options:
        options = {"windows": [(3, 0), (-1, 0)]} | options
    stack = TransformerStack(2, E, HEADS, device=device, dtype=dtype, **options)
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            if "bias" in name or "log_temperature" in name:
                parameter.normal_(std=0.3)
    return stack


def sequence(device, n=13, dtype=torch.float32):
    return torch.randn(2, n, E, dtype=dtype, device=device)


def assert_same_with_gradients(one, other, x):
    leaves = [x.requires_grad_(), *other.parameters()]
    first, second = one(x), other(x)
    assert_close(first, second)
    gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in (first, second)]
    assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", ["before", "after"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_layer_is_torch_nns(activation, norm, device):
    made = {"dtype": torch.float64, "device": device}
    torch.manual_seed(0)
    other = nn.TransformerEncoderLayer(
        E, HEADS, 40, 0.0, activation, 1e-3, batch_first=True, norm_first=norm == "before", **made
    )
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.3)
    options = {"dim_feedforward": 40, "activation": activation, "norm": norm, "layer_norm_eps": 1e-3}
    layer = TransformerLayer(E, HEADS, window=(4, 0), **options, **made)
    layer.load_state_dict(
        {name: value for name, value in other.state_dict().items() if "self_attn" not in name}
        | {f"self_attn.{k}": v for k, v in MultiheadAttention.from_torch(other.self_attn).state_dict().items()}
    )
    x = sequence(device, dtype=torch.float64).requires_grad_()
    mask = ~visible_keys(13, 13, (4, 0), None).to(device)
    one, expected = layer(x), other(x, src_mask=mask)
    assert_close(one, expected)
    grad_output = torch.randn_like(x)
    for name in ("linear1.weight", "linear2.bias", "norm1.weight", "norm2.bias", "self_attn.out_proj.weight"):
        leaves = layer.get_parameter(name), other.get_parameter(name)
        assert_close(
            torch.autograd.grad(one, (x, leaves[0]), grad_output, retain_graph=True),
            torch.autograd.grad(expected, (x, leaves[1]), grad_output, retain_graph=True),
        )


@pytest.mark.parametrize(
    "activation, function", [("silu", F.silu), ("geglu", F.gelu), ("swiglu", F.silu)], ids=["silu", "geglu", "swiglu"]
)
def test_activations(activation, function, device):
    layer = TransformerLayer(E, HEADS, dim_feedforward=10, activation=activation, device=device)
    x = sequence(device)
    y = x + layer.self_attn(layer.norm1(x))
    hidden = layer.linear1(layer.norm2(y))
    if activation == "silu":
        hidden = function(hidden)
    else:
        hidden = function(hidden[..., :10]) * hidden[..., 10:]
    assert hidden.size(-1) == 10
    assert_close(layer(x), y + layer.linear2(hidden))


def test_defaults():
    layer = TransformerLayer(E, HEADS)
    assert layer.linear1.weight.shape == (4 * E, E)
    assert (layer.activation, layer.norm, layer.norm1.eps, layer.dropout.p) == ("gelu", "before", 1e-5, 0.0)
    assert layer.self_attn.dropout == 0
    assert layer.self_attn.window == (-1, -1)
    layer = TransformerLayer(E, HEADS, attention_dropout=0.2, dropout=0.3, bias=False)
    assert layer.self_attn.dropout == 0.2
    assert layer.dropout.p == 0.3
    assert {name for name, _ in layer.named_parameters() if "bias" in name} == {"norm1.bias", "norm2.bias"}


def test_stack_is_its_layers(device):
    stack = stack_of(device)
    assert [layer.self_attn.window for layer in stack.layers] == [(3, 0), (-1, 0)]
    x = sequence(device)
    assert torch.equal(stack(x), stack.norm(stack.layers[1](stack.layers[0](x))))
    stack = TransformerStack(3, E, HEADS, window=(5, 0), device=device)
    assert [layer.self_attn.window for layer in stack.layers] == [(5, 0)] * 3
    assert stack.norm is None
    assert torch.equal(stack(x), stack.layers[2](stack.layers[1](stack.layers[0](x))))


def test_parameter_names_are_torch_nns():
    ours = dict(TransformerStack(2, E, HEADS, final_norm=True).named_parameters())
    other = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS), 2, nn.LayerNorm(E), enable_nested_tensor=False)
    shared = {name for name, _ in other.named_parameters() if "in_proj" not in name}
    assert shared == {name for name in ours if not any(f"{part}_proj" in name for part in "qkv")}


def test_dropout(device):
    stack = stack_of(device, dropout=0.3, attention_dropout=0.2)
    x = sequence(device)
    torch.manual_seed(1)
    first, second = stack(x), stack(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(stack(x), first)
    assert torch.equal(stack.eval()(x), stack_of(device)(x))
    # On each sublayer's output: where all of it is dropped, only the residual connections are left.
    assert torch.equal(TransformerLayer(E, HEADS, dropout=1.0, device=device)(x), x)


@pytest.mark.parametrize("norm", ["before", "after"])
@pytest.mark.parametrize("script", [False, True], ids=["eager", "script"])
def test_decoding_is_the_whole_sequence(script, norm, device):
    stack = stack_of(device, torch.float64, norm=norm).eval()
    x = sequence(device, dtype=torch.float64)
    whole = stack(x)
    decoder = torch.jit.script(stack) if script else stack
    for chunks in ([1] * 13, [5, 1, 1, 4, 2]):
        caches, outputs = None, []
        for chunk in x.split(chunks, 1):
            output, caches = decoder.decode(chunk, caches)
            outputs.append(output)
        assert_close(torch.cat(outputs, 1), whole)
        assert [cache.key.size(2) for cache in caches] == [3, 13]
        assert [int(cache.length) for cache in caches] == [13, 13]
    with pytest.raises(
        (RuntimeError, torch.jit.Error), match="wmha: caches must be one for each of the 2 layers, got 1"
    ):
        decoder.decode(x, caches[:1])


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "geglu", "swiglu"])
def test_script(activation, training, device):
    stack = stack_of(device, activation=activation, dropout=0.1, attention_dropout=0.1).train(training)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(stack), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert loaded.state_dict().keys() == stack.state_dict().keys()
    for n in (13, 13, 13, 9):
        x = sequence(device, n)
        torch.manual_seed(n)
        expected = stack(x)
        torch.manual_seed(n)
        assert_close(loaded(x), expected)


def test_script_of_cross_attention(device):
    module = MultiheadAttention(E, HEADS, kdim=10, vdim=6, device=device)
    inputs = sequence(device), torch.randn(2, 9, 10, device=device), torch.randn(2, 9, 6, device=device)
    assert_close(torch.jit.script(module)(*inputs), module(*inputs))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend, device):
    stack = stack_of(device)
    compiled = torch.compile(stack, backend=backend, fullgraph=True, dynamic=True)
    assert_same_with_gradients(compiled, stack, sequence(device))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same_with_gradients(compiled, stack, sequence(device, 40))


def test_compiled_decoding(device):
    """A few graphs for any number of positions."""
    stack = stack_of(device).eval()
    x = sequence(device, 30)
    compiled = torch.compile(stack.decode, backend="eager", fullgraph=True, dynamic=True)
    caches, outputs = None, []
    with torch.no_grad():
        for i in range(30):
            stance = "fail_on_recompile" if i > 12 else "default"
            with torch.compiler.set_stance(stance):
                output, caches = compiled(x[:, i : i + 1], caches)
            outputs.append(output)
        assert_close(torch.cat(outputs, 1), stack(x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_export(training, device):
    stack = stack_of(device, dropout=0.1, attention_dropout=0.1).train(training)
    shapes = {"x": {1: torch.export.Dim("length", min=2, max=4096)}}
    program = torch.export.export(stack, (sequence(device),), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (2, 40):
        x = sequence(device, n)
        torch.manual_seed(n)
        expected = stack(x)
        torch.manual_seed(n)
        assert_close(loaded(x), expected)


class Step(nn.Module):
    """One step of a filled cache as a program of tensors."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, cache):
        return self.module.decode(x, cache)


def test_exported_decoding(device):
    layer = TransformerLayer(E, HEADS, window=(5, 0), device=device).eval()
    x = sequence(device, 20)
    with torch.no_grad():
        _, cache = layer.decode(x[:, :8])
        step = torch.export.export(Step(layer), (x[:, 8:9], cache)).module()
        outputs = []
        for i in range(8, 20):
            output, cache = step(x[:, i : i + 1], cache)
            outputs.append(output)
        assert_close(torch.cat(outputs, 1), layer(x)[:, 8:])
        assert cache.length == 20


def test_copies(device):
    stack = stack_of(device)
    x = sequence(device)
    other = copy.deepcopy(stack)
    assert torch.equal(other(x), stack(x))
    other.reset_parameters()
    assert not torch.equal(other(x), stack(x))
    other.load_state_dict(stack.state_dict())
    assert torch.equal(other(x), stack(x))
    assert_close(stack.double()(x.double()).float(), other(x))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"windows": [(3, 0)]}, "windows must be one for each of the 2 layers, got 1"),
        (
            {"windows": [(3, 0), (2, 0)], "window": (1, 0)},
            r"window must be (-1, -1) where windows are given, got (1, 0)",
        ),
        ({"windows": [(3, 0), (2, 1)], "causal": True}, "window_right must be -1 or 0 where causal is set, got 1"),
        ({"dim_feedforward": 0}, "dim_feedforward must be at least 1, got 0"),
        ({"activation": "tanh"}, "activation must be one of gelu, relu, silu, geglu, swiglu, got tanh"),
        ({"norm": "between"}, "norm must be one of before, after, got between"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps must be 0 or positive, got -1"),
        ({"dropout": -0.5}, "dropout must be between 0 and 1, got -0.5"),
        ({"attention_dropout": 2.0}, "attention_dropout must be between 0 and 1, got 2"),
        ({"kdim": 5}, "kdim must be embed_dim, 24, for self-attention, got 5"),
        ({"embed_dim": 30}, "embed_dim must be a multiple of num_heads, 4, without head_dim, got 30"),
    ],
    ids=lambda value: None if isinstance(value, str) else "_".join(value),
)
def test_errors_name_the_option(options, message):
    with pytest.raises(ValueError) as error:
        TransformerStack(**({"num_layers": 2, "embed_dim": E, "num_heads": HEADS} | options))
    assert str(error.value).startswith(f"wmha: {message}")


def test_unknown_options_are_errors():
    with pytest.raises(TypeError, match="windoow"):
        TransformerStack(2, E, HEADS, windoow=(3, 0))
