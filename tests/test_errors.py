"""Wrong arguments: the message names the argument, what was expected and what came; on CPU and Meta alike."""

import dataclasses
import math
import re
from collections.abc import Callable

import pytest
import torch

import wmha

Q, KV = (2, 4, 5, 8), (2, 2, 6, 8)


@dataclasses.dataclass(frozen=True)
class Wrong:
    """Changes to good arguments, and a pattern that the message matches: argument, expectation, and what came."""

    name: str
    message: str
    change: Callable[[dict], dict]
    weights_too: bool = True  # attention_weights, which takes no value and no dropout, refuses it too


def replace(**changes):
    """Options by value; tensors by a function of the old one."""

    def change(arguments: dict) -> dict:
        return {name: new(arguments[name]) if callable(new) else new for name, new in changes.items()}

    return change


def ones(*shape, dtype=torch.float32):
    return lambda old: torch.ones(shape, dtype=dtype, device=old.device if isinstance(old, torch.Tensor) else None)


def temperature_of(*shape, dtype=torch.float32):
    return lambda arguments: {"temperature": torch.ones(shape, dtype=dtype, device=arguments["query"].device)}


WRONG = [
    Wrong("query_3d", r"query .*4 dimensions.*got 3.*\[4, 5, 8\]", replace(query=ones(4, 5, 8))),
    Wrong("key_3d", r"key .*4 dimensions.*got 3.*\[2, 6, 8\]", replace(key=ones(2, 6, 8))),
    Wrong("key_5d", r"key .*4 dimensions.*got 5", replace(key=ones(1, 2, 2, 6, 8))),
    Wrong("query_scalar", r"query .*4 dimensions.*got 0", replace(query=ones())),
    Wrong("value_3d", r"value .*4 dimensions.*got 3", replace(value=ones(2, 6, 8)), False),
    Wrong("key_batch", r"key .*batch.*2.*got 3", replace(key=ones(3, 2, 6, 8))),
    Wrong("value_batch", r"value .*batch.*2.*got 1", replace(value=ones(1, 2, 6, 8)), False),
    Wrong("key_dim", r"key .*last dimension.*8.*got 7", replace(key=ones(2, 2, 6, 7))),
    Wrong("value_positions", r"value .*6.*got 7", replace(value=ones(2, 2, 7, 8)), False),
    Wrong("value_heads", r"value .*heads.*2.*got 4", replace(value=ones(2, 4, 6, 8)), False),
    Wrong(
        "heads_not_divided",
        r"the heads of key .*divide.*4.*got 3",
        replace(key=ones(2, 3, 6, 8), value=ones(2, 3, 6, 8)),
    ),
    Wrong(
        "more_kv_heads", r"the heads of key .*divide.*4.*got 8", replace(key=ones(2, 8, 6, 8), value=ones(2, 8, 6, 8))
    ),
    Wrong("no_kv_heads", r"the heads of key .*divide.*4.*got 0", replace(key=ones(2, 0, 6, 8), value=ones(2, 0, 6, 8))),
    Wrong("no_key_dim", r"query .*at least 1.*got 0", replace(query=ones(2, 4, 5, 0), key=ones(2, 2, 6, 0))),
    Wrong("no_value_dim", r"value .*at least 1.*got 0", replace(value=ones(2, 2, 6, 0)), False),
    Wrong("key_dtype", r"key .*dtype.*Float.*got Double", replace(key=ones(*KV, dtype=torch.float64))),
    Wrong("value_dtype", r"value .*dtype.*Float.*got Half", replace(value=ones(*KV, dtype=torch.float16)), False),
    *(
        Wrong(
            f"dtype_{name}",
            rf"query .*dtype.*(Double|Float|BFloat16|Half).*got {name}",
            replace(query=ones(*Q, dtype=dtype), key=ones(*KV, dtype=dtype), value=ones(*KV, dtype=dtype)),
        )
        for name, dtype in {
            "Int": torch.int32,
            "Long": torch.int64,
            "Bool": torch.bool,
            "ComplexFloat": torch.complex64,
            "Float8_e4m3fn": torch.float8_e4m3fn,
        }.items()
    ),
    Wrong("window_left", r"window_left .*-1.*got -2", replace(window_left=-2)),
    Wrong("window_right", r"window_right .*-1.*got -9223372036854775808", replace(window_right=-(2**63))),
    Wrong("window_after_unbounded", r"window_right .*got -2", replace(window_left=-1, window_right=-2)),
    Wrong("scale_nan", r"scale .*finite.*got -?nan", replace(scale=math.nan)),
    Wrong("scale_inf", r"scale .*finite.*got -inf", replace(scale=-math.inf)),
    Wrong("temperature_zero", r"temperature .*positive.*got 0", replace(temperature=0.0)),
    Wrong("temperature_negative", r"temperature .*positive.*got -1.5", replace(temperature=-1.5)),
    Wrong("temperature_nan", r"temperature .*finite.*got -?nan", replace(temperature=math.nan)),
    Wrong("temperature_inf", r"temperature .*finite.*got inf", replace(temperature=math.inf)),
    Wrong("temperature_shape", r"temperature .*shape.*4.*got.*\[3\]", temperature_of(3)),
    Wrong("temperature_kv_heads", r"temperature .*shape.*4.*got.*\[2\]", temperature_of(2)),
    Wrong("temperature_2d", r"temperature .*shape.*got.*\[4, 1\]", temperature_of(4, 1)),
    Wrong("temperature_empty", r"temperature .*shape.*got.*\[0\]", temperature_of(0)),
    Wrong("temperature_dtype", r"temperature .*floating.*got Long", temperature_of(dtype=torch.int64)),
    Wrong("temperature_complex", r"temperature .*floating.*got ComplexFloat", temperature_of(4, dtype=torch.complex64)),
    Wrong("softcap_negative", r"softcap .*positive.*got -1", replace(softcap=-1.0)),
    Wrong("softcap_nan", r"softcap .*got -?nan", replace(softcap=math.nan)),
    Wrong("softcap_inf", r"softcap .*finite.*got inf", replace(softcap=math.inf)),
    Wrong("dropout_negative", r"dropout_p .*0 and 1.*got -0.1", replace(dropout_p=-0.1), False),
    Wrong("dropout_above_one", r"dropout_p .*0 and 1.*got 1.1", replace(dropout_p=1.1), False),
    Wrong("dropout_nan", r"dropout_p .*0 and 1.*got -?nan", replace(dropout_p=math.nan), False),
]
every_wrong = pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)


