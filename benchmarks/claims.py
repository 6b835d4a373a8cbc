"""What papers and goals say, beside what was measured: each claim a row, from the records alone."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Records = Mapping[str, Any]
"""Content of the files of one kind, by file name."""
REPRODUCED, NOT, MIXED = "reproduced", "**not** reproduced", "mixed"
OPEN, NOT_RUN = "not decided yet", "not run yet"
REACHED, MISSED = "reached", "**not** reached"
SAME_ACCURACY = 0.01
LEARNED = 0.1
"""Accuracy below which a model knows of an answer little more than that it is one of the values."""
RIVALS = ("mha", "swa", "mla", "nsa")


class Claim(NamedTuple):
    """One row of the table. verdict: one of those above."""

    said: str
    measured: str
    verdict: str


def verdict_of(better: int, same: int, worse: int) -> str:
    """Of comparisons that went one way, the other, or neither."""
    if better + same + worse == 0:
        return NOT_RUN
    if worse == 0:
        return REPRODUCED
    return NOT if better == 0 else MIXED


def recall_claims(records: Records, where: str = "") -> list[Claim]:
    """DMA against every other attention, cell by cell of the recall sweeps. A cell that its minutes ended says only
    how fast its model learns, so it decides nothing; nor does one in which neither model has learned to recall.

    where: which cells these are, for the sentence.
    """
    found: dict[tuple[Any, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for file, results in records.items():
        for result in results:
            config = result["config"]
            cell = (file, config["length"], config["pairs"], config["dim"])
            found[cell, config["attention"]].append(result)
    return [_recall_claim(found, rival, where) for rival in RIVALS]


def _recall_claim(found: Mapping[tuple[Any, str], list[dict[str, Any]]], rival: str, where: str) -> Claim:
    pairs = [
        (own, found[cell, rival]) for (cell, name), own in found.items() if name == "dma" and (cell, rival) in found
    ]
    ended = [pair for pair in pairs if all(result["stopped"] != "time" for results in pair for result in results)]
    accuracy = [tuple(np.mean([result["accuracy"] for result in results]) for results in pair) for pair in ended]
    accuracy = [pair for pair in accuracy if max(pair) >= LEARNED]
    better = sum(own - other > SAME_ACCURACY for own, other in accuracy)
    worse = sum(other - own > SAME_ACCURACY for own, other in accuracy)
    same = len(accuracy) - better - worse
    by_steps = ([r for results in pair for r in results if r["stopped"] == "steps"] for pair in ended)
    shortened = [results for results in by_steps if results]
    parts = []
    if accuracy:
        parts.append(f"better in {better}, within {SAME_ACCURACY} in {same}, worse in {worse} of {len(accuracy)} cells")
    if len(ended) > len(accuracy):
        parts.append(f"{len(ended) - len(accuracy)} in which neither answers one in ten, which decide nothing")
    if shortened:
        steps = sorted({result["steps"] for results in shortened for result in results})
        parts.append(f"{len(shortened)} with schedules shortened to {', '.join(map('{:,}'.format, steps))} steps")
    if len(pairs) > len(ended):
        parts.append(f"{len(pairs) - len(ended)} cut short by time, which decide nothing")
    said = f"DMA recalls at least as much as {rival.upper()} (2508.02124){where}"
    return Claim(said, "; ".join(parts), OPEN if pairs and not accuracy else verdict_of(better, same, worse))


def scaling_claims(records: Records) -> list[Claim]:
    """DMA's loss against every other attention's, size by size of the ladders."""
    from train.experiments.scaling import seed_spread

    losses = collections.defaultdict(list)
    for file, content in records.items():
        for run in content["runs"]:
            losses[(file, run["size"]), run["attention"]].append(run["validation_loss"])
    lost = [run["name"] for content in records.values() for run in content.get("diverged", ())]
    # How far seeds are apart where variants are compared; a record of one variant alone compares nothing.
    compared = [content["runs"] for content in records.values() if len({r["attention"] for r in content["runs"]}) > 1]
    spreads = [seed_spread(runs) for runs in compared]
    spread = max((one for one in spreads if one is not None), default=0.0)
    claims = []
    for rival in RIVALS:
        gaps = [
            float(np.mean(own) - np.mean(losses[size, rival]))
            for (size, name), own in losses.items()
            if name == "dma" and (size, rival) in losses
        ]
        better, worse = sum(gap < -2 * spread for gap in gaps), sum(gap > 2 * spread for gap in gaps)
        parts = []
        if gaps:
            parts.append(
                f"lower in {better}, higher in {worse} of {len(gaps)} sizes by more than two standard deviations over "
                f"seeds ({2 * spread:.4f}); mean gap {np.mean(gaps):+.4f} nats"
            )
        for variant in ("dma", rival):
            if count := sum(f"_{variant}_" in name for name in lost):
                parts.append(f"{count} of {variant.upper()}'s runs diverged")
        said = f"DMA's loss is below {rival.upper()}'s at equal size and tokens (2508.02124)"
        verdict = verdict_of(better, len(gaps) - better - worse, worse)
        if verdict == REPRODUCED and not better:
            verdict = NOT
        claims.append(Claim(said, "; ".join(parts), verdict))
    return claims


def needle_claim(records: Records) -> Claim:
    """Models that differ in their attention alone, by name: `6x512_dma_s0` and `6x512_mha_s0`; at lengths both saw."""
    accuracy = {
        content["model"]: dict(zip(content["lengths"], np.mean(content["accuracy"], axis=1), strict=True))
        for content in records.values()
    }
    pairs, measured = [], []
    for name, own in accuracy.items():
        rival = accuracy.get(name.replace("_dma_", "_mha_"), {})
        if "_dma_" in name and (common := sorted(own.keys() & rival.keys())):
            pair = tuple(float(np.mean([found[length] for length in common])) for found in (own, rival))
            lengths = " to ".join(f"{length:,}" for length in dict.fromkeys((common[0], common[-1])))
            pairs.append(pair)
            measured.append(f"{pair[0]:.0%} against {pair[1]:.0%} right at {lengths} tokens")
    better, worse = (sum(sign * (own - other) > 0 for own, other in pairs) for sign in (1, -1))
    said = "DMA finds more needles than MHA, over all lengths that both were asked (2508.02124)"
    verdict = verdict_of(better, len(pairs) - better - worse, worse)
    return Claim(said, "; ".join(measured), NOT if pairs and not better else verdict)


class SpeedGoal(NamedTuple):
    """Time of a rival, over ours: at least `ratio` at one length, window and direction."""

    length: int
    window: int
    direction: str
    rival: str
    ratio: float


OURS, DENSE, SLIDING, SELECTION = "dma mosaic_gpu", "cudnn dense", "cudnn sliding window", "select + layout"
WITHOUT_WINDOW = (DENSE, "flash attention 2")
"""What is measured once a length, beside whatever window."""
SPEED_GOALS = (
    SpeedGoal(32_768, 1024, "forward", DENSE, 9),
    SpeedGoal(32_768, 1024, "both", DENSE, 7.5),
    SpeedGoal(32_768, 1024, "forward", SLIDING, 1 / 1.35),
    SpeedGoal(32_768, 1024, "both", SLIDING, 1 / 1.35),
    SpeedGoal(8192, 1024, "forward", DENSE, 2),
    SpeedGoal(8192, 1024, "both", DENSE, 2),
    SpeedGoal(131_072, 2048, "forward", DENSE, 20),
    # Short rows, and windows that hide nothing: the identity layout.
    SpeedGoal(1024, 1024, "forward", DENSE, 1 / 1.1),
    SpeedGoal(1024, 1024, "both", DENSE, 1 / 1.1),
    SpeedGoal(2048, 1024, "forward", DENSE, 1 / 1.1),
    SpeedGoal(2048, 1024, "both", DENSE, 1 / 1.1),
    SpeedGoal(8192, 8192, "forward", DENSE, 1 / 1.1),
    SpeedGoal(8192, 8192, "both", DENSE, 1 / 1.1),
)
SELECTION_GOALS = ((32_768, 1024, 0.12), (131_072, 2048, 0.4))
"""Tokens, window, and milliseconds for choosing keys and listing them, for 8 kv heads."""
TABLE_5 = {"batch": 1, "heads": 32, "kv_heads": 8, "head_dim": 128}
LONGEST = (1 << 20, 2048)
STEP_CONTEXTS = (1024, 524_288)


def attention_claims(records: Records) -> list[Claim]:
    """The kernel goals for the shape of the paper's Table 5: selection included, medians, rivals of the same run."""
    times = {
        file: {key: statistics.median(row["milliseconds"]) for key, row in attention_rows(content).items()}
        for file, content in records.items()
        if ({"batch": 1} | content["options"]).items() >= TABLE_5.items()
    }

    def of_each(length: int, window: int, direction: str, what: str) -> dict[str, float]:
        key = (length, window, "random", direction, what)
        return {file: own[key] for file, own in times.items() if key in own}

    claims = [_speed_claim(goal, of_each(*goal[:3], OURS), of_each(*goal[:3], goal.rival)) for goal in SPEED_GOALS]
    for length, window, most in SELECTION_GOALS:
        found = of_each(length, window, "forward", SELECTION)
        measured = "; ".join(f"{time:.3f} ms ({file})" for file, time in found.items())
        said = f"goal: {length:,} tokens, w {window:,}, keys of 8 heads chosen and listed in at most {most:g} ms"
        claims.append(Claim(said, measured, _verdict([time <= most for time in found.values()])))
    length, window = LONGEST
    found = of_each(length, window, "both", OURS)
    measured = "; ".join(f"{time:,.0f} ms ({file})" for file, time in found.items())
    said = f"goal: {length:,} tokens, w {window:,}, forward and backward on one card"
    return [*claims, Claim(said, measured, REACHED if found else NOT_RUN)]


