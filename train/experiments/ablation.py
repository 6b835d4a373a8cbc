"""Ablations of dynamic-mask attention: the runs, how far each looks, and one table of all."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from dmattn_jax.models.decoder import CausalDecoder
from dmattn_jax.models.doge import DogeForCausalLM
from train.checkpoint import newest_intact, restore_parameters
from train.config import TrainConfig
from train.errors import ConfigError
from train.experiments.ablation_config import MEANINGS, NAMES, AblationCell, AblationName, AblationSweep
from train.experiments.ablation_layers import LAYERS, AblatedDoge
from train.experiments.ablation_measures import measure_distances
from train.experiments.cells import train_missing
from train.experiments.deadline import Deadline
from train.experiments.results import RESULT, origin, read_results, write_json, write_text
from train.experiments.scaling import is_done
from train.experiments.speed import speed_table
from train.metrics_file import read_metrics
from train.monitor import say
from train.parameters import Skeleton, skeleton_of
from train.plots import INK, plot_masks, save_figure
from train.report import PICTURE_TOKENS, make_expiry_function, windows_of

MEASURED_ROWS = 8
COLOURS: dict[AblationName, str] = dict(
    zip(
        NAMES,
        (
            "#f08a24",
            "#8a94a6",
            "#3d7ea6",
            "#6a994e",
            "#8d5a97",
            "#b23a48",
            "#7f5539",
            "#2a9d8f",
            "#1d3557",
            "#c9a227",
            "#111111",
        ),
        strict=True,
    )
)


def run_ablations(sweep: AblationSweep, output: Path, max_minutes: float | None) -> int:
    """Trains the runs that `output` does not have yet and draws after each. Returns the exit code.

    Raises: ConfigError when a folder holds a run of another configuration, and what a run raises.
    """
    from train import mesh

    deadline = Deadline(max_minutes)
    cells = sweep.cells(output, mesh.batch_shards(mesh.make_mesh(sweep.base.mesh)))
    code = train_missing(
        cells, output, lambda cell: is_done(cell.train, output), lambda cell: _train(cell, output, deadline), deadline
    )
    if not code and any(read_results(output)):
        report(output)
        say((output / "table.md").read_text(encoding="utf-8"))
    return code


def make_model(ablation: AblationName) -> Callable[..., CausalDecoder]:
    """(config, rngs=) -> the model of an ablation."""
    if ablation in LAYERS:
        return functools.partial(_ablated, LAYERS[ablation])
    return DogeForCausalLM


def _ablated(attention, config, *, rngs) -> AblatedDoge:
    return AblatedDoge(config, attention, rngs=rngs)


def _train(cell: AblationCell, output: Path, deadline: Deadline) -> int:
    from train.loop import run

    config, folder = cell.train, output / cell.name
    assert isinstance(config.batch_size, int)
    assert isinstance(config.steps, int)
    outcome = run(config, lambda: deadline.passed, make_model(cell.ablation))
    if outcome.step < config.steps:
        return outcome.exit_code
    skeleton = skeleton_of(config.model, lambda rngs: make_model(cell.ablation)(config.model, rngs=rngs))
    rows = read_metrics(folder / "metrics.csv")
    rates = [float(row["tokens_per_second"]) for row in rows if row["tokens_per_second"]]
    result = {
        "name": cell.name,
        "variant": cell.ablation,
        "seed": config.seed,
        "parameters": sum(int(np.prod(leaf.shape)) for leaf in skeleton.shapes.values()),
        "validation_loss": next(float(row["validation_loss"]) for row in reversed(rows) if row["validation_loss"]),
        "learning_rate": config.optimizer.learning_rate,
        "batch_size": config.batch_size,
        "sequence_length": config.sequence_length,
        "steps": config.steps,
        "tokens": config.steps * config.batch_size * config.sequence_length,
        "seconds": float(rows[-1]["seconds"]),
        "tokens_per_second": float(np.median(rates)) if rates else None,
        "text": outcome.text,
        **_look(skeleton, config, folder),
        "config": dataclasses.asdict(config),
        **origin(folder),
    }
    write_json(folder / RESULT, result)
    # No command could open it as what it is, and it is the largest of the files.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    report(output)
    return 0


def _look(skeleton: Skeleton, config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Distances over some held-out rows, and the mask of the row with the longest document; of a model that sees every
    key, nothing."""
    windows = windows_of(config.model)
    if config.model.attention == "mha" or min(windows) >= config.sequence_length:
        return {}
    from train.data import make_datasets
    from train.run_files import open_tokenizer

    step = newest_intact(folder / "checkpoints", say)
    assert step is not None
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here) for name, s in skeleton.shapes.items()}
    params = restore_parameters(folder / "checkpoints", step, shapes)
    held_out = make_datasets(
        config.data,
        open_tokenizer(config.data.tokenizer),
        sequence_length=config.sequence_length,
        batch_size=1,
        seed=config.seed,
    )
    rows = list(itertools.islice(held_out.validation, 4 * MEASURED_ROWS))
    held_out.train.close()
    # Rows of long documents: in short ones a window sees everything.
    rows.sort(key=lambda row: -np.bincount(row["segment_ids"][0])[1:].max(initial=0))
    tokens, segments = (
        np.concatenate([row[name] for row in rows[:MEASURED_ROWS]]) for name in ("tokens", "segment_ids")
    )
    found: dict[str, Any] = {"distances": measure_distances(skeleton, params, tokens, segments)}
    if config.model.attention == "dma":
        expiry = make_expiry_function(skeleton)(params, tokens[0, :PICTURE_TOKENS], segments[0, :PICTURE_TOKENS])
        found["mask"] = {
            "windows": windows,
            "segment_ids": " ".join(map(str, segments[0, :PICTURE_TOKENS])),
            "expiry": [[" ".join(map(str, head)) for head in layer.T] for layer in expiry],
        }
    return found