@pytest.fixture(params=["device", "meta"])
def arguments(request, device):
    place = device if request.param == "device" else "meta"
    return {
        "query": torch.randn(Q, device=place),
        "key": torch.randn(KV, device=place),
        "value": torch.randn(KV, device=place),
    }


def refuses(function, arguments: dict, message: str) -> None:
    """Raises with the message, and leaves the tensors alone."""
    tensors = [argument for argument in arguments.values() if isinstance(argument, torch.Tensor)]
    copies = [tensor.clone() for tensor in tensors]
    with pytest.raises(RuntimeError) as error:
        function(**arguments)
    assert re.search(f"wmha: {message}", str(error.value)), str(error.value)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert tensor.is_meta or torch.equal(tensor.view(-1).view(torch.uint8), copy.view(-1).view(torch.uint8))


@pytest.mark.parametrize("function", ["attention", "attention_with_lse", "_attention_forward"])
@every_wrong
def test_operators(wrong, function, arguments):
    arguments |= wrong.change(arguments)
    refuses(getattr(torch.ops.wmha, function), arguments, wrong.message)


@every_wrong
def test_attention_weights(wrong, arguments):
    arguments |= wrong.change(arguments)
    del arguments["value"]
    if wrong.weights_too:
        refuses(torch.ops.wmha.attention_weights, arguments, wrong.message)


def with_gradients(**arguments):
    for argument in arguments.values():
        if isinstance(argument, torch.Tensor) and argument.is_floating_point():
            argument.requires_grad_()
    return torch.ops.wmha.attention(**arguments)


def composed(**arguments):
    """Under a transform, of whatever: the composite form."""
    return torch.func.vmap(lambda _: torch.ops.wmha.attention(**arguments), randomness="same")(torch.zeros(2))


def python_function(*, window_left=-1, window_right=-1, **arguments):
    return wmha.attention(**arguments, window=(window_left, window_right))


@pytest.mark.parametrize("path", [with_gradients, composed, python_function])
@every_wrong
def test_every_path(wrong, path, arguments):
    arguments |= wrong.change(arguments)
    refuses(path, arguments, wrong.message)


