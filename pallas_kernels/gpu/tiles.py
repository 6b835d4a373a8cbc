"""What the kernels read: the rows of all lists gathered, their bias and interval, and which tiles meet which.

All of it is XLA. Positions are float32 and relative to the first query of the row's epoch, so they are small in lists
of any length, and exact to 2^24 in the identity layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.contract import EpochLists, Intervals
from pallas_kernels.gpu.gathers import gathered_lines
from pallas_kernels.gpu.list_rows import listed_rows
from pallas_kernels.gpu.tree import split

LOG2E = math.log2(math.e)
BLOCK_Q = 128
"""Queries of a tile: a warpgroup's matrix product has 64 rows, and two of them share a tile."""
GRANULE = 128
"""Slots that the parts of a list are multiples of: the most keys of a tile."""


Bounds = Float[Array, "B K E tiles"] | Float[np.ndarray, "tiles"]
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
        with the numbers of `query_runs`. Those that may hold others, of the list's second part, are visited last."""
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
        first = size * np.arange(self.capacity // size, dtype=np.float32) - self.offset
        return first, first + (size - 1)

    def ends(self, size: int) -> tuple[Bounds, Bounds]:
        """The earliest and the latest end of each tile of `size` rows; numbers where they are known."""
        if self.offset is None or self.filled is None:
            return self._bounds(2, size)
        first = size * np.arange(self.capacity // size)
        never, end = np.float32(-1), np.float32(self.filled - self.offset)
        return np.where(first + size <= self.filled, end, never), np.where(first < self.filled, end, never)

    def _bounds(self, which: int, size: int) -> tuple[jax.Array, jax.Array]:
        part = self.meta[:, :, which]
        part = part.reshape(*part.shape[:2], self.epochs, self.capacity // size, size)
        return part.min(-1), part.max(-1)


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
    # In a kernel of its own: where it is fused with the stacking of what a key has, each number looks at a whole row.
    finite = lax.optimization_barrier((jnp.isfinite(key) & jnp.isfinite(value)).all(-1))
    # What −inf hides is hidden whatever it holds.
    bias = jnp.where(finite | jnp.isneginf(bias), bias * LOG2E, jnp.nan)
    # Element by element, which fuses with what makes the array; the row's bias is NaN all the same.
    key, value = (jnp.where(jnp.isfinite(array), array, 0) for array in (key, value))
    offset = length - queries
    epoch_size = padded_length(queries)
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
        bias = biases((item * length + own) * kv_heads + head) * LOG2E
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


def query_runs(rows: Rows, queries: int, block_k: int) -> Int32[Array, "B K 4 tiles"]:
    """Which tiles of block_k keys each tile of queries visits, as four numbers: tiles that all its queries see whole
    (visited first), tiles visited of the list's first part, tiles skipped after those, tiles visited in all.

    Keys carried into an epoch stand in order of falling expiry and entering ones in order of position, so both
    parts are visited from their first tile on. The identity layout has one part, which may begin late (packed
    documents) and counts whole tiles only from the row's very start.
    """
    tiles, split = padded_length(queries) // BLOCK_Q, rows.carried // block_k
    first = BLOCK_Q * np.arange(rows.epoch_size // BLOCK_Q, dtype=np.int32)
    last = first + (BLOCK_Q - 1)
    # Tiles of queries before tiles of keys.
    first_query, last_query = (place.astype(np.float32)[:, None] for place in (first, last))
    earliest_end, latest_end = (end[..., None, :] for end in rows.ends(block_k))
    earliest_start, latest_start = (start[..., None, :] for start in rows.starts(block_k))
    if split:
        whole = _before_first(earliest_end[..., :split] <= last_query)
        carried = _after_last(latest_end[..., :split] > first_query)
        skipped = split - carried
        visited = carried + _after_last(earliest_start[..., split:] <= last_query)
    else:
        skipped = _before_first(latest_end > first_query)
        begun, alive = _after_last(earliest_start <= last_query), _after_last(latest_end > first_query)
        use = _namespace(begun, alive, skipped)
        visited = use.maximum(use.minimum(begun, alive) - skipped, 0)
        carried = use.zeros_like(visited)
        wholly = use.minimum(_before_first(latest_start > first_query), _before_first(earliest_end <= last_query))
        whole = use.where(skipped == 0, use.minimum(wholly, visited), 0)
    return _of_every_head(rows, whole, carried, skipped, visited)[..., :tiles]


def _before_first(found: Bool[Array | np.ndarray, "*n tiles"]) -> Int32[Array | np.ndarray, "*n"]:
    """How many tiles stand before the first that is found."""
    number = np.arange(found.shape[-1], dtype=np.int32)
    return _namespace(found).where(found, number, np.int32(found.shape[-1])).min(-1)


def _after_last(found: Bool[Array | np.ndarray, "*n tiles"]) -> Int32[Array | np.ndarray, "*n"]:
    """How many tiles it takes from the first on to have all that are found."""
    number = np.arange(1, found.shape[-1] + 1, dtype=np.int32)
    return _namespace(found).where(found, number, np.int32(0)).max(-1)


def _namespace(*arrays: Array | np.ndarray) -> ModuleType:
    """NumPy for what is known when the program is traced, which is then part of it and costs no kernel."""
    return np if all(isinstance(array, np.ndarray) for array in arrays) else jnp


def _of_every_head(rows: Rows, *counts: Int32[Array | np.ndarray, "*n"]) -> Int32[Array, "B K 4 tiles"]:
    """Four counts of each tile together, [tiles] or [B, K, E, tiles of one epoch]."""
    use = _namespace(*counts)
    shape = (rows.key.shape[0], rows.key.shape[2], rows.epochs, counts[0].shape[-1])
    together = use.stack([use.broadcast_to(count, shape) for count in counts], axis=2)
    return jnp.asarray(together.reshape(*shape[:2], len(counts), -1), jnp.int32)


def key_walks(rows: Rows, block_k: int, block_q: int) -> Int32[Array, "B K 4 tiles"]:
    """Which tiles of block_q queries of its epoch each tile of keys visits: the first, how many before those of which
    no query is before a key, how many of these see it whole, how many in all."""
    bounds = (*rows.starts(block_k), *rows.ends(block_k))
    use = _namespace(*bounds)
    earliest_start, latest_start = (use.maximum(start, 0) for start in bounds[:2])
    earliest_end, latest_end = (use.clip(end, 0, rows.epoch_size) for end in bounds[2:])
    first, until = use.floor(earliest_start / block_q), use.ceil(latest_end / block_q)
    visited = use.maximum(until - first, 0)
    begun, outlives = use.ceil(latest_start / block_q), use.floor(earliest_end / block_q)
    whole = use.maximum(outlives - begun, 0)
    return _of_every_head(rows, first, use.minimum(begun - first, visited), whole, visited)
