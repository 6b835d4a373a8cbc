"""The recall experiment as programs for the device: many training steps in one call, a test, a look at the gates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from train.config import OptimizerConfig
from train.experiments.mqar_config import FIRST_LAYER_ALONE, GATE_BEGINS, GATE_RATES, MQARConfig
from train.experiments.mqar_data import Examples, make_examples
from train.experiments.mqar_model import RecallModel
from train.optimizer import make_optimizer, make_schedule
from train.parameters import Skeleton, skeleton_of
from train.step import Params, TrainState, apply_gradients, make_state

TEST_SEED = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a cell runs. steps: of the whole training, whole calls of `train`.

    initial() -> state; train(state) -> (state, metrics of every step); test(params) -> {"accuracy", "loss"};
    look(params) -> the measures of `gate_measures` and one example's gates, for `dma` alone.
    """

    skeleton: Skeleton
    steps: int
    initial: Callable[[], TrainState]
    train: Callable[[TrainState], tuple[TrainState, Mapping[str, jax.Array]]]
    test: Callable[[Params], Mapping[str, jax.Array]]
    look: Callable[[Params], Mapping[str, jax.Array]] | None


def make_programs(config: MQARConfig) -> Programs:
    """The jitted programs of a resolved configuration; the state given to `train` is consumed (donated)."""
    assert config.batch_size is not None
    assert config.learning_rate is not None
    batch = config.batch_size
    skeleton = skeleton_of(config, lambda rngs: RecallModel(config, rngs=rngs))
    per_epoch = config.train_examples // batch
    wanted = config.epochs * per_epoch if config.steps is None else min(config.steps, config.epochs * per_epoch)
    calls = max(1, math.ceil(wanted / config.scan_steps))
    steps = calls * config.scan_steps
    recipe = OptimizerConfig(
        schedule="cosine", warmup_fraction=0.0, decay_fraction=0.0, b2=0.999, weight_decay=config.weight_decay
    )
    schedule = make_schedule(recipe, config.learning_rate, steps)
    optimizer = make_optimizer(recipe, schedule, skeleton.decay_mask())
    if config.change in GATE_RATES:
        which = "blocks.0.attention.gate." if config.change in FIRST_LAYER_ALONE else ".gate."
        of_gate = {name: which in name for name in skeleton.shapes}
        rate, first = GATE_RATES[config.change], GATE_BEGINS.get(config.change, 0) * steps
        slowed = optax.scale_by_schedule(lambda step: jnp.where(step < first, 0.0, rate))
        optimizer = optax.chain(optimizer, optax.masked(slowed, of_gate))
    stream, shuffle = jax.random.split(jax.random.key(config.seed))

    def objective(params: Params, examples: Examples) -> Array:
        return _answers(skeleton.merge(params), examples)[0].mean()

    def one_step(state: TrainState, index: jax.Array) -> tuple[TrainState, dict[str, Array]]:
        loss, gradients = jax.value_and_grad(objective)(state.params, make_examples(config, stream, index))
        losses = {"cross_entropy": loss, "auxiliary": jnp.zeros(())}
        rate = schedule(state.step - state.bad_steps)
        state, metrics = apply_gradients(state, gradients, losses, optimizer)
        return state, metrics | {"learning_rate": jnp.asarray(rate, jnp.float32)}

    def train(state: TrainState) -> tuple[TrainState, dict[str, Array]]:
        return jax.lax.scan(one_step, state, epoch_rows(config, shuffle, state.step))

    def test(params: Params) -> dict[str, Array]:
        model, key = skeleton.merge(params), jax.random.key(TEST_SEED)
        count = math.ceil(config.test_examples / batch)

        def one_batch(index: jax.Array) -> tuple[Array, Array]:
            loss, right = _answers(model, make_examples(config, key, index))
            # the last batch is filled up with examples that do not count
            counts = (index < config.test_examples)[:, None]
            return jnp.where(counts, loss, 0).sum(), jnp.where(counts, right, False).sum()

        losses, right = jax.lax.map(one_batch, jnp.arange(count * batch).reshape(count, batch))
        assert config.pairs is not None
        labels = config.test_examples * config.pairs
        return {"accuracy": right.sum() / labels, "loss": losses.sum() / labels}

    def look(params: Params) -> dict[str, Array]:
        examples = make_examples(config, jax.random.key(TEST_SEED), jnp.arange(min(batch, config.test_examples)))
        return gate_measures(config, skeleton.merge(params), examples)

    return Programs(
        skeleton,
        steps,
        jax.jit(lambda: make_state(skeleton.initialize(config.seed), optimizer)),
        jax.jit(train, donate_argnums=0),
        jax.jit(test),
        jax.jit(look) if config.attention == "dma" else None,
    )


