"""The benchmark's pictures. Colours are Okabe and Ito's."""

from __future__ import annotations

import pathlib

import matplotlib.pyplot as plt
import numpy as np

from plots import finish

COLORS = {
    "wmha": "#0072B2",
    "flex": "#E69F00",
    "chunked": "#009E73",
    "SDPA, mask": "#D55E00",
    "SDPA": "#CC79A7",
    "local-attention": "#56B4E9",
    "flash-attn": "#000000",
}


def draw(folder: pathlib.Path, results: list, information: dict) -> None:
    threads = f", {information['threads']} threads" if "threads" in information else ""
    where = f"{information['processor']}{threads}, torch {information['torch']}"
    windowed = [r for r in results if r.case not in ("N", "W") and r.way in COLORS]
    if windowed:
        ratios(folder / "ratios.png", windowed, where)
    if any(r.case in ("N", "W") for r in results):
        scaling(folder / "scaling.png", results, where)


def ratios(file: pathlib.Path, results: list, where: str) -> None:
    """How many times as long as wmha each other way takes, case by case; a panel for each dtype and pass."""
    panels = list(dict.fromkeys((r.dtype, r.backward) for r in results))
    shapes = list(dict.fromkeys(r.shape for r in results if r.way != "wmha"))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(10, 0.45 * rows * len(shapes) + 1.2), squeeze=False, sharey=True
    )
    for axes, (dtype, backward) in zip(grid.flat, panels, strict=False):
        of_panel = [r for r in results if (r.dtype, r.backward) == (dtype, backward)]
        ours = {r.shape: r.minimum for r in of_panel if r.way == "wmha"}
        for i, shape in enumerate(shapes):
            others = [r for r in of_panel if r.shape == shape and r.way != "wmha"]
            for j, other in enumerate(others):
                height = 0.8 / len(others)
                y = i - 0.4 + (j + 0.5) * height
                ratio = other.minimum / ours[shape]
                axes.barh(y, ratio, height, color=COLORS[other.way])
                axes.annotate(f"{ratio:.1f}", (ratio, y), (3, 0), textcoords="offset points", va="center", fontsize=7)
        axes.axvline(1, color=COLORS["wmha"], linewidth=2)
        axes.set_xscale("log")
        axes.set_yticks(range(len(shapes)), shapes, fontsize=8)
        axes.set_ylim(len(shapes) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_title(f"{dtype}, {'forward and backward' if backward else 'forward'}")
        axes.set_xlabel("times as long as wmha")
    used = [way for way in COLORS if any(r.way == way for r in results)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[way]) for way in used]
    figure.legend(handles, used, loc="outside lower center", ncols=len(used), frameon=False)
    figure.suptitle(where, x=0.01, ha="left", fontsize=9)
    finish(figure, file)


def scaling(file: pathlib.Path, results: list, where: str) -> None:
    """Time over length at one window, and over the window at one length; forward and backward."""
    first = next(r for r in results if r.case in ("N", "W"))
    figure, (over_length, over_window) = plt.subplots(1, 2, figsize=(10, 4.6))
    for axes, case, of in ((over_length, "N", lambda r: r.length), (over_window, "W", lambda r: r.left)):
        chosen = [r for r in results if r.case == case and r.backward]
        for way, color in COLORS.items():
            points = sorted((of(r), 1e3 * r.minimum) for r in chosen if r.way == way)
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, "o-", color=color, label=way)
        ticks = np.unique([of(r) for r in chosen])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
        axes.minorticks_off()
    over_length.set(title="Time over length, window 256, in ms", xlabel="length")
    over_window.set(title="Time over window, length 4,096, in ms", xlabel="window")
    figure.legend(*over_length.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(
        f"Forward and backward in {first.dtype}, {first.heads} heads, D = 64; {where}", x=0.01, ha="left", fontsize=9
    )
    finish(figure, file)