def attention_rows(content: Mapping[str, Any]) -> dict[tuple[int, int, str, str, str], Mapping[str, Any]]:
    """A record's rows by (length, window, gate, direction, what). What has no window is filed under every window of its
    length: the row measured beside it, else the first of that length."""
    rows = {
        (row["length"], row["window"], row["gate"], row["direction"], row["what"]): row
        for row in content["rows"]
        if row["milliseconds"]
    }
    first: dict[tuple[int, str, str, str], Mapping[str, Any]] = {}
    for (length, _, *rest), row in rows.items():
        first.setdefault((length, *rest), row)
    for length, window, gate, direction in dict.fromkeys(key[:4] for key in rows):
        for what in WITHOUT_WINDOW:
            if (row := first.get((length, gate, direction, what))) is not None:
                rows.setdefault((length, window, gate, direction, what), row)
    return rows


def _speed_claim(goal: SpeedGoal, ours: Mapping[str, float], rivals: Mapping[str, float]) -> Claim:
    """ours, rivals: milliseconds by file; only files that have both are compared."""
    passes = "forward and backward" if goal.direction == "both" else "forward"
    said = f"goal: {goal.length:,} tokens, w {goal.window:,}, {passes} "
    if goal.ratio >= 1:
        said += f"at least {goal.ratio:g}× faster than cuDNN "
    else:
        said += f"in at most {1 / goal.ratio:.4g}× the time of cuDNN "
    said += goal.rival.removeprefix("cudnn ")
    ratios, parts = [], []
    for file in (file for file in ours if file in rivals):
        own, other = ours[file], rivals[file]
        ratios.append(other / own)
        shown = f"{other / own:.1f}×" if goal.ratio >= 1 else f"{own / other:.2f}×"
        parts.append(f"{shown} ({own:.2f} ms; {file})")
    return Claim(said, "; ".join(parts), _verdict([ratio >= goal.ratio for ratio in ratios]))


