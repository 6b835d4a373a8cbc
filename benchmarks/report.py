"""Writes docs/results.md and its figures from the records in benchmarks/results.

    python -m benchmarks.report

Records of experiments are the results.json of their commands, under a name of their kind: mqar_paper.json is
runs/mqar/results.json, and so on; a kind without a record is said to be not run yet. No number is written by hand.
"""

from __future__ import annotations

import collections
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks import claims
from benchmarks.attention_plot import draw
from benchmarks.claims import DENSE, OURS, SELECTION, SLIDING, attention_rows
from train.dam import retrieve, sweep
from train.experiments import ablation, mqar_sweep, retrieval, scaling
from train.experiments.mqar_plots import plot_film

HERE = Path(__file__).parent
PASSES = {"forward": "forward", "both": "forward + backward"}
RIVALS = (DENSE, SLIDING, "flash attention 2", "flex attention", "dma xla")


@dataclass(frozen=True)
class Options:
    """From where to where."""

    results: Path = HERE / "results"
    output: Path = HERE.parent / "docs" / "results.md"
    """Figures go to a folder beside it, of the same name."""


@dataclass(frozen=True)
class Section:
    """One kind of record. write(file's name, content, folder of figures) -> Markdown; commands make the record."""

    title: str
    kind: str
    write: Callable[[str, Any, Path], str]
    commands: str


def main(options: Options) -> None:
    records = {section.kind: read(options.results, section.kind) for section in SECTIONS}
    folder = options.output.with_suffix("")
    parts = [
        "# Results\n",
        "Written by `python -m benchmarks.report` from [the records](../benchmarks/results/); no number is written by "
        "hand. What was tried on the way is in the [journal](journal.md).\n",
        "## What was said, and what was measured\n",
        claims_table(records),
    ]
    for section in SECTIONS:
        parts.append(f"## {section.title}\n")
        found = records[section.kind]
        if not found:
            parts.append(f"**Not run yet.** The record is made by\n\n```bash\n{section.commands}\n```\n")
        for name, content in found.items():
            parts.append(f"[{name}.json](../benchmarks/results/{name}.json)\n")
            parts.append(section.write(name, content, folder))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    print(options.output)


def read(results: Path, kind: str) -> dict[str, Any]:
    """Content of the records of a kind, by name without ending; those of an earlier state end in `_before`."""
    paths = [path for path in sorted(results.glob(f"{kind}*.json")) if not path.stem.endswith("_before")]
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def claims_table(records: Mapping[str, claims.Records]) -> str:
    papers, easier = (
        {name: cells for name, cells in records["mqar"].items() if grid in name} for grid in ("paper", "zoology")
    )
    rows = [
        *claims.recall_claims(papers),
        *claims.recall_claims(easier, "; here on zoology's easier grid"),
        *claims.scaling_claims(records["scaling"]),
        claims.needle_claim(records["needle"]),
        *claims.attention_claims(records["h200_attention"]),
        *claims.training_claims(records["h200_train_step"]),
        claims.decode_claim(records["decode"]),
        claims.generation_claim(records["generation"]),
        *claims.dam_claims(records["dam_smollm2"], records["dam_sweep"], records["dam_prefill"]),
    ]
    lines = ["| said | measured | |", "|---|---|---|"]
    lines += [f"| {row.said} | {row.measured} | {row.verdict} |" for row in rows]
    return "\n".join(lines) + "\n"


def recall(name: str, results: list[dict[str, Any]], figures: Path) -> str:
    """Accuracy and speed by cell, which cells there are and how they ended; masks over training of the first seed."""
    mqar_sweep.plot(results, figures / f"{name}.png")
    seeds = sorted({result["config"]["seed"] for result in results})
    stops = collections.Counter(result["stopped"] for result in results)
    steps = sorted(result["steps"] for result in results)
    windows, margins = (
        ", ".join(f"{value:,}" for value in sorted({result["config"].get(field, 0) for result in results}))
        for field in ("window", "gate_step")
    )
    said = (
        f"{len(results)} cells on {_devices(results)}, seeds {', '.join(map(str, seeds))}, {steps[0]:,} to "
        f"{steps[-1]:,} steps; stopped by {', '.join(f'{why} ({count})' for why, count in sorted(stops.items()))}. "
        f"Windows of {windows} keys, margin in δ {margins}."
    )
    parts = [f"{said}\n", mqar_sweep.tables(results), _picture(name, "Accuracy by cell")]
    for result in (result for result in results if "film" in result and result["config"]["seed"] == seeds[0]):
        plot_film(result, figures / f"{name}_{result['name']}.png")
        parts.append(_picture(f"{name}_{result['name']}", "Masks over training"))
    return "\n".join(parts)


