"""The configuration of a training run: what `train.py` reads from a file and from the command line.

A file is TOML with the sections [model], [optimizer], [data] and [training]; what it leaves out has the default below.
On the command line the same keys are options, such as --num-heads 8, and win.
"""

import argparse
import difflib
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pydantic
import tomlkit
import tomlkit.exceptions
import torch

import checkpoint
from command import InputError
from language_model import LanguageModel

Positive = Annotated[int, pydantic.Field(ge=1)]
Probability = Annotated[float, pydantic.Field(ge=0, le=1)]
Windows = Annotated[list[int], pydantic.BeforeValidator(lambda value: value if isinstance(value, list) else [value])]
NotNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


def key(default: Any, description: str) -> Any:
    return pydantic.Field(default, description=description)


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


class Model(Section):
    num_layers: Positive = key(4, "number of layers")
    embed_dim: Positive = key(128, "width of the model")
    num_heads: Positive = key(4, "query heads of each layer, 1 to 128")
    num_kv_heads: Positive | None = key(None, "key and value heads, a divisor of num_heads; none: num_heads")
    head_dim: Positive | None = key(None, "dimension of a query and key head; none: embed_dim / num_heads")
    value_dim: Positive | None = key(None, "dimension of a value head; none: head_dim")
    window: Windows = key([128], "bytes before its own that a byte sees, -1: all; one for all layers or one for each")
    scale: float | None = key(None, "factor on the product of query and key; none: 1 / sqrt(head_dim)")
    temperature: float = key(1.0, "divides the scores; where it is learned, it starts with this")
    learned_temperature: Literal["none", "shared", "per_head"] = key("per_head", "whose temperature is learned")
    softcap: float = key(0.0, "squashes scores into (-softcap, softcap); 0: off")
    attention_dropout: Probability = key(0.0, "probability with which an attention weight is dropped")
    dropout: Probability = key(0.0, "probability with which an element of a sublayer's output is dropped")
    bias: bool = key(False, "the projections have biases")
    dim_feedforward: Positive | None = key(None, "width of the feed-forward network; none: 4 * embed_dim")
    activation: Literal["gelu", "relu", "silu", "geglu", "swiglu"] = key("gelu", "of the feed-forward network")
    norm: Literal["before", "after"] = key("before", "where a sublayer's layer norm stands")
    layer_norm_eps: NotNegative = key(1e-5, "epsilon of the layer norms")


class Optimizer(Section):
    optimizer: Literal["adamw", "adam", "muon", "sgd"] = key(
        "adamw", "muon is for the layers' matrices, with adamw for the rest"
    )
    learning_rate: NotNegative = key(3e-3, "highest learning rate")
    momentum: Probability = key(0.95, "of muon and sgd")
    beta1: Probability = key(0.9, "of adam and adamw")
    beta2: Probability = key(0.95, "of adam and adamw")
    weight_decay: NotNegative = key(0.1, "of matrices; vectors have none")
    clip_norm: NotNegative = key(1.0, "longest gradient, longer ones are shortened; 0: off")
    steps: Positive = key(2000, "training steps")
    warm_up: Annotated[int, pydantic.Field(ge=0)] = key(100, "steps in which the learning rate rises")
    schedule: Literal["cosine", "linear", "constant"] = key("cosine", "how the learning rate falls after that")
    final_rate: Probability = key(0.0, "what it falls to, as a part of learning_rate")


class Data(Section):
    data: list[str] = key([], "files or folders of text; none: the sources of Python's standard library")
    validation_bytes: Positive = key(2**17, "bytes held out for validation, at most")
    length: Annotated[int, pydantic.Field(ge=2)] = key(256, "bytes in a sequence")
    batch_size: Positive = key(8, "sequences in a training step, of all processes together")
    accumulate: Positive = key(
        1, "parts that a process makes of its share of them, one after the other, to save memory"
    )

    @property
    def step_bytes(self) -> int:
        """Bytes that a training step reads."""
        return self.batch_size * self.length


class Training(Section):
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: cuda where there is one")
    bf16: bool = key(False, "autocast to bfloat16")
    threads: Annotated[int, pydantic.Field(ge=0)] = key(0, "on the CPU; 0: as PyTorch chooses")
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**63)] = key(0, "of everything random")
    validate_every: Positive = key(100, "steps from one validation to the next")
    patience: Annotated[int, pydantic.Field(ge=0)] = key(0, "validations without a new best that end it; 0: none do")
    checkpoint_every: Positive = key(200, "steps from one checkpoint to the next")


class Config(Section):
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    data: Data = Data()
    training: Training = Training()

    def table(self) -> dict[str, dict[str, Any]]:
        return self.model_dump()


