"""Draws what benchmarks/generation.py measured: tokens per second and memory of the caches against the context.

python benchmarks/generation_plot.py benchmarks/results/generation_cpu.json docs/generation.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from train.plots import CHOSEN, INK, RECENT, save_figure

NAMES = {"dma": ("dynamic mask", CHOSEN), "mha": ("dense", RECENT)}
MARKS = {"prefill": ("o-", "read"), "decode": ("s--", "drawn after a prompt"), "generated": ("^:", "drawn in all")}


def main(source: tyro.conf.Positional[Path], target: tyro.conf.Positional[Path]) -> None:
    """source: the measurements. target: the picture, a PNG."""
    draw(json.loads(source.read_text()), target)


def draw(record: dict[str, Any], target: Path) -> None:
    rows = [row for row in record["rows"] if not row["error"]]
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for attention, (name, colour) in NAMES.items():
        own = [row for row in rows if row["attention"] == attention]
        for what, (mark, meaning) in MARKS.items():
            label = f"{name}, {meaning}"
            _line(speed, own, what, "tokens_per_second", mark, color=colour, label=label)
        held = [dict(row, mebibytes=row["cache_bytes"] / 2**20) for row in own]
        _line(memory, held, "decode", "mebibytes", "o-", color=colour, label=name)
    lengths = sorted({row["length"] for row in rows})
    _decorate(speed, "tokens per second", lengths)
    _decorate(memory, "MiB of cache", lengths)
    shape = "{layers} layers of {hidden_size}, window {window}, batch {batch}, {dtype}".format(**record["options"])
    figure.suptitle(f"{record['device']}: {shape}", color=INK, fontsize=10)
    save_figure(figure, target, dpi=130)


def _line(axes: Any, rows: Sequence[dict[str, Any]], what: str, field: str, mark: str, **style: Any) -> None:
    points = sorted((row["length"], row[field]) for row in rows if row["what"] == what)
    if points:
        axes.plot(*zip(*points, strict=True), mark, markersize=4, **style)


def _decorate(axes: Any, title: str, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length // 1024:,}K" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens of context")
    axes.set_title(title, color=INK, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
