"""The demo's pictures."""

import pathlib

import matplotlib.pyplot as plt
import matplotlib.ticker
import torch
from torch import Tensor

import wmha
from demo_compare import Step
from language_model import LanguageModel
from plots import BLUE, VERMILION, finish


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
        heads = (attention.num_heads, attention.head_dim)
        projections = (attention.q_proj, attention.k_proj)
        query, key = (project(*inputs).unflatten(-1, heads).transpose(1, 2) for project in projections)
        temperatures.append(attention.log_temperature.exp())
        weights.append(wmha.attention_weights(query, key, window=attention.window, temperature=temperatures[-1])[0])

    hooks = [layer.self_attn.register_forward_pre_hook(look) for layer in model.stack.layers]
    model.eval()
    model(text[None].long())
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
