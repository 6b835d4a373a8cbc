"""Rows of keys, one block of slots at a time, for either layout.

Both passes ask the same things of a layout: which blocks does an epoch have, which are worth visiting, and
what stands in the rows of a block. Nothing is gathered before it is used, so no copy of all lists exists.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.contract import BlockSizes, Intervals
from pallas_kernels.xla.config import XlaBlockSizes


class Rows(NamedTuple):
    """One block of key rows. Rows that stand for nothing have an empty interval, key and value 0."""

    key: Float[Array, "B K c D"]
    value: Float[Array, "B K c D"]
    bias: Float[Array, "B K c"]
    start: Int32[Array, "B K c"]
    end: Int32[Array, "B K c"]


class Epoch(NamedTuple):
    """Where an epoch's queries stand: positions [first, first + size), and its number."""

    number: Int32[Array, ""]
    first: Int32[Array, ""]
    size: int

    @property
    def positions(self) -> Int32[Array, " t"]:
        return self.first + jnp.arange(self.size, dtype=jnp.int32)


def take_rows(array: Array, index: Int32[Array, "B K c"]) -> Array:
    """array [B, S, K, …], index [B, K, c] -> [B, K, c, …]; 0 where the index is past the end."""
    batch = jnp.arange(array.shape[0], dtype=jnp.int32)[:, None, None]
    head = jnp.arange(array.shape[2], dtype=jnp.int32)[None, :, None]
    return array.at[batch, index, head].get(mode="fill", fill_value=0)


def take_slots(array: Array, slot: Int32[Array, "B K c"]) -> Array:
    """array [B, K, C, …], slot [B, K, c] -> [B, K, c, …]; 0 where the slot is past the end."""
    batch = jnp.arange(array.shape[0], dtype=jnp.int32)[:, None, None]
    head = jnp.arange(array.shape[1], dtype=jnp.int32)[None, :, None]
    return array.at[batch, head, slot].get(mode="fill", fill_value=0)


def isolate_non_finite(rows: Rows) -> Rows:
    """Move a non-finite key or value into its row's bias, which only queries that see the row ever read.

    0 · NaN is NaN: without this a NaN in one key would reach every query of its block through the products.
    """
    finite = jnp.isfinite(rows.key).all(-1) & jnp.isfinite(rows.value).all(-1)
    return rows._replace(
        key=jnp.where(finite[..., None], rows.key, 0),
        value=jnp.where(finite[..., None], rows.value, 0),
        bias=jnp.where(finite, rows.bias, jnp.nan),
    )


class _Blocks:
    """A walk over `capacity` slots in blocks of `size`; the last one is pushed back to end with the slots."""

    def __init__(self, key, value, bias, intervals: Intervals, capacity: int, block_k: int):
        self.arrays = (key, value, bias)
        self.intervals = intervals
        self.capacity = capacity
        self.size = min(block_k, capacity)
        self.count = -(-capacity // self.size)

    def first_slot(self, block: Int32[Array, ""]) -> Int32[Array, ""]:
        return jnp.minimum(block * self.size, self.capacity - self.size)


class ListBlocks(_Blocks):
    """Blocks of an epoch's gathered list."""

    def __init__(self, key, value, bias, intervals: Intervals, blocks: XlaBlockSizes):
        assert intervals.lists is not None
        self.lists = intervals.lists
        super().__init__(key, value, bias, intervals, self.lists.index.shape[-1], blocks.block_k)

    def _index(self, epoch: Epoch, block: Int32[Array, ""]) -> Int32[Array, "B K c"]:
        lists = jax.lax.dynamic_index_in_dim(self.lists.index, epoch.number, axis=2, keepdims=False)
        first = self.first_slot(block)
        index = jax.lax.dynamic_slice_in_dim(lists, first, self.size, axis=2)
        # The last block is pushed back to end with the list: what it shares with the one before is not its own.
        own = first + jnp.arange(self.size) >= block * self.size
        return jnp.where(own, index, self.intervals.start.shape[-1])

    def visited(self, epoch: Epoch, block: Int32[Array, ""]) -> Bool[Array, ""]:
        return (self._index(epoch, block) < self.intervals.start.shape[-1]).any()

    def rows(self, epoch: Epoch, block: Int32[Array, ""]) -> Rows:
        index = self._index(epoch, block)
        key, value, bias = (take_rows(array, index) for array in self.arrays)
        start, end = (take_slots(array, index) for array in (self.intervals.start, self.intervals.end))
        return isolate_non_finite(Rows(key, value, bias, start, end))


class IdentityBlocks(_Blocks):
    """Blocks of all keys in their own order."""

    def __init__(self, key, value, bias, intervals: Intervals, blocks: XlaBlockSizes):
        super().__init__(key, value, bias, intervals, key.shape[1], blocks.block_k)
        # Bounds of each block over all its rows that are ever visible, so that blocks are skipped unread.
        alive = intervals.start < intervals.end
        block = jnp.arange(self.capacity) // self.size
        earliest = jnp.where(alive, intervals.start, jnp.iinfo(jnp.int32).max).min((0, 1))
        latest = jnp.where(alive, intervals.end, jnp.iinfo(jnp.int32).min).max((0, 1))
        self.earliest = jax.ops.segment_min(earliest, block, self.count, indices_are_sorted=True)
        self.latest = jax.ops.segment_max(latest, block, self.count, indices_are_sorted=True)

    def visited(self, epoch: Epoch, block: Int32[Array, ""]) -> Bool[Array, ""]:
        return (self.earliest[block] < epoch.first + epoch.size) & (self.latest[block] > epoch.first)

    def rows(self, epoch: Epoch, block: Int32[Array, ""]) -> Rows:
        del epoch
        first = self.first_slot(block)
        key, value, bias = (
            jnp.moveaxis(jax.lax.dynamic_slice_in_dim(array, first, self.size, axis=1), 2, 1) for array in self.arrays
        )
        start, end = (
            jax.lax.dynamic_slice_in_dim(array, first, self.size, axis=2)
            for array in (self.intervals.start, self.intervals.end)
        )
        own = first + jnp.arange(self.size) >= block * self.size
        # Not an end of 0: where there are more queries than keys, the first ones are at positions before 0.
        return isolate_non_finite(Rows(key, value, bias, start, jnp.where(own, end, start)))


def key_blocks(key, value, bias, intervals: Intervals, blocks: BlockSizes) -> ListBlocks | IdentityBlocks:
    """The blocks of whichever layout `intervals` has."""
    assert isinstance(blocks, XlaBlockSizes)
    kind = IdentityBlocks if intervals.lists is None else ListBlocks
    return kind(key, value, bias, intervals, blocks)
