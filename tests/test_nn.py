"""wmha.nn.MultiheadAttention, against plain PyTorch. The modules in C++: cpp/test_nn.cpp and cpp_app/."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from reference import visible_keys
from wmha.nn import KeyValueCache, MultiheadAttention

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

E, HEADS = 24, 4


def module_of(device, dtype=torch.float64, **options):
    torch.manual_seed(0)
    module = MultiheadAttention(E, HEADS, dtype=dtype, device=device, **options)
    with torch.no_grad():  # biases start with 0, and temperatures with 1
        for name, parameter in module.named_parameters():
            if "bias" in name or "log_temperature" in name:
                parameter.normal_(std=0.3)
    return module


def sequence(device, n=13, features=E, dtype=torch.float64):
    return torch.randn(2, n, features, dtype=dtype, device=device, requires_grad=True)


def assert_same_gradients(one: Tensor, other: Tensor, leaves) -> None:
    assert_close(one, other)
    grad_output = torch.randn_like(one)
    for first, second in zip(
        torch.autograd.grad(one, leaves, grad_output), torch.autograd.grad(other, leaves, grad_output), strict=True
    ):
        assert_close(first, second)


def by_hand(module: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    def split(x, heads):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2).repeat_interleave(HEADS // heads, 1)

    q = split(module.q_proj(query), HEADS)
    k, v = split(module.k_proj(key), module.num_kv_heads), split(module.v_proj(value), module.num_kv_heads)
    scores = q @ k.transpose(-2, -1) * (module.head_dim**-0.5 if module.scale is None else module.scale)
    if module.softcap:
        scores = module.softcap * torch.tanh(scores / module.softcap)
    if module.log_temperature is not None:
        scores = scores / module.log_temperature.exp().view(-1, 1, 1)
    else:
        scores = scores / module.temperature
    mask = visible_keys(q.size(2), k.size(2), module.window, None).to(scores.device)
    heads = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
    return module.out_proj(heads.transpose(1, 2).flatten(2))


OPTIONS = {
    "defaults": {},
    "window": {"window": (3, 1)},
    "causal": {"causal": True},
    "causal_window": {"window": (3, -1), "causal": True},
    "groups": {"num_kv_heads": 2, "window": (4, 0)},
    "dimensions": {"num_kv_heads": 1, "head_dim": 5, "value_dim": 7, "bias": False, "window": (4, 2)},
    "scores": {"scale": 0.3, "softcap": 2.0, "temperature": 0.7},
    "shared": {"learned_temperature": "shared", "window": (5, 0)},
    "per_head": {"learned_temperature": "per_head", "window": (5, 0), "num_kv_heads": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_self_attention(options, device):
    module = module_of(device, **options)
    x = sequence(device)
    leaves = [x, *module.parameters()]
    assert_same_gradients(module(x), by_hand(module, x, x, x), leaves)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cross_attention(options, device):
    module = module_of(device, kdim=10, vdim=6, **options)
    inputs = sequence(device, 9), sequence(device, 12, 10), sequence(device, 12, 6)
    assert_same_gradients(module(*inputs), by_hand(module, *inputs), [*inputs, *module.parameters()])


def test_the_value_is_the_key_by_default(device):
    module = module_of(device)
    x, y = sequence(device), sequence(device, 5)
    assert torch.equal(module(x, y), module(x, y, y))
    with pytest.raises(RuntimeError, match="wmha: value must come with key, got value alone"):
        module(x, value=y)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 10, "vdim": 6}, {"vdim": 6}], ids=["packed", "separate", "vdim"])
def test_from_torch(sizes, bias, batch_first, device):
    made = {"dtype": torch.float64, "device": device}
    other = torch.nn.MultiheadAttention(E, HEADS, bias=bias, batch_first=batch_first, **sizes, **made)
    if bias:
        torch.nn.init.normal_(other.in_proj_bias)
        torch.nn.init.normal_(other.out_proj.bias)
    module = MultiheadAttention.from_torch(other)
    inputs = [sequence(device, 9), *(sequence(device, 12, sizes.get(name, E)) for name in ("kdim", "vdim"))]
    expected, _ = other(*(x if batch_first else x.transpose(0, 1) for x in inputs), need_weights=False)
    expected = expected if batch_first else expected.transpose(0, 1)
    grad_output = torch.randn_like(expected)
    output = module(*inputs)
    assert_close(output, expected)

    packed = other.in_proj_weight is not None
    weights = [other.in_proj_weight] if packed else [other.q_proj_weight, other.k_proj_weight, other.v_proj_weight]
    biases = [other.in_proj_bias, other.out_proj.bias] if bias else []
    expected_gradients = torch.autograd.grad(expected, [*inputs, other.out_proj.weight, *weights, *biases], grad_output)
    ours = [module.q_proj, module.k_proj, module.v_proj]
    weights, biases = [one.weight for one in ours], [one.bias for one in (*ours, module.out_proj)] if bias else []
    gradients = torch.autograd.grad(output, [*inputs, module.out_proj.weight, *weights, *biases], grad_output)
    assert_close(gradients[:4], expected_gradients[:4])
    flat, expected_flat = (torch.cat([one.flatten() for one in some[4:]]) for some in (gradients, expected_gradients))
    # The keys' bias shifts all scores of a query alike: its gradient is 0 but for rounding.
    assert_close(flat, expected_flat, atol=1e-12, rtol=1e-7)


def test_from_torch_with_options(device):
    other = torch.nn.MultiheadAttention(E, HEADS, dropout=0.2, batch_first=True, device=device).eval()
    module = MultiheadAttention.from_torch(other, window=(3, 0), learned_temperature="per_head")
    assert module.window == (3, 0)
    assert module.dropout == 0.2
    assert not module.training
    x = sequence(device, dtype=torch.float32)
    mask = visible_keys(13, 13, (3, 0), None).to(device)
    assert_close(module(x), other(x, x, x, attn_mask=~mask, need_weights=False)[0])
    before = other.in_proj_weight.clone()
    torch.nn.init.zeros_(module.q_proj.weight)  # the weights are a copy
    assert torch.equal(other.in_proj_weight, before)


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_from_torch_says_what_it_cannot_take(option):
    other = torch.nn.MultiheadAttention(E, HEADS, **{option: True})
    with pytest.raises(ValueError, match=f"wmha: from_torch needs a module with {option}=False, got {option}=True"):
        MultiheadAttention.from_torch(other)


DECODED = {
    "window": {"window": (4, 0)},
    "no_context": {"window": (0, 0)},
    "causal": {"causal": True},
    "wide": {"window": (100, 0)},
    "groups": {"window": (5, 0), "num_kv_heads": 2, "value_dim": 3, "bias": False},
    "one_group": {"causal": True, "num_kv_heads": 1, "softcap": 3.0},
    "per_head": {"window": (5, 0), "learned_temperature": "per_head", "scale": 0.4},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", DECODED.values(), ids=DECODED)
@pytest.mark.parametrize("chunks", [[1] * 17, [3] * 5 + [2], [17], [10, 1, 1, 1, 4], [0, 5, 0, 12]], ids=str)
def test_decoding_is_the_whole_sequence(chunks, options, dtype, device):
    module = module_of(device, dtype, **options)
    x = sequence(device, 17, dtype=dtype)
    left = module.window[0]
    cache, outputs, seen = None, [], 0
    for chunk in x.split(chunks, 1):
        output, cache = module.decode(chunk, cache)
        outputs.append(output)
        seen += chunk.size(1)
        held = seen if left < 0 else min(seen, left)
        assert isinstance(cache, KeyValueCache)
        assert cache.key.shape == (2, module.num_kv_heads, held, module.head_dim)
        assert cache.value.shape == (2, module.num_kv_heads, held, module.value_dim)
        assert cache.length == seen
    whole = module(x)
    assert_close(torch.cat(outputs, 1), whole)
    # Gradients go through the cache too.
    assert_same_gradients(torch.cat(outputs, 1), whole, [x, module.k_proj.weight, module.v_proj.weight])


def test_the_cache_holds_no_more_memory_than_the_window(device):
    module = module_of(device, window=(4, 0))
    with torch.no_grad():
        _, cache = module.decode(sequence(device, 1000))
        for _ in range(10):
            largest = 2 * cache.key.nelement() * cache.key.element_size()
            assert cache.key.untyped_storage().nbytes() <= largest
            _, cache = module.decode(sequence(device, 1), cache)


def test_a_sequence_goes_on_in_two_ways(device):
    module = module_of(device, window=(4, 0))
    x, y, z = sequence(device, 6), sequence(device, 2), sequence(device, 3)
    _, cache = module.decode(x)
    for rest in (y, z, y):
        output, _ = module.decode(rest, cache)
        assert_close(output, module(torch.cat((x, rest), 1))[:, 6:])


@pytest.mark.parametrize("right", [-1, 2])
def test_decoding_needs_a_causal_window(right, device):
    module = module_of(device, window=(4, right))
    message = rf"wmha: window_right must be 0 \(causal\) for decode, got {right}"
    with pytest.raises(RuntimeError, match=message):
        module.decode(sequence(device))
    with pytest.raises(torch.jit.Error, match=message):
        torch.jit.script(module).decode(sequence(device))


def test_dropout_is_for_training_alone(device):
    module = module_of(device, dropout=0.5)
    plain = module_of(device)
    x = sequence(device)
    torch.manual_seed(1)
    first, second = module(x), module(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(module(x), first)
    assert torch.equal(module(x), second)
    module.eval()
    assert torch.equal(module(x), plain(x))
    assert torch.equal(torch.jit.script(module)(x), plain(x))


@pytest.mark.parametrize("learned, shape", [("shared", (1,)), ("per_head", (HEADS,))])
def test_a_learned_temperature_stays_positive(learned, shape, device):
    module = MultiheadAttention(E, HEADS, learned_temperature=learned, temperature=0.5, device=device)
    assert module.log_temperature.shape == shape
    assert_close(module.log_temperature.exp(), torch.full(shape, 0.5, device=device))
    x = sequence(device, dtype=torch.float32)
    optimizer = torch.optim.Adam([module.log_temperature], lr=3.0)  # a step on the temperature itself would cross 0
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        assert torch.all(module.log_temperature.grad != 0)
        optimizer.step()
        assert torch.all(module.log_temperature.exp() > 0)
        assert torch.isfinite(module(x)).all()


def test_parameters_start_as_torch_nns_do():
    module = MultiheadAttention(400, 8, num_kv_heads=4, vdim=100)
    for projection in (module.q_proj, module.k_proj, module.v_proj):
        bound = math.sqrt(6 / sum(projection.weight.shape))
        assert 0.99 * bound < projection.weight.abs().max() <= bound
        assert torch.all(projection.bias == 0)
    assert 0.99 / 20 < module.out_proj.weight.abs().max() <= 1 / 20
    assert torch.all(module.out_proj.bias == 0)
    torch.manual_seed(3)
    module.reset_parameters()
    first = copy.deepcopy(module.state_dict())
    torch.manual_seed(3)
    module.reset_parameters()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, first[name])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be between 1 and 128, got 0"),
        ({"num_heads": 129}, "num_heads must be between 1 and 128, got 129"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, 4, got 3"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"embed_dim": 30}, "embed_dim must be a multiple of num_heads, 4, without head_dim, got 30"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"value_dim": 0}, "value_dim must be at least 1, got 0"),
        ({"kdim": -1}, "kdim must be at least 1, got -1"),
        ({"vdim": 0}, "vdim must be at least 1, got 0"),
        ({"window": (-2, 0)}, "window_left must be -1 (no bound), 0 or positive, got -2"),
        ({"window": (0, -2)}, "window_right must be -1 (no bound), 0 or positive, got -2"),
        ({"window": (8, 1), "causal": True}, "window_right must be -1 or 0 where causal is set, got 1"),
        ({"scale": math.inf}, "scale must be finite, got inf"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0"),
        ({"temperature": math.nan}, "temperature must be positive and finite, got nan"),
        ({"learned_temperature": "all"}, "learned_temperature must be one of none, shared, per_head, got all"),
        ({"softcap": -1.0}, "softcap must be 0 (off) or positive, and finite, got -1"),
        ({"dropout": 1.5}, "dropout must be between 0 and 1, got 1.5"),
    ],
    ids=lambda value: None if isinstance(value, str) else "_".join(value),
)
def test_errors_name_the_option(options, message):
    with pytest.raises(ValueError) as error:
        MultiheadAttention(**({"embed_dim": E, "num_heads": HEADS} | options))
    assert str(error.value).startswith(f"wmha: {message}")


@pytest.mark.parametrize("heads", [1, 128])
def test_head_counts(heads, device):
    module = MultiheadAttention(heads * 2, heads, window=(2, 0), device=device)
    assert module(torch.randn(1, 5, heads * 2, device=device)).shape == (1, 5, heads * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(dtype, device):
    module = module_of(device, window=(4, 0), learned_temperature="per_head")
    x = sequence(device)
    expected = module(x)
    with torch.autocast(device, dtype):
        output = copy.deepcopy(module).float()(x.float())
        assert output.dtype == dtype
    assert_close(output.double(), expected, atol=0.03, rtol=0.03)
    output = module.to(dtype)(x.to(dtype))
    assert output.dtype == module.log_temperature.dtype == dtype
    assert_close(output.double(), expected, atol=0.03, rtol=0.03)


def test_description():
    text = repr(MultiheadAttention(E, HEADS, causal=True, softcap=30, dropout=0.1, learned_temperature="shared"))
    assert "embed_dim=24, num_heads=4, num_kv_heads=4, head_dim=6, value_dim=6, window=(-1, 0)" in text
    assert "temperature=1, learned_temperature=shared, softcap=30, dropout=0.1" in text
    assert "(q_proj): Linear(in_features=24" in text


def test_it_is_one_call_of_the_operator(device):
    """Composite operators aren't seen by a profiler of dispatch, their parts are: one attention, no other softmax."""
    module = module_of(device, window=(3, 0), dropout=0.1)
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    with Record():
        module(sequence(device))
    assert sum("wmha" in call for call in calls) == 1
    assert not any("softmax" in call or "bmm" in call for call in calls)
