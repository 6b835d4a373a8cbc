"""Schedules, weight decay, the step law, accumulation, and steps that must not count."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmattn_jax.models.config import DogeConfig
from train import step
from train.config import OptimizerConfig, TrainConfig
from train.errors import ConfigError
from train.optimizer import make_optimizer, make_schedule, step_law_batch_tokens, step_law_learning_rate, validate
from train.parameters import make_skeleton
from train.resolve import resolve

MODEL = DogeConfig(
    vocab_size=31,
    hidden_size=12,
    intermediate_size=20,
    num_layers=3,
    num_heads=2,
    num_kv_heads=2,
    head_dim=6,
    window=5,
    dtype="float32",
)


def test_wsd_at_exact_steps():
    schedule = make_schedule(OptimizerConfig(schedule="wsd"), 0.5, 1000)
    expected = {0: 0.5 / 100, 49: 0.25, 99: 0.5, 100: 0.5, 899: 0.5, 900: 0.5, 950: 0.25, 999: 0.005, 1000: 0.0}
    for at, rate in expected.items():
        assert float(schedule(at)) == pytest.approx(rate, rel=1e-5, abs=1e-9), at


def test_wsd_ends_at_min_ratio():
    schedule = make_schedule(OptimizerConfig(schedule="wsd", min_ratio=0.2), 0.5, 1000)
    assert float(schedule(1000)) == pytest.approx(0.1, rel=1e-5)


def test_cosine_at_exact_steps():
    schedule = make_schedule(OptimizerConfig(schedule="cosine", min_ratio=0.1), 2.0, 1000)
    expected = {0: 0.02, 99: 2.0, 100: 2.0, 550: 1.1, 1000: 0.2}
    for at, rate in expected.items():
        assert float(schedule(at)) == pytest.approx(rate, rel=1e-4), at


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 11])
def test_schedules_of_few_steps_are_positive_and_never_above_the_peak(kind, steps):
    schedule = make_schedule(OptimizerConfig(schedule=kind), 0.3, steps)
    rates = [float(schedule(at)) for at in range(steps)]
    assert all(0 < rate <= 0.3 + 1e-6 for rate in rates), rates


def test_without_warmup_the_first_step_has_the_peak():
    assert float(make_schedule(OptimizerConfig(warmup_fraction=0.0), 0.5, 100)(0)) == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"warmup_fraction": 0.7, "decay_fraction": 0.7}, "must be <= 1"),
        ({"warmup_fraction": -0.1}, "warmup_fraction"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"clip_norm": float("nan")}, "clip_norm"),
        ({"max_bad_steps": 0}, "max_bad_steps"),
    ],
)
def test_impossible_numbers_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        validate(replace(OptimizerConfig(), **changes))


def test_what_decays_by_path():
    mask = make_skeleton(MODEL).decay_mask()
    assert {name for name, decays in mask.items() if decays} == {
        "embedding",
        "blocks.attention.query",
        "blocks.attention.key",
        "blocks.attention.value",
        "blocks.attention.out",
        "blocks.mlp.gate_projection",
        "blocks.mlp.up_projection",
        "blocks.mlp.down_projection",
    }
    assert {name for name, decays in mask.items() if not decays} == {
        "norm.weight",
        "blocks.attention_norm.weight",
        "blocks.mlp_norm.weight",
        "blocks.attention.query_norm.weight",
        "blocks.attention.key_norm.weight",
        "blocks.attention_residual",
        "blocks.mlp_residual",
        "blocks.attention.gate.A",
        "blocks.attention.gate.delta",
    }


def test_experts_and_an_untied_table_decay():
    mask = make_skeleton(replace(MODEL, num_experts=16, num_experts_per_token=3, tie_embeddings=False)).decay_mask()
    for name in ("unembedding", "blocks.mlp.router", "blocks.mlp.expert_down", "blocks.mlp.expert_up"):
        assert mask[name], name


def test_decay_reaches_exactly_the_masked_parameters():
    skeleton = make_skeleton(MODEL)
    params = {name: np.ones(shape.shape, np.float32) for name, shape in skeleton.shapes.items()}
    mask = skeleton.decay_mask()
    config = OptimizerConfig(weight_decay=0.5)
    optimizer = make_optimizer(config, optax.constant_schedule(0.1), mask)
    zeros = jax.tree.map(np.zeros_like, params)
    updates = jax.jit(lambda params: optimizer.update(zeros, optimizer.init(params), params)[0])(params)
    for name, update in updates.items():
        np.testing.assert_allclose(update, -0.05 if mask[name] else 0.0, rtol=1e-6, err_msg=name)


def test_step_law_numbers():
    # 1.79·N^−0.713·D^0.307 and 0.58·D^0.571, computed by hand with logarithms
    assert step_law_learning_rate(1e8, 2e9) == pytest.approx(0.0025367, rel=1e-3)
    assert step_law_batch_tokens(2e9) == pytest.approx(118_663, rel=1e-3)


def test_auto_is_the_step_law_at_20_tokens_a_parameter():
    config = TrainConfig(
        model=MODEL,
        optimizer=OptimizerConfig(learning_rate="auto"),
        batch_size="auto",
        steps="auto",
        sequence_length=11,
    )
    plan = resolve(config, shards=2)
    parameters = MODEL.num_parameters(embeddings=False)
    assert plan.tokens == plan.steps * plan.batch_size * 11
    assert 20 * parameters <= plan.tokens < 20 * parameters + plan.batch_size * 11
    assert plan.batch_size % 2 == 0
    assert abs(plan.batch_size * 11 - step_law_batch_tokens(20 * parameters)) <= 11
    assert plan.learning_rate == pytest.approx(step_law_learning_rate(parameters, plan.tokens))


def test_auto_batch_with_given_steps_solves_the_step_law():
    plan = resolve(TrainConfig(model=MODEL, batch_size="auto", steps=4001, sequence_length=13), shards=1)
    assert plan.batch_size * 13 == pytest.approx(step_law_batch_tokens(plan.tokens), rel=0.05)


@pytest.fixture(scope="module")
def machinery():
    """(skeleton, optimizer, a state, a batch of 6 rows with unequal numbers of targets)."""
    skeleton = make_skeleton(MODEL)
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(0.05), skeleton.decay_mask())
    state = jax.jit(lambda: step.make_state(skeleton.initialize(3), optimizer))()
    generator = np.random.default_rng(5)
    tokens = generator.integers(0, 31, (6, 17)).astype(np.int32)
    targets = np.roll(tokens, -1, axis=1)
    targets[:, -1] = -1
    targets[1, 3:] = -1
    targets[4, :] = -1
    batch = {"tokens": tokens, "targets": targets, "segment_ids": np.ones_like(tokens)}
    return skeleton, optimizer, state, {name: jnp.asarray(array) for name, array in batch.items()}


@pytest.fixture(scope="module")
def whole_batch(machinery):
    skeleton, _, state, batch = machinery
    return jax.jit(lambda params, batch: step.loss_and_gradients(skeleton, params, batch, 1))(state.params, batch)


def test_accumulation_equals_the_big_batch(machinery, whole_batch):
    skeleton, _, state, batch = machinery
    losses, gradients = whole_batch
    in_parts = jax.jit(lambda params, batch: step.loss_and_gradients(skeleton, params, batch, 3))
    parts, summed = in_parts(state.params, batch)
    assert float(parts["cross_entropy"]) == pytest.approx(float(losses["cross_entropy"]), rel=1e-6)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(summed[name], gradient, rtol=2e-4, atol=1e-7, err_msg=name)


def test_microbatches_keep_every_row_once(machinery):
    batch = machinery[3]
    parts = step.split_microbatches(batch, 3)["tokens"]
    assert parts.shape == (3, 2, 17)
    np.testing.assert_array_equal(np.sort(parts.reshape(6, 17), axis=0), np.sort(batch["tokens"], axis=0))


def test_loss_is_the_mean_over_all_targets(machinery, whole_batch):
    skeleton, _, state, batch = machinery
    logits = jax.jit(lambda params: skeleton.merge(params)(batch["tokens"], batch["segment_ids"]))(state.params)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(batch["targets"], 0)[..., None], -1)[..., 0]
    counted = batch["targets"] >= 0
    expected = -float(jnp.sum(jnp.where(counted, chosen, 0)) / counted.sum())
    assert float(whole_batch[0]["cross_entropy"]) == pytest.approx(expected, rel=1e-5)


def _bitwise_equal(one, other):
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True), one, other)
    return all(jax.tree.leaves(same))


@pytest.mark.parametrize("where", ["loss", "gradient nan", "gradient inf"])
def test_a_bad_step_changes_nothing_but_the_counters(machinery, where):
    _, optimizer, state, _ = machinery
    gradients = jax.tree.map(np.ones_like, state.params)
    apply = jax.jit(lambda *arguments: step.apply_gradients(*arguments, optimizer))
    losses = {"cross_entropy": jnp.float32(2), "auxiliary": jnp.float32(0)}
    state, _ = apply(state, gradients, losses)
    if where == "loss":
        losses = losses | {"cross_entropy": jnp.float32("nan")}
    else:
        poison = float(where.split()[1])
        # A copy: the step before may still be reading the arrays it was given.
        gradients = gradients | {"norm.weight": gradients["norm.weight"].copy()}
        gradients["norm.weight"][5] = poison
    after, metrics = apply(state, gradients, losses)
    assert _bitwise_equal(after.params, state.params)
    assert _bitwise_equal(after.optimizer, state.optimizer)
    assert (int(after.step), int(after.bad_steps), int(after.bad_in_row)) == (2, 1, 1)
    assert int(metrics["bad_steps"]) == 1

    finite = {"cross_entropy": jnp.float32(2), "auxiliary": jnp.float32(0)}
    recovered, _ = apply(after, jax.tree.map(np.ones_like, state.params), finite)
    assert not _bitwise_equal(recovered.params, state.params)
    assert (int(recovered.bad_steps), int(recovered.bad_in_row)) == (1, 0)


def test_gradients_are_clipped(machinery):
    _, _, state, _ = machinery
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0), optax.constant_schedule(1.0), None)
    huge = jax.tree.map(lambda p: jnp.full_like(p, 1e6), state.params)
    after = jax.jit(lambda params: optimizer.update(huge, optimizer.init(params), params)[1])(state.params)
    assert float(optax.tree.norm(optax.tree.get(after, "mu"))) == pytest.approx(0.1, rel=1e-4)