@torch.jit.script
def scripted(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    return wmha.attention(
        query,
        key,
        value,
        window=(window_left, window_right),
        temperature=temperature,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
    )


@every_wrong
def test_torchscript(wrong, arguments):
    arguments |= wrong.change(arguments)
    refuses(scripted, arguments, wrong.message)


def test_mixed_devices(device):
    query, key = torch.randn(Q, device=device), torch.randn(KV, device=device)
    refuses(
        torch.ops.wmha.attention,
        {"query": query, "key": key.to("meta"), "value": key},
        f"key .*device of query, {device}.*got meta",
    )
    refuses(
        torch.ops.wmha.attention,
        {"query": query, "key": key, "value": key.to("meta")},
        f"value .*device of query, {device}.*got meta",
    )
    refuses(
        torch.ops.wmha.attention,
        {"query": query, "key": key, "value": key, "temperature": torch.ones(4, device="meta")},
        f"temperature .*device of query, {device}.*got meta",
    )


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "mkldnn"])
@pytest.mark.parametrize("function", ["attention", "attention_with_lse", "attention_weights", "multi_head_attention"])
def test_other_layouts(function, layout):
    """PyTorch's own message where no kernel is registered, else ours; never one from the depths of a composition."""
    strided = torch.ones((2, 4, 4) if function == "multi_head_attention" else (2, 2, 4, 4))
    other = {"sparse_coo": strided.to_sparse, "sparse_csr": strided.to_sparse_csr, "mkldnn": strided.to_mkldnn}[
        layout
    ]()
    tensors = (other, strided, strided)[: 2 if function == "attention_weights" else 3]
    options = {}
    if function == "multi_head_attention":
        tensors += (*(torch.eye(4),) * 3, None, None, None, torch.eye(4), None)
        options["num_heads"] = 2
    with pytest.raises(RuntimeError, match=r"Could not run 'wmha::\w+'|wmha: query .*(strided|layout).*got"):
        getattr(torch.ops.wmha, function)(*tensors, **options)


def test_options_are_keyword_only(device):
    query = torch.randn(1, 1, 2, 2, device=device)
    with pytest.raises((RuntimeError, TypeError), match="positional"):
        torch.ops.wmha.attention(query, query, query, 3)


@pytest.mark.parametrize("name", ["window_left", "window_right"])
def test_largest_values_are_valid(name, device):
    query = torch.randn(1, 1, 5, 2, device=device)
    output = torch.ops.wmha.attention(query, query, query, **{name: 2**63 - 1})
    assert torch.equal(output, torch.ops.wmha.attention(query, query, query))


WEIGHTS = {"q_weight": (8, 6), "k_weight": (4, 5), "v_weight": (6, 7), "out_weight": (9, 12)}
BIASES = {"q_bias": 8, "k_bias": 4, "v_bias": 6, "out_bias": 9}
MULTI_HEAD = [
    ("query", ones(5, 6), r"query .*3 dimensions.*got 2"),
    ("key", ones(2, 4, 5, 1), r"key .*3 dimensions.*got 4"),
    ("value", ones(3, 4, 7), r"value .*batch.*2.*got 3"),
    ("value", ones(2, 5, 7), r"value .*4.*got 5"),
    ("key", ones(2, 4, 6), r"(key|k_weight) .*(5.*got 6|6.*got 5)"),
    ("query", ones(2, 5, 6, dtype=torch.int64), r"query .*dtype.*got Long"),
    ("key", ones(2, 4, 5, dtype=torch.float64), r"key .*dtype of query, Float.*got Double"),
    ("num_heads", 0, r"num_heads .*at least 1.*got 0"),
    ("num_heads", -4, r"num_heads .*at least 1.*got -4"),
    ("num_kv_heads", 0, r"num_kv_heads .*at least 1.*got 0"),
    ("num_kv_heads", 3, r"num_kv_heads .*divide.*4.*got 3"),
    ("num_heads", 6, r"(q_weight|num_heads) .*6.*got 8"),
    ("q_weight", ones(8), r"q_weight .*2 dimensions.*got 1"),
    ("q_weight", ones(7, 6), r"q_weight .*4.*got 7"),
    ("q_weight", ones(0, 6), r"q_weight .*4.*got 0"),
    ("q_weight", ones(8, 5), r"q_weight .*6.*got 5"),
    ("q_weight", ones(8, 6, dtype=torch.float64), r"q_weight .*dtype of query, Float.*got Double"),
    ("k_weight", ones(6, 5), r"k_weight .*2.*got 3"),
    ("k_weight", ones(5, 5), r"k_weight .*2.*got 5"),
    ("v_weight", ones(5, 7), r"v_weight .*2.*got 5"),
    ("v_weight", ones(6, 6), r"v_weight .*7.*got 6"),
    ("out_weight", ones(9, 11), r"out_weight .*12.*got 11"),
    ("out_weight", ones(9), r"out_weight .*2 dimensions.*got 1"),
    *((name, ones(3), rf"{name} .*{size}.*got 3") for name, size in BIASES.items()),
    *((name, ones(size, 1), rf"{name} .*1 dimension.*got 2") for name, size in BIASES.items()),
    *((name, ones(size, dtype=torch.float16), rf"{name} .*dtype.*Float.*got Half") for name, size in BIASES.items()),
    ("temperature", torch.ones(3), r"temperature .*4.*got \[3\]"),
    ("temperature", -1.0, r"temperature .*positive.*got -1"),
    ("window_left", -2, r"window_left .*got -2"),
    ("softcap", -2.0, r"softcap .*got -2"),
    ("dropout_p", 2.0, r"dropout_p .*got 2"),
    ("scale", math.inf, r"scale .*got inf"),
]


