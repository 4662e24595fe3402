"""The demo's pictures. Colours are Okabe and Ito's, which colour-blind readers tell apart."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
import torch
from torch import Tensor

import wmha
from demo_compare import Step
from demo_model import LanguageModel

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
plt.rcParams.update(
    {
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.grid": True,
        "grid.alpha": 0.3,
        "font.size": 10,
    }
)


def learning(
    file: pathlib.Path, losses: list[float], step_bytes: int, points: list[tuple[int, float]], lines: dict[str, float]
) -> None:
    """Bits per byte over the bytes read: each step's, the validation text's at some steps, and what others need."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    megabytes = step_bytes / 1e6
    smooth = np.convolve(np.pad(losses, 10, mode="edge"), np.ones(21) / 21, mode="valid")
    read = (np.arange(len(losses)) + 1) * megabytes
    axes.plot(read, smooth, color=BLUE, alpha=0.4, label="text it trains on, smoothed")
    steps, values = zip(*points, strict=True)
    axes.plot(np.array(steps) * megabytes, values, "o-", color=BLUE, label="text it has not seen")
    for value in lines.values():
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
    height = -np.inf
    for value, name in sorted((value, name) for name, value in {**lines, "this model": values[-1]}.items()):
        height = max(value, height + 0.32)  # a line of text, so that names don't overlap
        color = BLUE if name == "this model" else GREY
        axes.annotate(f"{name}: {value:.2f}", (1, height), (6, 0), ("axes fraction", "data"), "offset points",
                      va="center", color=color)  # fmt: skip
    axes.set(xlim=(0, len(losses) * megabytes), ylim=(0, 8.2))
    axes.set(xlabel="bytes read in training, in millions", ylabel="bits per byte (less is better)")
    axes.set_title("Learning to predict the next byte of a text")
    axes.legend(loc="upper right", frameon=False)
    finish(figure, file)


def cost(file: pathlib.Path, results: dict[str, list[Step]], window: int, subtitle: str) -> None:
    """Time and memory of a training step over the length of the sequence."""
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(10, 4.8))
    for name, steps in results.items():
        style = {
            "color": BLUE if name.startswith("wmha") else VERMILION,
            "marker": "o" if name.startswith("wmha") else "s",
            "linestyle": "--" if name.endswith("no dropout") else "-",
            "label": name,
        }
        lengths = [step.length for step in steps]
        time_axes.plot(lengths, [1000 * step.seconds for step in steps], **style)
        memory_axes.plot(lengths, [max(step.mebibytes, 1) for step in steps], **style)
    lengths = sorted({step.length for steps in results.values() for step in steps})
    for axes in (time_axes, memory_axes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("sequence length, in bytes")
    time_axes.set_title("Time of a training step, in ms")
    memory_axes.set_title("Its peak memory, in MiB")
    figure.legend(*time_axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(results), frameon=False)
    figure.suptitle(f"The same model on two attentions, window {window}; {subtitle}", x=0.01, ha="left", fontsize=10)
    finish(figure, file)


@torch.no_grad()
def attention_of(model: LanguageModel, text: Tensor) -> tuple[Tensor, Tensor]:
    """text (N,) -> the weights of all heads (layers, H, N, N) and their temperatures (layers, H)."""
    weights, temperatures = [], []

    def look(attention, inputs):
        query, key, _ = attention.project(*inputs)
        temperatures.append(attention.log_temperature.exp())
        window = (attention.window, 0)
        weights.append(wmha.attention_weights(query, key, window=window, temperature=temperatures[-1])[0])

    hooks = [block.attention.register_forward_pre_hook(look) for block in model.blocks]
    model.eval()
    model(text[None])
    for hook in hooks:
        hook.remove()
    return torch.stack(weights).cpu(), torch.stack(temperatures).cpu()


def attention(file: pathlib.Path, model: LanguageModel, text: Tensor, window: int) -> None:
    """Four of the most focused heads, those that look nearest first: their weights over the whole text, and below what
    one byte sees of the text before it."""
    weights, temperatures = attention_of(model, text)
    position = torch.arange(len(text))
    distance = (weights * (position[:, None] - position)).sum(-1).mean(-1)  # (layers, H)
    focused = weights.amax(-1).mean(-1).flatten().argsort(descending=True)[: max(4, distance.numel() // 2)]
    order = focused[distance.flatten()[focused].argsort()].tolist()
    chosen = [order[round(i * (len(order) - 1) / 3)] for i in range(4)] if len(order) > 4 else order
    figure, rows = plt.subplots(2, len(chosen), figsize=(3.2 * len(chosen), 6.4), height_ratios=(3, 2), squeeze=False)
    for column, index in enumerate(chosen):
        layer, head = divmod(index, weights.size(1))
        image, strip = rows[:, column]
        image.imshow(weights[layer, head].sqrt(), cmap="cividis", vmin=0, vmax=0.8)  # the root lifts the many small
        image.grid(visible=False)
        image.set_title(
            f"layer {layer + 1}, head {head + 1}, temperature {temperatures[layer, head]:.2f}\n"
            f"looks {distance[layer, head]:.0f} bytes back on average",
            fontsize=9,
        )
        image.set_xlabel("sees byte")
        image.set_ylabel("byte" if column == 0 else "")
        draw_text(strip, text, weights[layer, head, -1], window)
    rows[1, 0].set_title("What the framed byte sees (darker: more)", fontsize=9)
    figure.suptitle(
        f"Attention of {len(chosen)} heads, window {window}: the brighter, the more a byte sees of another",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    finish(figure, file)


def draw_text(axes, text: Tensor, weights: Tensor, window: int, columns: int = 24) -> None:
    """The last of the text in rows of characters, on backgrounds as dark as their weights; the last one is framed."""
    characters = [chr(byte) if 32 <= byte < 127 else {10: "\u21b5"}.get(byte, "\u00b7") for byte in text.tolist()]
    first = max(0, len(text) - window - 1)
    shades = plt.get_cmap("Blues")(0.85 * (weights / weights.max()).sqrt().numpy())
    for i in range(first, len(text)):
        row, column = divmod(i - first, columns)
        axes.add_patch(plt.Rectangle((column, row), 1, 1, facecolor=shades[i], edgecolor="none"))
        dark = weights[i] > 0.4 * weights.max()
        axes.text(column + 0.5, row + 0.55, characters[i], ha="center", va="center", fontsize=8, family="monospace",
                  color="white" if dark else "black")  # fmt: skip
    axes.add_patch(plt.Rectangle((column, row), 1, 1, facecolor="none", edgecolor=VERMILION, linewidth=1.5))
    axes.set(xlim=(0, columns), ylim=(row + 1, 0))
    axes.axis("off")


def finish(figure, file: pathlib.Path) -> None:
    figure.savefig(file)
    plt.close(figure)
