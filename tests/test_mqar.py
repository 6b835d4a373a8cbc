"""Associative recall: the statistics of its examples, its model, a cell interrupted and continued, a sweep."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.mqar import SWEEPS
from dmattn_jax import nn
from dmattn_jax.oracle import visible_keys_oracle
from train import cli
from train.errors import ConfigError
from train.experiments import mqar_cell
from train.experiments.ablation_layers import LAYERS
from train.experiments.deadline import Deadline
from train.experiments.mqar_cell import train_cell
from train.experiments.mqar_config import CHANGES, GATE_BEGINS, GATE_RATES, MQARConfig, MQARSweep, resolve
from train.experiments.mqar_data import Examples, make_examples
from train.experiments.mqar_model import RecallModel
from train.experiments.mqar_plots import MOST_SNAPSHOTS, GateHistory, film_of
from train.experiments.mqar_step import TEST_SEED, epoch_rows, gate_measures, make_programs
from train.experiments.mqar_sweep import report, run_sweep
from train.metrics_file import read_metrics
from train.run_directory import RunDirectory

TINY = MQARConfig(
    length=22, pairs=5, dim=12, vocab_size=31, window=7, train_examples=53, test_examples=11, batch_size=5, epochs=3,
    eval_every=15, scan_steps=3, dtype="float32", learning_rate=1e-2,
)  # fmt: skip


def examples(config: MQARConfig, count: int, seed: int = 0) -> Examples:
    make = jax.jit(lambda: make_examples(config, jax.random.key(seed), jnp.arange(count)))
    return Examples(*map(np.asarray, make()))


def test_examples_are_pairs_then_the_keys_again_with_their_values_as_labels():
    config = resolve(dataclasses.replace(TINY, vocab_size=None))
    assert config.vocab_size == 23
    made, count = examples(config, 2000), 2000
    keys, values = made.tokens[:, 0:10:2], made.tokens[:, 1:10:2]
    for row in range(count):
        assert len(set(keys[row])) == len(set(values[row])) == len(set(made.position[row])) == 5
    # V = 23: keys in 1 … 10, values in 11 … 22, and each of them does occur
    assert set(np.unique(keys)) == set(range(1, 11))
    assert set(np.unique(values)) == set(range(11, 23))
    np.testing.assert_array_equal(made.value, values)
    np.testing.assert_array_equal(np.take_along_axis(made.tokens, made.position, axis=1), keys)
    assert set(np.unique(made.position)) == {10, 12, 14, 16, 18, 20}
    rest = np.ones_like(made.tokens, bool)
    rest[:, :10] = False
    np.put_along_axis(rest, made.position, False, axis=1)
    counts = np.bincount(made.tokens[rest], minlength=23)
    expected = rest.sum() / 23
    # chi-square with 22 degrees of freedom: 57 is beyond its 0.9999 quantile
    assert np.sum((counts - expected) ** 2 / expected) < 57
    again = examples(config, 3)
    np.testing.assert_array_equal(again.tokens, made.tokens[:3])
    assert (examples(config, 3, seed=1).tokens != again.tokens).any()


def test_gaps_are_drawn_without_replacement_from_the_power_law():
    config = resolve(dataclasses.replace(TINY, length=28, power=0.3))
    count = 40_000
    gaps = (examples(config, count).position - 10) // 2
    share = (np.arange(9) + 1.0) ** (0.3 - 1)
    share /= share.sum()
    second = [sum(share[a] * share[b] / (1 - share[a]) for a in range(9) if a != b) for b in range(9)]
    for drawn, expected in ((gaps[:, 0], share), (gaps[:, 1], np.array(second))):
        observed = np.bincount(drawn, minlength=9)
        # 8 degrees of freedom: 32 is beyond the 0.9999 quantile
        assert np.sum((observed - count * expected) ** 2 / (count * expected)) < 32


def test_an_epoch_has_every_example_once_in_an_order_of_its_own():
    config = resolve(TINY)
    key = jax.random.key(3)
    rows = jax.jit(lambda step: epoch_rows(config, key, step))
    # 53 examples are 10 batches of 5; calls of 3 steps do not divide them.
    numbers = np.concatenate([np.asarray(rows(jnp.int32(step))) for step in range(0, 30, 3)])
    assert numbers.shape == (30, 5)
    epochs = numbers.reshape(3, 50)
    for epoch in epochs:
        assert len(set(epoch)) == 50
        assert epoch.min() >= 0
        assert epoch.max() < 53
    assert (epochs[0] != epochs[1]).any()
    one_more = dataclasses.replace(config, scan_steps=13)
    np.testing.assert_array_equal(jax.jit(lambda: epoch_rows(one_more, key, jnp.int32(9)))(), numbers[9:22])


@pytest.mark.slow
def test_model_is_causal_and_learns():
    config = resolve(dataclasses.replace(TINY, attention="nsa", num_layers=1))
    model = RecallModel(config, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(examples(config, 3).tokens)
    call = nnx.jit(lambda model, tokens: model(tokens))
    before = np.asarray(call(model, tokens))
    after = np.asarray(call(model, tokens.at[:, 13:].add(1)))
    np.testing.assert_array_equal(after[:, :13], before[:, :13])
    assert (after[:, 13:] != before[:, 13:]).any()
    assert model.logits(jnp.asarray(before)).shape == (3, 22, 31)
    programs = make_programs(config)
    state, losses = programs.initial(), []
    for _ in range(programs.steps // 3):
        state, metrics = programs.train(state)
        losses += np.asarray(metrics["loss"]).tolist()
    assert losses[0] == pytest.approx(math.log(31), rel=0.3)
    assert np.mean(losses[-5:]) < 0.95 * losses[0]
    assert int(state.bad_steps) == 0


@pytest.mark.slow
def test_gate_measures_by_counting():
    config = resolve(dataclasses.replace(TINY, attention="dma", num_layers=2))
    model = RecallModel(config, rngs=nnx.Rngs(4))
    for layer, block in enumerate(model.blocks):
        block.attention.gate.A[...] = jnp.asarray([0.7 - layer])
        block.attention.gate.delta[...] *= 40
    made = examples(config, 4)

    @nnx.jit
    def measure(model):
        return gate_measures(config, model, made), model.gates(jnp.asarray(made.tokens))

    measured, gates = measure(model)
    for layer in range(2):
        visible = np.asarray(visible_keys_oracle(jnp.asarray(gates[layer]), config.window))[:, 0]
        key, value = (
            np.mean([[visible[b, made.position[b, i], 2 * i + o] for i in range(5)] for b in range(4)]) for o in (0, 1)
        )
        assert float(measured["key_visible"][layer]) == pytest.approx(key)
        assert float(measured["value_visible"][layer]) == pytest.approx(value)
        tied = [[list(row).count(gate) > 1 for gate in row] for row in gates[layer, ..., 0]]
        assert float(measured["ties"][layer]) == pytest.approx(np.mean(tied))
        assert float(measured["A"][layer]) == pytest.approx(abs(0.7 - layer), rel=1e-5)
    near = np.mean([[made.position[b, i] - 2 * i < 7 for i in range(5)] for b in range(4)])
    assert float(measured["in_window"][0]) == pytest.approx(near)
    assert 0 < near < 1
    model.blocks[0].attention.gate.A[...] = jnp.zeros(1)
    assert float(measure(model)[0]["ties"][0]) == 1


@pytest.mark.parametrize("change", [name for name in GATE_RATES if name not in GATE_BEGINS])
def test_a_gate_may_learn_at_another_rate(change):
    """One step from equal parameters: only the gate's go another way, and by that factor."""
    config = resolve(dataclasses.replace(TINY, num_layers=1, scan_steps=1, eval_every=1))

    def after_a_step(config):
        programs = make_programs(config)
        before = jax.device_get(programs.initial().params)
        state, _ = programs.train(programs.initial())
        return {name: np.asarray(value) - before[name] for name, value in state.params.items()}

    published, changed = after_a_step(config), after_a_step(dataclasses.replace(config, change=change))
    gate = "blocks.0.attention.gate.A"
    assert (published[gate] != 0).all()
    np.testing.assert_allclose(changed.pop(gate), GATE_RATES[change] * published.pop(gate), rtol=1e-5)
    for name, moved in published.items():
        # All move by 0.01 or so; two programs may round parameters of 1 otherwise, in their last bit.
        np.testing.assert_allclose(changed[name], moved, rtol=1e-5, atol=2**-22, err_msg=name)


