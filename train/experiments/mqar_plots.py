"""Pictures of one recall cell: its curves, its gates over training, its masks now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from train.experiments.mqar_config import MQARConfig
from train.experiments.mqar_model import RecallModel
from train.metrics_file import read_metrics
from train.plots import CHOSEN, INK, RECENT, plot_mask_film, plot_masks, save_figure, spread

MOST_SNAPSHOTS = 64
MOST_POSITIONS = 768
MOST_MOMENTS, MOST_FILMED = 6, 256
LAYER_COLOURS = (RECENT, CHOSEN, "#6a994e", "#8d5a97")


class GateHistory:
    """One example's gates at up to 64 moments of the training, evenly spread; `save` keeps them across sessions."""

    def __init__(self, path: Path, until: int) -> None:
        """until: snapshots of later steps are dropped, because those steps run again."""
        self._path = path
        self._every = 1
        self._seen = 0
        self.steps: list[int] = []
        self.gates: list[Float[np.ndarray, "N L"]] = []
        if path.exists():
            with np.load(path) as saved:
                kept = saved["steps"] <= until
                self.steps, self.gates = saved["steps"][kept].tolist(), list(saved["gates"][kept])
                self._every, self._seen = int(saved["every"]), int(saved["every"]) * int(kept.sum())

    def add(self, step: int, gates: Float[np.ndarray, "N L"]) -> None:
        self._seen += 1
        if (self._seen - 1) % self._every:
            return
        self.steps.append(step)
        self.gates.append(np.asarray(gates, np.float32))
        if len(self.steps) > MOST_SNAPSHOTS:
            self.steps, self.gates, self._every = self.steps[::2], self.gates[::2], 2 * self._every

    def save(self) -> None:
        """Writes the file at once; it may be older than a checkpoint, and then lacks a few moments."""
        if not self.steps:
            return
        fresh = self._path.with_name(f".{self._path.name}")
        with fresh.open("wb") as file:
            np.savez_compressed(file, steps=np.array(self.steps), gates=np.stack(self.gates), every=self._every)
        fresh.replace(self._path)


