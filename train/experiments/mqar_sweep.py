"""A sweep of recall cells, and what their results say together: one table, one figure."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dmattn_jax.models.config import AttentionKind
from train.errors import ConfigError
from train.experiments.cells import train_missing
from train.experiments.deadline import Deadline
from train.experiments.mqar_cell import read_result, train_cell
from train.experiments.mqar_config import CHANGES, MEANING_OF_CHANGES, Change, MQARConfig, MQARSweep
from train.experiments.results import read_results, write_json, write_text
from train.experiments.speed import speed_table
from train.experiments.variants import COLOURS, VARIANTS
from train.monitor import say
from train.plots import INK, save_figure


def run_sweep(sweep: MQARSweep, output: Path, max_minutes: float | None) -> int:
    """Trains the cells that `output` does not have yet, in order, and draws after each. Returns the exit code.

    Raises: ConfigError when a folder holds a cell of another configuration.
    """
    deadline = Deadline(max_minutes)

    def train(cell: MQARConfig) -> int:
        outcome = train_cell(cell, output, deadline)
        if outcome.result is not None:
            report(output)
        return outcome.exit_code

    def is_done(cell: MQARConfig) -> bool:
        return read_result(output / cell.name, cell) is not None

    code = train_missing(sweep.cells(), output, is_done, train, deadline)
    if not code and any(read_results(output)):
        report(output)
        say((output / "table.md").read_text(encoding="utf-8"))
    return code


@dataclasses.dataclass(frozen=True)
class Group:
    """Cells that differ in their seed alone. accuracy: the last test of each. half_right: the step of the first test in
    which half of the answers were right, in rising order; None where that never was."""

    attention: AttentionKind
    change: Change
    length: int
    pairs: int
    dim: int
    accuracy: tuple[float, ...]
    stopped: tuple[str, ...]
    half_right: tuple[int | None, ...]

    @property
    def label(self) -> str:
        """What is compared: the attention, and what is not as published in it."""
        return _label(self.attention, self.change)

    @property
    def text(self) -> str:
        """The mean, its spread over seeds, and a mark where time and not the recipe ended the training."""
        text = f"{np.mean(self.accuracy):.3f}"
        if len(self.accuracy) > 1:
            text += f" ± {np.std(self.accuracy, ddof=1):.3f}"
        return text + ("*" if "time" in self.stopped else "")


def group_results(results: Iterator[dict[str, Any]]) -> list[Group]:
    """One group for each variant, change, length, number of pairs and width."""
    cells = collections.defaultdict(list)
    for result in results:
        config = result["config"]
        cells[*_compared(result), config["length"], config["pairs"], config["dim"]].append(result)
    return [
        Group(
            *key,
            tuple(cell["accuracy"] for cell in found),
            tuple(cell["stopped"] for cell in found),
            tuple(sorted(map(_half_right, found), key=lambda step: math.inf if step is None else step)),
        )
        for key, found in sorted(cells.items())
    ]


def _half_right(result: dict[str, Any]) -> int | None:
    """Where a cell leaves its plateau, on which it knows of an answer no more than that it is one of the values."""
    return next((row["step"] for row in result["history"] if row["accuracy"] >= 0.5), None)


def _compared(result: dict[str, Any]) -> tuple[AttentionKind, Change]:
    """A cell's attention and change; cells from before there were changes have none."""
    return result["config"]["attention"], result["config"].get("change", "none")


def _label(attention: str, change: Change) -> str:
    """What a table calls them."""
    name = attention.upper()
    return name if change == "none" else f"{name}, {change}"


def report(output: Path) -> None:
    """Writes results.json (every cell's numbers), table.md and accuracy.png from the cells below `output`.

    Raises: ConfigError when there is none.
    """
    results = list(read_results(output))
    if not results:
        raise ConfigError(f"no finished cell below {output}")
    write_json(output / "results.json", results)
    write_text(output / "table.md", tables(results))
    plot(results, output / "accuracy.png")


def tables(results: list[dict[str, Any]]) -> str:
    """Accuracies, where plateaus ended, what was changed where anything was, and speeds."""
    groups = group_results(iter(results))
    return _accuracies(groups) + _plateaus(groups) + _changes(groups) + _speeds(results)


def _accuracies(groups: list[Group]) -> str:
    lines = _table(groups, lambda group: group.text)
    if any(group.text.endswith("*") for group in groups):
        lines += ["", "\\* stopped by its minutes, before the target and the last epoch"]
    return "\n".join(lines) + "\n"


def _plateaus(groups: list[Group]) -> str:
    """Steps until half of the answers are right, after a blank line; of every seed, since a mean of two ends says
    nothing of either."""

    def text(group: Group) -> str:
        return ", ".join("never" if step is None else f"{step:,}" for step in group.half_right)

    lines = ["", "Steps until half of the answers were right, of each seed:", "", *_table(groups, text)]
    return "\n".join(lines) + "\n"


