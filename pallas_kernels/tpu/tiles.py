"""What all TPU kernels share: rows as blocks of slots, their scalars and bounds, and products of one precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.powers_of_two import LOG2E
from pallas_kernels.tpu.config import LANES, TpuBlockSizes

NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))


@dataclass(frozen=True)
class Rows:
    """Blocks of slots: one list an epoch, or the keys in their own order, `chunk` at a time.

    bias: in base 2. span: first position that sees a slot and first that no longer does, relative to the first query
    that may meet the block; both 0 where a slot is empty. bounds: per tile of LANES slots the least and largest start
    and the least and largest end: what decides whether a tile is skipped, and whether it needs a mask.
    tiles: query tiles that may meet a block; block n's are the n-th run of them in lists, all of them otherwise.
    """

    key: Float[Array, "B K N C D"]
    value: Float[Array, "B K N C D"]
    bias: Float[Array, "B K N 1 C"]
    span: Int32[Array, "B K N 2 C"]
    bounds: Int32[Array, "B K N 4 tiles"]
    listed: bool
    tiles: int

    @property
    def arrays(self) -> tuple[Array, ...]:
        """A kernel's inputs, in the order of `specs`."""
        return self.bounds, self.key, self.value, self.bias, self.span

    def specs(self, place: Callable[..., tuple]) -> list[pl.BlockSpec]:
        """One block of each of `arrays` a grid step. place(*grid step): batch item, kv head, number of the block."""
        capacity, dim = self.key.shape[3:]

        def spec(*shape, memory_space=pltpu.VMEM):
            return pl.BlockSpec(
                (None, None, None, *shape), lambda *step: (*place(*step), 0, 0), memory_space=memory_space
            )

        bounds = spec(4, capacity // LANES, memory_space=pltpu.SMEM)
        return [bounds, spec(capacity, dim), spec(capacity, dim), spec(1, capacity), spec(2, capacity)]

    def met_by(self, tile, chunk):
        """The block that a query tile meets: its epoch's list, or any chunk of all keys."""
        return lax.div(tile, self.tiles) if self.listed else chunk


def make_rows(key, value, bias, span, *, listed: bool, tiles: int) -> Rows:
    """Rows with the bounds of their tiles."""
    by_tile = span.reshape(*span.shape[:-1], -1, LANES)
    least, largest = by_tile.min(-1), by_tile.max(-1)
    bounds = jnp.stack([least[..., 0, :], largest[..., 0, :], least[..., 1, :], largest[..., 1, :]], axis=3)
    return Rows(key, value, bias, span, bounds, listed, tiles)


def padded_length(queries: int, sizes: TpuBlockSizes, listed: bool) -> int:
    """Queries rounded up to whole epochs, or to whole tiles where there are no epochs."""
    size = sizes.epoch if listed else sizes.block_q
    return -(-queries // size) * size


def product(left: Array, right: Array, numbers) -> Float[Array, "m n"]:
    """A matrix product accumulated in float32; float32 operands keep all of their bits."""
    exact = left.dtype == jnp.float32
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return lax.dot_general(left, right, numbers, precision=precision, preferred_element_type=jnp.float32)


def parts(array: Float[Array, "m n"], exact: bool) -> tuple[Array, ...]:
    """bfloat16 arrays whose sum is `array`: all of its bits in three, or 16 of them in two.

    A product with a matrix of zeros and one 1 a row moves each part unchanged, at the full rate of the matrix unit.
    """
    found, rest = [], array
    for _ in range(3 if exact else 2):
        found.append(rest.astype(jnp.bfloat16))
        rest = rest - found[-1].astype(jnp.float32)
    return tuple(found)


def fold_lanes(array: Float[Array, "m n"]) -> Float[Array, "m 128"]:
    """Sums of every LANES-th column."""
    total = array[:, :LANES]
    for at in range(LANES, array.shape[1], LANES):
        total = total + array[:, at : at + LANES]
    return total


def columns(row: Array) -> Array:
    """A row [1, n] as [n, 128]: entry i in all lanes of row i."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def row(column: Float[Array, "n 128"]) -> Float[Array, "1 n"]:
    """The inverse of `columns`; what stands in the lanes of a row is equal."""
    turned = []
    for at in range(0, column.shape[0], LANES * LANES):
        packed = column[at : at + LANES]
        tiles = range(1, min(LANES, (column.shape[0] - at) // LANES))
        lane = lax.broadcasted_iota(jnp.int32, packed.shape, 1)
        for tile in tiles:
            packed = jnp.where(lane == tile, column[at + tile * LANES : at + (tile + 1) * LANES], packed)
        packed = packed.T
        turned += [packed[tile : tile + 1] for tile in (0, *tiles)]
    return jnp.concatenate(turned, axis=1)


def logits(query: Float[Array, "R D"], key_ref, bias_ref, slots, scale: float) -> Float[Array, "R n"]:
    """Biased logits in base 2 of query rows and slots."""
    return product(query, key_ref[slots, :], NT) * (scale * LOG2E) + bias_ref[:, slots]


def visible(span_ref, slots, first, queries: int) -> Bool[Array, "queries n"]:
    """Which of the queries [first, first + queries) see which slots."""
    position = first + lax.broadcasted_iota(jnp.int32, (queries, slots.size), 0)
    return (span_ref[0:1, slots] <= position) & (position < span_ref[1:2, slots])


def visits(bounds_ref, tile, first, last):
    """Whether any query of [first, last] sees a key of the tile, as far as bounds tell, and whether all see all."""
    meets = (bounds_ref[0, tile] <= last) & (bounds_ref[3, tile] > first)
    whole = (bounds_ref[1, tile] <= first) & (bounds_ref[2, tile] > last)
    return meets, whole


def walk(bounds_ref, capacity: int, wide: int, first, last, step: Callable[..., None]) -> None:
    """Call step(at, width, masked) for the slots that queries [first, last] see, from the first slot to the last.

    `wide` slots that all of the queries see are one step without a mask; of others, pairs of tiles and single tiles
    are a step with one.
    """
    pair = 2 * LANES

    def visit(group, _):
        seen = [visits(bounds_ref, group * (wide // LANES) + tile, first, last) for tile in range(wide // LANES)]
        whole = functools.reduce(jnp.logical_and, (each for _, each in seen))

        @pl.when(whole)
        def _whole():
            step(pl.multiple_of(group * wide, LANES), wide, False)

        def visit_pair(part, _):
            tile = group * (wide // LANES) + 2 * part
            (left, _), (right, _) = (visits(bounds_ref, tile + side, first, last) for side in (0, 1))

            @pl.when(left & right)
            def _both():
                step(pl.multiple_of(tile * LANES, LANES), pair, True)

            @pl.when(left != right)
            def _one():
                step(pl.multiple_of(jnp.where(left, tile, tile + 1) * LANES, LANES), LANES, True)

        lax.fori_loop(0, jnp.where(whole, 0, wide // pair), visit_pair, None)

    lax.fori_loop(0, capacity // wide, visit, None)
