"""Moving entries of rows along the lanes inside a kernel, where no entry passes another one.

Such moves are what a network of shifts by powers of two does without a collision: entries that close up go by the
lowest bit of their distance first, entries that spread out by the highest. Every step is a rotation of whole registers
and a choice, so eight rows move at once and every bit of an entry arrives.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.tpu.config import LANES
from pallas_kernels.tpu.tiles import NN, NT, product

HERE = 1 << 30
"""Marks a place of `spread` as taken, beside the distance that its entry came."""


def lanes(shape: tuple[int, int]) -> Int32[Array, "R n"]:
    """The number of each place in its row."""
    return lax.broadcasted_iota(jnp.int32, shape, 1)


def close_up(distance: Int32[Array, "R n"], rows: tuple[Array, ...]) -> tuple[Array, ...]:
    """Entries moved `distance` places to the left; 0 for places that hold none.

    Where entry j stands before entry k, distance j <= distance k. Places that no entry moved to hold anything.
    """
    width = distance.shape[1]
    for bit in range((width - 1).bit_length()):
        step = 1 << bit
        arriving = pltpu.roll(distance, width - step, axis=1)
        comes = (arriving & step) != 0
        distance = jnp.where(comes, arriving, jnp.where((distance & step) != 0, 0, distance))
        rows = tuple(jnp.where(comes, pltpu.roll(row, width - step, axis=1), row) for row in rows)
    return rows


def spread(
    distance: Int32[Array, "R n"], entry: Bool[Array, "R n"], rows: tuple[Array, ...]
) -> tuple[Int32[Array, "R n"], tuple[Array, ...]]:
    """Entries moved `distance` places to the right, in a row that has room for them; the inverse of `close_up`.

    Returns what stands in each place: HERE + the distance that its entry came, or 0; and the moved rows.
    """
    width = distance.shape[1]
    marked = jnp.where(entry, distance + HERE, 0)
    for bit in reversed(range((width - 1).bit_length())):
        step = 1 << bit
        arriving = pltpu.roll(marked, step, axis=1)
        comes = (arriving & step) != 0
        marked = jnp.where(comes, arriving, jnp.where((marked & step) != 0, 0, marked))
        rows = tuple(jnp.where(comes, pltpu.roll(row, step, axis=1), row) for row in rows)
    return marked, rows


def count_before(mask: Bool[Array, "R n"]) -> tuple[Int32[Array, "R n"], Int32[Array, "R 1"]]:
    """How many places of a row before each one are set, and in all."""
    places = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
    earlier = (places < lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)).astype(jnp.bfloat16)
    ones = jnp.where(mask, 1.0, 0.0)
    total = jnp.zeros((mask.shape[0], 1), jnp.float32)
    found = []
    for at in range(0, mask.shape[1], LANES):
        tile = ones[:, at : at + LANES]
        found.append(total + product(tile.astype(jnp.bfloat16), earlier, NN))
        total = found[-1][:, LANES - 1 :] + tile[:, LANES - 1 :]
    return jnp.concatenate(found, axis=1).astype(jnp.int32), total.astype(jnp.int32)


def to_bytes(*rows: Int32[Array, "1 n"]) -> Float[Array, "8 n"]:
    """The bytes of up to two rows as bfloat16 numbers, which hold 0 … 255 exactly."""
    number = lax.broadcasted_iota(jnp.int32, (8, rows[0].shape[1]), 0)
    of_row = jnp.where(number < 4, rows[0], rows[-1])
    return ((of_row >> (8 * (number & 3))) & 255).astype(jnp.float32).astype(jnp.bfloat16)


def from_bytes(planes: Float[Array, "8 n"]) -> tuple[Int32[Array, "1 n"], Int32[Array, "1 n"]]:
    byte = planes.astype(jnp.int32)
    first, second = (
        byte[at : at + 1] | (byte[at + 1 : at + 2] << 8) | (byte[at + 2 : at + 3] << 16) | (byte[at + 3 : at + 4] << 24)
        for at in (0, 4)
    )
    return first, second


def place(planes: Float[Array, "8 128"], places: Int32[Array, "1 128"], count: int) -> Float[Array, "8 count"]:
    """Column j added to column places[j]; dropped where that is `count` or beyond."""
    row = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
    tiles = [product(planes, (row == places - at).astype(jnp.bfloat16), NT) for at in range(0, count, LANES)]
    return jnp.concatenate(tiles, axis=1)


def take(planes: Float[Array, "8 n"], places: Int32[Array, "1 128"]) -> Float[Array, "8 128"]:
    """Column places[j] in column j; 0 for places from n on."""
    row = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
    found = jnp.zeros((planes.shape[0], LANES), jnp.float32)
    for at in range(0, planes.shape[1], LANES):
        found += product(planes[:, at : at + LANES], (row == places - at).astype(jnp.bfloat16), NN)
    return found
