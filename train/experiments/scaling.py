"""The scaling experiment: the ladder's runs, one after the other, and what they say together."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from train import config_json
from train.config import TrainConfig
from train.errors import ConfigError
from train.experiments.cells import train_missing
from train.experiments.deadline import Deadline
from train.experiments.results import RESULT, origin, read_diverged, read_results, write_json, write_text
from train.experiments.scaling_config import ScalingSweep
from train.experiments.scaling_fit import Fit, fit_power_laws
from train.experiments.speed import speed_table
from train.experiments.variants import COLOURS, VARIANTS
from train.flops import count_parameters, training_flops_per_token
from train.metrics_file import read_metrics
from train.monitor import say
from train.plots import INK, save_figure


def run_ladder(sweep: ScalingSweep, output: Path, max_minutes: float | None) -> int:
    """Trains the runs that `output` does not have yet and draws after each. Returns the exit code.

    Raises: ConfigError when a folder holds a run of another configuration, and what a run raises.
    """
    from train import mesh

    deadline = Deadline(max_minutes)
    cells = sweep.cells(output, mesh.batch_shards(mesh.make_mesh(sweep.base.mesh)))
    code = train_missing(
        cells, output, lambda cell: is_done(cell, output), lambda cell: _train(cell, output, deadline), deadline
    )
    if not code and any(read_results(output)):
        report(output)
        say((output / "table.md").read_text(encoding="utf-8"))
    return code


def is_done(cell: TrainConfig, output: Path) -> bool:
    """Raises: ConfigError when the folder holds a finished run of another configuration."""
    folder = output / cell.name
    if not (folder / RESULT).exists():
        return False
    changed = config_json.differences(config_json.load(folder / "config.json"), cell)
    changed = {name: values for name, values in changed.items() if not name.startswith(("log.", "mesh.", "runs_dir"))}
    if changed:
        shown = config_json.show(changed)
        raise ConfigError(f"{folder} holds a run of another configuration: {shown}; choose another --output")
    return True


def _train(cell: TrainConfig, output: Path, deadline: Deadline) -> int:
    from train.loop import run

    assert isinstance(cell.batch_size, int)
    assert isinstance(cell.steps, int)
    outcome = run(cell, lambda: deadline.passed)
    if outcome.step < cell.steps:
        return outcome.exit_code
    # A run whose last session ended between its last step and this line has its numbers in metrics.csv alone.
    rows = read_metrics(output / cell.name / "metrics.csv")
    rates = [float(row["tokens_per_second"]) for row in rows if row["tokens_per_second"]]
    tokens = cell.steps * cell.batch_size * cell.sequence_length
    count = count_parameters(cell.model)
    flops = training_flops_per_token(cell.model, cell.sequence_length)
    result = {
        "name": cell.name,
        "size": cell.name.split("_")[0],
        "size_parameters": count_parameters(dataclasses.replace(cell.model, attention="mha")).non_embedding,
        "attention": cell.model.attention,
        "seed": cell.seed,
        "parameters": count.total,
        "non_embedding": count.non_embedding,
        "tokens": tokens,
        "flops": flops.total * tokens,
        "attention_flops": flops.attention * tokens,
        "validation_loss": next(float(row["validation_loss"]) for row in reversed(rows) if row["validation_loss"]),
        "learning_rate": cell.optimizer.learning_rate,
        "batch_size": cell.batch_size,
        "steps": cell.steps,
        "seconds": float(rows[-1]["seconds"]),
        "tokens_per_second": float(np.median(rates)) if rates else None,
        "text": outcome.text,
        "config": dataclasses.asdict(cell),
        **origin(output / cell.name),
    }
    write_json(output / cell.name / RESULT, result)
    report(output)
    return 0


def report(output: Path, samples: int = 300) -> None:
    """Writes results.json (every run's numbers, the fit, and which diverged), table.md and scaling.png from `output`.

    Variants with fewer than 3 sizes are shown and not fitted. Raises: ConfigError when there is no finished run.
    """
    results = list(read_results(output))
    if not results:
        raise ConfigError(f"no finished run below {output}")
    fit, diverged = fit_of(results, samples), list(read_diverged(output))
    content = {"runs": results, "fit": None if fit is None else describe_fit(fit), "diverged": diverged}
    write_json(output / "results.json", content)
    write_text(output / "table.md", table(results, fit, diverged))
    plot(results, fit, output / "scaling.png")


def fit_of(results: Sequence[Mapping[str, Any]], samples: int = 300) -> Fit | None:
    """The laws of all variants with at least 3 sizes; None where they are too few."""
    points: dict[str, list[tuple[float, float]]] = {}
    for variant in VARIANTS:
        own = [(r["flops"], r["validation_loss"]) for r in results if r["attention"] == variant]
        if len({compute for compute, _ in own}) >= 3:
            points[variant] = own
    # One number more than a floor and two for each variant.
    enough = sum(map(len, points.values())) > 1 + 2 * len(points)
    return fit_power_laws(points, samples) if points and enough else None


def describe_fit(fit: Fit) -> dict[str, Any]:
    """The fit as JSON, with 95% intervals."""
    return {
        "law": "L(C) = floor + scale * C^-exponent, C in FLOPs of training, attention included",
        "floor": fit.floor,
        "floor_interval": fit.interval(next(iter(fit.laws)), "floor"),
        "error_of_log_loss": fit.error,
        "bootstrap_samples": len(fit.samples),
        "variants": {
            name: {
                "scale": law.scale,
                "exponent": law.exponent,
                "scale_interval": fit.interval(name, "scale"),
                "exponent_interval": fit.interval(name, "exponent"),
            }
            for name, law in fit.laws.items()
        },
    }


def seed_spread(results: Sequence[Mapping[str, Any]]) -> float | None:
    """Standard deviation of the loss over runs of one size and variant, pooled over all that have several."""
    groups = collections.defaultdict(list)
    for result in results:
        groups[result["size"], result["attention"]].append(result["validation_loss"])
    squares = sum(float(np.var(losses)) * len(losses) for losses in groups.values())
    freedom = sum(len(losses) - 1 for losses in groups.values())
    return math.sqrt(squares / freedom) if freedom else None


def table(results: Sequence[Mapping[str, Any]], fit: Fit | None, diverged: Sequence[Mapping[str, Any]] = ()) -> str:
    """Losses, speeds and laws as Markdown. diverged: runs without numbers, which are named."""
    sizes = {r["size"]: r["size_parameters"] for r in sorted(results, key=lambda r: r["size_parameters"])}
    variants = [variant for variant in VARIANTS if any(r["attention"] == variant for r in results)]
    losses = collections.defaultdict(list)
    for result in results:
        losses[result["size"], result["attention"]].append(result["validation_loss"])
    lines = ["| size | " + " | ".join(variant.upper() for variant in variants) + " | widest gap | over runs |"]
    lines.append("|---|" + "---|" * (len(variants) + 2))
    for size, parameters in sizes.items():
        means = {v: float(np.mean(losses[size, v])) for v in variants if losses[size, v]}
        cells = [f"{means[v]:.4f} ({len(losses[size, v])})" if v in means else "" for v in variants]
        gap = f"{max(means.values()) - min(means.values()):.4f}" if len(means) > 1 else ""
        spread = seed_spread([result for result in results if result["size"] == size])
        cells += [gap, "" if spread is None else f"{spread:.4f}"]
        lines.append(f"| {size} ({parameters / 1e6:.1f}M) | " + " | ".join(cells) + " |")
    spread = seed_spread(results)
    said = "no size has two seeds" if spread is None else f"{spread:.4f} over all sizes"
    lines += [
        "",
        f"Validation loss in nats, mean over (runs); standard deviation over runs of one variant: {said}.",
        "",
    ]
    if diverged:
        names = ", ".join(run["name"] for run in diverged)
        lines += [f"Diverged, and in no mean or fit ({len(diverged)} runs): {names}.", ""]
    speeds = speed_table(
        sorted(results, key=lambda r: r["size_parameters"]),
        lambda r: f"{r['size']} ({r['size_parameters'] / 1e6:.1f}M)",
        {variant: variant.upper() for variant in VARIANTS},
    )
    lines += [speeds] if speeds else []
    if fit is None:
        return "\n".join([*lines, "No fit: it needs 3 sizes of a variant, and more runs than parameters."]) + "\n"
    low, high = fit.interval(variants[0] if variants[0] in fit.laws else next(iter(fit.laws)), "floor")
    lines += [f"L(C) = E + a·C^−b, E = {fit.floor:.3f} [{low:.3f}, {high:.3f}] for all; 95% bootstrap intervals.", ""]
    largest = max(result["flops"] for result in results)
    lines += [f"| attention | a | b | loss at {largest:.2g} FLOPs |", "|---|---|---|---|"]
    for name, law in fit.laws.items():
        ends = fit.interval(name, "exponent")
        at = [float(sample[name](np.array([largest]))[0]) for sample in fit.samples]
        ends_at = np.quantile(at, [0.025, 0.975])
        lines.append(
            f"| {name.upper()} | {law.scale:.4g} | {law.exponent:.4f} [{ends[0]:.4f}, {ends[1]:.4f}] | "
            f"{float(law(np.array([largest]))[0]):.4f} [{ends_at[0]:.4f}, {ends_at[1]:.4f}] |"
        )
    return "\n".join(lines) + "\n"


def plot(results: Sequence[Mapping[str, Any]], fit: Fit | None, path: Path) -> None:
    figure = Figure(figsize=(8.4, 5), layout="constrained")
    axes = figure.add_subplot()
    for variant in VARIANTS:
        own = [(r["flops"], r["validation_loss"]) for r in results if r["attention"] == variant]
        if not own:
            continue
        compute, loss = map(np.array, zip(*own, strict=True))
        law = None if fit is None else fit.laws.get(variant)
        label = variant.upper() if law is None else f"{variant.upper()}, b = {law.exponent:.3f}"
        axes.plot(compute, loss, "o", color=COLOURS[variant], markersize=5, alpha=0.85, label=label)
        if law is not None:
            line = np.geomspace(compute.min() / 1.5, compute.max() * 1.5, 100)
            axes.plot(line, law(line), color=COLOURS[variant], linewidth=1.6)
    if fit is not None:
        axes.axhline(fit.floor, color=INK, linewidth=0.8, linestyle="--")
        axes.annotate(
            f"E = {fit.floor:.3f}", (0.01, fit.floor), xycoords=("axes fraction", "data"),
            xytext=(0, 4), textcoords="offset points",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("training compute, FLOPs (attention included)")
    axes.set_ylabel("validation loss, nats per token")
    axes.set_title("Loss against compute", loc="left", color=INK, fontweight="bold")
    axes.grid(True, color="#e6e9ef", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path, dpi=140)
