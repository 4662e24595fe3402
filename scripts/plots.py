"""What the pictures have in common, and that of a training. Colours are Okabe and Ito's, which colour-blind readers tell
apart."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import checkpoint

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#666666"
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


def bars(file: pathlib.Path, values: dict[str, float], title: str, label: str) -> None:
    """Named values, the first on top."""
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.28 * len(values)))
    drawn = axes.barh(
        list(values), list(values.values()), color=[BLUE if value > 0 else VERMILION for value in values.values()]
    )
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
    axes.set(title=title, xlabel=label)
    finish(figure, file)


def finish(figure, file: pathlib.Path) -> None:
    with checkpoint.replacing(file) as stream:
        figure.savefig(stream, format="png")
    plt.close(figure)