SECTIONS: dict[str, type[Section]] = {"model": Model, "optimizer": Optimizer, "data": Data, "training": Training}
SECTION_OF = {name: section for section, kind in SECTIONS.items() for name in kind.model_fields}


def read(file: pathlib.Path) -> Config:
    """InputError names the file and the key."""
    return validate(read_toml(file), str(file))


def read_toml(file: pathlib.Path) -> dict[str, Any]:
    try:
        return tomlkit.parse(file.read_text()).unwrap()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    except (tomlkit.exceptions.TOMLKitError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not TOML: {error}") from error


def write(config: Config, file: pathlib.Path) -> None:
    """Every key with its value and what it means; those that are none are comments, since TOML has no none."""
    document = tomlkit.document()
    for section, kind in SECTIONS.items():
        table = tomlkit.table()
        for name, value in getattr(config, section):
            if value is None:
                table.add(tomlkit.comment(f"{name} = none: {kind.model_fields[name].description}"))
            else:
                table.add(name, tomlkit.item(value).comment(kind.model_fields[name].description))
        document.add(section, table)
    checkpoint.write(tomlkit.dumps(document), file)


def validate(table: dict[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(table)
    except pydantic.ValidationError as error:
        raise InputError("\n".join(sentences(error, where))) from error


def sentences(error: pydantic.ValidationError, where: str) -> Iterator[str]:
    for one in error.errors():
        section, *rest = (str(part) for part in one["loc"])
        name = rest[0] if rest else ""
        if one["type"] == "extra_forbidden":
            known = SECTIONS[section].model_fields if name else SECTIONS
            yield f"{where}: unknown {f'key {name} in' if name else 'section'} [{section}]{meant(name or section, known)}"
        else:
            yield f"{where}: [{section}] {name}: {one['msg'].lower()}, got {one['input']!r}"


def meant(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, [*known, *SECTION_OF], 1)
    if not close:
        return f"; known are {', '.join(known)}"
    section = f" in [{SECTION_OF[close[0]]}]" if close[0] in SECTION_OF else ""
    return f"; is {close[0]}{section} meant?"


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option for each key, --num-heads for num_heads."""
    for section, kind in SECTIONS.items():
        group = parser.add_argument_group(f"[{section}]")
        for name, field in kind.model_fields.items():
            default = "none" if field.default is None else field.default
            is_list = "list" in str(field.annotation)
            group.add_argument(
                f"--{name.replace('_', '-')}",
                help=f"{field.description} (default: {default if default != [] else 'none'})".replace("%", "%%"),
                metavar=name.rpartition("_")[2].upper(),
                nargs="+" if is_list else None,
            )


def override(config: Config, args: argparse.Namespace) -> Config:
    """The configuration with what was given on the command line."""
    for name, section in SECTION_OF.items():
        given = getattr(args, name)
        if given is not None:
            config = merge(config, {section: {name: given}}, f"--{name.replace('_', '-')}")
    return config


def merge(config: Config, values: dict[str, dict[str, Any]], where: str) -> Config:
    """The configuration with other values, by section and key. A value "none" is None where a key may be None."""
    table = config.table()
    for section, keys in values.items():
        fields = SECTIONS[section].model_fields
        table[section] |= {
            name: None if value == "none" and fields[name].default is None else value for name, value in keys.items()
        }
    return validate(table, where)


def check(config: Config, where: str, processes: int = 1) -> Config:
    """InputError where values don't go together."""
    optimizer, data = config.optimizer, config.data
    if optimizer.warm_up > optimizer.steps:
        raise InputError(f"{where}: warm_up must be at most steps, {optimizer.steps}, got {optimizer.warm_up}")
    if data.batch_size % (data.accumulate * processes) != 0:
        raise InputError(
            f"{where}: batch_size must be a multiple of accumulate times the number of processes, "
            f"{data.accumulate} x {processes}, got {data.batch_size}"
        )
    try:
        with torch.device("meta"):
            LanguageModel(**dict(config.model))
    except ValueError as error:
        raise InputError(f"{where}: {str(error).removeprefix('wmha: ')}") from error
    return config


def resolved(config: Config) -> Config:
    """The configuration with a number wherever none stands for one."""
    with torch.device("meta"):
        layer = LanguageModel(**dict(config.model)).stack.layers[0]
    attention = layer.self_attn
    taken = {
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "value_dim": attention.value_dim,
        "scale": attention.head_dim**-0.5 if attention.scale is None else attention.scale,
        "dim_feedforward": layer.linear2.in_features,
    }
    return merge(config, {"model": taken}, "resolved")
