"""A sweep of recall cells, and what their results say together: one table, one figure."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from train.errors import ConfigError
from train.experiments.cells import train_missing
from train.experiments.deadline import Deadline
from train.experiments.mqar_cell import read_result, train_cell
from train.experiments.mqar_config import MQARConfig, MQARSweep
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
    """Cells that differ in their seed alone. accuracy: the last test of each."""

    attention: str
    length: int
    pairs: int
    dim: int
    accuracy: tuple[float, ...]
    stopped: tuple[str, ...]

    @property
    def text(self) -> str:
        """The mean, its spread over seeds, and a mark where time and not the recipe ended the training."""
        text = f"{np.mean(self.accuracy):.3f}"
        if len(self.accuracy) > 1:
            text += f" ± {np.std(self.accuracy, ddof=1):.3f}"
        return text + ("*" if "time" in self.stopped else "")


def group_results(results: Iterator[dict[str, Any]]) -> list[Group]:
    """One group for each variant, length, number of pairs and width."""
    cells = collections.defaultdict(list)
    for result in results:
        config = result["config"]
        cells[config["attention"], config["length"], config["pairs"], config["dim"]].append(result)
    return [
        Group(*key, tuple(cell["accuracy"] for cell in found), tuple(cell["stopped"] for cell in found))
        for key, found in sorted(cells.items())
    ]


def report(output: Path) -> None:
    """Writes results.json (every cell's numbers), table.md and accuracy.png from the cells below `output`.

    Raises: ConfigError when there is none.
    """
    results = list(read_results(output))
    if not results:
        raise ConfigError(f"no finished cell below {output}")
    groups = group_results(iter(results))
    write_json(output / "results.json", results)
    write_text(output / "table.md", tables(results))
    plot(groups, output / "accuracy.png")


def tables(results: list[dict[str, Any]]) -> str:
    """Accuracies, and speeds below them."""
    return _table(group_results(iter(results))) + _speeds(results)


def _table(groups: list[Group]) -> str:
    """Accuracy as Markdown: widths and variants by lengths."""
    tasks = sorted({(group.length, group.pairs) for group in groups})
    rows = sorted({(group.dim, VARIANTS.index(group.attention), group.attention) for group in groups})
    found = {(group.attention, group.dim, group.length, group.pairs): group.text for group in groups}
    lines = [
        "| width | attention | " + " | ".join(f"{length:,} ({pairs} pairs)" for length, pairs in tasks) + " |",
        "|---|---|" + "---|" * len(tasks),
    ]
    for dim, _, attention in rows:
        cells = " | ".join(found.get((attention, dim, *task), "") for task in tasks)
        lines.append(f"| {dim} | {attention.upper()} | {cells} |")
    if any(group.text.endswith("*") for group in groups):
        lines += ["", "\\* stopped by its minutes, before the target and the last epoch"]
    return "\n".join(lines) + "\n"


def _speeds(results: list[dict[str, Any]]) -> str:
    """Speeds by length and width, after a blank line; "" where no cell says."""
    cells = [result | {"attention": result["config"]["attention"]} for result in results]
    ordered = sorted(cells, key=lambda cell: (cell["config"]["length"], cell["config"]["dim"]))
    table = speed_table(
        ordered,
        lambda cell: f"{cell['config']['length']:,} tokens, width {cell['config']['dim']}",
        {variant: variant.upper() for variant in VARIANTS},
    )
    return f"\n{table}" if table else ""


def plot(groups: list[Group], path: Path) -> None:
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
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(f"{task[0]:,} tokens, {task[1]} pairs", loc="left", color=INK, fontsize=11)
        axes.set_xlabel("model width")
        axes.grid(True, color="#e6e9ef", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy on unseen examples")
    drawn = dict(pair[::-1] for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True))
    if any("time" in group.stopped for group in groups):
        hollow = Line2D([], [], color="white", marker="o", markeredgecolor=INK, linewidth=0)
        drawn["stopped by its minutes"] = hollow
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=len(drawn), frameon=False)
    save_figure(figure, path, dpi=140)
