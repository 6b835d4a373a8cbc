"""Ablations: other layers against the oracle, distances by counting, cells that differ in what they say alone."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_run import small_config

from dmattn_jax.models import DogeConfig
from dmattn_jax.oracle import visible_keys_oracle
from train import cli
from train.errors import ConfigError
from train.experiments import ablation
from train.experiments.ablation_config import NAMES, AblationSweep
from train.experiments.ablation_layers import (
    EarlierFirstAttention,
    HalfRecentAttention,
    HiddenGateAttention,
    earlier_first,
)
from train.experiments.ablation_measures import distance_edges, measure_distances
from train.parameters import skeleton_of

CONFIG = DogeConfig(
    vocab_size=61, hidden_size=40, intermediate_size=22, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=10,
    window=5, dtype="float32", init_std=0.3,
)  # fmt: skip
SEGMENTS = np.array([[1] * 17 + [2] * 9 + [0] * 3, [1] * 29], np.int32)


def random_gates(attention) -> None:
    """A gate that has left its start, with few different values, so that many are equal."""
    attention.gate.A[...] = jnp.asarray([0.9, -0.7], jnp.float32)
    # Small, for a δ of 2^40 leaves nothing of q·k in float32.
    shape = attention.gate.delta[...].shape
    attention.gate.delta[...] = jnp.round(3 * jax.random.normal(jax.random.key(2), shape)) / 8


def test_of_equal_gates_the_earlier_is_kept():
    random = np.random.default_rng(0)
    gate = random.integers(0, 4, (2, 29, 3)).astype(np.float32)
    gate[0, 3] = -np.inf
    ranked = np.asarray(earlier_first(jnp.asarray(gate)))
    visible = np.asarray(visible_keys_oracle(jnp.asarray(ranked), 5, segment_ids=jnp.asarray(SEGMENTS)))
    for row, head, query in itertools.product(range(2), range(3), range(29)):
        allowed = [j for j in range(query + 1) if SEGMENTS[row, j] == SEGMENTS[row, query] != 0]
        allowed = [j for j in allowed if gate[row, j, head] > -np.inf]
        expected = sorted(allowed, key=lambda j: (-gate[row, j, head], j))[:5]
        assert set(np.flatnonzero(visible[row, head, query])) == set(expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_every_ablated_model_has_a_loss_and_gradients(name, packed):
    skeleton = skeleton_of(CONFIG, lambda rngs: ablation.make_model(name)(CONFIG, rngs=rngs))
    params = jax.eval_shape(lambda: skeleton.initialize(0))
    tokens, segments = jax.ShapeDtypeStruct((2, 29), jnp.int32), jnp.asarray(SEGMENTS) if packed else None

    def loss(params, tokens):
        return skeleton.merge(params).loss(tokens, tokens, segments).loss

    # Traced alone: what could differ between layers is the program.
    value, gradients = jax.eval_shape(jax.value_and_grad(loss), params, tokens)
    assert value.shape == ()
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, params)


def mask_of(layer, gates) -> np.ndarray:
    """[B, K, T, S]: who sees whom, by the layer's own rule, counted key by key."""
    windows, gates = layer.windows, np.asarray(gates)
    visible = np.asarray(visible_keys_oracle(jnp.asarray(gates), windows, segment_ids=jnp.asarray(SEGMENTS)))
    if not isinstance(layer, HalfRecentAttention):
        return visible
    visible = np.zeros_like(visible)
    for row, head, query in np.ndindex(visible.shape[:3]):
        allowed = [j for j in range(query + 1) if SEGMENTS[row, j] == SEGMENTS[row, query] != 0]
        recent = windows[head] // 2
        chosen = sorted(allowed, key=lambda j, row=row, head=head: (gates[row, j, head], j))
        seen = {*chosen[recent - windows[head] :], *[j for j in allowed if j > query - recent]}
        visible[row, head, query, sorted(seen)] = True
    return visible


