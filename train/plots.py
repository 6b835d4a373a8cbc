"""Pictures of a run: its loss, and the masks that its heads have learned."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, ScalarFormatter

from train.metrics_file import read_metrics

INK, PAPER = "#1b2333", "#ffffff"
RECENT, CHOSEN, DROPPED, UNSEEN = "#3d7ea6", "#f08a24", "#dbe3ec", "#f7f8fa"
MOST_LAYERS, MOST_HEADS = 8, 4


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Writes a PNG at once: a reader never sees half a picture, and several processes may write the same one."""
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(fresh, dpi=dpi, format="png", facecolor=PAPER)
    fresh.replace(path)


def smooth(values: Sequence[float], span: int) -> np.ndarray:
    """Exponential moving average with the start corrected (the first value is itself). float64, as long as given."""
    decay = 1 - 2 / (span + 1)
    out = np.empty(len(values))
    total = weight = 0.0
    for i, value in enumerate(values):
        total, weight = decay * total + value, decay * weight + 1
        out[i] = total / weight
    return out


def plot_loss(metrics: Path, path: Path, title: str) -> None:
    """`plots/loss.png`: training loss, raw and smoothed, and validation loss, from the rows of metrics.csv."""
    rows = read_metrics(metrics)
    train = [(int(r["step"]), float(r["loss"])) for r in rows if r["loss"]]
    train = [(step, loss) for step, loss in train if np.isfinite(loss)]
    validation = [(int(r["step"]), float(r["validation_loss"])) for r in rows if r["validation_loss"]]
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=RECENT, alpha=0.3, linewidth=0.9)
        axes.plot(
            steps, smooth(losses, max(3, len(losses) // 25)), color=RECENT, linewidth=2, label="training (smoothed)"
        )
    if validation:
        steps, losses = zip(*validation, strict=True)
        axes.plot(steps, losses, color=CHOSEN, linewidth=2, marker="o", markersize=4.5, label="validation")
        axes.annotate(
            f"{losses[-1]:.3f}", (steps[-1], losses[-1]), xytext=(7, 0), textcoords="offset points",
            color=CHOSEN, fontweight="bold", va="center",
        )  # fmt: skip
    axes.set_yscale("log")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter = ScalarFormatter()
        formatter.set_scientific(False)
        which(formatter)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_minor_locator(LogLocator(base=10, subs=()))
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.set_title(title, loc="left", color=INK, fontweight="bold")
    axes.grid(True, color="#e6e9ef", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.04)
    if train or validation:
        axes.legend(frameon=False)
    save_figure(figure, path, dpi=130)


def visible_from_expiry(expiry: Int[np.ndarray, " S"]) -> Bool[np.ndarray, "S S"]:
    """The mask [query, key] of one head's lifetimes: key j is visible to i iff j <= i < expiry[j]."""
    queries, keys = np.arange(len(expiry))[:, None], np.arange(len(expiry))[None, :]
    return (keys <= queries) & (queries < expiry[None, :])


def _mask_colours(visible: np.ndarray, window: int, segments: np.ndarray) -> np.ndarray:
    distance = np.arange(len(visible))[:, None] - np.arange(len(visible))[None, :]
    same = (segments[:, None] == segments[None, :]) & (segments[:, None] > 0)
    recent = (distance >= 0) & (distance < window) & same
    codes = np.where(visible, np.where(recent, 3, 2), np.where(recent, 1, 0))
    palette = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (UNSEEN, DROPPED, CHOSEN, RECENT)])
    return palette[codes].astype(np.uint8)