def test_a_late_gate_learns_after_a_third_of_the_steps():
    programs = make_programs(resolve(dataclasses.replace(TINY, num_layers=1, change="late_gate")))
    assert programs.steps == 30
    state, moved = programs.initial(), []
    for _ in range(5):
        gate = np.array(state.params["blocks.0.attention.gate.A"])
        state, _ = programs.train(state)
        moved.append(bool((np.asarray(state.params["blocks.0.attention.gate.A"]) != gate).any()))
    assert moved == [False, False, False, True, True], "three steps a call, and ten that do not count"


def test_only_the_second_layer_s_gate_learns():
    programs = make_programs(resolve(dataclasses.replace(TINY, change="second_gate")))
    before = jax.device_get(programs.initial().params)
    after = programs.train(programs.initial())[0].params
    for layer, learns in ((0, False), (1, True)):
        for name in (f"blocks.{layer}.attention.gate.{part}" for part in ("A", "delta")):
            assert (np.asarray(after[name]) != before[name]).any() == learns


def test_a_gate_that_is_told_keeps_all_values_and_nothing_else():
    """Once as many values have passed as a query sees; before, the window's rest is the last other tokens."""
    config = resolve(dataclasses.replace(TINY, change="told_gate", window=5))
    programs = make_programs(config)
    trained = programs.train(programs.initial())[0].params
    model = programs.skeleton.merge(trained)
    gates = model.gates(jnp.asarray(examples(config, 3).tokens))
    assert (np.asarray(gates[0]) == 1).all()
    sees = np.asarray(visible_keys_oracle(gates[1], 5))[0, 0]
    for query in range(9, 22):
        assert np.flatnonzero(sees[query]).tolist() == [1, 3, 5, 7, 9]
    assert np.flatnonzero(sees[6]).tolist() == [1, 3, 4, 5, 6]