@pytest.mark.parametrize(
    "kind",
    [EarlierFirstAttention, HalfRecentAttention, pytest.param(HiddenGateAttention, marks=pytest.mark.slow)],
)
def test_layers_are_the_oracle_and_know_no_future(kind):
    layer = kind(40, 4, 2, 10, window=(5, 7), init_std=0.3, rngs=nnx.Rngs(1))
    random_gates(layer)
    x = jax.random.normal(jax.random.key(3), (2, 29, 40))
    x = x.at[0, 4].set(x[0, 2]).at[1, 20].set(x[1, 6])
    call = nnx.jit(lambda layer, x: layer(x, jnp.asarray(SEGMENTS)))
    out = np.asarray(call(layer, x))

    @nnx.jit
    def parts(layer, x):
        from dmattn_jax.documents import document_positions

        query, key, value = layer._project(x, document_positions(jnp.asarray(SEGMENTS), 29))
        gate = layer.gates(x) if kind is HiddenGateAttention else layer.gate(value)
        return query, key, value, gate, layer.gates(x)

    query, key, value, gate, ranked = parts(layer, x)
    visible = mask_of(layer, ranked)
    assert visible.any(-1).sum() == 2 * (SEGMENTS != 0).sum()
    expiry = np.asarray(layer.lifetimes(ranked, jnp.asarray(SEGMENTS)))
    seen_last = 1 + np.where(visible, np.arange(29)[:, None], -1).max(axis=2)
    np.testing.assert_array_equal(seen_last.transpose(0, 2, 1), np.where(expiry > np.arange(29)[:, None], expiry, 0))
    visible = np.repeat(visible, 2, axis=1)
    wide = [np.repeat(np.asarray(part, np.float64), 2, axis=2) for part in (key, value)]
    logits = np.einsum("bthd,bshd->bhts", np.asarray(query, np.float64), wide[0]) / np.sqrt(10)
    logits += np.repeat(np.asarray(gate, np.float64), 2, axis=2).transpose(0, 2, 1)[:, :, None]
    logits = np.where(visible, logits, -1e9)
    weights = np.where(visible, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    heads = np.einsum("bhts,bshd->bthd", weights, wide[1])
    expected = np.einsum("bthd,hdm->btm", heads, np.asarray(layer.out[...], np.float64))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    assert not out[SEGMENTS == 0].any()
    later = np.asarray(call(layer, x.at[:, 13:].add(1)))
    np.testing.assert_array_equal(later[:, :13], out[:, :13])
    assert (later[:, 13:17] != out[:, 13:17]).any()
    with pytest.raises(NotImplementedError, match="is trained and measured on whole texts"):
        layer.decode(x, None)


def test_before_training_earlier_ties_are_the_first_keys_and_dma_a_window():
    gate = jnp.ones((1, 29, 1))
    visible = np.asarray(visible_keys_oracle(earlier_first(gate), 5))[0, 0]
    np.testing.assert_array_equal(np.flatnonzero(visible[20]), range(5))


@pytest.mark.parametrize(
    "name", ["swa", "earlier_ties", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dma", "hidden_gate"))]
)
def test_distances_by_counting(name):
    config = dataclasses.replace(CONFIG, attention="swa" if name == "swa" else "dma", num_layers=1)
    make = ablation.make_model(name)
    skeleton = skeleton_of(config, lambda rngs: make(config, rngs=rngs))
    params = skeleton.initialize(4)
    if name != "swa":
        shape = params["blocks.attention.gate.delta"].shape
        params["blocks.attention.gate.A"] = jnp.asarray([[0.9, -0.7]])
        params["blocks.attention.gate.delta"] = 3 * jax.random.normal(jax.random.key(5), shape)
    tokens = np.random.default_rng(1).integers(0, 61, (2, 29)).astype(np.int32)
    found = measure_distances(skeleton, params, tokens, SEGMENTS)
    assert found["edges"] == distance_edges(29) == [0, 1, 2, 4, 8, 16]
    assert found["queries"] == 12 + 4 + 24
    np.testing.assert_allclose(np.sum(found["visible"], -1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.sum(found["weight"], -1), 1, rtol=1e-6)
    if name == "swa":
        np.testing.assert_allclose(found["visible"][0], [[0.2, 0.2, 0.4, 0.2, 0, 0]] * 2, rtol=1e-6)
        assert found["far_visible"] == found["far_weight"] == [[0.0, 0.0]]
        return
    model = skeleton.merge(params)
    gates = model.gates(jnp.asarray(tokens), jnp.asarray(SEGMENTS))[0]
    visible = np.asarray(visible_keys_oracle(gates, 5, segment_ids=jnp.asarray(SEGMENTS)))
    far = pairs = np.zeros(2)
    for row, query in itertools.product(range(2), range(29)):
        start = 17 if row == 0 and query >= 17 else 0
        if SEGMENTS[row, query] and query - start >= 5:
            seen = visible[row, :, query]
            pairs = pairs + seen.sum(-1)
            far = far + seen[:, : query - 4].sum(-1)
    np.testing.assert_allclose(found["far_visible"][0], far / pairs, rtol=1e-6)
    assert 0 < max(found["far_weight"][0]) < 1


def test_cells_differ_in_what_they_ablate_alone(tmp_path):
    sweep = AblationSweep(seeds=(0, 3), width=512)
    cells = sweep.cells(tmp_path)
    assert [cell.name for cell in cells] == [f"{name}_s{seed}" for seed in (0, 3) for name in NAMES]
    plain = cells[0].train
    for cell in cells[: len(NAMES)]:
        assert (cell.train.steps, cell.train.batch_size, cell.train.seed) == (plain.steps, plain.batch_size, 0)
        assert cell.train.optimizer == plain.optimizer
        before, after = (dataclasses.asdict(one.model) for one in (cells[0].train, cell.train))
        changed = {name for name in before if before[name] != after[name]}
        assert changed <= {"attention", "gate_activation", "window", "gate_step"}
        assert len(changed) == (cell.ablation in ("swa", "linear_gate", "windows", "margin", "all_keys", "mha"))
    windows = next(cell for cell in cells if cell.ablation == "windows").train.model.window
    assert windows == (128, 213, 299, 384)
    assert next(cell for cell in cells if cell.ablation == "all_keys").train.model.window == plain.sequence_length
    assert sum(windows) == 4 * 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 513}, "at most a fourth of the sequence length 2048, got 513"),
        ({"width": 128}, "width must be at least 256 for windows of two sizes"),
        ({"width": 100}, "width must be a multiple of 2"),
        ({"seeds": ()}, "seeds must not be empty"),
    ],
)
def test_impossible_sweeps_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        AblationSweep(**changes).cells(tmp_path)


