"""Lifetimes and epoch lists on a GPU: a tree of merges, in which no step is longer than a few kernels.

Rows that have no lists and are short enough are not merged but counted (`counting`).

A prefix is summarised by its own top w, and of the keys that a prefix shows only the lowest L can leave during the
next L positions. So, per kv head:

1. up: keys are merged in pairs, pairs in fours, up to the length of an epoch;
2. across: prefixes of whole epochs get their top w in a scan of log₂(epochs) merges. These are the lists' carried
   keys, in order;
3. down: the lowest L of the prefix before a block of L keys split in two. The first half keeps the lowest L/2; the
   second half gets them from the merge with the first half's own keys. Both are L/2 long;
4. at blocks of one key, the lowest before a key leaves when that key enters; a key that does not enter leaves at once.

Up and down stay inside an epoch, so that each is one kernel. Each step writes as many numbers as there are keys: the
work is N log N, the memory N log(epoch).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.contract import BlockSizes, Intervals, document_ends
from pallas_kernels.gpu.counting import MOST_KEYS, bounded, expiry_by_counting
from pallas_kernels.gpu.gathers import Stage, gathered, staged
from pallas_kernels.gpu.lists import epoch_lists
from pallas_kernels.gpu.ranked import List, Ranked, merged
from pallas_kernels.gpu.tree import INTEGERS, LEAF, Tree, split
from pallas_kernels.order import NOTHING, TAKEN, order_of


def select(
    gate: Float[Array, "B K S"],
    windows: tuple[int, ...],
    start: Int32[Array, "B S"] | None,
    end: Int32[Array, "B S"] | None,
    *,
    queries: int,
    blocks: BlockSizes,
) -> Intervals | None:
    """`contract.Select`: what each key's gate and document make of it; lists where they are shorter than the row."""
    if jnp.finfo(gate.dtype).bits > 32:
        return None  # an order of 32 bits would tie what differs
    batch, heads, length = gate.shape
    position = jnp.arange(length, dtype=jnp.int32)
    starts = jnp.broadcast_to(position, gate.shape)
    listed = max(windows) + blocks.epoch < length
    if not listed and length <= MOST_KEYS and min(windows) < length:
        return Intervals(starts, expiry_by_counting(gate, windows, start, end), starts_at_key=True)
    start, end = document_ends(start, end, batch, length)
    if min(windows) >= length:
        whole = jnp.broadcast_to(end[:, None], gate.shape)
        return Intervals(starts, jnp.where(jnp.isneginf(gate), position, whole), starts_at_key=True)
    size = blocks.epoch if listed else min(blocks.epoch, max(LEAF, 1 << (length - 1).bit_length()))
    if size % LEAF or size & (size - 1):
        raise ValueError(f"epoch must be a power of two, {LEAF} or more, got {size}")
    # Epochs count from the first query; keys before it fill whole epochs of their own.
    front = -(length - queries) % size if listed else 0
    padded = -(-(front + length) // size) * size
    tree = Tree(batch, heads, padded, size, tuple(min(window, length) for window in windows))

    def pad(array, fill):
        return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(front, padded - front - length)], constant_values=fill)

    # Padding is a document of its own for each place, so that nothing passes over it.
    own = jnp.arange(padded, dtype=jnp.int32)
    real = (own >= front) & (own < front + length)
    begins = jnp.where(real, pad(start + front, 0), own)
    begins = jnp.repeat(begins, heads, axis=0)
    sorted_blocks = _sort_blocks(tree, gate, front, begins)
    order = sorted_blocks[1].order.reshape(tree.rows, padded)
    prefixes = _prefixes(tree, sorted_blocks[size], begins)
    lowest = _lowest(tree, sorted_blocks, prefixes, begins)
    leaves = _leave(tree, order, lowest, begins)
    expiry, own_order = (
        array.reshape(batch, heads, padded)[..., front : front + length] for array in (leaves - front, order)
    )
    # Who has no order has no place either: its gate is −inf. (The gate itself would be read across, heads innermost.)
    expiry = bounded(expiry, position, own_order, end[:, None])
    lists = None
    if listed:
        lists = epoch_lists(tree, order, prefixes, expiry, length=length, queries=queries, front=front, blocks=blocks)
    return Intervals(starts, expiry, lists, starts_at_key=True)


