"""Scaling: fits that find known laws, ladders whose runs are alike, and a ladder stopped and continued."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from small_run import small_config

from configs.scaling import LADDER_20M
from train import cli
from train.config import DataConfig
from train.data import training_texts
from train.errors import ConfigError, TrainingDivergedError
from train.experiments import scaling, text
from train.experiments.cells import train_missing
from train.experiments.deadline import Deadline
from train.experiments.results import read_diverged
from train.experiments.scaling_config import ScalingSweep
from train.experiments.scaling_fit import PowerLaw, fit_power_laws
from train.experiments.variants import VARIANTS
from train.flops import count_parameters

LAWS = {
    "mha": PowerLaw(1.3, 4.1e2, 0.17),
    "swa": PowerLaw(1.3, 9.7e2, 0.19),
    "dma": PowerLaw(1.3, 2.9e2, 0.16),
}
COMPUTE = np.geomspace(1e14, 3e17, 6)


def points(noise=0.0, seed=0):
    random = np.random.default_rng(seed)
    return {
        name: [(c, float(law(np.array([c]))[0] * np.exp(noise * random.normal()))) for c in np.repeat(COMPUTE, 2)]
        for name, law in LAWS.items()
    }


def test_exact_points_give_back_their_laws():
    fit = fit_power_laws(points(), samples=2)
    assert fit.error < 1e-6
    for name, law in LAWS.items():
        found = fit.laws[name]
        assert found.floor == pytest.approx(1.3, rel=1e-3)
        assert found.exponent == pytest.approx(law.exponent, rel=2e-3)
        assert found.scale == pytest.approx(law.scale, rel=3e-2)
        np.testing.assert_allclose(found(COMPUTE), law(COMPUTE), rtol=1e-5)


def test_intervals_of_noisy_points_hold_the_truth():
    fit = fit_power_laws(points(noise=0.004), samples=60)
    assert fit.error == pytest.approx(0.004, rel=0.5)
    low, high = fit.interval("mha", "floor")
    assert low < 1.3 < high
    assert high - low < 1.0
    for name, law in LAWS.items():
        low, high = fit.interval(name, "exponent")
        assert low < law.exponent < high
    # The same data and seed give the same intervals.
    assert fit_power_laws(points(noise=0.004), samples=60).interval("dma", "scale") == fit.interval("dma", "scale")


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say():
    inside = []
    for seed in range(24):
        fit = fit_power_laws(points(noise=0.004, seed=seed), samples=80)
        for name, law in LAWS.items():
            low, high = fit.interval(name, "exponent")
            inside.append(low <= law.exponent <= high)
    assert 0.8 < np.mean(inside) <= 1.0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "at least one variant"),
        ({"mha": [(1e15, 2.0), (2e15, 1.9)]}, "'mha' must have at least 3 different computes"),
        ({"mha": [(1e15, 2.0), (2e15, 1.9), (3e15, float("nan"))]}, "'mha' must be finite and > 0"),
        ({"mha": [(1e15, 2.0), (2e15, 1.9), (3e15, 1.8)]}, "more than the 3 parameters of the fit, got 3"),
    ],
)
def test_what_no_law_has_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        fit_power_laws(bad)


def test_a_vocabulary_is_of_what_is_trained_on(tmp_path):
    """Files without text are neither trained on nor held out, so which files are held out does not depend on them."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"file {number}")
        (texts / f"{number}.py").write_text("")
        (texts / f"{number}.png").write_bytes(bytes(range(256)))
    data = DataConfig(source=str(texts), validation_fraction=0.2)
    sampled = set(text._sample(data))
    assert sampled == set(training_texts(data))
    assert len(sampled) == 32
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "logo.png").write_bytes(bytes(range(256)))
    (mixed / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(9)))
    data = DataConfig(source=str(mixed), validation_fraction=0.3)
    assert sorted(text._sample(data)) == sorted(training_texts(data))


def test_a_vocabulary_that_was_learned_otherwise_is_not_taken(tmp_path):
    config = small_config(tmp_path)
    made = text.tokenizer_of(config, 260, tmp_path / "out")
    assert text.tokenizer_of(config, 260, tmp_path / "out") == made
    with pytest.raises(ConfigError, match=r"learned otherwise: vocab_size 260 -> 300; choose another --output"):
        text.tokenizer_of(config, 300, tmp_path / "out")
    other = replace(config, data=replace(config.data, source="stdlib"))
    with pytest.raises(ConfigError, match=r"learned otherwise: source .* -> 'stdlib'"):
        text.tokenizer_of(other, 260, tmp_path / "out")