def spread(count: int, most: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def plot_mask_film(
    expiry: Int[np.ndarray, "T L S"], moments: Sequence[str], window: int, path: Path, title: str
) -> None:
    """The mask of one head of each layer at some moments of the training, which have names; colours as `plot_masks`."""
    many, layers, length = expiry.shape
    figure = Figure(figsize=(3.2 * many + 0.6, 3.2 * layers + 1.2), layout="constrained")
    grid = figure.subplots(layers, many, squeeze=False)
    for layer, number in itertools.product(range(layers), range(many)):
        axes = grid[layer][number]
        _draw_mask(axes, expiry[number, layer], window, np.ones(length, np.int32))
        axes.set_title(moments[number], fontsize=9, color=INK, fontweight="bold", loc="left")
        if not number:
            axes.annotate(f"layer {layer}", (-0.32, 0.5), xycoords="axes fraction", rotation=90, va="center", color=INK)
    _name_mask_axes(figure, grid, title)
    save_figure(figure, path, dpi=110)


def plot_masks(
    expiry: Int[np.ndarray, "L S K"],
    windows: Sequence[int],
    segment_ids: Int[np.ndarray, " S"],
    path: Path,
    title: str,
) -> None:
    """`plots/masks.png`: what each kv head of each layer sees of one text; rows are queries, columns keys.

    windows: per kv head. Colours tell the learned mask from a sliding window of the same budget: what both see,
    what only the learned mask sees (chosen, further back), and what it gave up for that. At most 8 layers and 4
    heads are drawn, spread evenly.
    """
    layers, _, heads = expiry.shape
    shown_layers, shown_heads = spread(layers, MOST_LAYERS), spread(heads, MOST_HEADS)
    figure = Figure(figsize=(3.1 * len(shown_layers) + 0.6, 3.35 * len(shown_heads) + 1.2), layout="constrained")
    grid = figure.subplots(len(shown_heads), len(shown_layers), squeeze=False)
    for row, head in enumerate(shown_heads):
        for column, layer in enumerate(shown_layers):
            axes = grid[row][column]
            _draw_mask(axes, expiry[layer, :, head], windows[head], segment_ids)
            axes.set_title(f"layer {layer} · head {head}", fontsize=11, color=INK, fontweight="bold", loc="left")
    _name_mask_axes(figure, grid, title)
    save_figure(figure, path, dpi=160)


def _draw_mask(axes: Any, expiry: Int[np.ndarray, " S"], window: int, segment_ids: Int[np.ndarray, " S"]) -> None:
    """One head's mask, and how much of it a sliding window of the same budget does not see."""
    length = len(expiry)
    visible = visible_from_expiry(expiry)
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    far = float(np.sum(visible & (distance >= window)) / max(np.sum(visible), 1))
    axes.imshow(_mask_colours(visible, window, segment_ids), interpolation="antialiased", aspect="equal")
    # a sliding window of the same budget ends at this line
    edge = np.array([0, max(length - window, 0)])
    axes.plot(edge - 0.5, edge + window - 0.5, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7)
    axes.set_xlim(-0.5, length - 0.5)
    axes.set_ylim(length - 0.5, -0.5)
    axes.set_title(f"{far:.0%} further back", fontsize=9, color=CHOSEN, loc="right")
    axes.spines[:].set_visible(False)
    axes.tick_params(labelsize=8, length=2, color="#9aa4b2", labelcolor="#5b6675")
    axes.label_outer()


def _name_mask_axes(figure: Figure, grid: Any, title: str) -> None:
    for axes in grid[-1]:
        axes.set_xlabel("key position", fontsize=9, color=INK)
    for axes in grid[:, 0]:
        axes.set_ylabel("query position", fontsize=9, color=INK)
    figure.suptitle(title, fontsize=14, color=INK, fontweight="bold")
    figure.legend(
        handles=[
            Patch(color=RECENT, label="seen, and recent"),
            Patch(color=CHOSEN, label="seen because it was chosen, beyond a sliding window"),
            Patch(color=DROPPED, label="recent, given up"),
            Line2D([], [], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label="edge of that sliding window"),
        ],
        loc="outside lower center", ncols=4, frameon=False, fontsize=10,
    )  # fmt: skip
