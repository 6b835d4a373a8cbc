"""Lifetimes and epoch lists on a GPU: a tree of merges, in which no step is longer than a few kernels.

A prefix is summarised by its own top w, and of the keys that a prefix shows only the lowest L can leave during the
next L positions. So, per kv head:

1. up: blocks of 32 keys are sorted, then merged in pairs up to the length of an epoch;
2. across: prefixes of whole epochs get their top w in a scan of log₂(epochs) merges. These are the lists' carried
   keys, in order;
3. down: the lowest L of the prefix before a block of L keys split in two. The first half keeps the lowest L/2; the
   second half gets them from the merge with the first half's own keys. Both are L/2 long;
4. at blocks of 32, each of the 32 lowest and the 32 that enter counts the entering keys above it in the bits of a word:
   it leaves at the n-th set one.

Each step writes as many numbers as there are keys, so the work is N log N and the memory O(N).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.contract import BlockSizes, Intervals
from pallas_kernels.gpu.gathers import gathered
from pallas_kernels.gpu.lists import epoch_lists
from pallas_kernels.gpu.ranked import (
    NOTHING,
    TAKEN,
    List,
    Ranked,
    bits_of,
    merged,
    nth_set_bit,
)
from pallas_kernels.gpu.tree import INTEGERS, LEAF, Tree, split
from pallas_kernels.order import sortable


def select(
    gate: Float[Array, "B K S"],
    windows: tuple[int, ...],
    start: Int32[Array, "B S"],
    end: Int32[Array, "B S"],
    *,
    queries: int,
    blocks: BlockSizes,
) -> Intervals:
    """`contract.Select`: what each key's gate and document make of it; lists where they are shorter than the row."""
    batch, heads, length = gate.shape
    position = jnp.arange(length, dtype=jnp.int32)
    starts = jnp.broadcast_to(position, gate.shape)
    hidden = jnp.isneginf(gate)
    if min(windows) >= length:
        whole = jnp.broadcast_to(end[:, None], gate.shape)
        return Intervals(starts, jnp.where(hidden, position, whole), starts_at_key=True)
    listed = max(windows) + blocks.epoch < length
    size = blocks.epoch if listed else min(blocks.epoch, max(LEAF, 1 << (length - 1).bit_length()))
    if size % LEAF or size & (size - 1):
        raise ValueError(f"epoch must be a power of two, {LEAF} or more, got {size}")
    # Epochs count from the first query; keys before it fill whole epochs of their own.
    front = -(length - queries) % size if listed else 0
    padded = -(-(front + length) // size) * size
    tree = Tree(batch, heads, padded, size, tuple(min(window, length) for window in windows))

    def pad(array, fill):
        return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(front, padded - front - length)], constant_values=fill)

    order = _orders(gate, front, padded)
    # Padding is a document of its own for each place, so that nothing passes over it.
    own = jnp.arange(padded, dtype=jnp.int32)
    real = (own >= front) & (own < front + length)
    begins = jnp.where(real, pad(start + front, 0), own)
    begins = jnp.repeat(begins, heads, axis=0)
    sorted_blocks = _sort_blocks(tree, order, begins)
    prefixes = _prefixes(tree, sorted_blocks[size], begins)
    lowest = _lowest(tree, sorted_blocks, prefixes, begins)
    leaves = _leave(tree, order, lowest, begins)
    expiry = jnp.minimum(leaves.reshape(batch, heads, padded)[..., front : front + length] - front, end[:, None])
    expiry = jnp.where(hidden, position, jnp.maximum(expiry, position))
    lists = None
    if listed:
        lists = epoch_lists(tree, order, prefixes, expiry, length=length, queries=queries, front=front, blocks=blocks)
    return Intervals(starts, expiry, lists, starts_at_key=True)


def _orders(gate: Float[Array, "B K S"], front: int, padded: int) -> Int32[Array, "R P"]:
    """Gates as integers, row by row; NOTHING for gates of −inf and around the row."""
    batch, heads, length = gate.shape

    def body(reads, n):
        row, place = split(n, padded)
        item, head = split(row, heads)
        at = place - front
        inside = (at >= 0) & (at < length)
        value = reads[0]((item * length + jnp.clip(at, 0, length - 1)) * heads + head)
        return (jnp.where(inside & (value != -jnp.inf), sortable(value), NOTHING),)

    # Read in the order in which layers make gates, heads innermost.
    return gathered(body, (jnp.moveaxis(gate, 1, 2),), batch * heads * padded, INTEGERS)[0].reshape(-1, padded)


def _sort_blocks(tree: Tree, order: Int32[Array, "R P"], begins: Int32[Array, "R P"]) -> dict[int, Ranked]:
    """Keys of each block's last document, sorted, for every block length from a leaf's to an epoch's."""
    leaf, begin = tree.blocks(order, LEAF), tree.blocks(begins, LEAF)
    leaf = jnp.where(begin == begin[..., -1:], leaf, NOTHING)
    within = jnp.arange(LEAF, dtype=jnp.int32)
    # Two sums, which XLA makes in one kernel of its own: a single one it gives to Triton, in tiles that grow with the
    # row, and at a million tokens that kernel compiled for 20 seconds.
    greater, ties = (jnp.sum(flags, axis=-1, dtype=jnp.int32) for flags in _greater_and_ties(leaf))
    rank = greater + ties
    here = rank[..., None, :] == within[:, None]
    blocks = {
        LEAF: Ranked(
            jnp.sum(jnp.where(here, leaf[..., None, :], 0), axis=-1, dtype=jnp.int32),
            jnp.sum(jnp.where(here, within, 0), axis=-1, dtype=jnp.int32) + tree.first(LEAF)[:, None],
        )
    }
    size = LEAF
    while size < tree.size:
        blocks[2 * size] = _merge_pairs(tree, blocks[size], begins)
        size *= 2
    return blocks


def _above(leaf: Int32[Array, "R n 32"]) -> Bool[Array, "R n 32 32"]:
    """above[…, t, i]: whether key i of a leaf stands above key t."""
    greater, ties = _greater_and_ties(leaf)
    return greater | ties


def _greater_and_ties(leaf: Int32[Array, "R n 32"]) -> tuple[Bool[Array, "R n 32 32"], Bool[Array, "R n 32 32"]]:
    """[…, t, i]: whether key i of a leaf is greater than key t; whether it is as great, and later."""
    within = jnp.arange(LEAF, dtype=jnp.int32)
    one, other = leaf[..., None], leaf[..., None, :]
    return other > one, (other == one) & (within > within[:, None])


def _merge_pairs(tree: Tree, lists: Ranked, begins: Int32[Array, "R P"]) -> Ranked:
    """Neighbouring blocks as one; of the first only what still counts at the end of the second."""
    half, size = lists.size, 2 * lists.size
    count = tree.padded // size

    def body(reads, n):
        order, position, begin = reads
        block, rank = split(n, size)
        first = block * size
        continues = begin(first + size - 1) < split(block, count)[1] * size + half
        earlier = List(lambda at: jnp.where(continues, order(first + at), NOTHING), half)
        found, leads, one, other = merged(earlier, List(lambda at: order(first + half + at), half), rank)
        return found, position(first + jnp.where(leads, one, half + other))

    return tree.lists(count, size, gathered(body, (*lists, begins), tree.rows * tree.padded, INTEGERS * 2))


def _prefixes(tree: Tree, epochs: Ranked, begins: Int32[Array, "R P"]) -> Ranked:
    """The top keys of the prefix up to the end of each epoch, of the document that is open there."""
    count = tree.padded // tree.size
    lists = Ranked(*(array[..., : tree.capacity] for array in epochs))
    step = 1
    while step < count:
        lists = _merge_distant(tree, lists, begins, step)
        step *= 2
    missing = tree.capacity - lists.size
    if missing:
        # So few keys that no prefix fills a window.
        lists = Ranked(*(jnp.pad(a, [(0, 0), (0, 0), (0, missing)], constant_values=NOTHING) for a in lists))
    return lists


def _merge_distant(tree: Tree, lists: Ranked, begins: Int32[Array, "R P"], step: int) -> Ranked:
    """Each epoch's list with the one `step` before it, which holds what came still earlier."""
    held, count = lists.size, tree.padded // tree.size
    size = min(2 * held, tree.capacity)

    def body(reads, n):
        order, position, begin = reads
        block, rank = split(n, size)
        _, epoch = split(block, count)
        continues = (epoch >= step) & (begin((block + 1) * tree.size - 1) < (epoch - step + 1) * tree.size)
        first, second = jnp.maximum(block - step, 0) * held, block * held
        earlier = List(lambda at: jnp.where(continues, order(first + at), NOTHING), held)
        found, leads, one, other = merged(earlier, List(lambda at: order(second + at), held), rank)
        return found, position(jnp.where(leads, first + one, second + other))

    return tree.lists(count, size, gathered(body, (*lists, begins), tree.rows * count * size, INTEGERS * 2))