def test_batches_of_a_ladder_divide_into_microbatches(tmp_path):
    base = replace(LADDER_20M.base, accumulate=3)
    for cell in replace(LADDER_20M, base=base, tokens_per_parameter=10).cells(tmp_path, shards=4):
        assert cell.batch_size % 12 == 0


def test_all_variants_of_a_size_are_trained_alike(tmp_path):
    cells = LADDER_20M.cells(tmp_path)
    assert len(cells) == 5 * (3 + 2 + 2 + 1 + 1 + 1)
    assert len({cell.name for cell in cells}) == len(cells)
    sizes = {}
    for cell in cells:
        alike = (cell.optimizer, cell.batch_size, cell.steps, cell.sequence_length, cell.data)
        size, _, seed = cell.name.split("_")
        assert sizes.setdefault(size, alike) == alike
        assert cell.seed == int(seed[1:])
        model = cell.model
        assert (model.num_heads, model.intermediate_size) == (2 * model.num_kv_heads, 3 * model.hidden_size)
        assert cell.sequence_length >= 4 * np.max(model.window)
        if model.attention == "nsa":
            assert (model.window, model.selected_blocks * model.selection_block) == (256, 512)
    dense = {c.name.split("_")[0]: count_parameters(c.model).non_embedding for c in cells if "_mha_" in c.name}
    assert len(dense) >= 5
    assert 0.5e6 < min(dense.values()) < 0.7e6
    assert 18e6 < max(dense.values()) < 20e6
    for size, parameters in dense.items():
        cell = next(cell for cell in cells if cell.name.startswith(size))
        tokens = cell.steps * cell.batch_size * cell.sequence_length
        assert tokens == pytest.approx(20 * parameters, rel=0.02)
        assert cell.optimizer.learning_rate == pytest.approx(1.79 * parameters**-0.713 * tokens**0.307)
        assert cell.batch_size * 2048 == pytest.approx(0.58 * (20 * parameters) ** 0.571, rel=0.3)
    few = replace(LADDER_20M, tokens_per_parameter=5.0).cells(tmp_path)[0]
    assert few.steps * few.batch_size * 2048 == pytest.approx(5 * dense["3x128"], rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 513}, "at least 4 windows, got 2048 with a window of 513"),
        ({"sizes": ((3, 100, 1),)}, r"a multiple of 2 \* head_dim \(128\), got 3 100 1"),
        ({"sizes": ()}, "sizes must not be empty"),
        ({"tokens_per_parameter": 0.0}, "tokens-per-parameter must be > 0"),
    ],
)
def test_impossible_ladders_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        replace(LADDER_20M, **changes).cells(tmp_path)


def write_runs(folder, variants=VARIANTS, sizes=6):
    random = np.random.default_rng(5)
    for index, variant in enumerate(variants):
        law = PowerLaw(1.1, (3 + index) * 1e2, 0.17)
        for rung, compute in enumerate(COMPUTE[:sizes]):
            for seed in range(2):
                loss = float(law(np.array([compute]))[0] + 0.002 * random.normal())
                result = {
                    "name": f"{rung}x1_{variant}_s{seed}", "size": f"{rung}x1", "size_parameters": 10**rung,
                    "attention": variant, "seed": seed, "flops": compute, "validation_loss": loss,
                }  # fmt: skip
                (folder / result["name"]).mkdir(parents=True)
                (folder / result["name"] / "result.json").write_text(json.dumps(result))


def test_report_fits_and_says_the_gap_beside_the_spread_of_seeds(tmp_path):
    write_runs(tmp_path)
    scaling.report(tmp_path, samples=5)
    table = (tmp_path / "table.md").read_text()
    assert "| size | MHA | SWA | MLA | NSA | DMA | widest gap | over runs |" in table
    assert re.search(r"standard deviation over runs of one variant: 0\.00\d+ over all sizes", table)
    assert table.count("\n| 0x1 (0.0M) |") == 1
    numbers = json.loads((tmp_path / "results.json").read_text())
    assert len(numbers["runs"]) == 60
    assert set(numbers["fit"]["variants"]) == set(VARIANTS)
    assert numbers["fit"]["floor"] == pytest.approx(1.1, abs=0.3)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="no finished run"):
        scaling.report(tmp_path / "empty")


def test_too_few_sizes_are_shown_and_not_fitted(tmp_path):
    write_runs(tmp_path, variants=("mha", "dma"), sizes=2)
    scaling.report(tmp_path)
    assert "No fit" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["fit"] is None


