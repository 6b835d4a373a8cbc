"""From lifetimes to epochs: the short lists of keys that each run of queries can see.

Cut the queries into epochs of S. At most w keys are carried into an epoch and at most S enter in it, so w + S
slots hold every key that any of its queries sees, whatever the gates are. The lists of all epochs together are
N/S · (w + S) integers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from dmattn_jax.permutation import inverse, partition, place
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
    return Intervals(start, choice.expiry, lists, starts_at_key=True)


def epoch_lists(choice: Choice, *, queries: int, window: int, epoch_size: int, granule: int = 1) -> EpochLists:
    """The lists of `contract.EpochLists` for lifetimes [j, expiry[j]), at most `window` alive at any position.

    Keys that enter are put in place by a running count. Every (key, epoch) pair in which a key is carried is written
    out once, in falling priority, and sorted by epoch: stably, bit by bit, since there are few epochs. So keys
    carried into an epoch stand in order of falling expiry, those that end within it gather in its last few blocks,
    and all other blocks need no mask. The order is taken from `priority`: by `expiry` itself, keys that outlive the
    row would stand in an order that depends on how long the row is, and sums would round differently when the
    future changes.
    """
    expiry, priority = choice
    *lead, length = expiry.shape
    offset = length - queries
    epochs = -(-queries // epoch_size)
    room = -(-window // granule) * granule
    capacity = -(-(room + epoch_size) // granule) * granule
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), expiry.shape)

    first_query = jnp.maximum(position, offset)
    alive = expiry > first_query
    entry = (first_query - offset) // epoch_size
    lived = jnp.where(alive, (expiry - 1 - offset) // epoch_size - entry + 1, 0)
    # Keys from before the first query do not enter: epoch 0 carries them.
    enters = alive & (position >= offset)
    carries = lived - enters

    # Entering: how many enter before a key in its own epoch.
    running = jnp.cumsum(enters, axis=-1, dtype=jnp.int32) - enters
    epoch_first = jnp.minimum(offset + entry * epoch_size, length - 1)
    enter_slot = room + running - jnp.take_along_axis(running, epoch_first, axis=-1)

    # Carried: pairs in order of falling priority; the pairs of one key are consecutive, by rising epoch.
    by_priority = length - 1 - priority
    ordered_key = inverse(by_priority)
    ordered_end = jnp.cumsum(jnp.take_along_axis(carries, ordered_key, axis=-1), axis=-1, dtype=jnp.int32)
    pairs = epochs * window
    key_end = jnp.take_along_axis(ordered_end, by_priority, axis=-1)
    key_start = key_end - carries
    pair = jnp.broadcast_to(jnp.arange(pairs, dtype=jnp.int32), (*lead, pairs))
    # Each pair's key: marked where its pairs begin, and carried on from there.
    begins = place(by_priority + 1, jnp.where(carries > 0, key_start, pairs), pairs, 0)
    owner = jnp.maximum(jax.lax.cummax(begins, axis=len(lead)) - 1, 0)
    row = jnp.take_along_axis(ordered_key, owner, axis=-1)
    exists = pair < ordered_end[..., -1:]
    since = pair - jnp.take_along_axis(key_start, row, axis=-1)
    epoch = jnp.take_along_axis(entry + enters, row, axis=-1) + since
    epoch = jnp.where(exists, epoch, epochs)
    carried_slot = _rank_within(epoch, epochs)

    # Where each key stands next: its following pair, or the first one if it just entered.
    last = jnp.take_along_axis(key_end, row, axis=-1) - 1
    follower = jnp.where(pair < last, jnp.roll(carried_slot, -1, axis=-1), capacity)
    first_carried = _take(carried_slot, jnp.where(carries > 0, key_start, pairs), capacity)

    slots = epochs * capacity
    destination = jnp.concatenate(
        [
            jnp.where(exists, epoch * capacity + carried_slot, slots),
            jnp.where(enters, entry * capacity + enter_slot, slots),
        ],
        axis=-1,
    )
    index = place(jnp.concatenate([row, position], axis=-1), destination, slots, length)
    next_slot = place(jnp.concatenate([follower, first_carried], axis=-1), destination, slots, capacity)
    return EpochLists(
        index=index.reshape(*lead, epochs, capacity),
        next_slot=next_slot.reshape(*lead, epochs, capacity),
        entry_slot=jnp.where(enters, enter_slot, first_carried),
        epoch_size=epoch_size,
        carried=room,
    )


def _rank_within(group: Int32[Array, "*n R"], groups: int) -> Int32[Array, "*n R"]:
    """How many entries of the same group stand before each entry; groups are 0 … `groups` inclusive."""
    shape = group.shape
    number = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
    sorted_group, origin = group, number
    for bit in range(groups.bit_length()):
        moved = partition((sorted_group >> bit) & 1 == 1)[1]
        sorted_group, origin = (place(array, moved, shape[-1], 0) for array in (sorted_group, origin))
    begins = jnp.where(sorted_group != jnp.roll(sorted_group, 1, axis=-1), number, 0)
    rank = number - jax.lax.cummax(begins, axis=len(shape) - 1)
    return place(rank, origin, shape[-1], 0)


def _take(array, index, fill: int):
    """array[index] along the last axis, `fill` where the index is past the end."""
    inside = index < array.shape[-1]
    taken = jnp.take_along_axis(array, jnp.minimum(index, array.shape[-1] - 1), axis=-1)
    return jnp.where(inside, taken, fill)