def _verdict(reached: Sequence[bool]) -> str:
    """Of a goal that every entry is a measurement of."""
    if not reached:
        return NOT_RUN
    return REACHED if all(reached) else MIXED if any(reached) else MISSED


def training_claims(records: Records) -> list[Claim]:
    """Whole training steps: tokens/s against dense attention, and the share of the device's peak."""
    ratios, shares = {}, {}
    for file, content in records.items():
        rows = {(row["preset"], row["attention"], row["length"]): row for row in content["rows"] if not row["error"]}
        for preset in dict.fromkeys(key[0] for key in rows):
            own, dense = (rows.get((preset, attention, 32_768)) for attention in ("dma", "mha"))
            if own and dense:
                ratios[f"{preset}, {file}"] = own["tokens_per_second"] / dense["tokens_per_second"]
        short = rows.get(("doge-320m", "dma", 2048))
        if short and short["mfu"] is not None:
            shares[file] = short["mfu"]
    goals = (
        ("goal: models trained at 32,768 tokens at 3× the tokens/s of dense attention", ratios, 3, "{:.2f}×"),
        ("goal: doge-320m at 2,048 tokens trained at 40% of the device's peak", shares, 0.4, "{:.1%}"),
    )
    return [
        Claim(
            said,
            "; ".join(f"{shown.format(value)} ({of})" for of, value in found.items()),
            _verdict([value >= least for value in found.values()]),
        )
        for said, found, least, shown in goals
    ]