@pytest.mark.slow
def test_runs_have_their_numbers_and_are_not_trained_twice(tmp_path, capsys):
    base = dataclasses.replace(small_config(tmp_path), steps=5)
    sweep = AblationSweep(
        ablations=("dma", "earlier_ties", "all_keys", "mha"),
        seeds=(0,),
        layers=1,
        width=16,
        head_dim=4,
        window=7,
        base=base,
    )
    output = tmp_path / "ablation"
    assert ablation.run_ablations(sweep, output, None) == 0
    first = (output / "results.json").read_text()
    assert ablation.run_ablations(sweep, output, None) == 0
    assert "4 cells, 4 of them done" in capsys.readouterr().out
    assert (output / "results.json").read_text() == first
    results = {result["variant"]: result for result in json.loads(first)}
    assert set(results) == {"dma", "earlier_ties", "all_keys", "mha"}
    # Where every key is seen there is nothing to measure or to draw.
    assert [name for name in results if "distances" in results[name]] == ["dma", "earlier_ties"]
    assert len(results["earlier_ties"]["mask"]["expiry"][0]) == 2
    assert results["dma"]["text"].startswith(str(tmp_path))
    table = (output / "table.md").read_text()
    assert table.count("\n| dma |") == 1
    assert "| thousand tokens/s | dma | earlier_ties | all_keys | mha |" in table
    for picture in ("ablation.png", "masks.png"):
        assert (output / picture).stat().st_size > 5_000
    assert not (output / "dma_s0" / "checkpoints").exists()


def test_the_command_teaches_and_refuses_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["ablation", "--help"])
    assert "--ablations" in capsys.readouterr().out
    assert cli.main(["ablation", "--window", "1024", "--output", str(tmp_path)]) == 2
    assert "at most a fourth" in capsys.readouterr().err
    assert cli.main(["ablation", "report", str(tmp_path)]) == 2
    assert cli.main(["ablation", "--jobs", "0", "--output", str(tmp_path), "--vocab-size", "0"]) == 2
    assert "jobs must be >= 1, got 0" in capsys.readouterr().err
