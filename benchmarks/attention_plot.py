"""Draws what benchmarks/attention.py measured: time against length, forward, and forward with backward.

python benchmarks/attention_plot.py benchmarks/results/h200_attention.json docs/attention_time.png
"""

from __future__ import annotations

import collections
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from train.plots import INK, save_figure

STYLES = ("o-", "s--", "^:", "d-.")
COLOURS = {
    "dma mosaic_gpu": "#d95f02",
    "dma xla": "#e6ab02",
    "cudnn dense": "#1b6ca8",
    "cudnn sliding window": "#2a9d5c",
    "flash attention 2": "#7570b3",
    "flex attention": "#a0537c",
}


def main(source: tyro.conf.Positional[Path], target: tyro.conf.Positional[Path]) -> None:
    """source: the measurements. target: the picture, a PNG."""
    draw(json.loads(source.read_text()), target)


def draw(record: dict[str, Any], target: Path) -> None:
    gate = record["options"]["gates"][0]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, direction, title in zip(
        figure.subplots(1, 2), ("forward", "both"), ("forward", "forward + backward"), strict=True
    ):
        rows = [row for row in record["rows"] if row["direction"] == direction and row["gate"] == gate]
        for name, colour in COLOURS.items():
            own = [row for row in rows if row["what"] == name]
            # Dense attention has no window, whatever stood beside it.
            lines = collections.defaultdict(list)
            for row in own:
                lines[None if "dense" in name else row["window"]].append(row)
            for (window, line), style in zip(sorted(lines.items()), itertools.cycle(STYLES)):
                points = sorted((row["length"], statistics.median(row["milliseconds"])) for row in line)
                label = name if len(lines) == 1 else f"{name}, w {window:,}"
                axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)
        decorate(axes, title, sorted({row["length"] for row in rows}))
    heads = "{heads} query heads, {kv_heads} kv heads, d {head_dim}, {dtype}".format(**record["options"])
    figure.suptitle(f"{record['device']}: {heads}, {gate} gate", color=INK, fontsize=10)
    save_figure(figure, target, dpi=130)


def decorate(axes: Any, title: str, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds")
    axes.set_title(title, color=INK, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
