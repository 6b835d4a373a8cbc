"""Moving entries of rows to known places: scatters to distinct destinations, so no sort and no race."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32


def place(
    values: Int32[Array, "*n R"], destination: Int32[Array, "*n R"], size: int, fill: int
) -> Int32[Array, "*n _"]:
    """out[…, destination[r]] = values[r], `fill` elsewhere; destinations past the end are dropped.

    Destinations within the end are distinct, so the result does not depend on any order.
    """
    *lead, count = destination.shape
    rows = math.prod(lead)
    # Row by row in one flat array, with one more place at its end for all that is dropped.
    flat = jnp.arange(rows, dtype=jnp.int32)[:, None] * size + destination.reshape(rows, count)
    flat = jnp.where(destination.reshape(rows, count) < size, flat, rows * size)
    out = jnp.full(rows * size + 1, fill, jnp.int32)
    out = out.at[flat.reshape(-1)].set(jnp.broadcast_to(values, destination.shape).reshape(-1))
    return out[:-1].reshape(*lead, size)


def inverse(order: Int32[Array, "*n S"]) -> Int32[Array, "*n S"]:
    """The inverse of permutations along the last axis."""
    position = jnp.arange(order.shape[-1], dtype=jnp.int32)
    return place(jnp.broadcast_to(position, order.shape), order, order.shape[-1], 0)


def partition(bit: Bool[Array, "*n S"]) -> tuple[Int32[Array, "*n S+1"], Int32[Array, "*n S"]]:
    """How many bits are set before each place (and in all), and where a stable partition, zeros first, moves it."""
    count = bit.shape[-1]
    after = jnp.cumsum(bit, axis=-1, dtype=jnp.int32)
    before = jnp.concatenate([jnp.zeros((*bit.shape[:-1], 1), jnp.int32), after], axis=-1)
    zeros = count - after[..., -1:]
    ones_before = before[..., :-1]
    position = jnp.arange(count, dtype=jnp.int32)
    return before, jnp.where(bit, zeros + ones_before, position - ones_before)