def _sort_blocks(tree: Tree, gate: Float[Array, "B K S"], front: int, begins: Int32[Array, "R P"]) -> dict[int, Ranked]:
    """Keys of each block's last document, sorted, for every block length from a single key's to an epoch's.

    Gates of −inf, and places around the row, are NOTHING.
    """
    _, heads, length = gate.shape

    def single(reads, _, n):
        row, place = split(n, tree.padded)
        item, head = split(row, heads)
        at = place - front
        inside = (at >= 0) & (at < length)
        value = reads[0]((item * length + jnp.clip(at, 0, length - 1)) * heads + head)
        return jnp.where(inside, order_of(value), NOTHING), place

    halves = [1 << power for power in range(tree.size.bit_length() - 1)]
    stages = [single, *(_merge_pairs(tree, half) for half in halves)]
    levels = range(len(stages))
    # Read in the order in which layers make gates, heads innermost.
    operands = (jnp.moveaxis(gate, 1, 2), begins)
    made = staged(stages, operands, tree.rows * tree.padded, tree.size, INTEGERS * 2, levels)
    return {
        1 << level: tree.lists(tree.padded >> level, 1 << level, parts)
        for level, parts in zip(levels, made, strict=True)
    }


def _merge_pairs(tree: Tree, half: int) -> Stage:
    """Neighbouring blocks as one; of the first only what still counts at the end of the second."""
    size = 2 * half
    count = tree.padded // size

    def body(reads, held, n):
        (_, begin), (order, position) = reads, held
        block, rank = split(n, size)
        first = block * size
        continues = begin(first + size - 1) < split(block, count)[1] * size + half
        earlier = List(lambda at: jnp.where(continues, order(first + at), NOTHING), half)
        found, leads, one, other = merged(earlier, List(lambda at: order(first + half + at), half), rank)
        return found, position(first + jnp.where(leads, one, half + other))

    return body


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
    """For every key, the lowest place of the window before it."""
    size, count = tree.size, tree.padded // tree.size

    def before_epochs(reads, _, n):
        order, position, *_ = reads
        block, place = split(n, size)
        row, epoch = split(block, count)
        in_prefix = tree.window(reads, row) - size + place
        at = jnp.maximum(block - 1, 0) * tree.capacity + jnp.maximum(in_prefix, 0)
        held = jnp.where(epoch > 0, order(at), NOTHING)
        return jnp.where(in_prefix < 0, TAKEN, held), position(at)

    halves = [size >> power for power in range(1, size.bit_length())]
    stages = [before_epochs, *(_halve(tree, number, half) for number, half in enumerate(halves))]
    entering = [array for half in halves for array in sorted_blocks[half]]
    operands = (*prefixes, begins, *entering, *tree.windows)
    [lowest] = staged(stages, operands, tree.rows * tree.padded, size, INTEGERS * 2, [len(halves)])
    return tree.lists(tree.padded, 1, lowest)


def _halve(tree: Tree, number: int, half: int) -> Stage:
    """From the lowest places before each block to those before each of its halves."""
    size = 2 * half
    count = tree.padded // half

    def body(reads, held, n):
        _, _, begin, *sorted_blocks = reads
        (order, position), (entered, entered_position) = held, sorted_blocks[2 * number :][:2]
        block, rank = split(n, half)
        row, place = split(block, count)
        early = (block & 1) == 0
        first, second = (block >> 1) * size, jnp.maximum(block - 1, 0) * half
        # Whether the window before the block still counts when its second half begins.
        continues = early | (begin(second + half - 1) < (place - 1) * half)
        vacant = size - tree.window(reads, row)

        def stayed(at):
            return jnp.where(continues, order(first + at), jnp.where(at < vacant, TAKEN, NOTHING))

        def came(at):
            return jnp.where(early, NOTHING, entered(second + at))

        found, leads, one, other = merged(List(stayed, size), List(came, half), half + rank)
        return found, jnp.where(leads, position(first + one), entered_position(second + other))

    return body


def _leave(tree: Tree, order: Int32[Array, "R P"], lowest: Ranked, begins: Int32[Array, "R P"]) -> Int32[Array, "R P"]:
    """When each key leaves the window: its own position if it never enters, P if it never leaves."""
    own = jnp.arange(tree.padded, dtype=jnp.int32)
    least, held = (array.reshape(tree.rows, tree.padded) for array in lowest)
    least = jnp.where(begins < own, least, NOTHING)
    enters = order >= least
    # Every key leaves once, so targets are distinct; those of the others lie past the end.
    total = tree.rows * tree.padded
    row = jnp.arange(tree.rows, dtype=jnp.int32)[:, None] * tree.padded
    nowhere = total + row + own
    target = jnp.where(enters, jnp.where(least == NOTHING, nowhere, row + held), row + own)
    leaves = jnp.full(total, tree.padded, jnp.int32)
    when = jnp.broadcast_to(own, target.shape).reshape(-1)
    leaves = leaves.at[target.reshape(-1)].set(when, mode="drop", unique_indices=True)
    return leaves.reshape(tree.rows, tree.padded)