def epoch_rows(config: MQARConfig, key: PRNGKeyArray, step: Int[Array, ""]) -> Int[Array, "S B"]:
    """Numbers of the examples of the next `scan_steps` batches: every epoch is a permutation of its own.

    What an epoch has beyond whole batches is left out of it.
    """
    assert config.batch_size is not None
    batch, examples = config.batch_size, config.train_examples
    per_epoch = examples // batch
    # The batches may reach into later epochs.
    reached = math.ceil((per_epoch - 1 + config.scan_steps) / per_epoch)

    def order(epoch: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(key, epoch), examples)[: per_epoch * batch]

    numbers = jax.vmap(order)(step // per_epoch + jnp.arange(reached)).reshape(-1, batch)
    return jax.lax.dynamic_slice_in_dim(numbers, step % per_epoch, config.scan_steps)


def _answers(model: RecallModel, examples: Examples) -> tuple[Float[Array, "B n"], Array]:
    """Cross-entropy of every label, and whether the likeliest of all V tokens is it."""
    hidden = jnp.take_along_axis(model(examples.tokens), examples.position[..., None], axis=1)
    logits = model.logits(hidden)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, examples.value)
    return loss, jnp.argmax(logits, axis=-1) == examples.value


def gate_measures(config: MQARConfig, model: RecallModel, examples: Examples) -> dict[str, Array]:
    """What the masks of a `dma` model let its answers see. All [layers], means over examples and labels:

    key_visible, value_visible: share of labels whose pair's key (value) is among the keys that the label's position
      sees; in_window: the share that a sliding window of the same size would show (the same in all layers).
    ties: share of gates equal to another of the row. spread: standard deviation of δ along a row.
    A, delta: norms of the gate's parameters. And of the first example: gates [layers, L], expiry [layers, L].
    """
    assert config.window is not None
    window = config.window
    gates = model.gates(examples.tokens)
    expiry = jax.lax.map(model.lifetimes, gates)[..., 0]
    gates = gates[..., 0]
    pairs = examples.position.shape[1]
    key = 2 * jnp.arange(pairs)

    def seen(offset: int) -> Array:
        return (examples.position < expiry[..., key + offset]).mean(axis=(1, 2))

    ordered = jnp.sort(gates, axis=-1)
    equal = ordered[..., 1:] == ordered[..., :-1]
    nothing = jnp.zeros((*equal.shape[:-1], 1), bool)
    tied = jnp.concatenate([nothing, equal], axis=-1) | jnp.concatenate([equal, nothing], axis=-1)
    in_window = (examples.position - key < window).mean()
    return {
        "key_visible": seen(0),
        "value_visible": seen(1),
        "in_window": jnp.broadcast_to(in_window, (config.num_layers,)),
        "ties": tied.mean(axis=(1, 2)),
        "spread": gates.std(axis=-1).mean(axis=1),
        "A": jnp.stack([jnp.linalg.norm(block.attention.gate.A[...]) for block in model.blocks]),
        "delta": jnp.stack([jnp.linalg.norm(block.attention.gate.delta[...]) for block in model.blocks]),
        "gates": gates[:, 0],
        "expiry": expiry[:, 0],
    }


def placed(tree: Any) -> Any:
    """Shapes on this process's first device: the target of a restore."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)
