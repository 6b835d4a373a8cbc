"""Epoch lists from lifetimes: who has which slot, and where it stands next, each read from tables of the rows."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.contract import BlockSizes, EpochLists
from pallas_kernels.gpu.gathers import gathered
from pallas_kernels.gpu.ranked import Ranked, bits_of, last_not_above, nth_set_bit, place_of, set_bits
from pallas_kernels.gpu.tree import INTEGERS, LEAF, Tree, split
from pallas_kernels.order import NOTHING


def epoch_lists(
    tree: Tree,
    order: Int32[Array, "R P"],
    prefixes: Ranked,
    expiry: Int32[Array, "B K S"],
    *,
    length: int,
    queries: int,
    front: int,
    blocks: BlockSizes,
) -> EpochLists:
    """`contract.EpochLists`: prefixes are the carried keys in order, and each key's place in one is searched for."""
    size, window = tree.size, tree.capacity
    epochs = -(-queries // size)
    history = tree.padded // size - epochs
    room = -(-window // blocks.granule) * blocks.granule
    capacity = -(-(room + size) // blocks.granule) * blocks.granule
    leaves = size // LEAF
    ends = jnp.pad(expiry + front, [(0, 0), (0, 0), (front, tree.padded - front - length)]).reshape(tree.rows, -1)
    # Who enters: a bit a key, and how many enter in an epoch before each leaf.
    entering = ends > jnp.arange(tree.padded, dtype=jnp.int32)
    words = bits_of(tree.blocks(entering, LEAF)[:, history * leaves :]).reshape(tree.rows, epochs, leaves)
    number = jnp.arange(leaves, dtype=jnp.int32)
    before = jnp.sum(jnp.where(number < number[:, None], set_bits(words)[..., None, :], 0), axis=-1, dtype=jnp.int32)

    def held(reads, n):
        """Who has a slot: its position, −1 if nobody; and as lists have it."""
        order, position, end, counts, word, *_ = reads
        block, slot = split(n, capacity)
        row, epoch = split(block, epochs)
        begin = (history + epoch) * size
        # Carried: the prefix before the epoch, in order, but for who leaves at once.
        at = (row * (history + epochs) + history + epoch - 1) * window + jnp.minimum(slot, window - 1)
        at = jnp.maximum(at, 0)
        there = (slot < tree.window(reads, row)) & (begin > 0) & (order(at) != NOTHING)
        carried = jnp.where(there, position(at), 0)
        carried = jnp.where(there & (end(row * tree.padded + carried) > begin), carried, -1)
        # Entering: the set bits of the epoch's words.
        which = slot - room
        leaf = last_not_above(which, lambda at: counts(block * leaves + at), leaves)
        bit = nth_set_bit(word(block * leaves + leaf), which + 1 - counts(block * leaves + leaf))
        enters = jnp.where(bit < LEAF, begin + leaf * LEAF + bit, -1)
        own = jnp.where(slot < room, carried, enters)
        return own, jnp.where(own < 0, length, own - front)

    def follows(reads, n):
        """The slot of the same key in the next epoch."""
        order, position, end, keys, owner = reads
        block, _ = split(n, capacity)
        row, epoch = split(block, epochs)
        own = owner(n)
        at = row * tree.padded + jnp.maximum(own, 0)
        lives_on = (own >= 0) & (epoch < epochs - 1) & (end(at) > (history + epoch + 1) * size)
        first = (row * (history + epochs) + history + epoch) * window
        place = place_of(keys(at), own, lambda i: order(first + i), lambda i: position(first + i), window)
        return (jnp.where(lives_on, place, capacity),)

    def enters_at(reads, n):
        """The slot of a key in its first list."""
        order, position, end, keys, counts, word = reads
        row, own = split(n, tree.padded)
        leaf, bit = split(jnp.maximum(own - history * size, 0), LEAF)
        at = row * (epochs * leaves) + leaf
        slot = room + counts(at) + set_bits(word(at) & ((jnp.int32(1) << bit) - 1))
        slot = jnp.where(end(n) > own, slot, capacity)
        if not history:
            return (slot,)
        first = (row * (history + epochs) + history - 1) * window
        place = place_of(keys(n), own, lambda i: order(first + i), lambda i: position(first + i), window)
        past = jnp.where(end(n) > history * size, place, capacity)
        return (jnp.where(own < history * size, past, slot),)

    slots = tree.rows * epochs * capacity
    own, index = gathered(held, (*prefixes, ends, before, words, *tree.windows), slots, INTEGERS * 2)
    (next_slot,) = gathered(follows, (*prefixes, ends, order, own), slots, INTEGERS)
    (entry,) = gathered(enters_at, (*prefixes, ends, order, before, words), tree.rows * tree.padded, INTEGERS)
    lead = expiry.shape[:2]
    return EpochLists(
        index=index.reshape(*lead, epochs, capacity),
        next_slot=next_slot.reshape(*lead, epochs, capacity),
        entry_slot=entry.reshape(*lead, tree.padded)[..., front : front + length],
        epoch_size=size,
        carried=room,
    )