def plot_gates(history: GateHistory, config: MQARConfig, path: Path) -> None:
    """δ of one test example, a row a test: which positions each layer's gate has learned to keep."""
    assert config.pairs is not None
    stack = np.stack(history.gates)
    figure = Figure(figsize=(11, 2.6 * stack.shape[1] + 0.8), layout="constrained")
    grid = figure.subplots(stack.shape[1], 1, squeeze=False, sharex=True)
    for layer, axes in enumerate(grid[:, 0]):
        picture = stack[:, layer]
        low, high = np.nanquantile(picture, [0.01, 0.99])
        drawn = axes.imshow(
            picture, aspect="auto", interpolation="nearest", cmap="viridis", vmin=low, vmax=max(high, low + 1e-6)
        )
        axes.axvline(2 * config.pairs - 0.5, color=CHOSEN, linewidth=1.2)
        ticks = sorted({0, (len(picture) - 1) // 2, len(picture) - 1})
        axes.set_yticks(ticks, [f"{history.steps[tick]:,}" for tick in ticks])
        axes.set_ylabel("step")
        axes.set_title(f"layer {layer}", loc="left", color=INK, fontsize=11, fontweight="bold")
        figure.colorbar(drawn, ax=axes, label="δ", pad=0.01)
    grid[-1][0].set_xlabel("position (pairs end at the line)")
    figure.suptitle(f"{config.name} · gates over training", color=INK, fontweight="bold")
    save_figure(figure, path, dpi=110)


def plot_mqar_masks(expiry: Int[np.ndarray, "N L"], config: MQARConfig, step: int, path: Path) -> None:
    """The mask of every layer on one test example; long ones are drawn for every k-th query and key."""
    assert config.window is not None
    sampled, window, stride = _sampled(expiry, config.window, MOST_POSITIONS)
    segments = np.ones(sampled.shape[1], np.int32)
    plot_masks(sampled[..., None], (window,), segments, path, f"{config.name} · step {step:,}{_every(stride)}")


def _sampled(expiry: Int[np.ndarray, "*n L"], window: int, most: int) -> tuple[Int[np.ndarray, "*n l"], int, int]:
    """Every stride-th query and key, so that at most `most` are left; the window in such steps; the stride."""
    stride = -(-expiry.shape[-1] // most)
    # Key j·k is visible to query i·k iff j <= i < expiry / k.
    return -(-expiry[..., ::stride] // stride), max(window // stride, 1), stride


def _every(stride: int) -> str:
    return "" if stride == 1 else f", every {stride}th position"


def film_of(history: GateHistory, config: MQARConfig, model: RecallModel) -> dict[str, Any]:
    """The masks that `model` makes of one test example's gates at up to 6 moments of the training, as JSON.

    steps; stride: only every stride-th position is kept; window, in such positions; expiry [moments][layers], lifetimes
    joined by spaces.
    """
    assert config.window is not None
    moments = spread(len(history.steps), MOST_MOMENTS)
    gates = jnp.asarray(np.stack([history.gates[number] for number in moments]))
    expiry = np.asarray(model.lifetimes(gates.reshape(-1, config.length, 1))).reshape(gates.shape)
    sampled, window, stride = _sampled(expiry, config.window, MOST_FILMED)
    return {
        "steps": [history.steps[number] for number in moments],
        "stride": stride,
        "window": window,
        "expiry": [[" ".join(map(str, layer)) for layer in masks] for masks in sampled],
    }


def plot_film(result: Mapping[str, Any], path: Path) -> None:
    """The masks over training that a cell's result holds."""
    film = result["film"]
    accuracy = {row["step"]: row["accuracy"] for row in result["history"]}
    expiry = np.array([[np.array(layer.split(), np.int32) for layer in masks] for masks in film["expiry"]])
    moments = [f"step {step:,}: {accuracy[step]:.0%} right" for step in film["steps"]]
    title = f"{result['name']} · masks over training{_every(film['stride'])}"
    plot_mask_film(expiry, moments, film["window"], path, title)


def plot_training(metrics: Path, config: MQARConfig, path: Path) -> None:
    """Accuracy and loss over steps; for `dma` also what the masks show of the answers, ties and gate norms."""
    rows = read_metrics(metrics)
    steps = [int(row["step"]) for row in rows]
    looked = bool(rows) and "ties_0" in rows[0]
    figure = Figure(figsize=(15 if looked else 8, 4.2), layout="constrained")
    panels = figure.subplots(1, 3 if looked else 1, squeeze=False)[0]

    def line(axes, column: str, label: str, **style) -> None:
        axes.plot(steps, [float(row[column]) for row in rows], label=label, **style)

    line(panels[0], "test_accuracy", "test accuracy", color=CHOSEN, linewidth=2, marker="o", markersize=3)
    panels[0].axhline(config.target, color=INK, linewidth=0.8, linestyle="--")
    panels[0].set_ylim(-0.02, 1.02)
    loss_axes = panels[0].twinx()
    line(loss_axes, "loss", "training loss", color=RECENT, linewidth=1.4)
    loss_axes.set_ylabel("cross-entropy, nats", color=RECENT)
    panels[0].set_ylabel("accuracy", color=CHOSEN)
    if looked:
        line(panels[1], "in_window_0", "a sliding window shows", color=INK, linestyle="--", linewidth=1)
        for layer in range(config.num_layers):
            colour = LAYER_COLOURS[layer % len(LAYER_COLOURS)]
            line(panels[1], f"key_visible_{layer}", f"key, layer {layer}", color=colour)
            line(
                panels[1], f"value_visible_{layer}", f"value, layer {layer}", color=colour, linestyle=":", linewidth=2.4
            )
            line(panels[1], f"ties_{layer}", f"ties, layer {layer}", color=colour, alpha=0.35)
            line(panels[2], f"A_{layer}", f"‖A‖, layer {layer}", color=colour)
            line(panels[2], f"delta_{layer}", f"‖Δ‖, layer {layer}", color=colour, linestyle=":", linewidth=2.4)
            line(panels[2], f"spread_{layer}", f"std of δ, layer {layer}", color=colour, alpha=0.35)
        panels[1].set_ylim(-0.02, 1.02)
        panels[1].set_ylabel("share of labels (ties: of keys)")
        panels[2].set_ylabel("norm")
        for axes in panels[1:]:
            axes.legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.set_xlabel("step")
        axes.grid(True, color="#e6e9ef", linewidth=0.8)
        axes.spines[["top"]].set_visible(False)
    figure.suptitle(config.name, color=INK, fontweight="bold", x=0.02, ha="left")
    save_figure(figure, path, dpi=120)