def _table(groups: list[Group], text: Callable[[Group], str]) -> list[str]:
    """Markdown: widths and variants by lengths."""
    tasks = sorted({(group.length, group.pairs) for group in groups})
    rows = sorted({(g.dim, *_place(g.attention, g.change), g.label) for g in groups}, key=lambda row: row[:3])
    found = {(group.label, group.dim, group.length, group.pairs): text(group) for group in groups}
    lines = [
        "| width | attention | " + " | ".join(f"{length:,} ({pairs} pairs)" for length, pairs in tasks) + " |",
        "|---|---|" + "---|" * len(tasks),
    ]
    for dim, *_, label in rows:
        cells = " | ".join(found.get((label, dim, *task), "") for task in tasks)
        lines.append(f"| {dim} | {label} | {cells} |")
    return lines


def _changes(groups: list[Group]) -> str:
    """What the changes are, after a blank line; "" where there is none."""
    made = {group.change for group in groups} - {"none"}
    lines = [f"- {change}: {MEANING_OF_CHANGES[change]}" for change in CHANGES if change in made]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def _speeds(results: list[dict[str, Any]]) -> str:
    """Speeds by length and width, after a blank line; "" where no cell says."""
    cells = [result | {"variant": _label(*_compared(result))} for result in results]
    ordered = sorted(cells, key=lambda cell: (cell["config"]["length"], cell["config"]["dim"]))
    labels = [_label(attention, change) for attention in VARIANTS for change in CHANGES]
    table = speed_table(
        ordered,
        lambda cell: f"{cell['config']['length']:,} tokens, width {cell['config']['dim']}",
        {label: label for label in labels},
    )
    return f"\n{table}" if table else ""


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against width; against steps where anything is changed in `dma`."""
    if any(change != "none" for _, change in map(_compared, results)):
        _plot_changes(results, path)
    else:
        _plot_widths(group_results(iter(results)), path)


def _plot_changes(results: list[dict[str, Any]], path: Path) -> None:
    """A panel for each task and width, a colour for each label, a line for each seed; dotted where it had stopped."""
    panels = collections.defaultdict(list)
    for result in results:
        config = result["config"]
        panels[config["length"], config["pairs"], config["dim"]].append(result)
    labels = [_label(*key) for key in sorted({*map(_compared, results)}, key=lambda both: _place(*both))]
    colours = dict(zip(labels, colormaps["tab20"](np.linspace(0, 1, 20)[np.arange(len(labels)) % 20]), strict=True))
    last = max(result["steps"] for result in results)
    figure = Figure(figsize=(5.5 * len(panels) + 2.5, 4.4), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, ((length, pairs, dim), own) in zip(grid, sorted(panels.items()), strict=True):
        for result in sorted(own, key=lambda result: _place(*_compared(result))):
            label = _label(*_compared(result))
            steps, accuracy = zip(*((row["step"], row["accuracy"]) for row in result["history"]), strict=True)
            axes.plot(steps, accuracy, color=colours[label], linewidth=1.8, label=label)
            axes.plot([steps[-1], last], [accuracy[-1]] * 2, color=colours[label], linewidth=0.8, linestyle=":")
        _dress(axes, f"{length:,} tokens, {pairs} pairs, width {dim}", "step")
    drawn = _name(grid)
    figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", frameon=False)
    save_figure(figure, path, dpi=140)


def _place(attention: AttentionKind, change: Change) -> tuple[int, int]:
    """Where they stand in tables and figures."""
    return VARIANTS.index(attention), CHANGES.index(change)


def _dress(axes: Axes, title: str, across: str) -> None:
    """A panel of accuracies."""
    axes.set_ylim(-0.03, 1.03)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlabel(across)
    axes.grid(True, color="#e6e9ef", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _name(panels: Sequence[Axes]) -> dict[str, Any]:
    """Names the first panel's axis; what the legend of all panels says, each label once."""
    panels[0].set_ylabel("accuracy on unseen examples")
    return dict(pair[::-1] for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True))


def _plot_widths(groups: list[Group], path: Path) -> None:
    tasks = sorted({(group.length, group.pairs) for group in groups})
    figure = Figure(figsize=(3.6 * len(tasks) + 1.2, 4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for attention in VARIANTS:
            own = [g for g in groups if g.attention == attention and (g.length, g.pairs) == task]
            if not own:
                continue
            dims = [group.dim for group in own]
            mean = [np.mean(group.accuracy) for group in own]
            low, high = ([f(group.accuracy) for group in own] for f in (min, max))
            axes.fill_between(dims, low, high, color=COLOURS[attention], alpha=0.18, linewidth=0)
            axes.plot(dims, mean, color=COLOURS[attention], marker="o", linewidth=2, label=attention.upper())
            late = [(d, m) for d, m, group in zip(dims, mean, own, strict=True) if "time" in group.stopped]
            if late:
                axes.plot(*zip(*late, strict=True), "o", color="white", markeredgecolor=COLOURS[attention], zorder=3)
        axes.set_xscale("log", base=2)
        ticks = sorted({group.dim for group in groups})
        axes.set_xticks(ticks, [str(dim) for dim in ticks])
        axes.minorticks_off()
        _dress(axes, f"{task[0]:,} tokens, {task[1]} pairs", "model width")
    drawn = _name(panels)
    if any("time" in group.stopped for group in groups):
        hollow = Line2D([], [], color="white", marker="o", markeredgecolor=INK, linewidth=0)
        drawn["stopped by its minutes"] = hollow
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=len(drawn), frameon=False)
    save_figure(figure, path, dpi=140)