def report(output: Path) -> None:
    """Writes results.json (every run's numbers), table.md, ablation.png and masks.png from the runs below `output`.

    Raises: ConfigError when there is no finished run.
    """
    results = list(read_results(output))
    if not results:
        raise ConfigError(f"no finished run below {output}")
    write_json(output / "results.json", results)
    write_text(output / "table.md", table(results))
    plot(results, output / "ablation.png")
    draw_mask(results, output / "masks.png")


def table(results: Sequence[dict[str, Any]]) -> str:
    """Losses, gaps to the published method, and how far each looks, as Markdown."""
    by_name = {name: [r for r in results if r["variant"] == name] for name in NAMES}
    lines = [
        "| ablation | | validation loss | − dma | visible keys beyond w | attention beyond w |",
        "|---|---|---|---|---|---|",
    ]
    base = [r["validation_loss"] for r in by_name["dma"]]
    for name, own in by_name.items():
        if not own:
            continue
        losses = [r["validation_loss"] for r in own]
        spread = f" ± {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
        gap = f"{np.mean(losses) - np.mean(base):+.4f}" if base else ""
        measured = [r["distances"] for r in own if "distances" in r]
        far = [
            f"{np.mean([np.mean(found[field]) for found in measured]):.1%}" if measured else ""
            for field in ("far_visible", "far_weight")
        ]
        lines.append(
            f"| {name} | {MEANINGS[name]} | {np.mean(losses):.4f}{spread} ({len(losses)}) | {gap} | {' | '.join(far)} |"
        )
    some = results[0]
    lines += [
        "",
        f"Nats a token on held-out files, mean ± standard deviation (seeds); {some['tokens'] / 1e6:,.1f}M tokens in "
        f"{some['steps']:,} steps, rows of {some['sequence_length']:,}. The last two columns: means over layers and "
        "heads, for queries that have more tokens before them than the window holds.",
        "",
        speed_table(results, lambda r: f"{r['sequence_length']:,} tokens a row", {name: name for name in NAMES}),
    ]
    return "\n".join(lines)


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Losses by seed, and the shares of visible keys and of attention at least so far away."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    losses, visible, weight = figure.subplots(1, 3)
    shown = [name for name in NAMES if any(r["variant"] == name for r in results)]
    for height, name in enumerate(shown):
        own = [r for r in results if r["variant"] == name]
        losses.plot(
            [r["validation_loss"] for r in own], [height] * len(own), "o", color=COLOURS[name], markersize=6, alpha=0.8
        )
        measured = [r["distances"] for r in own if "distances" in r]
        for axes, field in ((visible, "visible"), (weight, "weight")) if measured else ():
            share = np.mean([np.mean(found[field], axis=(0, 1)) for found in measured], axis=0)
            beyond = share[::-1].cumsum()[::-1]
            edges = measured[0]["edges"]
            axes.plot(edges[1:], beyond[1:], "o-", color=COLOURS[name], markersize=3, linewidth=1.6, label=name)
    losses.set_yticks(range(len(shown)), shown)
    losses.invert_yaxis()
    losses.set_xlabel("validation loss, nats per token")
    losses.set_title("one dot a seed", loc="left", color=INK, fontsize=11)
    for axes, title in ((visible, "visible keys"), (weight, "attention")):
        axes.set_xscale("log", base=2)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("distance, tokens")
        axes.set_title(f"share of {title} at this distance or further", loc="left", color=INK, fontsize=11)
    visible.legend(frameon=False, fontsize=8)
    for axes in (losses, visible, weight):
        axes.grid(True, color="#e6e9ef", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, dpi=130)


def draw_mask(results: Sequence[dict[str, Any]], path: Path) -> None:
    """The mask of the published method, its first seed; nothing where it has not been run."""
    found = next((r for r in results if r["variant"] == "dma"), None)
    if found is None:
        return
    mask = found["mask"]
    expiry = np.array([[np.array(head.split(), np.int32) for head in layer] for layer in mask["expiry"]])
    plot_masks(
        expiry.transpose(0, 2, 1),
        mask["windows"],
        np.array(mask["segment_ids"].split(), np.int32),
        path,
        f"{found['name']} · {found['steps']:,} steps · the keys that each head lets its queries see",
    )
