"""Lifetimes in a short row by counting: how many keys of each block outrank a key, block after block.

A key leaves the window at the first position up to which `window` keys of its document outrank it. Counting to there
takes one kernel, where the tree of `selection` has ten that mostly wait for each other: up to some thousands of keys
that is sooner.

Every program sorts the blocks of its row, each in the registers of one thread, and finds by binary search how many of
a block's keys are above one of its own. One threshold says it all: later keys win ties, so a threshold one lower
serves for the blocks behind a key, and none can pass the greatest integer, which serves for those before its document.
In the key's own block and in that where its document begins, the count is put right by a look at each of their keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.gpu.gathers import CHUNK, WARPGROUP, iota, launch, read, write
from pallas_kernels.gpu.tree import split
from pallas_kernels.order import NOTHING, TAKEN, order_of

MOST_KEYS = 4096
"""Keys of a row, at most."""
BLOCK = 32
"""Keys that are counted between two looks at whether the window is full: as many as a thread sorts."""
SPREAD = BLOCK + 1
"""Words from one block of shared memory to the next: entries at the same place of 32 blocks are in 32 banks."""
AT_ONCE = 8
"""Blocks that are searched together: the steps of one search wait for each other."""
READ = 4 * CHUNK
"""Keys whose gates are read at once, at most."""


def expiry_by_counting(
    gate: Float[Array, "B K S"],
    windows: tuple[int, ...],
    start: Int32[Array, "B S"] | None,
    end: Int32[Array, "B S"] | None,
) -> Int32[Array, "B K S"]:
    """Where each key leaves the window, at most at the end of its document; a key that is never seen leaves where it
    stands. Arguments as of `contract.Select`. One kernel on a CUDA GPU; the same by XLA elsewhere.

    Raises: ValueError for more than MOST_KEYS keys.
    """
    batch, heads, length = gate.shape
    if length > MOST_KEYS:
        raise ValueError(f"a row must have at most {MOST_KEYS:,} keys to be counted, got {length:,}")
    windows = tuple(min(window, length) for window in windows)
    rows, blocks = batch * heads, -(-length // (AT_ONCE * BLOCK)) * AT_ONCE
    # What a kernel would read beside the gates, where it is not one number.
    documents = () if start is None or end is None else (start, end)
    limits = () if len(set(windows)) == 1 else (jnp.tile(jnp.asarray(windows, jnp.int32), batch),)
    known = len(documents)

    def portable(gate, *more):
        order = order_of(jnp.moveaxis(gate, 1, 2).reshape(rows, length))
        padded = jnp.pad(order, ((0, 0), (0, blocks * BLOCK - length)), constant_values=NOTHING)
        falling = jnp.sort(padded.reshape(rows, blocks, BLOCK), axis=2, descending=True).reshape(padded.shape)
        start, end = (jnp.repeat(array, heads, axis=0) for array in more[:known]) if known else (None, length)
        window = more[known][:, None] if limits else windows[0]
        own = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), order.shape)

        def entries(array):
            def at(block, within):
                place = jnp.broadcast_to(block * BLOCK + within, order.shape)
                return jnp.take_along_axis(array, place, axis=1, mode="promise_in_bounds")

            return at

        return bounded(
            _first_full(own, order, start, window, entries(padded), entries(falling), blocks), own, order, end
        )

    def kernel(*operands):
        tiles, size = -(-length // WARPGROUP), min(READ, -(-length // CHUNK) * CHUNK)
        pieces = -(-length // size)

        def program(*refs):
            gate, *more = refs[: len(operands)]
            target, orders, falling = refs[len(operands) :]
            row, tile = split(lax.axis_index("program"), tiles)
            item, head = split(row, heads)

            def entries(buffer):
                return lambda block, within: read(buffer, block * SPREAD + within)

            def rank(piece, _):
                place = iota((size,), 0) + piece * size
                value = read(gate, (jnp.minimum(place, length - 1) + item * length) * heads + head)
                block, within = split(place, BLOCK)
                write(orders, jnp.where(place < length, order_of(value), NOTHING), block * SPREAD + within)

            own = iota((WARPGROUP,), 0) + tile * WARPGROUP
            at = jnp.minimum(own, length - 1) + item * length
            begin, until = (read(bound, at) for bound in more[:known]) if known else (None, length)
            window = more[known][row] if limits else windows[0]
            lax.fori_loop(0, pieces, rank, None)
            # All four warps have written before any of them reads.
            plgpu.commit_smem()
            # Where there are fewer blocks than threads, the others sort the last one too.
            block = jnp.minimum(iota((WARPGROUP,), 0), blocks - 1)
            for within, value in enumerate(_falling([entries(orders)(block, n) for n in range(BLOCK)])):
                write(falling, value, block * SPREAD + within)
            plgpu.commit_smem()
            order = entries(orders)(*split(own, BLOCK))
            full = _first_full(own, order, begin, window, entries(orders), entries(falling), blocks)
            target[pl.ds((row * tiles + tile) * WARPGROUP, WARPGROUP)] = bounded(full, own, order, until)

        whole = jax.ShapeDtypeStruct((rows * tiles * WARPGROUP,), jnp.int32)
        buffer = plgpu.SMEM((pieces * size // BLOCK * SPREAD,), jnp.int32)
        flat = [array.reshape(-1) for array in operands]
        out = launch("counting", program, flat, rows * tiles, whole, [buffer, buffer])
        return out.reshape(rows, tiles * WARPGROUP)[:, :length]

    # Read in the order in which layers make gates, heads innermost.
    operands = (jnp.moveaxis(gate, 1, 2), *documents, *limits)
    return lax.platform_dependent(*operands, cuda=kernel, default=portable).reshape(gate.shape)


def _falling(values: Sequence[Int32[Array, " n"]]) -> list[Int32[Array, " n"]]:
    """Arrays sorted element by element, the greatest first; a power of two of them (Batcher's odd-even merge sort)."""
    values = list(values)
    count = len(values)
    run = 1
    while run < count:
        stride = run
        while stride:
            for first in range(stride % run, count - stride, 2 * stride):
                for low in range(first, min(first + stride, count - stride)):
                    if low // (2 * run) == (low + stride) // (2 * run):
                        pair = values[low], values[low + stride]
                        values[low], values[low + stride] = jnp.maximum(*pair), jnp.minimum(*pair)
            stride //= 2
        run *= 2
    return values


def _first_full(
    own: Int32[Array, "*n"],
    order: Int32[Array, "*n"],
    begin: Int32[Array, "*n"] | None,
    window: int | Int32[Array, "..."],  # noqa: UP037
    orders: Callable[[Any, Any], Int32[Array, "*n"]],
    falling: Callable[[Any, Any], Int32[Array, "*n"]],
    blocks: int,
) -> Int32[Array, "*n"]:
    """The first position up to which `window` keys outrank each key; that behind the last block if there is none.

    own, order, begin: each key's position, its order, and where its document begins (None: with the row). orders: the
    orders of the keys at a place of a block, for each key; falling: of the block's keys sorted.
    """
    nothing = own - own
    own_block, own_place = split(own, BLOCK)
    ties, first_block, early = nothing, None, nothing
    for n in range(BLOCK):
        ties += jnp.where((orders(own_block, n) == order) & (own_place < n), 1, 0)
    if begin is not None:
        first_block, first_place = split(begin, BLOCK)
        for n in range(BLOCK):
            early += jnp.where((orders(first_block, n) > order) & (first_place > n), 1, 0)

    def outranking(block):
        """How many keys of a block outrank each key: of the same document, and above it or behind it and as high."""
        bound = jnp.where(block > own_block, order - 1, order)
        if first_block is not None:
            # Not with TAKEN first: that would be unsigned (see `ranked`).
            bound = jnp.where(block >= first_block, bound, TAKEN)
        found = nothing
        for step in (BLOCK >> bit for bit in range(1, BLOCK.bit_length())):
            found = jnp.where(falling(block, found + (step - 1)) > bound, found + step, found)
        found += jnp.where(falling(block, found) > bound, 1, 0)
        found += jnp.where(block == own_block, ties, 0)
        return found if first_block is None else found - jnp.where(block == first_block, early, 0)

    def count(group, carry):
        total, before, full = carry
        for found in [outranking(group * AT_ONCE + n) for n in range(AT_ONCE)]:
            total += found
            vacant = total < window
            before, full = jnp.where(vacant, total, before), full + jnp.where(vacant, 1, 0)
        return total, before, full

    _, so_far, full = lax.fori_loop(0, blocks // AT_ONCE, count, (nothing, nothing, nothing))
    position, block = full * BLOCK, jnp.minimum(full, blocks - 1)
    for n in range(BLOCK):
        place, other = block * BLOCK + n, orders(block, n)
        outranks = (other > order) | ((other == order) & (place > own))
        so_far += jnp.where(outranks if begin is None else outranks & (place >= begin), 1, 0)
        position += jnp.where(so_far < window, 1, 0)
    return jnp.where(full < blocks, position, blocks * BLOCK)


def bounded(
    leaves: Int32[Array, "*n"], own: Int32[Array, "*#n"], order: Int32[Array, "*n"], end: Int32[Array, "*#n"] | int
) -> Int32[Array, "*n"]:
    """The expiry of keys that leave a window there: not past their document's end, and not before themselves; at once
    where no query may see them."""
    return jnp.where(order == NOTHING, own, jnp.maximum(jnp.minimum(leaves, end), own))