def ladder(name: str, content: dict[str, Any], figures: Path) -> str:
    """The fit is made again from the runs."""
    runs = content["runs"]
    fit = scaling.fit_of(runs)
    scaling.plot(runs, fit, figures / f"{name}.png")
    some = runs[0]["config"]
    said = (
        f"{len(runs)} runs on {_devices(runs)}; rows of {some['sequence_length']:,} tokens, window "
        f"{some['model']['window']:,} or the variant's equal. Text: {'; '.join(sorted({run['text'] for run in runs}))}."
    )
    if again := [run["name"] for run in runs if run["name"].endswith("_again")]:
        said += f" {', '.join(again)}: a seed once more."
    table = scaling.table(runs, fit, content.get("diverged", ()))
    alone = "Speeds of these attentions, each alone on a device: [training steps](#training-steps)."
    return f"{said}\n\n{table}\n{alone}\n\n{_picture(name, 'Loss against compute, with the fits')}"


def ablations(name: str, results: list[dict[str, Any]], figures: Path) -> str:
    ablation.plot(results, figures / f"{name}.png")
    ablation.draw_mask(results, figures / f"{name}_masks.png")
    said = f"{len(results)} runs on {_devices(results)}. Text: {'; '.join(sorted({r['text'] for r in results}))}."
    pictures = _picture(name, "Loss by seed, and distances of visible keys and of attention")
    if (figures / f"{name}_masks.png").exists():
        pictures += "\n" + _picture(f"{name}_masks", "Masks of the published method on held-out text")
    return f"{said}\n\n{ablation.table(results)}\n{pictures}"


def found_again(name: str, result: dict[str, Any], figures: Path) -> str:
    """Needle or lines: a heat map of one model."""
    retrieval.plot_grid(result, figures / f"{name}.png")
    lines = ["| tokens | " + " | ".join(f"{length:,}" for length in result["lengths"]) + " |"]
    lines.append("|---|" + "---|" * len(result["lengths"]))
    lines.append("| right | " + " | ".join(f"{sum(row) / len(row):.0%}" for row in result["accuracy"]) + " |")
    said = (
        f"{result['model']}, asked in the form of a {result['form']}, {result['trials']} for each of "
        f"{len(result['depths'])} depths, on {result['device']}."
    )
    return f"{said}\n\n" + "\n".join(lines) + f"\n\n{_picture(name, 'Right answers by length and depth')}"


def generation(name: str, content: dict[str, Any], figures: Path) -> str:
    from benchmarks.generation_plot import draw

    draw(content, figures / f"{name}.png")
    lines = ["| attention | | context | tokens/s | MiB of cache |", "|---|---|---|---|---|"]
    for row in content["rows"]:
        shown = row["error"] or f"{row['tokens_per_second']:,.0f}"
        cache = f"{row['cache_bytes'] / 2**20:,.2f}" if row["cache_bytes"] else ""
        lines.append(f"| {row['attention']} | {row['what']} | {row['length']:,} | {shown} | {cache} |")
    shape = "{layers} layers of {hidden_size}, window {window}, batch {batch}, {dtype}".format(**content["options"])
    parts = [f"{shape}, on {content['device']}.{_note(content)}\n", "\n".join(lines), ""]
    profiled = {f"{row['attention']}, {row['length']:,}": row for row in content["rows"] if row.get("breakdown")}
    if profiled:
        said = (
            "Microseconds of a token's kernels, by the part of the model that they belong to. Between them the "
            "profiler takes time too:"
        )
        parts += [said, "", _parts("attention, context", profiled, scale=1e3), ""]
    return "\n".join([*parts, _picture(name, "Speed and memory against context")])


