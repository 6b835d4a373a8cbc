"""From lifetimes to epochs: the short lists of keys that each run of queries can see.

Cut the queries into epochs of S. At most w keys are carried into an epoch and at most S enter in it, so w + S
slots hold every key that any of its queries sees, whatever the gates are. The lists of all epochs together are
N/S · (w + S) integers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from dmattn_jax.selection import Choice
from pallas_kernels import BlockSizes, EpochLists, Intervals


def lay_out(choice: Choice, *, queries: int, window: int, blocks: BlockSizes) -> Intervals:
    """Intervals of causal lifetimes, with epoch lists where those are shorter than the row of keys.

    window: the largest of the heads'. The identity layout serves where lists would hold as much as the row does.
    """
    length = choice.expiry.shape[-1]
    start = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), choice.expiry.shape)
    lists = None
    if window + blocks.epoch < length:
        lists = epoch_lists(choice, queries=queries, window=window, epoch_size=blocks.epoch, granule=blocks.granule)
    return Intervals(start, choice.expiry, lists)


def epoch_lists(choice: Choice, *, queries: int, window: int, epoch_size: int, granule: int = 1) -> EpochLists:
    """The lists of `contract.EpochLists` for lifetimes [j, expiry[j]), at most `window` alive at any position.

    Every (key, epoch) pair in which the key is alive is written out once, sorted by epoch and by the order within
    an epoch, and read into slots. Keys carried in stand in order of falling expiry, so that the keys that end
    within the epoch gather in its last few blocks and all other blocks need no mask. That order is taken from
    `priority`: sorted by `expiry` itself, keys that outlive the row would stand in an order that depends on how
    long the row is, and sums would round differently when the future changes.
    """
    expiry, priority = choice
    *lead, length = expiry.shape
    offset = length - queries
    epochs = -(-queries // epoch_size)
    pairs = epochs * (window + epoch_size)
    room = -(-window // granule) * granule
    capacity = -(-(room + epoch_size) // granule) * granule
    position = jnp.arange(length, dtype=jnp.int32)

    first_query = jnp.maximum(position, offset)
    alive = expiry > first_query
    entry = jnp.broadcast_to((first_query - offset) // epoch_size, expiry.shape)
    lived = jnp.where(alive, (expiry - 1 - offset) // epoch_size - entry + 1, 0)
    pair_end = jnp.cumsum(lived, axis=-1, dtype=jnp.int32)
    pair_start = pair_end - lived

    # Pair r belongs to the key whose range of pairs holds r, and to as many epochs after its entry.
    pair = jnp.arange(pairs, dtype=jnp.int32)
    owner = _ranges_holding(pair_end, pairs)
    exists = pair < pair_end[..., -1:]
    row = jnp.minimum(owner, length - 1)
    epoch = jnp.take_along_axis(entry - pair_start, row, axis=-1) + pair
    carried = row < offset + epoch * epoch_size
    # Negative for keys carried in, which therefore come first.
    order = jnp.where(carried, -1 - jnp.take_along_axis(priority, row, axis=-1), row)
    epoch = jnp.where(exists, epoch, epochs)
    everyone = jnp.broadcast_to(pair, (*lead, pairs))
    sorted_epoch, sorted_order, sorted_pair, sorted_row = jax.lax.sort(
        (epoch, order, everyone, row), dimension=-1, num_keys=2, is_stable=True
    )

    # Where each epoch begins in the sorted pairs, and where in it the entering keys begin.
    bounds = _count_below(sorted_epoch, epochs)
    entering = jnp.cumsum(sorted_order >= 0, axis=-1, dtype=jnp.int32)
    entering = jnp.concatenate([jnp.zeros((*lead, 1), jnp.int32), entering], axis=-1)
    entering = jnp.diff(jnp.take_along_axis(entering, bounds, axis=-1), axis=-1)
    begin, middle, finish = bounds[..., :-1], bounds[..., 1:] - entering, bounds[..., 1:]

    slot = jnp.arange(capacity, dtype=jnp.int32)
    early = slot < room
    source = jnp.where(early, begin[..., None] + slot, middle[..., None] + slot - room)
    filled = source < jnp.where(early, middle[..., None], finish[..., None])
    source = jnp.where(filled, source, pairs).reshape(*lead, epochs * capacity)
    index = _take(sorted_row, source, length).reshape(*lead, epochs, capacity)

    # The way back: the slot of every pair, in pair order, where the next epoch of the same key is pair r + 1.
    at = jnp.minimum(sorted_epoch, epochs - 1)
    rank = pair - jnp.take_along_axis(begin, at, axis=-1)
    enters = sorted_order >= 0
    sorted_slot = jnp.where(enters, room + pair - jnp.take_along_axis(middle, at, axis=-1), rank)
    pair_slot = jax.lax.sort((sorted_pair, sorted_slot), dimension=-1, num_keys=1, is_stable=False)[1]
    last = jnp.take_along_axis(pair_end, row, axis=-1) - 1
    follower = jnp.where(pair < last, jnp.concatenate([pair_slot[..., 1:], pair_slot[..., :1]], axis=-1), capacity)
    next_slot = _take(jnp.take_along_axis(follower, sorted_pair, axis=-1), source, capacity)
    entry_slot = jnp.where(lived > 0, _take(pair_slot, pair_start, capacity), capacity)
    return EpochLists(
        index=index,
        next_slot=next_slot.reshape(*lead, epochs, capacity),
        entry_slot=entry_slot,
        epoch_size=epoch_size,
        carried=room,
    )


def _take(array, index, fill: int):
    """array[index] along the last axis, `fill` where the index is past the end."""
    inside = index < array.shape[-1]
    taken = jnp.take_along_axis(array, jnp.minimum(index, array.shape[-1] - 1), axis=-1)
    return jnp.where(inside, taken, fill)


def _ranges_holding(range_end: Int32[Array, "*n S"], count: int) -> Int32[Array, "*n {count}"]:
    """For r = 0 … count−1 the number of ranges that end at or before r: the range that holds r."""
    search = jnp.arange(count, dtype=jnp.int32)
    flat = range_end.reshape(-1, range_end.shape[-1])
    found = jax.vmap(lambda ends: jnp.searchsorted(ends, search, side="right", method="scan"))(flat)
    return found.astype(jnp.int32).reshape(*range_end.shape[:-1], count)


def _count_below(ascending: Int32[Array, "*n R"], count: int) -> Int32[Array, "*n {count+1}"]:
    """For e = 0 … count the number of entries below e in ascending rows."""
    search = jnp.arange(count + 1, dtype=jnp.int32)
    flat = ascending.reshape(-1, ascending.shape[-1])
    found = jax.vmap(lambda row: jnp.searchsorted(row, search, side="left", method="scan"))(flat)
    return found.astype(jnp.int32).reshape(*ascending.shape[:-1], count + 1)
