"""What the kernels read: the rows of all lists gathered, their bias and interval, and which tiles meet which.

All of it is XLA. Positions are float32 and relative to the first query of the row's epoch, so they are small in lists
of any length, and exact to 2^24 in the identity layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.contract import EpochLists, Intervals
from pallas_kernels.gpu.gathers import gathered_lines
from pallas_kernels.gpu.list_rows import is_number, listed_rows
from pallas_kernels.gpu.tree import split
from pallas_kernels.powers_of_two import base_2

BLOCK_Q = 128
"""Queries of a tile: a warpgroup's matrix product has 64 rows, and two of them share a tile."""
GRANULE = 128
"""Slots that the parts of a list are multiples of: the most keys of a tile."""
LAST_POSITION = 1 << 24
"""Up to here float32 knows every position."""
KEY_BY_KEY = 2048
"""Keys of a row up to which `query_runs` looks at each of them for each tile of queries."""


Bounds = Int32[Array, "B K E tiles"] | Int32[np.ndarray, "tiles"]
"""Of tiles of rows; numbers where the compiler can know them, one for all heads."""


@dataclass(frozen=True)
class Rows:
    """Rows [B, R, K, D] of `epochs` lists of `capacity` slots, one after the other; R = epochs · capacity.

    meta: bias in base 2, first position that sees the row, first that no longer does.
    carried: slots of each list's first part, 0 in the identity layout, whose one list is all keys in order.
    epoch_size: queries of a list; all of them in the identity layout.
    offset: in an identity layout whose row n is visible from position n - offset on, that number; else None.
    filled: where, besides, the last query sees all rows that hold a key, how many those are; else None.
    own_starts: whether each key is visible from its own position on, so that no two begin at once.
    """

    key: Float[Array, "B R K D"]
    value: Float[Array, "B R K D"]
    meta: Float[Array, "B K 3 R"]
    epochs: int
    capacity: int
    carried: int
    epoch_size: int
    offset: int | None = None
    filled: int | None = None
    own_starts: bool = False

    def begun_tiles(self, size: int, whole: Any, carried: Any, visited: Any) -> Any:
        """Up to which of the tiles of `size` rows that a tile of queries visits no key begins after its first query,
        with the counts of `visits_of_queries`. Those that may hold others, of a list's second part, come last."""
        if not self.own_starts:
            return jnp.maximum(whole, carried)
        # Keys of BLOCK_Q − 1 positions, which stand in as many rows at most.
        aligned = self.offset is not None and self.offset % size == 0
        late = BLOCK_Q // size + (0 if aligned else 1)
        return jnp.maximum(whole, visited - jnp.minimum(visited - carried, late))

    def starts(self, size: int) -> tuple[Bounds, Bounds]:
        """The earliest and the latest first position of each tile of `size` rows; numbers where they are known."""
        if self.offset is None:
            return self._bounds(1, size)
        first = size * np.arange(self.capacity // size, dtype=np.int32) - np.int32(self.offset)
        return first, first + (size - 1)

    def ends(self, size: int) -> tuple[Bounds, Bounds]:
        """The earliest and the latest end of each tile of `size` rows; numbers where they are known."""
        if self.offset is None or self.filled is None:
            return self._bounds(2, size)
        first = size * np.arange(self.capacity // size)
        never, end = np.int32(-1), np.int32(self.filled - self.offset)
        return np.where(first + size <= self.filled, end, never), np.where(first < self.filled, end, never)

    def extremes(self, size: int) -> Int32[Array, "B K 2 2 E tiles"]:
        """The negative of the earliest, and the latest start and end of each tile of `size` rows: one maximum."""
        places = self.meta[:, :, None, 1:].reshape(*self.meta.shape[:2], 1, 2, self.epochs, self.capacity // size, size)
        signs = np.array([-1, 1], np.int32)[:, None, None, None, None]
        return (places.astype(jnp.int32) * signs).max(-1)

    def _bounds(self, which: int, size: int) -> tuple[Bounds, Bounds]:
        if size == 1:
            each = self.meta[:, :, which].astype(jnp.int32)
            each = each.reshape(*self.meta.shape[:2], self.epochs, self.capacity)
            return each, each
        extremes = self.extremes(size)[:, :, :, which - 1]
        return -extremes[:, :, 0], extremes[:, :, 1]


jax.tree_util.register_dataclass(
    Rows,
    data_fields=["key", "value", "meta"],
    meta_fields=["epochs", "capacity", "carried", "epoch_size", "offset", "filled", "own_starts"],
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
    if intervals.lists is not None:
        return _listed_rows(key, value, bias, intervals, intervals.lists, queries=queries)
    return _all_rows(key, value, bias, intervals, queries=queries)


def _all_rows(key, value, bias, intervals: Intervals, *, queries: int) -> Rows:
    """The identity layout: keys and values as they are, but for whole tiles."""
    length = key.shape[1]
    offset = length - queries
    epoch_size = padded_length(queries)
    if epoch_size > LAST_POSITION:
        raise ValueError(f"a row without lists has at most {LAST_POSITION:,} queries on a GPU, got {queries:,}")
    # In a kernel of its own: where it is fused with the stacking of what a key has, each number looks at a whole row.
    whole_rows = lax.optimization_barrier((is_number(key) & is_number(value)).all(-1))
    # What −inf hides is hidden whatever it holds.
    bias = jnp.where(whole_rows | jnp.isneginf(bias), base_2(bias), jnp.nan)
    # Element by element, which fuses with what makes the array; the row's bias is NaN all the same.
    key, value = (jnp.where(is_number(array), array, 0) for array in (key, value))
    ends = jnp.full_like(intervals.end, length) if intervals.ends_with_row else intervals.end
    bounds = (jnp.moveaxis(array, 1, 2) - offset for array in (intervals.start, ends))
    start, end = (jnp.clip(array, -1, epoch_size + 1) for array in bounds)

    def whole(array, fill: int):
        missing = [(0, 0), (0, -length % GRANULE)] + [(0, 0)] * (array.ndim - 2)
        return jnp.pad(array, missing, constant_values=fill)

    columns = (whole(bias, 0), whole(start, epoch_size + 1), whole(end, -1))
    meta = jnp.stack([jnp.moveaxis(column.astype(jnp.float32), 1, 2) for column in columns], axis=2)
    known = (offset if intervals.starts_at_key else None, length if intervals.ends_with_row else None)
    return Rows(whole(key, 0), whole(value, 0), meta, 1, meta.shape[3], 0, epoch_size, *known, intervals.starts_at_key)


def _listed_rows(key, value, bias, intervals: Intervals, lists: EpochLists, *, queries: int) -> Rows:
    batch, length, kv_heads = key.shape[:3]
    epochs, capacity = lists.index.shape[2:]
    count, size = epochs * capacity, lists.epoch_size
    key, value, broken = listed_rows(key, value, lists.index.reshape(batch, kv_heads, count), GRANULE)

    def place(reads, n):
        """Of each slot: its bias and interval, as read from the arrays of keys."""
        index, marks, biases, ends, *starts = reads
        line, slot = split(n, count)
        item, head = split(line, kv_heads)
        epoch, _ = split(slot, capacity)
        first = length - queries + epoch * size
        own = index(n)
        filled, own = own < length, jnp.minimum(own, length - 1)
        at = line * length + own
        bias = base_2(biases((item * length + own) * kv_heads + head).astype(jnp.float32))
        bias = jnp.where(marks((item * count + slot) * kv_heads + head) != 0, jnp.nan, bias)
        bias = jnp.where(filled, bias, 0.0)
        start = starts[0](at) if starts else own
        start = jnp.where(filled, jnp.clip(start - first, -1, size + 1), size + 1)
        end = jnp.where(filled, jnp.clip(ends(at) - first, -1, size + 1), -1)
        return bias, start.astype(jnp.float32), end.astype(jnp.float32)

    known = () if intervals.starts_at_key else (intervals.start,)
    operands = (lists.index, broken, bias, intervals.end, *known)
    meta = gathered_lines(place, operands, batch * kv_heads, count, 3, jnp.float32)
    meta = meta.reshape(batch, kv_heads, 3, count)
    return Rows(key, value, meta, epochs, capacity, lists.carried, size, own_starts=intervals.starts_at_key)


def query_runs(rows: Rows, block_k: int) -> Int32[Array, "B K 3 _"]:
    """Which tiles of block_k keys each tile of queries visits, in three numbers that `visits_of_queries` reads.

    Keys carried into an epoch stand in order of falling expiry and entering ones in order of position, so both parts of
    a list are visited from their first tile on. The identity layout has one part, which may begin late (packed
    documents) and counts whole tiles only from the row's very start.

    All are maxima of one array, and so one program of the compiler's makes them.
    """
    split = rows.carried // block_k
    first_query = BLOCK_Q * np.arange(rows.epoch_size // BLOCK_Q, dtype=np.int32)[:, None]
    last_query = first_query + (BLOCK_Q - 1)
    # Of short rows key by key, so that nothing waits for the bounds of tiles.
    known = isinstance(rows.ends(block_k)[0], np.ndarray)
    size = 1 if not split and not known and rows.capacity <= KEY_BY_KEY else block_k
    tile = np.arange(rows.capacity // size, dtype=np.int32) * size // block_k
    tiles = np.int32(rows.capacity // block_k)
    (earliest_start, latest_start), (earliest_end, latest_end) = (
        # [B, K, the three numbers, E, tiles of queries, tiles of keys]
        [bound if isinstance(bound, np.ndarray) else bound[:, :, None, :, None, :] for bound in bounds(size)]
        for bounds in (rows.starts, rows.ends)
    )
    numbers: tuple[tuple[Any, Any, Any], ...]
    if split:
        carried = tile < split
        numbers = (
            (carried & (earliest_end <= last_query), tiles - tile, tiles - split),
            (carried & (latest_end > first_query), tile + 1, 0),
            (~carried & (earliest_start <= last_query), tile + 1, split),
        )
    else:
        seen = (latest_end > first_query) & (earliest_start <= last_query)
        in_part = (latest_start > first_query) | (earliest_end <= last_query)
        numbers = ((in_part, tiles - tile, 0), (seen, tiles - tile, 0), (seen, tile + 1, 0))
    use = _namespace(*(found for found, *_ in numbers))
    whole, second, until = (use.where(found, number, np.int32(otherwise)) for found, number, otherwise in numbers)
    which = np.arange(3)[:, None, None, None]
    return _of_every_head(rows, use.where(which == 0, whole, use.where(which == 1, second, until)).max(-1))


def visits_of_queries(rows: Rows, block_k: int, numbers: Iterable[Any]) -> tuple[Any, Any, Any, Any]:
    """Of a tile of queries, by its numbers of `query_runs`: tiles that all its queries see whole (visited first), tiles
    visited of the list's first part, tiles skipped after those, tiles visited in all."""
    tiles, split = rows.capacity // block_k, rows.carried // block_k
    after_whole, second, until = numbers
    carried, skipped = (second, split - second) if split else (0, tiles - second)
    return tiles - after_whole, carried, skipped, jnp.maximum(until - skipped, 0)


def key_walks(rows: Rows, block_k: int) -> Int32[Array, "B K 4 _"]:
    """When the keys of each tile begin and end to be seen, in positions of the epoch, for `visits_of_keys`: the
    earliest start and end, both negative, and the latest."""
    bounds = [bound for pair in zip(rows.starts(block_k), rows.ends(block_k), strict=True) for bound in pair]
    if not all(isinstance(bound, np.ndarray) for bound in bounds):
        return rows.extremes(block_k).reshape(*rows.meta.shape[:2], 4, -1)
    return _of_every_head(rows, np.stack([-bounds[0], -bounds[1], bounds[2], bounds[3]])[:, None])


def visits_of_keys(rows: Rows, block_q: int, numbers: Iterable[Any]) -> tuple[Any, Any, Any, Any]:
    """Of a tile of keys, by its numbers of `key_walks`: which tiles of block_q queries of its epoch it visits, as the
    first, how many before those of which no query is before a key, how many of these see it whole, how many in all."""
    first_start, first_end, last_start, last_end = (
        jnp.clip(sign * number, 0, rows.epoch_size) for sign, number in zip((-1, -1, 1, 1), numbers, strict=True)
    )
    size = jnp.int32(block_q)
    first, outlives = lax.div(first_start, size), lax.div(first_end, size)
    begun, until = (lax.div(place + (size - 1), size) for place in (last_start, last_end))
    visited = jnp.maximum(until - first, 0)
    return first, jnp.minimum(begun - first, visited), jnp.maximum(outlives - begun, 0), visited


def _namespace(*arrays: Array | np.ndarray) -> ModuleType:
    """NumPy for what is known when the program is traced, which is then part of it and costs no kernel."""
    return np if all(isinstance(array, np.ndarray) for array in arrays) else jnp


def _of_every_head(rows: Rows, numbers: Array | np.ndarray) -> Int32[Array, "B K n tiles"]:
    """Numbers of each tile together, given as [n, E, tiles of one epoch] or with all heads."""
    shape = (rows.key.shape[0], rows.key.shape[2], *numbers.shape[-3:])
    numbers = _namespace(numbers).broadcast_to(numbers, shape).reshape(*shape[:3], -1)
    # Written out, a constant takes no program that spreads it.
    return jnp.asarray(np.ascontiguousarray(numbers) if isinstance(numbers, np.ndarray) else numbers, jnp.int32)