def _lowest(tree: Tree, sorted_blocks: dict[int, Ranked], prefixes: Ranked, begins: Int32[Array, "R P"]) -> Ranked:
    """For every leaf, the LEAF lowest places of the window before it."""
    size, count = tree.size, tree.padded // tree.size

    def body(reads, n):
        order, position, windows = reads
        block, place = split(n, size)
        row, epoch = split(block, count)
        in_prefix = windows(row) - size + place
        at = jnp.maximum(block - 1, 0) * tree.capacity + jnp.maximum(in_prefix, 0)
        held = jnp.where(epoch > 0, order(at), NOTHING)
        return jnp.where(in_prefix < 0, TAKEN, held), position(at)

    operands = (*prefixes, tree.windows)
    lowest = tree.lists(count, size, gathered(body, operands, tree.rows * tree.padded, INTEGERS * 2))
    while size > LEAF:
        lowest = _halve(tree, lowest, sorted_blocks[size // 2], begins)
        size //= 2
    return lowest


def _halve(tree: Tree, lowest: Ranked, entering: Ranked, begins: Int32[Array, "R P"]) -> Ranked:
    """From the lowest places before each block to those before each of its halves."""
    size, half = lowest.size, entering.size
    count = tree.padded // half

    def body(reads, n):
        order, position, entered, entered_position, begin, windows = reads
        block, rank = split(n, half)
        row, number = split(block, count)
        early = (block & 1) == 0
        first, second = (block >> 1) * size, jnp.maximum(block - 1, 0) * half
        # Whether the window before the block still counts when its second half begins.
        continues = early | (begin(second + half - 1) < (number - 1) * half)
        vacant = size - windows(row)

        def held(at):
            return jnp.where(continues, order(first + at), jnp.where(at < vacant, TAKEN, NOTHING))

        def came(at):
            return jnp.where(early, NOTHING, entered(second + at))

        found, leads, one, other = merged(List(held, size), List(came, half), half + rank)
        return found, jnp.where(leads, position(first + one), entered_position(second + other))

    operands = (*lowest, *entering, begins, tree.windows)
    return tree.lists(count, half, gathered(body, operands, tree.rows * tree.padded, INTEGERS * 2))


def _leave(tree: Tree, order: Int32[Array, "R P"], lowest: Ranked, begins: Int32[Array, "R P"]) -> Int32[Array, "R P"]:
    """When each key leaves the window: its own position if it never enters, P if it never leaves."""
    leaf, begin, first = tree.blocks(order, LEAF), tree.blocks(begins, LEAF), tree.first(LEAF)[:, None]
    within = jnp.arange(LEAF, dtype=jnp.int32)
    carried_on = begin < first
    # Held keys: the lowest leaves first.
    beats = (leaf[..., None, :] >= lowest.order[..., None]) & carried_on[..., None, :]
    leaves = nth_set_bit(bits_of(beats), jnp.broadcast_to(LEAF - within, lowest.order.shape))
    # Entering keys: above them stand some of the held ones, and others that enter.
    vacant = jnp.where(within < LEAF - tree.windows, TAKEN, NOTHING)
    held = jnp.where(carried_on[..., None], lowest.order[..., None, :], vacant[..., None, :])
    need = LEAF - jnp.sum(held > leaf[..., None], axis=-1, dtype=jnp.int32)
    beats = _above(leaf) & (begin[..., None, :] == begin[..., None])
    place = nth_set_bit(bits_of(beats), need)
    place = jnp.where(need < 1, within, jnp.maximum(place, within))
    entered = jnp.where(place < LEAF, first + place, tree.padded).reshape(-1)
    row = (jnp.arange(tree.rows, dtype=jnp.int32) * tree.padded)[:, None, None]
    real = (leaves < LEAF) & (lowest.order != NOTHING) & (lowest.order != TAKEN)
    # Every key leaves once, so targets are distinct; those of the others lie past the end.
    total = tree.rows * tree.padded
    nowhere = total + jnp.arange(total, dtype=jnp.int32).reshape(leaves.shape)
    target = jnp.where(real, row + lowest.position, nowhere)
    entered = entered.at[target.reshape(-1)].set((first + leaves).reshape(-1), mode="drop", unique_indices=True)
    return entered.reshape(tree.rows, tree.padded)