def test_spread_over_seeds_is_pooled():
    runs = [("a", 1.0), ("a", 1.2), ("b", 5.0), ("b", 5.4), ("c", 9.0)]
    results = [{"size": size, "attention": "mha", "validation_loss": loss} for size, loss in runs]
    assert scaling.seed_spread(results) == pytest.approx(np.sqrt((0.02 + 0.08) / 2))
    assert scaling.seed_spread(results[-1:]) is None


@pytest.mark.slow
def test_a_ladder_stopped_and_continued(tmp_path, monkeypatch, capsys):
    base = small_config(tmp_path)
    base = replace(base, steps=6)
    sweep = ScalingSweep(sizes=((1, 16, 1),), variants=("mha", "swa"), head_dim=8, window=6, base=base)
    output = tmp_path / "ladder"

    class Soon:
        def __init__(self, minutes):
            self.left = 9 if minutes else 10**9

        @property
        def passed(self):
            self.left -= 1
            return self.left <= 0

    monkeypatch.setattr(scaling, "Deadline", Soon)
    assert scaling.run_ladder(sweep, output, 1.0) == 0
    first = json.loads((output / "results.json").read_text())["runs"]
    assert [run["name"] for run in first] == ["1x16_mha_s0"]
    assert "because time was up after step" in capsys.readouterr().out
    assert scaling.run_ladder(sweep, output, None) == 0
    runs = json.loads((output / "results.json").read_text())["runs"]
    assert len(runs) == 2
    assert runs[0] == first[0]
    assert "resuming from step" in capsys.readouterr().out
    assert scaling.run_ladder(sweep, output, None) == 0
    for run in runs:
        assert run["steps"] == 6
        assert run["tokens"] == 6 * 4 * 29
        assert 0 < run["attention_flops"] < run["flops"]
        assert run["validation_loss"] < 6
    other = replace(sweep, base=replace(base, optimizer=dataclasses.replace(base.optimizer, learning_rate=0.5)))
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate 0.01 -> 0.5; choose another --output"):
        scaling.run_ladder(other, output, None)


@dataclasses.dataclass(frozen=True)
class FakeCell:
    name: str
    rate: float = 0.1


def test_a_cell_is_its_process_s_until_its_result_is_written(tmp_path, capsys):
    cell, done, trained = FakeCell("a"), [], []

    def elsewhere(_):
        raise AssertionError("trained twice at once")

    def train(cell):
        # Another process comes by after the training, before the result.
        assert train_missing([cell], tmp_path, lambda cell: bool(done), elsewhere, Deadline(None)) == 0
        assert f"passed over: {tmp_path / 'a'} is in use by another process" in capsys.readouterr().out
        trained.append(cell.name)
        done.append(cell.name)
        return 0

    assert train_missing([cell], tmp_path, lambda cell: bool(done), train, Deadline(None)) == 0
    assert trained == ["a"]
    # One that looked before the result was there looks again once the cell is free.
    answers = iter([False, True])
    assert train_missing([cell], tmp_path, lambda cell: next(answers), elsewhere, Deadline(None)) == 0


def test_a_cell_that_diverged_is_a_result_and_not_trained_again(tmp_path, capsys):
    trained = []

    def train(cell):
        trained.append(cell.name)
        if cell.rate > 1:
            raise TrainingDivergedError(f"{cell.name}: 20 steps in a row")
        return 0

    def run(*cells):
        trained.clear()
        assert train_missing(cells, tmp_path, lambda cell: False, train, Deadline(None)) == 0
        return list(trained)

    assert run(FakeCell("a", 3.0), FakeCell("b")) == ["a", "b"]
    assert "diverged: a: 20 steps in a row" in capsys.readouterr().out
    assert run(FakeCell("a", 3.0), FakeCell("b")) == ["b"]
    assert "2 cells, 1 of them done" in capsys.readouterr().out
    assert run(FakeCell("a", 0.3)) == ["a"]
    assert [run["name"] for run in read_diverged(tmp_path)] == ["a"]
    write_runs(tmp_path, sizes=2)
    scaling.report(tmp_path, samples=2)
    assert "Diverged, and in no mean or fit (1 runs): a." in (tmp_path / "table.md").read_text()
    assert [run["said"] for run in json.loads((tmp_path / "results.json").read_text())["diverged"]] == [
        "a: 20 steps in a row"
    ]


def test_the_command_teaches_and_refuses_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["scaling", "--help"])
    assert "--sizes" in capsys.readouterr().out
    assert cli.main(["scaling", "--window", "1024", "--output", str(tmp_path)]) == 2
    assert "at least 4 windows" in capsys.readouterr().err
    assert cli.main(["scaling", "report", str(tmp_path)]) == 2
