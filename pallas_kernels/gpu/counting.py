"""Lifetimes in a short row by counting: every key is compared with every other, and nothing is sorted.

A key leaves the window at the first position up to which `window` keys of its document outrank it. Finding it takes
N² comparisons a row, but one kernel, where the tree of `selection` has ten that mostly wait for each other: up to some
thousands of keys that is sooner.

Keys are counted in blocks. Outside of two blocks one comparison says it all: later keys win ties, so a threshold
one lower serves for those behind a key, and none can pass the greatest integer, which serves for those before its
document. In the key's own block and in that where its document begins, the count is put right by what a look at each
of their keys finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.gpu.gathers import CHUNK, WARPGROUP, iota, launch, read
from pallas_kernels.gpu.tree import split
from pallas_kernels.order import NOTHING, TAKEN, order_of

MOST_KEYS = 4096
"""Keys of a row, at most."""
BLOCK = 32
"""Keys that are counted between two looks at whether the window is full."""
SUMS = 4
"""Of which the count is the sum: additions to one of them wait for each other."""
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
    rows, blocks = batch * heads, -(-length // BLOCK)
    # What a kernel would read beside the gates, where it is not one number.
    documents = () if start is None or end is None else (start, end)
    limits = () if len(set(windows)) == 1 else (jnp.tile(jnp.asarray(windows, jnp.int32), batch),)
    known = len(documents)

    def portable(gate, *more):
        order = order_of(jnp.moveaxis(gate, 1, 2).reshape(rows, length))
        padded = jnp.pad(order, ((0, 0), (0, blocks * BLOCK - length)), constant_values=NOTHING)
        start, end = (jnp.repeat(array, heads, axis=0) for array in more[:known]) if known else (None, length)
        window = more[known][:, None] if limits else windows[0]
        own = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), order.shape)

        def order_at(place):
            return lax.dynamic_slice_in_dim(padded, place, 1, axis=1)

        def orders_at(places):
            return jnp.take_along_axis(padded, places, axis=1, mode="promise_in_bounds")

        return bounded(_first_full(own, order, start, window, order_at, orders_at, blocks), own, order, end)

    def kernel(*operands):
        tiles, size = -(-length // WARPGROUP), min(READ, -(-length // CHUNK) * CHUNK)
        pieces = -(-length // size)

        def program(*refs):
            gate, *more = refs[: len(operands)]
            target, orders = refs[len(operands) :]
            row, tile = split(lax.axis_index("program"), tiles)
            item, head = split(row, heads)

            def rank(piece, _):
                place = iota((size,), 0) + piece * size
                value = read(gate, (jnp.minimum(place, length - 1) + item * length) * heads + head)
                orders[pl.ds(piece * size, size)] = jnp.where(place < length, order_of(value), NOTHING)

            own = iota((WARPGROUP,), 0) + tile * WARPGROUP
            at = jnp.minimum(own, length - 1) + item * length
            begin, until = (read(bound, at) for bound in more[:known]) if known else (None, length)
            window = more[known][row] if limits else windows[0]
            lax.fori_loop(0, pieces, rank, None)
            # All four warps have written before any of them reads.
            plgpu.commit_smem()
            order = read(orders, own)
            full = _first_full(
                own, order, begin, window, lambda place: orders[place], lambda places: read(orders, places), blocks
            )
            target[pl.ds((row * tiles + tile) * WARPGROUP, WARPGROUP)] = bounded(full, own, order, until)

        whole = jax.ShapeDtypeStruct((rows * tiles * WARPGROUP,), jnp.int32)
        buffers = [plgpu.SMEM((pieces * size,), jnp.int32)]
        flat = [array.reshape(-1) for array in operands]
        out = launch("counting", program, flat, rows * tiles, whole, buffers)
        return out.reshape(rows, tiles * WARPGROUP)[:, :length]

    # Read in the order in which layers make gates, heads innermost.
    operands = (jnp.moveaxis(gate, 1, 2), *documents, *limits)
    return lax.platform_dependent(*operands, cuda=kernel, default=portable).reshape(gate.shape)


def _first_full(
    own: Int32[Array, "*n"],
    order: Int32[Array, "*n"],
    begin: Int32[Array, "*n"] | None,
    window: int | Int32[Array, "..."],  # noqa: UP037
    order_at: Callable[[Any], Any],
    orders_at: Callable[[Int32[Array, "*n"]], Int32[Array, "*n"]],
    blocks: int,
) -> Int32[Array, "*n"]:
    """The first position up to which `window` keys outrank each key; that behind the last block if there is none.

    own, order, begin: each key's position, its order, and where its document begins (None: with the row). order_at: the
    order of the key at one place; orders_at: of the keys at a place for each key.
    """
    nothing = own - own
    own_block, _ = split(own, BLOCK)
    first_block = None if begin is None else split(begin, BLOCK)[0]

    def above(place):
        found = orders_at(place)
        outranks = (found > order) | ((found == order) & (place > own))
        return outranks if begin is None else (place >= begin) & outranks

    def threshold(block):
        bound = jnp.where(block > own_block, order - 1, order)
        # Not with TAKEN first: that would be unsigned (see `ranked`).
        return bound if first_block is None else jnp.where(block >= first_block, bound, TAKEN)

    def error(block):
        """By how much the threshold miscounts a block, one for each key."""
        bound, missing = threshold(block), nothing
        for n in range(BLOCK):
            place = block * BLOCK + n
            missing += jnp.where(above(place), 1, 0) - jnp.where(orders_at(place) > bound, 1, 0)
        return missing

    of_own, of_first = error(own_block), None if first_block is None else error(first_block)

    def error_of(block):
        before = 0 if of_first is None else jnp.where(block == first_block, of_first, 0)
        return jnp.where(block == own_block, of_own, before)

    def count(block, carry):
        (first, *sums), before, full = carry
        bound = threshold(block)
        sums = [first + error_of(block), *sums]
        for n in range(BLOCK):
            sums[n % SUMS] += jnp.where(bound < order_at(block * BLOCK + n), 1, 0)
        found = sum(sums[1:], sums[0])
        vacant = found < window
        return tuple(sums), jnp.where(vacant, found, before), full + jnp.where(vacant, 1, 0)

    _, so_far, full = lax.fori_loop(0, blocks, count, ((nothing,) * SUMS, nothing, nothing))
    position, block = full * BLOCK, jnp.minimum(full, blocks - 1)
    for n in range(BLOCK):
        so_far += jnp.where(above(block * BLOCK + n), 1, 0)
        position += jnp.where(so_far < window, 1, 0)
    return jnp.where(full < blocks, position, blocks * BLOCK)


def bounded(
    leaves: Int32[Array, "*n"], own: Int32[Array, "*#n"], order: Int32[Array, "*n"], end: Int32[Array, "*#n"] | int
) -> Int32[Array, "*n"]:
    """The expiry of keys that leave a window there: not past their document's end, and not before themselves; at once
    where no query may see them."""
    return jnp.where(order == NOTHING, own, jnp.maximum(jnp.minimum(leaves, end), own))