def decode_claim(records: Records) -> Claim:
    """A layer's step of decoding: the same time and memory after a long context as after a short one."""
    parts, reached = [], []
    for file, content in records.items():
        rows = {
            (row["batch"], row["context"]): row
            for row in content["rows"]
            if row["what"] == OURS and row["microseconds"]
        }
        for batch in sorted({batch for batch, _ in rows}):
            first, last = (rows.get((batch, context)) for context in STEP_CONTEXTS)
            if first is None or last is None:
                continue
            time = statistics.median(last["microseconds"]) / statistics.median(first["microseconds"])
            memory = last["cache_bytes"] / first["cache_bytes"]
            reached.append(time <= 1.1 and memory <= 1.01)
            parts.append(f"batch {batch}: {time:.2f}× the time, {memory:.2f}× the cache ({file})")
    short, long = STEP_CONTEXTS
    said = (
        f"goal: a step of decoding after {long:,} tokens costs what it costs after {short:,}: time within 10%, equal "
        "memory"
    )
    verdict = NOT_RUN if not reached else REACHED if all(reached) else MISSED
    return Claim(said, "; ".join(parts), verdict)


def generation_claim(records: Records) -> Claim:
    """Speed and memory of decoding, from the shortest context to the longest of each file."""
    parts, flat = [], True
    for file, content in records.items():
        rows = [r for r in content["rows"] if (r["attention"], r["what"]) == ("dma", "decode") and not r["error"]]
        # Below the window the cache is still filling.
        rows = [r for r in rows if r["length"] >= content["options"]["window"]]
        if len({r["length"] for r in rows}) < 2:
            continue
        first, last = min(rows, key=lambda r: r["length"]), max(rows, key=lambda r: r["length"])
        speed = last["tokens_per_second"] / first["tokens_per_second"]
        memory = last["cache_bytes"] / first["cache_bytes"]
        flat &= speed > 0.9 and memory < 1.01
        parts.append(
            f"{speed:.0%} of the speed and {memory:.2f}× the cache at {last['length']:,} of those at "
            f"{first['length']:,} ({file})"
        )
    said = "goal: decoding costs the same after any context: speed at least 90%, equal memory"
    return Claim(said, "; ".join(parts), (REACHED if flat else MISSED) if parts else NOT_RUN)


