"""The shape of the work that chooses keys, shared by its steps."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.gpu.gathers import Read
from pallas_kernels.gpu.ranked import Ranked

LEAF = 32
"""Keys of a leaf: the bits of a word."""
INTEGERS = (jnp.int32,)


class Tree:
    """The shape of the work: `rows` = batch · heads rows of `padded` keys in epochs of `size`.

    windows: what kernels read each row's window from, the last of their operands; none where all are `capacity`.
    """

    def __init__(self, batch: int, heads: int, padded: int, size: int, windows: tuple[int, ...]):
        self.rows, self.padded, self.size = batch * heads, padded, size
        self.capacity = max(windows)
        self.windows: tuple[jax.Array, ...] = ()
        if min(windows) < self.capacity:
            self.windows = (jnp.tile(jnp.asarray(windows, jnp.int32), batch),)

    def window(self, reads: Sequence[Read], row: Int32[Array, " n"]) -> Int32[Array, " n"]:
        """Each row's window, for a kernel whose operands end with `windows`."""
        return reads[-1](row) if self.windows else jnp.full_like(row, self.capacity)

    def blocks(self, array: Int32[Array, "R P"], size: int) -> Int32[Array, "R n c"]:
        return array.reshape(self.rows, self.padded // size, size)

    def lists(self, count: int, size: int, parts: Sequence[Int32[Array, " n"]]) -> Ranked:
        """Orders and positions, flat, as `count` lists a row."""
        order, position = (part.reshape(self.rows, count, size) for part in parts)
        return Ranked(order, position)


def split(n: Int32[Array, " n"], size: int) -> tuple[Int32[Array, " n"], Int32[Array, " n"]]:
    """Quotient and rest of numbers that are not negative."""
    divisor = jnp.int32(size)
    return jax.lax.div(n, divisor), jax.lax.rem(n, divisor)