def test_a_gate_that_stays_still_is_a_sliding_window():
    """The control of the comparison: from equal parameters the two learn the same."""
    still, sliding = (
        make_programs(resolve(dataclasses.replace(TINY, dtype="float32", **changes)))
        for changes in ({"change": "still_gate"}, {"attention": "swa"})
    )
    begin = still.initial()
    # Training consumes what it is given.
    shared = {name: jnp.array(begin.params[name]) for name in sliding.initial().params}
    learned = still.train(begin)[0].params
    expected = sliding.train(dataclasses.replace(sliding.initial(), params=shared))[0].params
    assert set(learned) - set(expected) == {
        f"blocks.{n}.attention.gate.{name}" for n in (0, 1) for name in ("A", "delta")
    }
    for name, value in expected.items():
        np.testing.assert_allclose(learned[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("change", [name for name in CHANGES if name not in GATE_RATES])
def test_every_change_learns_and_draws_its_own_masks(change, tmp_path):
    config = resolve(dataclasses.replace(TINY, num_layers=1, change=change))
    assert config.window == (22 if change == "all_keys" else 7)
    assert (config.gate_step > 0) == (change == "margin")
    programs = make_programs(config)
    state, metrics = programs.train(programs.initial())
    assert np.isfinite(metrics["loss"]).all()
    assert int(state.bad_steps) == 0
    model = programs.skeleton.merge(state.params)
    layer = model.blocks[0].attention
    assert isinstance(layer, LAYERS.get(change, nn.DynamicMaskAttention))
    assert layer.gate.activation == ("linear" if change == "linear_gate" else "exp")
    expiry = np.asarray(programs.look(state.params)["expiry"])
    gates = model.gates(jnp.asarray(examples(config, 5, TEST_SEED).tokens))[0]
    np.testing.assert_array_equal(expiry[0], layer.lifetimes(gates)[0, :, 0])
    history = GateHistory(tmp_path / "gates.npz", until=0)
    history.add(3, np.asarray(gates[:1, :, 0]))
    assert film_of(history, config, model)["expiry"] == [[" ".join(map(str, expiry[0]))]]
    if change == "all_keys":
        assert (expiry == 22).all()
    if change == "half_recent":
        assert (expiry >= np.minimum(np.arange(22) + 3, 22)).all()


class Calls:
    """A deadline that passes at its n-th question."""

    def __init__(self, number: int) -> None:
        self.left = number

    @property
    def passed(self) -> bool:
        self.left -= 1
        return self.left <= 0


def test_a_cell_has_its_numbers_and_is_not_trained_twice(tmp_path):
    config = resolve(dataclasses.replace(TINY, attention="swa", num_layers=1, epochs=1, eval_every=9, target=1e-9))
    assert make_programs(config).steps == 12
    assert make_programs(dataclasses.replace(config, steps=4)).steps == 6, "whole calls of three steps"
    assert make_programs(dataclasses.replace(config, steps=40)).steps == 12
    result = train_cell(config, tmp_path, Deadline(None)).result
    assert result is not None
    # The first test reaches so low a target.
    assert (result["stopped"], result["steps"]) == ("target", 9)
    assert result["config"] == dataclasses.asdict(config)
    assert json.loads((tmp_path / config.name / "result.json").read_text()) == result
    assert train_cell(config, tmp_path, Calls(1)).result == result
    # What a folder from before a field does not say about it is that it was at its default.
    saved = tmp_path / config.name / "config.json"
    before = json.loads(saved.read_text())
    del before["change"]
    saved.write_text(json.dumps(before))
    assert train_cell(config, tmp_path, Calls(1)).result == result
    with pytest.raises(ConfigError, match=r"learning_rate 0.01 -> 0.02; choose another --output"):
        train_cell(dataclasses.replace(config, learning_rate=0.02), tmp_path, Deadline(None))


@pytest.mark.slow
def test_a_cell_stopped_and_continued_is_the_cell_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(mqar_cell, "SECONDS_BETWEEN_SAVES", 0.0)
    config = resolve(dataclasses.replace(TINY, num_layers=1))
    whole = train_cell(config, tmp_path / "whole", Deadline(None)).result
    # Stopped in the second epoch, and between two tests; the checkpoint of the first test is older.
    first = train_cell(config, tmp_path / "parts", Calls(6))
    assert first.result is None
    assert (tmp_path / "parts" / config.name / "checkpoints" / "18").is_dir()
    folder = tmp_path / "parts" / config.name
    session = mqar_cell._Session(config, RunDirectory(folder))
    session.close()
    # What was trained between the last test and the stop took time too.
    assert session.seconds > float(read_metrics(folder / "metrics.csv")[-1]["seconds"])
    parts = train_cell(config, tmp_path / "parts", Deadline(None)).result
    timed = train_cell(dataclasses.replace(config, minutes=1e-9), tmp_path / "short", Deadline(None)).result
    assert whole is not None
    assert whole["stopped"] == "epochs"
    assert whole["steps"] == 30
    assert (timed["stopped"], timed["steps"]) == ("time", 3)
    # A row says what its tests said; the mean loss of a row cut by the stop has lost its first part.
    assert [row["accuracy"] for row in parts["history"]] == [row["accuracy"] for row in whole["history"]]
    assert (parts["test_loss"], parts["measures"]) == (whole["test_loss"], whole["measures"])
    assert [row["step"] for row in parts["history"]] == [15, 30]
    assert {path.name for path in (folder / "plots").iterdir()} == {
        "training.png", "gates.png", "masks.png", "film.png",
    }  # fmt: skip
    film = parts["film"]
    assert film == whole["film"]
    assert (film["steps"], film["stride"]) == ([15, 30], 1)
    assert not (folder / "checkpoints").exists()
    rows = read_metrics(folder / "metrics.csv")
    assert {"key_visible_0", "ties_0", "A_0"} <= set(rows[0])
    with np.load(folder / "gates.npz") as saved:
        assert saved["steps"].tolist() == [15, 30]
        assert saved["gates"].shape == (2, 1, 22)


def test_gate_history_stays_small_and_forgets_what_runs_again(tmp_path):
    path = tmp_path / "gates.npz"
    history = GateHistory(path, until=0)
    for step in range(1, 201):
        history.add(step, np.full((2, 4), step))
    history.save()
    assert len(history.steps) <= MOST_SNAPSHOTS
    assert set(np.diff(history.steps)) == {4}
    config = resolve(dataclasses.replace(TINY, length=4, pairs=1, window=2))
    film = film_of(history, config, RecallModel(config, rngs=nnx.Rngs(0)))
    assert len(film["steps"]) == 6
    assert film["steps"][0] == 1
    # Equal gates: the last two keys.
    assert film["expiry"] == [["2 3 4 4"] * 2] * 6
    again = GateHistory(path, until=101)
    assert again.steps == [step for step in history.steps if step <= 101]
    again.add(again.steps[-1] + 4, np.zeros((2, 4)))
    assert set(np.diff(again.steps)) == {4}


def test_the_papers_sweep_is_its_recipe():
    cells = SWEEPS["paper"].cells()
    assert len(cells) == 4 * 4 * 5
    assert len({cell.name for cell in cells}) == len(cells)
    by = {(cell.length, cell.dim): cell for cell in cells}
    assert {length: by[length, 32].batch_size for length in (1024, 2048, 4096, 8192)} == {
        1024: 64, 2048: 32, 4096: 16, 8192: 8,
    }  # fmt: skip
    rates = {dim: by[1024, dim].learning_rate for dim in (32, 64, 128, 256)}
    assert rates == pytest.approx({32: 4e-4, 64: 3e-4, 128: 2e-4, 256: 1e-4})
    assert {by[length, 32].pairs for length in (2048, 4096, 8192)} == {512}
    assert by[1024, 32].pairs == 256
    assert {cell.window for cell in cells} == {512}
    assert all(cell.vocab_size == cell.length + 1 for cell in cells)
    assert (cells[0].train_examples, cells[0].test_examples, cells[0].epochs) == (250_000, 1_000, 100)
    for sweep in SWEEPS.values():
        assert sweep.cells()


def finished(attention: str, dim: int, seed: int, accuracy: float, stopped: str) -> dict:
    config = resolve(MQARConfig(attention=attention, length=64, pairs=4, dim=dim, seed=seed))  # type: ignore[arg-type]
    history = [{"step": step, "accuracy": step / 30 * accuracy, "loss": 1.0} for step in (10, 20, 30)]
    return {
        "name": config.name, "config": dataclasses.asdict(config), "accuracy": accuracy, "stopped": stopped,
        "history": history,
    }  # fmt: skip


def test_report_is_the_mean_and_spread_of_the_cells_that_are_done(tmp_path):
    cells = [
        finished("mha", 32, 0, 0.5, "epochs"),
        finished("mha", 32, 1, 0.75, "target"),
        finished("mha", 32, 2, 0.1, "epochs"),
        finished("dma", 64, 0, 0.25, "time"),
    ]
    for cell in cells:
        (tmp_path / cell["name"]).mkdir()
        (tmp_path / cell["name"] / "result.json").write_text(json.dumps(cell))
    report(tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "| width | attention | 64 (4 pairs) |"
    assert lines[2:4] == ["| 32 | MHA | 0.450 ± 0.328 |", "| 64 | DMA | 0.250* |"]
    assert "stopped by its minutes" in lines[5]
    assert lines[-2:] == ["| 32 | MHA | 20, 30, never |", "| 64 | DMA | never |"]
    assert json.loads((tmp_path / "results.json").read_text()) == sorted(cells, key=lambda cell: cell["name"])
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="no finished cell"):
        report(tmp_path / "empty")


def test_changes_are_cells_of_dma_alone_and_rows_of_their_own(tmp_path):
    sweep = MQARSweep(
        lengths=(64,), pairs=(4,), dims=(32,), variants=("swa", "dma"), changes=("none", "margin", "slow_gate")
    )
    cells = sweep.cells()
    assert [cell.name for cell in cells] == [
        "swa_L64_n4_d32_s0", "dma_L64_n4_d32_s0", "dma_margin_L64_n4_d32_s0", "dma_slow_gate_L64_n4_d32_s0",
    ]  # fmt: skip
    for number, cell in enumerate(cells):
        result = {
            "name": cell.name, "config": dataclasses.asdict(cell), "accuracy": number / 4, "stopped": "epochs",
            "steps": 10 + number, "history": [{"step": 5, "accuracy": 0.1, "loss": 1.0}],
            "tokens_per_second": 1e6 * (number + 1), "device": "cpu", "sharing": 1,
        }  # fmt: skip
        if cell.attention == "swa":
            # A cell from before there were changes.
            del result["config"]["change"]
        (tmp_path / cell.name).mkdir()
        (tmp_path / cell.name / "result.json").write_text(json.dumps(result))
    report(tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2:6] == [
        "| 32 | SWA | 0.000 |", "| 32 | DMA | 0.250 |",
        "| 32 | DMA, slow_gate | 0.750 |", "| 32 | DMA, margin | 0.500 |",
    ]  # fmt: skip
    assert "- slow_gate: the gate's two parameters learn at 0.1 times the rate" in lines
    assert "- margin: δ rounded to multiples of 0.1 (gate_step)" in lines
    assert "| 64 tokens, width 32 | 1,000 | 2,000 | 4,000 | 3,000 |" in lines
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_a_sweep_passes_over_a_cell_that_another_process_trains(tmp_path, capsys):
    sweep = MQARSweep(
        lengths=(64,), pairs=(4,), dims=(32,), variants=("mha",), cell=dataclasses.replace(TINY, window=5)
    )
    (cell,) = sweep.cells()
    other = RunDirectory(tmp_path / cell.name)
    other.lock()
    try:
        assert run_sweep(sweep, tmp_path, None) == 0
    finally:
        other.unlock()
    assert "is in use by another process" in capsys.readouterr().out


def test_a_sweep_trains_what_is_missing_and_continues(tmp_path, monkeypatch):
    asked = []

    def train(cell, output, deadline):
        asked.append(cell.name)
        result = finished(cell.attention, cell.dim, cell.seed, 0.5, "epochs")
        (output / cell.name).mkdir(exist_ok=True)
        (output / cell.name / "result.json").write_text(json.dumps(result))
        return mqar_cell.CellOutcome(result)

    monkeypatch.setattr("train.experiments.mqar_sweep.train_cell", train)
    sweep = MQARSweep(lengths=(64,), pairs=(4,), dims=(32,), variants=("mha", "dma"), seeds=(0, 1))
    assert run_sweep(dataclasses.replace(sweep, seeds=(1,)), tmp_path, None) == 0
    assert run_sweep(sweep, tmp_path, None) == 0
    assert asked == [
        "mha_L64_n4_d32_s1", "dma_L64_n4_d32_s1", "mha_L64_n4_d32_s0", "dma_L64_n4_d32_s0",
    ]  # fmt: skip
    asked.clear()
    assert run_sweep(dataclasses.replace(sweep, seeds=(2,)), tmp_path, 1e-9) == 0
    assert asked == []


@pytest.mark.slow
def test_an_easy_cell_is_learned(tmp_path):
    """Dense attention solves it within a minute on a CPU; who only knows which 8 values are there has 1 of 8."""
    (cell,) = dataclasses.replace(SWEEPS["smoke"], variants=("mha",)).cells()
    result = train_cell(cell, tmp_path, Deadline(None)).result
    assert result is not None
    assert result["stopped"] == "target"
    assert result["accuracy"] >= 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": 6}, "length must be even and at least 4 * pairs, got length 22 with 6 pairs: use at most 5 pairs"),
        ({"vocab_size": 11}, "vocab-size must leave 5 distinct keys below its half, got 11: use at least 12"),
        ({"dim": 6}, "dim must be a multiple of 4, got 6"),
        ({"scan_steps": 4}, "scan-steps must divide eval-every, got 4 and 15"),
        ({"train_examples": 3}, "train-examples must be at least one batch of 5, got 3"),
        ({"seed": 2**32}, "seed must be <= 4294967295, got 4294967296"),
        ({"minutes": 0.0}, "minutes must be > 0, got 0.0"),
        ({"length": 0}, "length must be >= 1, got 0"),
        ({"attention": "swa", "change": "margin"}, "change is of dma, got margin of swa"),
    ],
)
def test_impossible_cells_are_refused(changes, message):
    with pytest.raises(ConfigError) as refused:
        resolve(dataclasses.replace(TINY, **changes))
    assert str(refused.value) == message


def test_the_command_teaches_and_refuses_in_one_line(tmp_path, capsys):
    assert cli.main(["mqar", "sweep"]) == 0
    assert "dmattn mqar sweep paper" in capsys.readouterr().out
    assert cli.main(["mqar", "sweep", "papers"]) == 2
    assert "unknown sweep 'papers': name one of paper, zoology, smoke" in capsys.readouterr().err
    assert cli.main(["mqar", "--length", "64", "--pairs", "17", "--output", str(tmp_path)]) == 2
    assert "use at most 16 pairs" in capsys.readouterr().err
    assert cli.main(["mqar", "--length", "64", "--max-minutes", "0", "--output", str(tmp_path)]) == 2
    assert "max-minutes must be > 0" in capsys.readouterr().err
    assert cli.main(["mqar", "report", str(tmp_path)]) == 2