def dam_claims(evaluations: Records, sweeps: Records, prefills: Records) -> list[Claim]:
    """What 2506.11104 says of masks: near dense in quality, and how much less time and memory."""
    return [_dam_quality(evaluations, sweeps), _dam_lines(evaluations), *_dam_prefill(prefills)]


def _dam_quality(evaluations: Records, sweeps: Records) -> Claim:
    """Perplexity through masks over dense; of a sweep the sparsest masks within 1%, and the best there are."""
    parts, near = [], []
    for file, content in evaluations.items():
        found = {(row["name"], row["length"], row.get("text", "")): row["perplexity"] for row in content["results"]}
        for (name, length, text), own in found.items():
            if name == "dam" and ("dense", length, text) in found:
                ratio = own / found["dense", length, text]
                near.append(ratio <= 1.01)
                parts.append(f"{ratio:.2f}× dense at {length:,} tokens{text and f' of {text}'} ({file})")
    for file, content in sweeps.items():
        cells = [cell for cell in content["cells"] if cell["results"]]
        if not cells:
            continue
        worst = [max(_ratios(cell)) for cell in cells]
        sparse = [cell["summary"]["density"] for cell, ratio in zip(cells, worst, strict=True) if ratio <= 1.01]
        best = cells[int(np.argmin(worst))]["summary"]["density"]
        near.append(bool(sparse))
        parts.append(
            f"{len(sparse)} of {len(cells)} settings"
            + (f", the sparsest at {min(sparse):.1%} of the pairs" if sparse else "")
            + f"; the nearest is {min(worst):.3f}× dense at {best:.1%} ({file})"
        )
    said = "DAM stays within 1% of dense attention (2506.11104); here by perplexity of SmolLM2-135M"
    return Claim(said, "; ".join(parts), verdict_of(sum(near), 0, len(near) - sum(near)))


def _ratios(cell: Mapping[str, Any]) -> list[float]:
    """Perplexity through the masks over dense, for each text."""
    dense = {row["text"]: row["loss"] for row in cell["results"] if row["name"] == "dense"}
    return [float(np.exp(row["loss"] - dense[row["text"]])) for row in cell["results"] if row["name"] == "dam"]


def _dam_lines(evaluations: Records) -> Claim:
    parts, equal = [], []
    for file, content in evaluations.items():
        found = {row["name"]: row for row in content.get("retrieval", ()) if row["task"] == "longeval"}
        if {"dense", "dam"} <= found.keys():
            dense, own = (float(np.mean(found[name]["accuracy"])) for name in ("dense", "dam"))
            equal.append(own >= 0.99 * dense)
            parts.append(f"{own:.1%} against {dense:.1%} ({file})")
    said = "DAM finds LongEval's lines as dense attention does: 79.66 against 80.11 (2506.11104)"
    return Claim(said, "; ".join(parts), verdict_of(sum(equal), 0, len(equal) - sum(equal)))


def _dam_prefill(prefills: Records) -> list[Claim]:
    claims = []
    for what, least, value in (
        ("time", 0.38, lambda row: statistics.median(row["seconds"])),
        ("temporary memory", 0.42, lambda row: row["temporary_bytes"]),
    ):
        parts, enough = [], []
        for file, content in prefills.items():
            rows = {(row["attention"], row["length"]): row for row in content["rows"] if not row["error"]}
            for (name, length), row in rows.items():
                if name == "dam" and ("dense", length) in rows:
                    less = 1 - value(row) / value(rows["dense", length])
                    enough.append(less >= least)
                    change = f"{round(-100 * less):+d}%".replace("-", "−")
                    parts.append(f"{change} at {length:,} tokens ({file})")
        said = f"DAM reads a prompt in {least:.0%} less {what} than dense attention (2506.11104); here against cuDNN"
        claims.append(Claim(said, "; ".join(parts), verdict_of(sum(enough), 0, len(enough) - sum(enough))))
    return claims
