"""Gradients of list rows, summed to those of the keys: a key has a row in every epoch of its life.

From the last epoch to the first, each carried row adds what its key collected later; a key's sum is read out in the
epoch in which it entered, or in epoch 0 if it came before the first query. The order is always the same.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.contract import EpochLists


def sum_rows(rows: Float[Array, "B R K W"], lists: EpochLists, *, length: int, queries: int) -> Float[Array, "B S K W"]:
    """Wide rows, R = E · C: a walk over epochs that carries only the rows of carried keys."""
    batch, kv_heads, epochs, capacity = lists.index.shape
    room, size, offset = lists.carried, lists.epoch_size, length - queries
    rows = rows.reshape(batch, epochs, capacity, kv_heads, -1)
    following = jnp.moveaxis(lists.next_slot, 1, 3)
    item = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    head = jnp.arange(kv_heads, dtype=jnp.int32)

    def step(later, epoch):
        own = jax.lax.dynamic_index_in_dim(rows, epoch, axis=1, keepdims=False)[:, :room]
        slot = jax.lax.dynamic_index_in_dim(following, epoch, axis=1, keepdims=False)[:, :room]
        total = own + later.at[item, slot, head].get(mode="fill", fill_value=0)
        return total, later

    nothing = jnp.zeros((batch, room, *rows.shape[3:]), rows.dtype)
    first, later = jax.lax.scan(step, nothing, jnp.arange(epochs, dtype=jnp.int32), reverse=True)
    position = jnp.arange(queries, dtype=jnp.int32)
    epoch = (position // size)[None, :, None]
    slot = jnp.moveaxis(lists.entry_slot[..., offset:], 1, 2)
    own = rows.at[item, epoch, slot, head].get(mode="fill", fill_value=0)
    follower = following.at[item, epoch, slot, head].get(mode="fill", fill_value=capacity)
    total = own + later.at[epoch, item, follower, head].get(mode="fill", fill_value=0)
    if not offset:
        return total
    before = jnp.moveaxis(lists.entry_slot[..., :offset], 1, 2)
    return jnp.concatenate([first.at[item, before, head].get(mode="fill", fill_value=0), total], axis=1)


def sum_scalars(
    values: Float[Array, "B K R"], lists: EpochLists, *, length: int, queries: int
) -> Float[Array, "B K S"]:
    """One number a row: so few that following pointers, twice as far each time, takes the fewest kernels."""
    shape = lists.index.shape
    epochs, capacity = shape[2:]
    slots = epochs * capacity
    epoch = jnp.arange(epochs, dtype=jnp.int32)[:, None]
    pointer = jnp.where(lists.next_slot < capacity, (epoch + 1) * capacity + lists.next_slot, slots)
    pointer = jnp.minimum(pointer, slots).reshape(*shape[:2], slots)
    for _ in range((epochs - 1).bit_length()):
        values = values + _take(values, pointer, 0)
        pointer = _take(pointer, pointer, slots)
    position = jnp.arange(length, dtype=jnp.int32)
    epoch = jnp.maximum(position - (length - queries), 0) // lists.epoch_size
    return _take(values, jnp.where(lists.entry_slot < capacity, epoch * capacity + lists.entry_slot, slots), 0)


def _take(array: Array, index: Int32[Array, "B K n"], fill: int) -> Array:
    item = jnp.arange(array.shape[0], dtype=jnp.int32)[:, None, None]
    head = jnp.arange(array.shape[1], dtype=jnp.int32)[:, None]
    return array.at[item, head, index].get(mode="fill", fill_value=fill)
