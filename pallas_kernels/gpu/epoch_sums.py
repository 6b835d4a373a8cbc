"""Gradients of list rows, summed to those of the keys: a key has a row in every epoch of its life.

Each key's rows are added in the order of its epochs, so that sums never race.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.contract import EpochLists, Intervals
from pallas_kernels.gpu.gathers import entries_of, iota, read


def sum_over_epochs(
    rows: Float[Array, "B R K PD"],
    intervals: Intervals,
    *,
    length: int,
    queries: int,
    parts: int,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B S K D"], ...]:
    """The rows, R = E · C, are `parts` arrays of D columns side by side; their sums over every key's rows, in dtype."""
    lists = intervals.lists
    assert lists is not None
    batch, heads, epochs, capacity = lists.index.shape
    width, keys = rows.shape[3] // parts, batch * length * heads
    # Many keys at a time, for there are many that nothing was added to; few where rows are long.
    tile = max(8, 512 // width)
    first, following, lives = (array.reshape(-1) for array in _chains(intervals, lists, length, queries))
    padded = -(-keys // tile) * tile
    trips = jnp.pad(lives, (0, padded - keys)).reshape(-1, tile).max(axis=1)
    slots = epochs * capacity

    def walk(reads, key, column, trips):
        read_row, read_first, read_next = reads
        item, head = lax.div(key, jnp.int32(length * heads)), lax.rem(key, jnp.int32(heads))

        def step(_, state):
            slot, totals = state
            there = slot < slots
            row = (item * slots + jnp.minimum(slot, slots - 1)) * heads + head
            totals = tuple(
                total + jnp.where(there, read_row(row, column + part * width), 0.0) for part, total in enumerate(totals)
            )
            return jnp.where(there, read_next(row), slots), totals

        nothing = (column * 0).astype(jnp.float32)
        return lax.fori_loop(0, trips, step, (read_first(key), (nothing,) * parts))[1]

    def portable(rows, first, following, trips):
        key = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32)[:, None], (keys, width))
        column = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (keys, width))
        totals = walk([entries_of(array) for array in (rows, first, following)], key, column, trips.max())
        return tuple(total.astype(dtype) for total in totals)

    def kernel(rows, first, following, trips):
        def program(rows_ref, first_ref, following_ref, trips_ref, *targets):
            number = lax.axis_index("tile")
            key = jnp.minimum(iota((tile, width), 0) + number * tile, keys - 1)

            def reads(ref):
                return lambda *places: read(ref, *places)

            totals = walk(
                [reads(ref) for ref in (rows_ref, first_ref, following_ref)],
                key,
                iota((tile, width), 1),
                trips_ref[number],
            )
            for target, total in zip(targets, totals, strict=True):
                target[pl.ds(number * tile, tile)] = total.astype(dtype)

        program.__name__ = "sum_over_epochs"
        out = plgpu.kernel(
            program,
            out_type=[jax.ShapeDtypeStruct((padded, width), dtype)] * parts,
            grid=(padded // tile,),
            grid_names=("tile",),
        )(rows, first, following, trips)
        return tuple(array[:keys] for array in out)

    rows = rows.reshape(batch * slots * heads, parts * width)
    sums = lax.platform_dependent(rows, first, following, trips, cuda=kernel, default=portable)
    return tuple(array.reshape(batch, length, heads, width) for array in sums)


def _chains(
    intervals: Intervals, lists: EpochLists, length: int, queries: int
) -> tuple[Int32[Array, "B S K"], Int32[Array, "B R K"], Int32[Array, "B S K"]]:
    """A key's first row (R where it has none), the row after each row (R after the last), and how many a key has."""
    batch, heads, epochs, capacity = lists.index.shape
    slots, offset, size = epochs * capacity, length - queries, lists.epoch_size
    entry = jnp.maximum(jnp.arange(length, dtype=jnp.int32) - offset, 0) // size
    there = lists.entry_slot < capacity
    first = jnp.where(there, entry * capacity + lists.entry_slot, slots)
    lives = jnp.where(there, (intervals.end - 1 - offset) // size - entry + 1, 0)
    later = jnp.arange(1, epochs + 1, dtype=jnp.int32)[:, None] * capacity + lists.next_slot
    following = jnp.where(lists.next_slot < capacity, later, slots).reshape(batch, heads, slots)
    return jnp.moveaxis(first, 1, 2), jnp.moveaxis(following, 1, 2), jnp.moveaxis(lives, 1, 2)