def train_step(name: str, content: dict[str, Any], figures: Path) -> str:
    lines = ["| model | attention | sequences × tokens | tokens/s | MFU |", "|---|---|---|---|---|"]
    for row in content["rows"]:
        shown = row["error"] or f"{row['tokens_per_second']:,.0f}"
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else ""
        lines.append(
            f"| {row['preset']} | {row['attention']} | {row['sequences']} × {row['length']:,} | {shown} | {mfu} |"
        )
    parts = [f"On {content['device']}.{_note(content)}\n", "\n".join(lines), ""]
    profiled = {
        f"{row['preset']}, {row['attention']}, {row['sequences']} × {row['length']:,}": row
        for row in content["rows"]
        if row.get("breakdown")
    }
    if profiled:
        said = "Milliseconds of a step's kernels, by the part of the model that they belong to:"
        parts += [said, "", _parts("model, attention, sequences × tokens", profiled)]
    return "\n".join(parts) + "\n"


def _parts(head: str, rows: Mapping[str, dict[str, Any]], scale: float = 1.0) -> str:
    """Where the time of each row goes, in milliseconds times `scale`; those parts first that take most of it anywhere,
    and by name those that ever take half a unit."""
    times = [{part: scale * time for part, time in row["breakdown"]["milliseconds"].items()} for row in rows.values()]
    most = {
        name: max(time.get(name, 0.0) for time in times) for name in dict.fromkeys(name for t in times for name in t)
    }
    names = [name for name in sorted(most, key=lambda name: -most[name]) if most[name] >= 0.5]
    lines = _header([head, *names, "the rest", "none runs"])
    for (label, row), time in zip(rows.items(), times, strict=True):
        rest = sum(value for name, value in time.items() if name not in names)
        shown = [label, *(f"{time.get(name, 0.0):.1f}" for name in names)]
        lines.append("| " + " | ".join([*shown, f"{rest:.1f}", f"{scale * row['breakdown']['idle']:.1f}"]) + " |")
    return "\n".join(lines)


def kernels(name: str, content: dict[str, Any], figures: Path) -> str:
    draw([content], figures / f"{name}.png")
    rows = attention_rows(content)
    shapes = list(dict.fromkeys(key[:4] for key in rows if key[4] == OURS))
    measured = {key[4] for key in rows}
    rivals = [what for what in RIVALS if what in measured]
    heads = ["tokens, window, gate", "", OURS, SELECTION, "of a matrix product", "MiB"]
    lines = _header([*heads, *(part for what in rivals for part in (what, "÷ ours"))])
    for length, window, gate, direction in shapes:
        own = rows[length, window, gate, direction, OURS]
        chosen = rows.get((length, window, gate, "forward", SELECTION))
        shown = [f"{length:,}, {window:,}, {gate}", PASSES[direction], _milliseconds(own), _milliseconds(chosen)]
        shown += [f"{own['share_of_matmul']:.0%}", f"{own['temporary_bytes'] / 2**20:,.0f}"]
        for what in rivals:
            other = rows.get((length, window, gate, direction, what))
            shown += [_milliseconds(other), _ratio(other, own)]
        lines.append("| " + " | ".join(shown) + " |")
    options = content["options"]
    said = (
        f"On {content['device']}, JAX {content['jax']}: {options['heads']} query and {options['kv_heads']} kv heads of "
        f"{options['head_dim']}, {options['dtype']}, batch {options.get('batch', 1)}. Milliseconds from gate "
        f"to output, selection included; medians of {options['repeats']}, and the range of a ratio over all pairs of "
        "repeats. MiB: temporary memory. "
        f"A matrix product of 8,192³ reaches {content['matrix_product_flops'] / 1e12:.0f} TFLOP/s in the same run."
    )
    said += _note(content)
    parts = [f"{said}\n", "\n".join(lines), ""]
    profiled = {
        f"{row['what']}, {row['length']:,}, {row['window']:,}, {PASSES[row['direction']]}": row
        for row in content["rows"]
        if row.get("breakdown") and row["gate"] == options["gates"][0]
    }
    if profiled:
        said = "Microseconds of the kernels, by what they do. Between them the profiler takes time too:"
        parts += [said, "", _parts("attention, tokens, window", profiled, scale=1e3), ""]
    return "\n".join([*parts, _picture(name, "Time of attention against length")])


def steps_of_decoding(name: str, content: dict[str, Any], figures: Path) -> str:
    """Microseconds of a layer's step by batch and context."""
    whats = list(dict.fromkeys(row["what"] for row in content["rows"]))
    found = {(row["batch"], row["context"], row["what"]): row for row in content["rows"]}
    lines = _header(["batch", "context", *(part for what in whats for part in (f"{what}, µs", "MiB of cache"))])
    for batch, context in dict.fromkeys(key[:2] for key in found):
        shown = [f"{batch}", f"{context:,}"]
        for what in whats:
            row = found[batch, context, what]
            times = row["microseconds"]
            shown += [row["error"] or f"{statistics.median(times):.1f} ({min(times):.1f}–{max(times):.1f})"]
            shown += ["" if row["error"] else f"{row['cache_bytes'] / 2**20:,.1f}"]
        lines.append("| " + " | ".join(shown) + " |")
    shape = "{heads} query and {kv_heads} kv heads of {head_dim}, window {window}, {dtype}".format(**content["options"])
    said = f"On {content['device']}, JAX {content['jax']}: {shape}. Medians and range; the w-slot cache is full."
    return f"{said}\n\n" + "\n".join(lines) + "\n"


def _header(names: list[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def _note(content: Mapping[str, Any]) -> str:
    """What a record says of itself, to follow a sentence."""
    return f" {content['note']}" if content.get("note") else ""


def _milliseconds(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    median = round(statistics.median(row["milliseconds"]), 2) + 0.0  # no "-0.00"
    return f"{median:.2f}" if median < 100 else f"{median:.0f}"


def _ratio(other: Mapping[str, Any] | None, own: Mapping[str, Any]) -> str:
    """A rival's time over ours, with its range."""
    if other is None:
        return ""
    theirs, ours = other["milliseconds"], own["milliseconds"]
    middle = statistics.median(theirs) / statistics.median(ours)
    return f"{middle:.2f}× ({min(theirs) / max(ours):.2f}–{max(theirs) / min(ours):.2f})"


def masks(name: str, content: dict[str, Any], figures: Path) -> str:
    lines = []
    if content["results"]:
        lines = [
            "| text | attention | tokens | density | perplexity | KL, nats | top-1 agreement |",
            "|---|---|---|---|---|---|---|",
        ]
    for row in content["results"]:
        lines.append(
            f"| {row.get('text', '')} | {row['name']} | {row['length']:,} | {row['density']:.1%} | "
            f"{row['perplexity']:.2f} | {row['kl']:.3f} | {row['agreement']:.1%} |"
        )
    parts = [f"{content['model']} on {content['device']}."]
    if lines:
        parts.append("\n".join(lines))
    if content.get("retrieval"):
        counts = {row["questions"] for row in content["retrieval"] if "questions" in row}
        parts += [f"Right answers, of {count} to each length:" for count in sorted(counts)]
        parts.append(retrieve.table(content["retrieval"]))
    return "\n\n".join(parts) + "\n"


def mask_sweep(name: str, content: dict[str, Any], figures: Path) -> str:
    sweep.plot(content, figures / f"{name}.png")
    some = content["cells"][0]["settings"]
    said = (
        f"{content['model']} on {_devices(content['cells'])}: {some['rows']} rows of {some['length']:,} tokens of each "
        f"text, {some['capture_rows']} rows recorded, amplified by {some['amplifier']}."
    )
    return f"{said}\n\n{sweep.table(content)}\n{_picture(name, 'Quality against density')}"


def prefill(name: str, content: dict[str, Any], figures: Path) -> str:
    lines = [
        "| tokens | attention | density | ms | temporary MiB | cache MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        shown = row["error"] or f"{statistics.median(row['seconds']) * 1e3:.2f}"
        lines.append(
            f"| {row['length']:,} | {row['attention']} | {row['density']:.1%} | {shown} | "
            f"{row['temporary_bytes'] / 2**20:,.1f} | {row['cache_bytes'] / 2**20:,.1f} |"
        )
    return f"On {content['device']}, {content['options']['dtype']}.\n\n" + "\n".join(lines) + "\n"


def _devices(results: list[dict[str, Any]]) -> str:
    return ", ".join(sorted({result["device"] for result in results}))


def _picture(name: str, what: str) -> str:
    return f"![{what}](results/{name}.png)\n"


SECTIONS = (
    Section(
        "Multi-query associative recall",
        "mqar",
        recall,
        "dmattn mqar sweep paper --jobs 6 --output runs/mqar\n"
        "cp runs/mqar/results.json benchmarks/results/mqar_paper.json",
    ),
    Section(
        "Scaling laws",
        "scaling",
        ladder,
        "dmattn scaling --jobs 4 --output runs/scaling\n"
        "cp runs/scaling/results.json benchmarks/results/scaling_packages.json",
    ),
    Section(
        "Ablations",
        "ablation",
        ablations,
        "dmattn ablation --jobs 4 --output runs/ablation\n"
        "cp runs/ablation/results.json benchmarks/results/ablation_packages.json",
    ),
    Section(
        "Needle in a haystack",
        "needle",
        found_again,
        "dmattn needle runs/scaling/6x512_dma_s0      # and 6x512_mha_s0, …\n"
        "cp runs/scaling/6x512_dma_s0/needle.json benchmarks/results/needle_6x512_dma.json",
    ),
    Section(
        "LongEval lines",
        "longeval",
        found_again,
        "dmattn longeval runs/scaling/6x512_dma_s0\n"
        "cp runs/scaling/6x512_dma_s0/longeval.json benchmarks/results/longeval_6x512_dma.json",
    ),
    Section(
        "Attention, alone",
        "h200_attention",
        kernels,
        "dmattn bench attention --output benchmarks/results/h200_attention.json",
    ),
    Section(
        "A step of decoding",
        "decode",
        steps_of_decoding,
        "dmattn bench decode --output benchmarks/results/decode_h200.json",
    ),
    Section(
        "Training steps",
        "h200_train_step",
        train_step,
        "dmattn bench train_step --output benchmarks/results/h200_train_step.json",
    ),
    Section(
        "Generation at long contexts",
        "generation",
        generation,
        "dmattn bench generation --output benchmarks/results/generation_h200.json",
    ),
    Section(
        "Masks for a frozen model: a sweep",
        "dam_sweep",
        mask_sweep,
        "dmattn dam sweep MODEL.gguf --output runs/dam\n"
        "cp runs/dam/results.json benchmarks/results/dam_sweep_smollm2.json",
    ),
    Section(
        "Masks for a frozen model",
        "dam_smollm2",
        masks,
        "dmattn dam text dam-text && dmattn dam capture MODEL.gguf --text dam-text/calibration --output dam512\n"
        "dmattn dam match dam512 --threshold 0.1 --mu 0.9\n"
        "dmattn dam eval MODEL.gguf dam512 --text dam-text/held-out/prose dam-text/held-out/code --lengths 1024 8192 "
        "--retrieval-lengths 1024 8192 --output benchmarks/results/dam_smollm2_512.json",
    ),
    Section(
        "A model's own selection, on the same weights as others",
        "dam_own",
        masks,
        "dmattn train quickstart && dmattn dam text dam-text\n"
        "dmattn dam eval runs/quickstart --text dam-text/held-out/prose dam-text/held-out/code --lengths 512 "
        "--output benchmarks/results/dam_own_quickstart_cpu.json",
    ),
    Section(
        "Prompts through masks",
        "dam_prefill",
        prefill,
        "dmattn bench dam --model MODEL.gguf --masks dam512 --output benchmarks/results/dam_prefill_h200.json",
    ),
)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
