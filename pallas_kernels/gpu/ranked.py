"""Short lists of keys in falling order of (gate, position): merged and searched, one element at a time.

Everything is elementwise in the place asked for, and reads lists through functions, so that `gathers.gathered` makes
one kernel of it. In such a kernel `where(found, NUMBER, place)` comes out unsigned and is compared and reduced so from
there on: the number must not be the first choice, and zeros to start from must be made of the array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32


class Ranked(NamedTuple):
    """Lists of keys: their gates as integers (`order.sortable`) and their positions, falling, the later first among
    equals. A place without a key has the order NOTHING, and its position means nothing."""

    order: Int32[Array, "R n c"]
    position: Int32[Array, "R n c"]

    @property
    def size(self) -> int:
        return self.order.shape[2]


class List(NamedTuple):
    """One list as its merge sees it: the order at a place inside, and how many places there are."""

    order: Callable[[Int32[Array, " n"]], Int32[Array, " n"]]
    size: int


def merged(
    earlier: List, later: List, rank: Int32[Array, " n"]
) -> tuple[Int32[Array, " n"], Bool[Array, " n"], Int32[Array, " n"], Int32[Array, " n"]]:
    """Who stands at `rank` in the union of two lists: its order, whether it is of the earlier one, and its place in
    the earlier or in the later list (the other place is inside its list too).

    Every key of `earlier` comes before those of `later`, which therefore win ties. A binary search for how many of the
    first `rank` are of the earlier list (the merge path).
    """
    low, high = jnp.maximum(rank - later.size, 0), jnp.minimum(rank, earlier.size)
    for step in _halving(min(earlier.size, later.size)):
        more = jnp.minimum(low + step, high)
        before, after = jnp.maximum(more - 1, 0), jnp.minimum(rank - more, later.size - 1)
        low = jnp.where(earlier.order(before) > later.order(after), more, low)
    first, second = jnp.minimum(low, earlier.size - 1), jnp.minimum(rank - low, later.size - 1)
    one, other = earlier.order(first), later.order(second)
    leads = (low < earlier.size) & ((rank - low >= later.size) | (one > other))
    return jnp.where(leads, one, other), leads, first, second


def place_of(
    order: Int32[Array, " n"],
    position: Int32[Array, " n"],
    orders: Callable[[Int32[Array, " n"]], Int32[Array, " n"]],
    positions: Callable[[Int32[Array, " n"]], Int32[Array, " n"]],
    size: int,
) -> Int32[Array, " n"]:
    """How many keys of a list of `size` are above (order, position)."""
    low = order - order
    for step in _halving(size):
        more = jnp.minimum(low + step, size)
        held = orders(more - 1)
        above = (held > order) | ((held == order) & (positions(more - 1) > position))
        low = jnp.where(above, more, low)
    return low


def _halving(most: int) -> list[int]:
    """Steps of a search for a number in 0 … most, as few as there are bits in it."""
    return [1 << bit for bit in reversed(range(most.bit_length()))]


def last_not_above(
    value: Int32[Array, " n"], bounds: Callable[[Int32[Array, " n"]], Int32[Array, " n"]], size: int
) -> Int32[Array, " n"]:
    """The last of `size` rising bounds that is not above the value; 0 if all are."""
    low = value - value
    for step in _halving(size - 1):
        more = jnp.minimum(low + step, size - 1)
        low = jnp.where(bounds(more) <= value, more, low)
    return low


def bits_of(flags: Bool[Array, "*n 32"]) -> Int32[Array, "*n"]:
    """Flags as the bits of a word, the first flag lowest."""
    weight = jnp.int32(1) << jnp.arange(32, dtype=jnp.int32)
    return jnp.sum(jnp.where(flags, weight, 0), axis=-1, dtype=jnp.int32)


def set_bits(word: Int32[Array, "*n"]) -> Int32[Array, "*n"]:
    """How many bits of a word are set; by sums of ever wider fields, since kernels have no instruction for it."""
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    return (eights * 0x01010101) >> 24


def nth_set_bit(word: Int32[Array, "*n"], which: Int32[Array, "*n"]) -> Int32[Array, "*n"]:
    """The place of the which-th set bit, counted from 1; 32 where the word has fewer (and 0 for which < 1)."""
    left, place, rest = which, which - which, word
    for half in (16, 8, 4, 2, 1):
        low = set_bits(rest & ((1 << half) - 1))
        up = left > low
        left = jnp.where(up, left - low, left)
        place = jnp.where(up, place + half, place)
        rest = jnp.where(up, rest >> half, rest)
    return jnp.where(set_bits(word) >= which, place, 32)
