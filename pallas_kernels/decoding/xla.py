"""The portable step: eviction, insertion and attention as XLA makes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.decoding.contract import EMPTY, Implementation, Slots
from pallas_kernels.order import TAKEN, sortable
from pallas_kernels.xla.tiles import accumulation_dtype, matmul


def insert(
    key: Float[Array, "B K D"],
    value: Float[Array, "B K D"],
    gate: Float[Array, "B K"],
    position: Int32[Array, " B"],
    slots: Slots,
    windows: tuple[int, ...],
) -> Slots:
    """The slots after one more key, as in `contract.Step`."""
    index = jnp.arange(slots.gate.shape[2])
    usable = index < jnp.asarray(windows, jnp.int32)[:, None]
    gate = gate[:, :, None]
    rank = jnp.where(usable, sortable(slots.gate), TAKEN)
    least = rank.min(axis=-1, keepdims=True)
    oldest = jnp.where(rank == least, slots.position, jnp.iinfo(jnp.int32).max)
    slot = jnp.argmin(oldest, axis=-1)[..., None]
    # The new position is the greatest, so at equal gates the new key wins.
    enters = (sortable(gate) >= least) & ~jnp.isneginf(gate)
    here = (index == slot) & enters
    return Slots(
        keys=jnp.where(here[..., None], key[:, :, None].astype(slots.keys.dtype), slots.keys),
        values=jnp.where(here[..., None], value[:, :, None].astype(slots.values.dtype), slots.values),
        gate=jnp.where(here, gate.astype(slots.gate.dtype), slots.gate),
        position=jnp.where(here, position[:, None, None], slots.position),
    )


def attend_slots(
    query: Float[Array, "B H D"],
    keys: Float[Array, "B K W D"],
    values: Float[Array, "B K W D"],
    bias: Float[Array, "#B #K #W"],
    visible: Bool[Array, "#B #K W"],
    scale: float,
) -> Float[Array, "B H D"]:
    """One query a row over unordered slots; bias and visible broadcast to [B, K, W]."""
    batch, heads, head_dim = query.shape
    grouped = query.reshape(batch, keys.shape[1], -1, head_dim)
    dtype = accumulation_dtype(query.dtype)
    logits = matmul("bkgd,bkwd->bkgw", grouped, keys.astype(query.dtype), dtype)
    shown = visible[:, :, None, :]
    logits = jnp.where(shown, logits * scale + bias[:, :, None, :], -jnp.inf)
    some = shown.any(axis=-1, keepdims=True)
    weights = jnp.where(shown, jax.nn.softmax(jnp.where(some, logits, 0), axis=-1), 0)
    out = matmul("bkgw,bkwd->bkgd", weights.astype(query.dtype), values.astype(query.dtype), dtype)
    return out.reshape(batch, heads, -1).astype(query.dtype)


def step(query, key, value, gate, position, slots: Slots, *, windows, scale):
    """`contract.Step`."""
    after = insert(key, value, gate, position, slots, windows)
    return attend_slots(query, after.keys, after.values, after.gate, after.position != EMPTY, scale), after


XLA = Implementation("xla", step, unavailable=lambda: None, unsupported=lambda query, slots: None)
