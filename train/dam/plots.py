"""Pictures of captured maps, of true masks, and of the patterns that they matched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dmattn_jax.dam import Maps, Masks

MOST_LAYERS, MOST_HEADS = 6, 9


def plot_maps(maps: Maps, path: Path) -> None:
    """The square root of the mean attention, heads across, layers down."""
    _grid(path, np.sqrt(maps.total / np.maximum(maps.count, 1)), "√ mean attention", "magma")


def plot_masks(masks: Masks, path: Path) -> None:
    """True masks up to the capture length L."""
    _grid(path, masks.inside.astype(float), "true masks", "Greys")


def plot_patterns(masks: Masks, path: Path) -> None:
    """What is visible up to 2 L: the true mask, and beyond it the extended diagonals and verticals."""
    side = masks.inside.shape[2]
    _grid(path, visible(masks, 2 * side).astype(float), "masks extended to twice the capture length", "Greys", side)


def visible(masks: Masks, length: int) -> np.ndarray:
    """[N, H, length, length], for a picture: nothing that computes attention builds this."""
    row, column = np.indices((length, length))
    distance = row - column
    side = masks.inside.shape[2]

    def look_up(vector: np.ndarray, at: np.ndarray) -> np.ndarray:
        return vector[..., np.clip(at, 0, vector.shape[-1] - 1)] & (at >= 0) & (at < vector.shape[-1])

    shown = (look_up(masks.diagonals, distance) | look_up(masks.verticals, column)) & (distance >= 0)
    shown[:, :, :side] = False
    inside = masks.inside[:, :, :length, :length]
    shown[:, :, : inside.shape[2], : inside.shape[3]] = inside
    return shown


def _grid(path: Path, images: Float[np.ndarray, "N H t s"], title: str, colours: str, edge: int | None = None) -> None:
    layers, heads = (
        sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})
        for count, most in zip(images.shape[:2], (MOST_LAYERS, MOST_HEADS), strict=True)
    )
    figure = Figure(figsize=(1.5 * len(heads) + 0.4, 1.6 * len(layers) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(layers), len(heads), squeeze=False)
    for axes, layer in zip(grid, layers, strict=True):
        for cell, head in zip(axes, heads, strict=True):
            cell.imshow(images[layer, head], cmap=colours, vmin=0, vmax=1, interpolation="antialiased")
            if edge is not None:
                cell.axhline(edge - 0.5, color="#f08a24", linewidth=0.7)
            cell.set_title(f"layer {layer} · head {head}", fontsize=7)
            cell.set_xticks([])
            cell.set_yticks([])
    figure.suptitle(f"{title} (rows: queries, columns: keys)", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
