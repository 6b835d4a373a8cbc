"""One optimizer step and one evaluation step, as pure functions ready for `jax.jit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from train.mesh import batch_sharding, like_parameters, parameter_shardings, replicated
from train.parameters import Skeleton

Params = dict[str, jax.Array]
Batch = Mapping[str, Int[Array, "B T"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a step changes. All randomness of a run is a function of (seed, step), so there is no key here.

    params: name -> array. optimizer: optax state. step: batches consumed, int32 []. bad_steps, bad_in_row: steps
    skipped for a non-finite loss or gradient, in all and since the last good one, int32 [].
    """

    params: Params
    optimizer: Any
    step: Int[Array, ""]
    bad_steps: Int[Array, ""]
    bad_in_row: Int[Array, ""]


def make_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(params), zero, zero, zero)


def abstract_state(skeleton: Skeleton, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state as shapes with shardings: the target of a restore, the argument of an abstract compilation."""
    shapes = jax.eval_shape(lambda: make_state(skeleton.initialize(0), optimizer))
    of_params = parameter_shardings(skeleton.axes, shapes.params, mesh)
    shardings = like_parameters(shapes, of_params, mesh, shapes.params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def shapes_of(abstract: TrainState) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of an abstract state."""
    return cast(dict[str, jax.ShapeDtypeStruct], abstract.params)


def shardings_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def initial_state(
    skeleton: Skeleton, optimizer: optax.GradientTransformation, abstract: TrainState, seed: int
) -> TrainState:
    """A fresh state, every device making only its own pieces. The same numbers on every mesh."""
    make = jax.jit(lambda: make_state(skeleton.initialize(seed), optimizer), out_shardings=shardings_of(abstract))
    return make()


def split_microbatches(batch: Batch, count: int) -> dict[str, Int[Array, "A b T"]]:
    """Row r goes to microbatch r % count, so that each device keeps its own rows."""
    return {
        name: array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)
        for name, array in batch.items()
    }


def loss_and_gradients(
    skeleton: Skeleton, params: Params, batch: Batch, accumulate: int
) -> tuple[dict[str, Float[Array, ""]], Params]:
    """Mean cross-entropy over all targets of the batch, the auxiliary loss, and gradients of their sum.

    With `accumulate` > 1, microbatches run one after the other, each weighted by its share of the targets, so the
    result is that of the whole batch at once; but for the balance loss of experts, which is that of each microbatch.
    """
    total = jnp.maximum(jnp.sum(batch["targets"] >= 0), 1).astype(jnp.float32)

    def objective(params: Params, micro: Batch) -> tuple[Array, dict[str, Array]]:
        out = skeleton.merge(params).loss(micro["tokens"], micro["targets"], micro["segment_ids"])
        cross_entropy = out.cross_entropy * (out.token_count / total)
        auxiliary = out.auxiliary / accumulate
        return cross_entropy + auxiliary, {"cross_entropy": cross_entropy, "auxiliary": auxiliary}

    gradient = jax.grad(objective, has_aux=True)
    if accumulate == 1:
        gradients, losses = gradient(params, batch)
        return losses, gradients

    def add(carry: Any, micro: Batch) -> tuple[Any, None]:
        gradients, losses = gradient(params, micro)
        return jax.tree.map(jnp.add, carry, (losses, gradients)), None

    zero = jnp.zeros((), jnp.float32)
    start = ({"cross_entropy": zero, "auxiliary": zero}, jax.tree.map(jnp.zeros_like, params))
    (losses, gradients), _ = jax.lax.scan(add, start, split_microbatches(batch, accumulate))
    return losses, gradients


@jax.named_scope("optimizer")
def apply_gradients(
    state: TrainState,
    gradients: Params,
    losses: Mapping[str, Float[Array, ""]],
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Array]]:
    """The next state. A non-finite loss or gradient leaves parameters and optimizer state bitwise as they are."""
    norm = optax.tree.norm(gradients)
    good = jnp.isfinite(norm) & jnp.isfinite(losses["cross_entropy"] + losses["auxiliary"])
    updates, next_optimizer = optimizer.update(gradients, state.optimizer, state.params)
    next_params = optax.apply_updates(state.params, updates)

    def choose(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

    bad = (~good).astype(jnp.int32)
    following = TrainState(
        params=choose(next_params, state.params),
        optimizer=choose(next_optimizer, state.optimizer),
        step=state.step + 1,
        bad_steps=state.bad_steps + bad,
        bad_in_row=jnp.where(good, 0, state.bad_in_row + 1),
    )
    metrics = {
        "loss": losses["cross_entropy"],
        "auxiliary": losses["auxiliary"],
        "gradient_norm": norm,
        "bad_steps": following.bad_steps,
        "bad_in_row": following.bad_in_row,
    }
    return following, metrics


def make_train_step(
    skeleton: Skeleton,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    abstract: TrainState,
    mesh: Mesh,
    accumulate: int,
) -> Any:
    """The jitted step (state, batch) -> (state, metrics); the state given is consumed (donated)."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        losses, gradients = loss_and_gradients(skeleton, state.params, batch, accumulate)
        following, metrics = apply_gradients(state, gradients, losses, optimizer)
        # what the optimizer took: it counts the updates it made, so skipped steps are not among them
        return following, metrics | {"learning_rate": schedule(state.step - state.bad_steps)}

    shardings = shardings_of(abstract)
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def make_eval_step(skeleton: Skeleton, params_shardings: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """The jitted (params, batch) -> (summed cross-entropy in nats, targets counted), both float32 []."""

    def evaluate(params: Params, batch: Batch) -> tuple[Array, Array]:
        out = skeleton.merge(params).loss(batch["tokens"], batch["targets"], batch["segment_ids"])
        return out.cross_entropy * out.token_count, jnp.asarray(out.token_count, jnp.float32)

    return jax.jit(
        evaluate,
        in_shardings=(dict(params_shardings), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )
