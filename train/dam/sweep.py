"""Masks of many capture lengths, thresholds and match shares, each measured: what quality costs which density."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from dmattn_jax.dam import DamError, Maps, MatchConfig, capture, fingerprint, load_maps, match, save_maps
from train.dam.evaluate import compare
from train.dam.found_text import KINDS, digests, gather
from train.dam.rivals import rivals
from train.dam.sweep_config import Cell, Sweep
from train.dam.text import read_documents, take_rows
from train.errors import ConfigError
from train.experiments.cells import train_missing
from train.experiments.deadline import Deadline
from train.experiments.results import RESULT, origin, read_results, write_json, write_text
from train.monitor import say
from train.plots import INK, save_figure
from train.run_files import OpenedModel

COLOURS = {
    "dam": "#f08a24",
    "sliding_window": "#8a94a6",
    "sink_and_window": "#3d7ea6",
    "vertical_slash": "#5b9e6f",
    "exact_top": "#b0507a",
}
MARKS = "osD^vP*X"


def run_sweep(opened: OpenedModel, sweep: Sweep, text: Path | None, output: Path, max_minutes: float | None) -> int:
    """Measures the cells that `output` does not have yet, draws after each, and returns the exit code.

    text: a folder of `dmattn dam text`; None: `output/text`, gathered if it is not there. Maps are recorded once for
    each capture length. Raises: ConfigError where a folder has results of other settings, model or text.
    """
    sweep.check()
    deadline = Deadline(max_minutes)
    folder = output / "text" if text is None else text
    if text is None and not digests(folder):
        say(f"gathering text: {folder}")
        gather(folder, sweep.megabytes)
    model = fingerprint(opened.model)
    settings = {**dataclasses.asdict(sweep), "model": model, "text": digests(folder)}
    for varied in ("captures", "thresholds", "mus", "megabytes", "batch_size"):
        settings.pop(varied)

    def documents(split: str, kinds: Sequence[str] = KINDS) -> list[np.ndarray]:
        return read_documents(tuple(str(folder / split / kind) for kind in kinds), opened.tokenizer, "text")

    held_out: dict[str, list[np.ndarray]] = {}

    def measure(cell: Cell) -> int:
        maps = _maps(opened, sweep, cell.capture, documents, output, settings)
        if not held_out:
            for kind in KINDS:
                held_out[kind] = take_rows(documents("held-out", (kind,)), sweep.length, sweep.rows)
        result: dict[str, Any] = {**dataclasses.asdict(cell), "settings": settings, **origin()}
        try:
            masks = match(maps, MatchConfig(cell.threshold, cell.mu, amplifier=sweep.amplifier))
        except DamError as error:
            # That nothing is left is what there is to know of this cell.
            result |= {"error": str(error), "results": []}
        else:
            others = rivals(opened.model, masks, sweep.length, sweep.sinks)
            found = [
                dataclasses.asdict(comparison)
                for kind, rows in held_out.items()
                for comparison in compare(
                    opened.model, rows, others, text=kind, batch_size=sweep.batch_size, progress=sys.stderr.isatty()
                )
            ]
            result |= {"min_length": masks.settings["min_length"], "summary": masks.summary(sweep.length)}
            result |= {"results": found}
        write_json(output / cell.name / RESULT, result)
        report(opened.name, output)
        return 0

    def is_done(cell: Cell) -> bool:
        path = output / cell.name / RESULT
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if known is not None and known["settings"] != settings:
            changed = [name for name in settings if known["settings"].get(name) != settings[name]]
            raise ConfigError(f"{path} was measured with other {', '.join(changed)}: choose another --output")
        return known is not None

    code = train_missing(sweep.cells(), output, is_done, measure, deadline)
    if any(read_results(output)):
        report(opened.name, output)
        say((output / "table.md").read_text(encoding="utf-8"))
    return code


def _maps(opened: OpenedModel, sweep: Sweep, length: int, documents: Any, output: Path, settings: Mapping) -> Maps:
    """Recorded, or what an earlier cell of the same settings has recorded."""
    folder = output / f"maps_{length}"
    known = folder / "settings.json"
    if known.is_file() and json.loads(known.read_text(encoding="utf-8")) == settings:
        return load_maps(folder)
    rows = take_rows(documents("calibration"), length, sweep.capture_rows)
    maps = capture(
        opened.model,
        [row.tolist() for row in rows],
        length=length,
        batch_size=sweep.batch_size,
        progress=sys.stderr.isatty(),
    )
    save_maps(maps, folder)
    write_json(known, settings)
    return maps


def report(model: str, output: Path) -> None:
    """Writes results.json (every cell's numbers), table.md and quality.png from the cells below `output`."""
    command = "dmattn " + " ".join(sys.argv[1:])
    content = {"command": command, "model": model, "cells": list(read_results(output))}
    write_json(output / "results.json", content)
    write_text(output / "table.md", table(content))
    plot(content, output / "quality.png")


def table(content: Mapping[str, Any]) -> str:
    """The cells as Markdown: perplexity over the dense model's for each kind of text, then the best rival's."""
    kinds = list(dict.fromkeys(row["text"] for cell in content["cells"] for row in cell["results"]))
    dense = {row["text"]: row for cell in content["cells"] for row in cell["results"] if row["name"] == "dense"}
    alone = ", ".join(f"{kind} {row['perplexity']:.2f}" for kind, row in dense.items())
    lines = [f"Dense perplexity: {alone}.", ""]
    lines += [
        "| L | τ | μ | density | diagonals, verticals a head | "
        + " | ".join(f"perplexity ÷ dense, {kind} | KL | top-1" for kind in kinds)
        + " | sink and window ÷ dense | vertical slash ÷ dense | exact top ÷ dense |",
        "|---|---|---|---|---|" + "---|---|---|" * len(kinds) + "---|---|---|",
    ]
    for cell in sorted(content["cells"], key=lambda cell: (cell["capture"], cell["threshold"], cell["mu"])):
        head = f"| {cell['capture']} | {cell['threshold']:g} | {cell['mu']:g} | "
        if "error" in cell:
            lines.append(f"{head}{cell['error'].split(':')[0]} |")
            continue
        found = {(row["text"], row["name"]): row for row in cell["results"]}
        ratio = {key: row["perplexity"] / dense[key[0]]["perplexity"] for key, row in found.items()}
        summary = cell["summary"]
        parts = [f"{summary['density']:.1%}"]
        parts.append(f"{summary['diagonals_per_head']:.1f}, {summary['verticals_per_head']:.1f}")
        for kind in kinds:
            own = found[kind, "dam"]
            parts.append(f"{ratio[kind, 'dam']:.3g} | {own['kl']:.3f} | {own['agreement']:.1%}")
        for name in ("sink_and_window", "vertical_slash", "exact_top"):
            parts.append(", ".join(f"{ratio[kind, name]:.3g}" for kind in kinds if (kind, name) in ratio))
        lines.append(head + " | ".join(parts) + " |")
    return "\n".join(lines) + "\n"


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Perplexity over dense and KL from dense against density, for each kind of text."""
    cells = [cell for cell in content["cells"] if cell["results"]]
    kinds = list(dict.fromkeys(row["text"] for cell in cells for row in cell["results"]))
    if not kinds:
        return
    captures = sorted({cell["capture"] for cell in cells})
    densities = [row["density"] for cell in cells for row in cell["results"] if row["name"] != "dense"]
    low, high = min(densities), max(densities)
    figure = Figure(figsize=(5.2 * len(kinds) + 0.6, 7.6), layout="constrained")
    grid = figure.subplots(2, len(kinds), squeeze=False, sharex=True, sharey="row")
    for column, kind in enumerate(kinds):
        for name, colour in COLOURS.items():
            points = []
            for cell in cells:
                found = {row["name"]: row for row in cell["results"] if row["text"] == kind}
                if name in found:
                    own, dense = found[name], found["dense"]
                    points.append((own["density"], np.exp(own["loss"] - dense["loss"]), own["kl"], cell["capture"]))
            for axes, which in zip(grid[:, column], (1, 2), strict=True):
                if name == "dam":
                    for capture_length in captures:
                        own_points = [p for p in points if p[3] == capture_length]
                        mark = MARKS[captures.index(capture_length) % len(MARKS)]
                        axes.scatter(
                            [p[0] for p in own_points], [p[which] for p in own_points], color=colour, marker=mark,
                            s=34, zorder=3,
                        )  # fmt: skip
                else:
                    ordered = sorted(points)
                    axes.plot(
                        [p[0] for p in ordered], [p[which] for p in ordered], color=colour, marker=".", linewidth=1.6
                    )
        top, bottom = grid[:, column]
        top.set_title(kind, loc="left", color=INK, fontweight="bold")
        top.set_yscale("log")
        bottom.set_yscale("log")
        bottom.set_xlabel("visible pairs, share of the causal ones")
        for axes in (top, bottom):
            axes.set_xscale("log")
            axes.set_xlim(low / 1.5, min(high * 1.5, 1.2))
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0 if low > 0.02 else 1))
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(True, which="both", color="#e6e9ef", linewidth=0.7)
            axes.spines[["top", "right"]].set_visible(False)
        top.axhline(1.01, color=INK, linewidth=0.8, linestyle="--")
    grid[0, 0].set_ylabel("perplexity ÷ dense (dashed: 1% above)")
    grid[1, 0].set_ylabel("KL from dense, nats a token")
    handles = [
        Line2D([], [], color=COLOURS["dam"], marker=MARKS[i % len(MARKS)], linewidth=0, label=f"DAM, L = {length}")
        for i, length in enumerate(captures)
    ]
    handles += [
        Line2D([], [], color=colour, label=name.replace("_", " ")) for name, colour in COLOURS.items() if name != "dam"
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    save_figure(figure, path, dpi=130)
