"""What the kernels read: the rows of all lists gathered, their bias and interval, and which tiles meet which.

All of it is XLA. Positions are float32 and relative to the first query of the row's epoch, so they are small in lists
of any length, and exact to 2^24 in the identity layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.contract import EpochLists, Intervals
from pallas_kernels.gpu.gathers import gathered
from pallas_kernels.gpu.tree import split

LOG2E = math.log2(math.e)
BLOCK_Q = 128
"""Queries of a tile: a warpgroup's matrix product has 64 rows, and two of them share a tile."""
GRANULE = 128
"""Slots that the parts of a list are multiples of: the most keys of a tile."""


@dataclass(frozen=True)
class Rows:
    """Rows [B, R, K, D] of `epochs` lists of `capacity` slots, one after the other; R = epochs · capacity.

    meta: bias in base 2, first position that sees the row, first that no longer does.
    carried: slots of each list's first part, 0 in the identity layout, whose one list is all keys in order.
    epoch_size: queries of a list; all of them in the identity layout.
    """

    key: Float[Array, "B R K D"]
    value: Float[Array, "B R K D"]
    meta: Float[Array, "B K 3 R"]
    epochs: int
    capacity: int
    carried: int
    epoch_size: int

    def tiled(self, which: int, size: int) -> Float[Array, "B K E tiles size"]:
        """Row `which` of meta, by list and tile."""
        part = self.meta[:, :, which]
        return part.reshape(*part.shape[:2], self.epochs, self.capacity // size, size)


jax.tree_util.register_dataclass(
    Rows, data_fields=["key", "value", "meta"], meta_fields=["epochs", "capacity", "carried", "epoch_size"]
)


def check_key_tile(size: int) -> None:
    """Raises: ValueError for a tile that is not whole products, or that the parts of a list are no multiples of."""
    if size not in (64, 128):
        raise ValueError(f"block_k must be 64 or 128, got {size}")


def padded_length(queries: int) -> int:
    """Queries rounded up to whole tiles."""
    return -(-queries // BLOCK_Q) * BLOCK_Q


def gather_rows(
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    bias: Float[Array, "B S K"],
    intervals: Intervals,
    *,
    queries: int,
) -> Rows:
    """The rows of every epoch's list, or all keys once in the identity layout."""
    finite = jnp.isfinite(key).all(-1) & jnp.isfinite(value).all(-1)
    bias = jnp.where(finite, bias * LOG2E, jnp.nan)
    if intervals.lists is None:
        key, value = (jnp.where(finite[..., None], array, 0) for array in (key, value))
        return _all_rows(key, value, bias, intervals, queries=queries)
    return _listed_rows(key, value, bias, intervals, intervals.lists, queries=queries)


def _all_rows(key, value, bias, intervals: Intervals, *, queries: int) -> Rows:
    """The identity layout: keys and values as they are, but for whole tiles."""
    length = key.shape[1]
    epoch_size = padded_length(queries)
    bounds = (jnp.moveaxis(array, 1, 2) - (length - queries) for array in (intervals.start, intervals.end))
    start, end = (jnp.clip(array, -1, epoch_size + 1) for array in bounds)

    def whole(array, fill: int):
        missing = [(0, 0), (0, -length % GRANULE)] + [(0, 0)] * (array.ndim - 2)
        return jnp.pad(array, missing, constant_values=fill)

    columns = (whole(bias, 0), whole(start, epoch_size + 1), whole(end, -1))
    meta = jnp.stack([jnp.moveaxis(column.astype(jnp.float32), 1, 2) for column in columns], axis=2)
    return Rows(whole(key, 0), whole(value, 0), meta, 1, meta.shape[3], 0, epoch_size)


def _listed_rows(key, value, bias, intervals: Intervals, lists: EpochLists, *, queries: int) -> Rows:
    batch, length, kv_heads, dim = key.shape
    epochs, capacity = lists.index.shape[2:]
    count, size = epochs * capacity, lists.epoch_size

    def place(reads, n):
        """Of each slot: its bias, interval and row, as read from the arrays of keys."""
        index, biases, starts, ends = reads
        line, slot = split(n, count)
        item, head = split(line, kv_heads)
        epoch, _ = split(slot, capacity)
        first = length - queries + epoch * size
        own = index(n)
        filled, own = own < length, jnp.minimum(own, length - 1)
        row = (item * length + own) * kv_heads + head
        at = line * length + own
        bias = jnp.where(filled, biases(row), 0.0)
        start = jnp.where(filled, jnp.clip(starts(at) - first, -1, size + 1), size + 1)
        end = jnp.where(filled, jnp.clip(ends(at) - first, -1, size + 1), -1)
        # A row of NaN bias is not read: whoever sees it gets its NaN from the bias.
        return bias, start.astype(jnp.float32), end.astype(jnp.float32), jnp.where(filled & (bias == bias), row, -1)

    *columns, row = (
        part.reshape(batch, kv_heads, count)
        for part in gathered(
            place,
            (lists.index, bias, intervals.start, intervals.end),
            batch * kv_heads * count,
            (jnp.float32, jnp.float32, jnp.float32, jnp.int32),
        )
    )
    row = jnp.moveaxis(row, 1, 2)

    def gather(array):
        there = array.reshape(-1, dim).at[jnp.maximum(row, 0)].get(mode="promise_in_bounds")
        return jnp.where(row[..., None] < 0, 0, there)

    meta = jnp.stack(columns, axis=2)
    return Rows(gather(key), gather(value), meta, epochs, capacity, lists.carried, size)


def query_runs(rows: Rows, queries: int, block_k: int) -> Int32[Array, "B K 4 tiles"]:
    """Which tiles of block_k keys each tile of queries visits, as four numbers: tiles that all its queries see whole
    (visited first), tiles visited of the list's first part, tiles skipped after those, tiles visited in all.

    Keys carried into an epoch stand in order of falling expiry and entering ones in order of position, so both
    parts are visited from their first tile on. The identity layout has one part, which may begin late (packed
    documents) and counts whole tiles only from the row's very start.
    """
    tiles = padded_length(queries) // BLOCK_Q
    first = jnp.arange(rows.epoch_size // BLOCK_Q, dtype=jnp.float32) * BLOCK_Q
    last = first + BLOCK_Q - 1
    start, end = rows.tiled(1, block_k), rows.tiled(2, block_k)
    earliest_start, latest_start, earliest_end, latest_end = start.min(-1), start.max(-1), end.min(-1), end.max(-1)

    def count(bounds, limit, side):
        """How many of ascending bounds [B, K, E, tiles] lie below each limit; at it, too, for side "right"."""
        flat = bounds.reshape(-1, bounds.shape[-1])
        # Few bounds and few limits: one comparison of all beats a loop of tiny kernels.
        found = jax.vmap(lambda row: jnp.searchsorted(row, limit, side=side, method="compare_all"))(flat)
        return found.reshape(*bounds.shape[:-1], -1).astype(jnp.int32)

    split = rows.carried // block_k
    if split:
        falling_latest, falling_earliest = (-array[..., :split] for array in (latest_end, earliest_end))
        whole = count(falling_earliest, -last, "left")
        carried = count(falling_latest, -first, "left")
        skipped = split - carried
        entering = count(jax.lax.cummin(earliest_start[..., split:], axis=3, reverse=True), last, "right")
        visited = carried + entering
    else:
        skipped = count(jax.lax.cummax(latest_end, axis=3), first, "right")
        until = count(jax.lax.cummin(earliest_start, axis=3, reverse=True), last, "right")
        visited = jnp.maximum(until - skipped, 0)
        carried = jnp.zeros_like(visited)
        begun = count(jax.lax.cummax(latest_start, axis=3), first, "right")
        outlives = count(-jax.lax.cummin(earliest_end, axis=3), -last, "left")
        whole = jnp.where(skipped == 0, jnp.minimum(jnp.minimum(begun, outlives), visited), 0)
    runs = jnp.stack([whole, carried, skipped, visited], axis=2)
    return runs.reshape(*runs.shape[:3], -1)[..., :tiles]


def key_walks(rows: Rows, block_k: int, block_q: int) -> Int32[Array, "B K 4 tiles"]:
    """Which tiles of block_q queries of its epoch each tile of keys visits: the first, how many before those that see
    it whole, how many see it whole, how many in all."""
    start, end = rows.tiled(1, block_k), rows.tiled(2, block_k)
    start, end = jnp.maximum(start, 0), jnp.clip(end, 0, rows.epoch_size)
    first, until = jnp.floor(start.min(-1) / block_q), jnp.ceil(end.max(-1) / block_q)
    visited = jnp.maximum(until - first, 0)
    begun, outlives = jnp.ceil(start.max(-1) / block_q), jnp.floor(end.min(-1) / block_q)
    whole = jnp.maximum(outlives - begun, 0)
    walks = jnp.stack([first, begun - first, whole, visited], axis=2).astype(jnp.int32)
    return walks.reshape(*walks.shape[:3], -1)
