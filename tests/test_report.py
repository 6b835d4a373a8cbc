"""docs/results.md is made of the records: what they say, what they contradict, and what is not run yet."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import pytest

from benchmarks import claims, report

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def cell(attention: str, dim: int, accuracy: float, seed: int = 0, stopped: str = "epochs") -> dict:
    config = {"attention": attention, "length": 64, "pairs": 4, "dim": dim, "seed": seed}
    return {
        "config": config, "accuracy": accuracy, "stopped": stopped, "steps": 10 * dim, "device": "gpu",
        "tokens_per_second": 2e6, "sharing": 1, "history": [{"step": 10 * dim, "accuracy": accuracy}],
    }  # fmt: skip


def run(size: str, attention: str, loss: float, seed: int = 0) -> dict:
    return {"size": size, "attention": attention, "validation_loss": loss, "seed": seed}


def test_recall_is_compared_cell_by_cell():
    cells = [cell("dma", 32, 0.4), cell("mha", 32, 0.5), cell("dma", 64, 0.99), cell("mha", 64, 0.995)]
    cells += [cell("dma", 128, 1.0, seed) for seed in (0, 1)] + [cell("mha", 128, 0.5), cell("nsa", 128, 0.2)]
    found = {claim.said.split()[-2]: claim for claim in claims.recall_claims({"mqar_x": cells})}
    assert found["MHA"].verdict == claims.MIXED
    assert found["MHA"].measured == "better in 1, within 0.01 in 1, worse in 1 of 3 cells"
    assert found["NSA"].verdict == claims.REPRODUCED
    assert found["SWA"] == (found["SWA"].said, "", claims.NOT_RUN)


def test_cells_ended_by_their_minutes_decide_nothing():
    cells = [cell("dma", 32, 0.9), cell("mha", 32, 0.1, stopped="time"), cell("swa", 32, 0.1)]
    cells += [cell("dma", 64, 0.1, stopped="time"), cell("swa", 64, 0.9)]
    found = {claim.said.split()[-2]: claim for claim in claims.recall_claims({"mqar_x": cells})}
    assert found["MHA"].verdict == claims.OPEN
    assert found["MHA"].measured == "1 cut short by time, which decide nothing"
    assert found["SWA"].verdict == claims.REPRODUCED
    assert found["SWA"].measured.endswith("of 1 cells; 1 cut short by time, which decide nothing")


def test_cells_that_nobody_learned_decide_nothing():
    cells = [cell("dma", 32, 0.003), cell("mha", 32, 0.002), cell("swa", 32, 0.55)]
    cells += [cell("dma", 64, 0.09), cell("mha", 64, 0.06)]
    found = {claim.said.split()[-2]: claim for claim in claims.recall_claims({"mqar_x": cells})}
    assert found["MHA"].verdict == claims.OPEN
    assert found["MHA"].measured == "2 in which neither answers one in ten, which decide nothing"
    assert found["SWA"].verdict == claims.NOT
    assert found["SWA"].measured == "better in 0, within 0.01 in 0, worse in 1 of 1 cells"


def test_shortened_schedules_are_named():
    cells = [cell("dma", 32, 0.9, stopped="target"), cell("mha", 32, 0.1, stopped="steps"), cell("swa", 32, 0.1)]
    mha, swa, *_ = claims.recall_claims({"mqar_x": cells}, "; here elsewhere")
    assert mha.said.endswith("MHA (2508.02124); here elsewhere")
    assert mha.measured.endswith("of 1 cells; 1 with schedules shortened to 320 steps")
    assert "shortened" not in swa.measured


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ((-0.1, -0.2), claims.REPRODUCED),
        ((-0.1, 0.2), claims.MIXED),
        ((0.1, 0.2), claims.NOT),
        # nothing beyond the spread of seeds is no advantage
        ((-0.001, 0.001), claims.NOT),
    ],
)
def test_losses_are_compared_beyond_the_spread_of_seeds(gaps, verdict):
    runs = [run("a", "swa", 2.0), run("a", "swa", 2.01, 1), run("b", "swa", 3.0)]
    runs += [run("a", "dma", 2.005 + gaps[0]), run("b", "dma", 3.0 + gaps[1])]
    found = {claim.said: claim for claim in claims.scaling_claims({"scaling_x": {"runs": runs}})}
    claim = next(claim for said, claim in found.items() if "SWA" in said)
    assert claim.verdict == verdict
    assert "of 2 sizes by more than two standard deviations over seeds (0.0141)" in claim.measured
    assert "diverged" not in claim.measured
    # Seeds far apart where nothing is compared say nothing of a comparison elsewhere.
    alone = {"scaling_y": {"runs": [run("a", "dma", 5.0), run("a", "dma", 9.0, 1)]}}
    assert claims.scaling_claims({"scaling_x": {"runs": runs}} | alone) == claims.scaling_claims(
        {"scaling_x": {"runs": runs}}
    )
    lost = [{"name": "c_dma_s0"}, {"name": "c_dma_s1"}, {"name": "c_mha_s0"}]
    for claim in claims.scaling_claims({"scaling_x": {"runs": runs, "diverged": lost}}):
        assert "2 of DMA's runs diverged" in claim.measured
        assert ("1 of MHA's runs diverged" in claim.measured) == ("MHA's at" in claim.said)


def test_needles_of_models_that_differ_in_attention_alone():
    def record(model: str, lengths: list[int], accuracy: list[list[float]]) -> dict:
        return {"model": model, "lengths": lengths, "accuracy": accuracy}

    found = {
        "needle_a": record("6x512_dma_s0", [2048, 1024, 4096], [[1.0, 0.5], [0.5, 0.0], [0.0, 0.0]]),
        "needle_b": record("6x512_mha_s0", [1024, 2048], [[0.5, 0.0], [0.0, 0.5]]),
    }
    claim = claims.needle_claim(found)
    assert claim[1:] == ("50% against 25% right at 1,024 to 2,048 tokens", claims.REPRODUCED)
    # Models that were asked nothing in common are not compared.
    other = found | {"needle_b": record("6x512_mha_s0", [8192], [[0.0, 0.0]])}
    assert claims.needle_claim(other).verdict == claims.NOT_RUN
    assert claims.needle_claim({"needle_a": found["needle_a"]}).verdict == claims.NOT_RUN


def timing(what: str, milliseconds: float, length: int = 8192, window: int = 1024, direction: str = "forward") -> dict:
    return {
        "length": length, "window": window, "gate": "random", "what": what, "direction": direction,
        "milliseconds": [milliseconds] * 3, "temporary_bytes": 0, "share_of_matmul": 0.5,
    }  # fmt: skip


def speed_record(*rows: dict, heads: int = 32) -> dict:
    options = {"heads": heads, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "repeats": 3, "gates": ["random"]}
    return {"options": options, "rows": list(rows), "device": "gpu", "jax": "0", "matrix_product_flops": 1e12}


def test_speed_goals_are_of_one_run_and_one_shape():
    ours, dense = timing("dma mosaic_gpu", 1.0), timing("cudnn dense", 2.5)

    def claim(records: dict, said: str = "8,192 tokens, w 1,024, forward at") -> claims.Claim:
        return next(c for c in claims.attention_claims(records) if said in c.said)

    assert claim({"a": speed_record(ours, dense)})[1:] == ("2.5× (1.00 ms; a)", claims.REACHED)
    # a rival of another run, or of other heads, is none
    assert claim({"a": speed_record(ours), "b": speed_record(dense)}).verdict == claims.NOT_RUN
    assert claim({"a": speed_record(ours, dense, heads=8)}).verdict == claims.NOT_RUN
    slow = speed_record(ours, timing("cudnn dense", 1.5))
    assert claim({"a": slow}).verdict == claims.MISSED
    assert claim({"a": slow, "b": speed_record(ours, dense)}).verdict == claims.MIXED


def test_dense_attention_is_compared_at_every_window_of_its_length(tmp_path):
    rows = [timing("cudnn dense", 1.0), timing("dma mosaic_gpu", 1.2, window=8192), timing("dma mosaic_gpu", 0.4)]
    said = "w 8,192, forward in"
    found = next(c for c in claims.attention_claims({"a": speed_record(*rows)}) if said in c.said)
    assert found[1:] == ("1.20× (1.20 ms; a)", claims.MISSED)
    # the one measured beside it counts first
    rows.append(timing("cudnn dense", 1.15, window=8192))
    found = next(c for c in claims.attention_claims({"a": speed_record(*rows)}) if said in c.said)
    assert found[1:] == ("1.04× (1.20 ms; a)", claims.REACHED)
    rows += [row | {"direction": "both"} for row in rows]
    page = report.kernels("a", speed_record(*rows), tmp_path)
    assert "| 8,192, 8,192, random | forward | 1.20 |  | 50% | 0 | 1.15 | 0.96× (0.96–0.96) |" in page
    assert "| 8,192, 1,024, random | forward | 0.40 |  | 50% | 0 | 1.00 | 2.50× (2.50–2.50) |" in page


def test_training_goals_are_of_one_run():
    def step(attention: str, length: int, speed: float, mfu: float | None = None) -> dict:
        return {"preset": "doge-320m", "attention": attention, "length": length, "tokens_per_second": speed,
                "mfu": mfu, "error": None}  # fmt: skip

    ours, dense = step("dma", 32_768, 310.0), step("mha", 32_768, 100.0)
    speed, share = claims.training_claims({"a": {"rows": [ours, dense, step("dma", 2048, 1.0, 0.39)]}})
    assert speed[1:] == ("3.10× (doge-320m, a)", claims.REACHED)
    assert share[1:] == ("39.0% (a)", claims.MISSED)
    small = [row | {"preset": "doge-160m"} for row in (ours | {"tokens_per_second": 290.0}, dense)]
    both = claims.training_claims({"a": {"rows": [ours, dense, *small]}})[0]
    assert both[1:] == ("3.10× (doge-320m, a); 2.90× (doge-160m, a)", claims.MIXED)
    apart = {"a": {"rows": [ours]}, "b": {"rows": [dense | {"error": "out of memory"}, step("dma", 2048, 1.0)]}}
    assert [claim.verdict for claim in claims.training_claims(apart)] == [claims.NOT_RUN] * 2


def test_decoding_is_flat_in_time_and_in_memory():
    def step(context: int, microseconds: float, cache: int) -> dict:
        return {"what": "dma mosaic_gpu", "batch": 3, "context": context, "microseconds": [microseconds],
                "cache_bytes": cache}  # fmt: skip

    short, long = claims.STEP_CONTEXTS
    for last, verdict in ((step(long, 10.5, 7), claims.REACHED), (step(long, 11.5, 7), claims.MISSED),
                          (step(long, 10.5, 8), claims.MISSED), (step(long - 1, 10.5, 7), claims.NOT_RUN)):  # fmt: skip
        assert claims.decode_claim({"a": {"rows": [last, step(short, 10.0, 7)]}}).verdict == verdict
    assert claims.decode_claim({}).verdict == claims.NOT_RUN


def test_generation_is_flat_between_two_lengths_at_least():
    def row(length: int, speed: float) -> dict:
        return {"attention": "dma", "what": "decode", "error": "", "length": length, "tokens_per_second": speed,
                "cache_bytes": 7}  # fmt: skip

    def verdict(*rows: dict) -> str:
        return claims.generation_claim({"a": {"options": {"window": 2048}, "rows": rows}}).verdict

    # A cache that is still filling is no measurement.
    assert verdict(row(1024, 700.0), row(8192, 70.0)) == claims.NOT_RUN
    assert verdict(row(1024, 700.0), row(8192, 70.0), row(65_536, 69.0)) == claims.REACHED
    assert verdict(row(8192, 70.0), row(65_536, 50.0)) == claims.MISSED


def test_attention_in_batches_is_not_what_the_goals_are_about():
    content = json.loads((RESULTS / "h200_attention_short.json").read_text())
    said = {claim.verdict for claim in claims.attention_claims({"a": content}) if "2,048 tokens" in claim.said}
    assert said == {claims.REACHED}
    content["options"]["batch"] = 16
    assert {claim.verdict for claim in claims.attention_claims({"a": content})} == {claims.NOT_RUN}


def test_the_page_is_written_from_the_records(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    for name in ("generation_cpu", "dam_smollm2_512", "h200_attention", "h200_attention_before", "decode_h200"):
        (results / f"{name}.json").write_text((RESULTS / f"{name}.json").read_text())
    cells = [cell("dma", dim, 0.25 * dim / 32, stopped="time") for dim in (32, 64)]
    (results / "mqar_few.json").write_text(json.dumps(cells))
    report.main(report.Options(results, tmp_path / "docs" / "results.md"))
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "2 cells on gpu, seeds 0, 320 to 640 steps; stopped by time (2)." in page
    assert "| 64 | DMA | 0.500* |" in page
    assert "| 64 tokens, width 32 | 2,000 |" in page
    assert page.count("**Not run yet.**") == len(report.SECTIONS) - 5
    assert "12.1× (1.33 ms; h200_attention) | reached |" in page
    assert "_before" not in page
    pictures = {path.name for path in (tmp_path / "docs" / "results").iterdir()}
    assert pictures == {"mqar_few.png", "generation_cpu.png", "h200_attention.png"}
    for picture in pictures:
        assert f"](results/{picture})" in page


def test_the_page_in_the_repository_is_of_the_records_in_it():
    page = (RESULTS.parents[1] / "docs" / "results.md").read_text()
    records = {section.kind: report.read(RESULTS, section.kind) for section in report.SECTIONS}
    assert report.claims_table(records) in page, "run python -m benchmarks.report again"
    for name in (name for found in records.values() for name in found):
        assert f"[{name}.json](../benchmarks/results/{name}.json)" in page


def test_the_times_in_the_readme_are_those_of_the_records_that_it_names():
    readme = (RESULTS.parents[1] / "README.md").read_text()
    paragraph = next(text for text in readme.split("\n\n") if text.startswith("Records:"))
    records = [
        claims.attention_rows(json.loads((RESULTS / f"{name}.json").read_text()))
        for name in re.findall(r"results/(\w+)\.json", paragraph)
    ]

    def measured(rows: dict, *shape: int | str) -> list[list[float]]:
        """What the cells of a row show, in their order, with a number for each that they show."""
        cells = []
        for direction in report.PASSES:
            ours, dense, sliding = (
                rows.get((*shape, "random", direction, what), {"milliseconds": []})["milliseconds"]
                for what in (claims.OURS, claims.DENSE, claims.SLIDING)
            )
            if not ours:
                return []
            middle = statistics.median(ours)
            ratios = (
                [statistics.median(dense) / middle, min(dense) / max(ours), max(dense) / min(ours)] if dense else []
            )
            cells += [[middle], ratios, [middle / statistics.median(sliding)]]
        return cells

    def shows(cell: str, values: list[float]) -> bool:
        shown = [number.replace(",", "") for number in re.findall(r"[\d,.]+", cell)]
        digits = [len(number.partition(".")[2]) for number in shown]
        return len(shown) == len(values) and all(
            abs(float(number) - value) <= 0.5001 * 10.0**-count
            for number, value, count in zip(shown, values, digits, strict=True)
        )

    table = re.findall(r"^\| ([\d,]+), ([\d,]+) \| (.+) \|$", readme, re.MULTILINE)
    assert len(table) > 10
    for length, window, shown in table:
        shape = [int(number.replace(",", "")) for number in (length, window)]
        found = [cells for cells in (measured(rows, *shape) for rows in records) if cells]
        assert any(all(map(shows, shown.split(" | "), cells)) for cells in found), f"{length}, {window}: {shown}"


def test_parts_of_a_token_are_in_microseconds(tmp_path):
    content = json.loads((RESULTS / "generation_cpu.json").read_text())
    decoded = next(row for row in content["rows"] if (row["attention"], row["what"]) == ("dma", "decode"))
    decoded["breakdown"] = {"milliseconds": {"norm": 0.0123, "attention": 0.25, "copies": 1e-4}, "idle": 0.0311}
    page = report.generation("generation_cpu", content, tmp_path)
    assert "| attention, context | attention | norm | the rest | none runs |" in page
    assert f"| dma, {decoded['length']:,} | 250.0 | 12.3 | 0.1 | 31.1 |" in page


def test_parts_of_attention_are_in_microseconds(tmp_path):
    content = json.loads((RESULTS / "h200_attention_8_4_batch.json").read_text())
    content["rows"] = [row | {"breakdown": None} for row in content["rows"]]
    first, *others = (row for row in content["rows"] if row["what"] == claims.OURS)
    first["breakdown"] = {"milliseconds": {"attention": 0.3, "lists": 0.0244, "around attention": 1e-4}, "idle": 0.002}
    others[0]["breakdown"] = {"milliseconds": {"attention": 1.2}, "idle": 0.0}
    page = report.kernels("h200_attention_8_4_batch", content, tmp_path)
    assert "8 query and 4 kv heads of 128, bfloat16, batch 16." in page
    assert "| attention, tokens, window | attention | lists | the rest | none runs |" in page
    assert "| dma mosaic_gpu, 2,048, 1,024, forward | 300.0 | 24.4 | 0.1 | 2.0 |" in page


def mask_row(name: str, perplexity: float, text: str = "prose", density: float = 0.1) -> dict:
    return {
        "name": name, "text": text, "length": 512, "rows": 2, "loss": math.log(perplexity), "perplexity": perplexity,
        "kl": 0.0 if name == "dense" else 0.1, "agreement": 0.9, "density": density,
    }  # fmt: skip


def mask_cell(threshold: float, perplexity: float, density: float) -> dict:
    names = ("dam", "sliding_window", "sink_and_window", "vertical_slash", "exact_top")
    results = [mask_row("dense", 10.0)] + [mask_row(name, perplexity, density=density) for name in names]
    settings = {"rows": 2, "length": 512, "capture_rows": 3, "amplifier": "box_cox"}
    summary = {"density": density, "diagonals_per_head": 1.0, "verticals_per_head": 2.0}
    return {"capture": 128, "threshold": threshold, "mu": 0.5, "settings": settings, "summary": summary,
            "device": "cpu", "results": results}  # fmt: skip


def test_masks_are_held_against_their_papers_claims():
    said = {
        name: claim
        for name, claim in zip(
            ("quality", "lines", "time", "memory"),
            claims.dam_claims(
                {
                    "dam_smollm2_a": {
                        "results": [mask_row("dense", 10.0), mask_row("dam", 10.02)],
                        "retrieval": [
                            {"task": "longeval", "name": name, "accuracy": accuracy}
                            for name, accuracy in (("dense", [1.0, 0.5]), ("dam", [0.5, 0.5]))
                        ],
                    }
                },
                {"dam_sweep_a": {"cells": [mask_cell(0.1, 10.08, 0.4), mask_cell(0.2, 11.0, 0.2)]}},
                {
                    "dam_prefill_a": {
                        "rows": [
                            {"attention": name, "length": 99, "error": "", "seconds": [t], "temporary_bytes": bytes_}
                            for name, t, bytes_ in (("dam", 0.5, 60), ("dense", 1.0, 100))
                        ]
                    }
                },
            ),
            strict=True,
        )
    }
    assert said["quality"].verdict == claims.REPRODUCED
    assert said["quality"].measured.startswith("1.00× dense at 512 tokens of prose (dam_smollm2_a); 1 of 2 settings, ")
    assert "the sparsest at 40.0% of the pairs; the nearest is 1.008× dense" in said["quality"].measured
    assert said["lines"] == (said["lines"].said, "50.0% against 75.0% (dam_smollm2_a)", claims.NOT)
    assert said["time"][1:] == ("−50% at 99 tokens (dam_prefill_a)", claims.REPRODUCED)
    assert said["memory"][1:] == ("−40% at 99 tokens (dam_prefill_a)", claims.NOT)
    assert [claim.verdict for claim in claims.dam_claims({}, {}, {})] == [claims.NOT_RUN] * 4


def test_a_sweep_of_masks_is_a_table_and_a_picture(tmp_path):
    content = {"model": "toy", "cells": [mask_cell(0.2, 11.0, 0.2), mask_cell(0.1, 10.1, 0.4)]}
    empty = {key: mask_cell(9.0, 1.0, 1.0)[key] for key in ("capture", "threshold", "mu", "settings", "device")}
    content["cells"].append(empty | {"error": "threshold 9 empties every head: lower it", "results": []})
    page = report.mask_sweep("dam_sweep_toy", content, tmp_path)
    assert "Dense perplexity: prose 10.00." in page
    assert "| 128 | 0.1 | 0.5 | 40.0% | 1.0, 2.0 | 1.01 | 0.100 | 90.0% | 1.01 | 1.01 | 1.01 |" in page
    assert page.index("| 128 | 0.1 |") < page.index("| 128 | 0.2 |") < page.index("threshold 9 empties every head")
    assert (tmp_path / "dam_sweep_toy.png").stat().st_size > 1000


def test_every_record_that_is_named_exists_and_every_picture_has_its_record():
    root = RESULTS.parents[1]
    # A line that copies a record there says how it would be made.
    lines = [
        line for page in (root / "README.md", *(root / "docs").glob("*.md")) for line in page.read_text().split("\n")
    ]
    named = {
        name
        for line in lines
        if not line.startswith("cp ")
        for name in re.findall(r"benchmarks/results/([\w*.]+)", line)
    }
    assert len(named) > 9
    assert [name for name in sorted(named) if not list(RESULTS.glob(name))] == []
    records = tuple(path.stem for path in RESULTS.glob("*.json"))
    pictures = (root / "docs" / "results").glob("*.png")
    assert [path.name for path in pictures if not path.stem.startswith(records)] == []