@pytest.mark.parametrize("place", ["device", "meta"])
@pytest.mark.parametrize("name, wrong, message", MULTI_HEAD, ids=[f"{i}_{row[0]}" for i, row in enumerate(MULTI_HEAD)])
def test_multi_head_attention(name, wrong, message, place, device):
    options = {"device": device if place == "device" else "meta"}
    arguments = {
        "query": torch.randn(2, 5, 6, **options),
        "key": torch.randn(2, 4, 5, **options),
        "value": torch.randn(2, 4, 7, **options),
        **{weight: torch.randn(shape, **options) for weight, shape in WEIGHTS.items()},
        **{bias: torch.randn(size, **options) for bias, size in BIASES.items()},
        "num_heads": 4,
        "num_kv_heads": 2,
    }
    assert torch.ops.wmha.multi_head_attention(**arguments).shape == (2, 5, 9)
    if isinstance(wrong, torch.Tensor):
        wrong = wrong.to(**options)
    arguments[name] = wrong(arguments.get(name)) if callable(wrong) else wrong
    refuses(torch.ops.wmha.multi_head_attention, arguments, message)


BACKWARD = [
    ("grad_output", (2, 4, 5, 7), torch.float32, r"grad_output .*\[2, 4, 5, 8\].*got \[2, 4, 5, 7\]"),
    ("grad_output", (2, 4, 5, 8), torch.float64, r"grad_output .*Float.*got Double"),
    ("grad_logsumexp", (2, 4, 6), torch.float32, r"grad_logsumexp .*\[2, 4, 5\].*got \[2, 4, 6\]"),
    ("grad_logsumexp", (2, 4, 5), torch.float16, r"grad_logsumexp .*Float.*got Half"),
    ("output", (2, 4, 4, 8), torch.float32, r"output .*\[2, 4, 5, 8\].*got \[2, 4, 4, 8\]"),
    ("output", (2, 4, 5, 8), torch.float16, r"output .*Float.*got Half"),
    ("logsumexp", (2, 4, 4), torch.float32, r"logsumexp .*\[2, 4, 5\].*got \[2, 4, 4\]"),
    ("logsumexp", (2, 4, 5), torch.float64, r"logsumexp .*Float.*got Double"),
    ("rng_state", (1,), torch.int64, r"rng_state .*\[2\].*got \[1\]"),
    ("rng_state", (0,), torch.int64, r"rng_state .*\[2\].*got \[0\]"),
    ("rng_state", (2,), torch.float32, r"rng_state .*Long.*got Float"),
    ("query", (2, 4, 5, 7), torch.float32, r"key .*7.*got 8"),
]


@pytest.mark.parametrize("name, shape, dtype, message", BACKWARD)
def test_backward_operator(name, shape, dtype, message, arguments):
    """Private, and within reach of everybody: it must not read out of bounds either."""
    output, logsumexp, rng_state = torch.ops.wmha._attention_forward(**arguments, dropout_p=0.5)
    arguments = {"grad_output": output, "grad_logsumexp": logsumexp} | arguments
    arguments |= {"output": output, "logsumexp": logsumexp, "rng_state": rng_state, "dropout_p": 0.5}
    torch.ops.wmha._attention_backward(**arguments)
    arguments[name] = torch.ones(shape, dtype=dtype, device=output.device)
    refuses(torch.ops.wmha._attention_backward, arguments, message)


@pytest.mark.parametrize(
    "state, dropout_p, message",
    [
        (torch.tensor([1]), 0.5, r"rng_state .*\[2\].*got \[1\]"),
        (torch.tensor([1.0, 2.0]), 0.5, r"rng_state .*Long.*got Float"),
        (torch.tensor([[1, 2]]), 0.5, r"rng_state .*\[2\].*got \[1, 2\]"),
        (torch.tensor([1, 2]), 1.5, r"dropout_p .*0 and 1.*got 1.5"),
        (torch.tensor([1, 2]), math.nan, r"dropout_p .*0 and 1.*got"),
    ],
)
@pytest.mark.parametrize("place", ["device", "meta"])
def test_mask_operator(state, dropout_p, message, place, device):
    arguments = {"rng_state": state.to(device if place == "device" else "meta"), "dropout_p": dropout_p}
    refuses(torch.ops.wmha._dropout_mask, arguments | {"batch": 1, "heads": 1, "queries": 4, "keys": 4}, message)


@pytest.mark.parametrize("option", ["scale", "softcap", "dropout_p", "query_offset"])
def test_a_tensor_for_a_number(option):
    query = torch.ones(Q)
    with pytest.raises(RuntimeError, match=f"argument '{option}'.*'Tensor'"):
        wmha.functional.attention(query, query, query, **{option: torch.ones(3)})
