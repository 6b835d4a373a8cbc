"""Draws what benchmarks/attention.py measured: time against length, forward, and forward with backward.

    python -m benchmarks.attention_plot docs/attention_time.png benchmarks/results/h200_attention.json … --windows 2048

Points of several records stand on one line where they are of one shape: look for ratios in the tables, which are of one
run each.
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

from benchmarks.claims import WITHOUT_WINDOW
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


def main(
    target: tyro.conf.Positional[Path],
    sources: tyro.conf.Positional[tuple[Path, ...]],
    windows: tuple[int, ...] = (),
) -> None:
    """target: the picture, a PNG. sources: the measurements, of the same heads. windows: only these; all if empty.

    Raises: ValueError where records are of different heads, batches, types or devices.
    """
    draw([json.loads(source.read_text()) for source in sources], target, windows)


def draw(records: Sequence[dict[str, Any]], target: Path, windows: Sequence[int] = ()) -> None:
    heads, *others = [_of_what(record) for record in records]
    if any(other != heads for other in others):
        raise ValueError(f"these records do not belong on one picture: {', '.join({heads, *others})}")
    figure = Figure(figsize=(10, 5), layout="constrained")
    found = [row for record in records for row in record["rows"] if row["gate"] == record["options"]["gates"][0]]
    found = [row for row in found if not windows or row["window"] in windows or row["what"] in WITHOUT_WINDOW]
    styles = dict(zip(sorted({row["window"] for row in found}), itertools.cycle(STYLES)))
    panels = figure.subplots(1, 2)
    for axes, direction, title in zip(panels, ("forward", "both"), ("forward", "forward + backward"), strict=True):
        rows = [row for row in found if row["direction"] == direction]
        for name, colour in COLOURS.items():
            # Dense attention has no window, whatever stood beside it.
            lines = collections.defaultdict(dict)
            for row in (row for row in rows if row["what"] == name):
                line = lines[None if name in WITHOUT_WINDOW else row["window"]]
                line.setdefault(row["length"], statistics.median(row["milliseconds"]))
            for window, line in sorted(lines.items()):
                label = name if window is None else f"{name}, w {window:,}"
                axes.plot(
                    *zip(*sorted(line.items()), strict=True), styles.get(window, "o-"), color=colour, label=label,
                    markersize=4,
                )  # fmt: skip
        decorate(axes, title, sorted({row["length"] for row in rows}))
    # Below, where no line is.
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(f"{heads}, {records[0]['options']['gates'][0]} gate", color=INK, fontsize=10)
    save_figure(figure, target, dpi=130)


def _of_what(record: dict[str, Any]) -> str:
    heads = "{heads} query heads, {kv_heads} kv heads, d {head_dim}, {dtype}".format(**record["options"])
    batch = record["options"].get("batch", 1)
    return f"{record['device']}: {heads}" + (f", batch {batch}" if batch > 1 else "")


def decorate(axes: Any, title: str, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    names = [
        f"{length >> 20}M" if length >> 20 else f"{length >> 10}K" if length >> 10 else f"{length}"
        for length in lengths
    ]
    axes.set_xticks(lengths, names)
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds")
    axes.set_title(title, color=INK, fontsize=10)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
