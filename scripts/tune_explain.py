"""Why the best trial of a study is better than the defaults: what each group of its values does alone, on the defaults."""

from collections.abc import Iterator
from typing import Any

from optuna.trial import FrozenTrial

GROUPS = {
    "learning rate": ("learning_rate", "warm_up", "schedule", "final_rate"),
    "optimizer": ("optimizer", "momentum", "beta1", "beta2", "weight_decay", "clip_norm"),
    "batch": ("batch_size", "accumulate", "length"),
    "size": ("num_layers", "embed_dim", "dim_feedforward"),
    "heads": ("num_heads", "num_kv_heads", "head_dim", "value_dim"),
    "window": ("window",),
    "scores": ("scale", "temperature", "learned_temperature", "softcap"),
    "layer": ("bias", "activation", "norm", "layer_norm_eps"),
    "dropout": ("attention_dropout", "dropout"),
}


def name_of(study: str, best: FrozenTrial) -> str:
    """The study of the trials that explain this one."""
    return f"{study}: why trial {best.number}"


def planned(defaults: dict[str, Any], best: FrozenTrial) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Parameters and attributes of the trials: the defaults, and for each group those with the best trial's values."""
    yield defaults, {"group": "defaults"}
    for group, names in GROUPS.items():
        changed = {
            name: best.params[name] for name in names if name in defaults and best.params[name] != defaults[name]
        }
        if changed:
            yield defaults | changed, {"group": group, "changed": changed}
