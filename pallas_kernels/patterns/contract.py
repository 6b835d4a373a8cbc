"""What every pattern-attention kernel computes, in which shapes, and with which promises.

Pattern attention is causal softmax attention whose mask is, per query head h, two bit vectors and one map of the
first L positions of a document. With p the position of a token in its document, key j is visible to query i iff both
are tokens of one document, p_j <= p_i, and

    inside[h, p_i, p_j]                                   if p_i < L
    diagonals[h, p_i − p_j] or verticals[h, p_j]          otherwise (false past a vector's end)

Promises, for every implementation:

- No array of T×S elements. Temporary memory is linear in T + S.
- A query that no key is visible to gives out 0.
- Products accumulate in float32 (float64 for float64 inputs).
- Results do not depend on what masked places hold, NaN included.
- The same inputs give bitwise the same outputs.

There is a forward alone: the masks serve frozen models.

Axis letters: B batch, T query time, S key time, H query heads, K kv heads, G = H/K, D head dim, L side of the map,
R distances, C columns, V kept columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, Int32


@dataclass(frozen=True)
class Patterns:
    """The masks of one layer's heads.

    columns: per kv head the columns that any of its query heads has in `verticals`, rising, −1 in unused places.
    reach: every visible pair at a distance of `reach` or more has its key in `columns`: what lies further back than
      that and is no column is never read again.
    """

    inside: Bool[Array, "H L L"]
    diagonals: Bool[Array, "H R"]
    verticals: Bool[Array, "H C"]
    columns: Int32[Array, "K V"]
    reach: int


jax.tree_util.register_dataclass(
    Patterns, data_fields=["inside", "diagonals", "verticals", "columns"], meta_fields=["reach"]
)


class Places(NamedTuple):
    """Where tokens stand. order: anything that grows by one from token to token of a document. start: the order of
    their document's first token; −1 where there is no token. Documents of a row follow one another, starts rising."""

    order: Int32[Array, "B N"]
    start: Int32[Array, "B N"]


class Kept(NamedTuple):
    """Keys and values of the columns, apart from the others: what a cache holds. start: their document's, −1 for a
    column that the document has not reached."""

    key: Float[Array, "B K V D"]
    value: Float[Array, "B K V D"]
    start: Int32[Array, "B K V"]


@runtime_checkable
class Forward(Protocol):
    """(query, key, value, patterns, places of the queries and of the keys) -> out.

    kept: None where `key` holds whole documents in order; then columns are read from there, and `order` is the row of
    `key`. Otherwise every pair closer than `patterns.reach` is read from `key`, in which order has no meaning, and
    every other from `kept`; all tokens of a row are then of one document.
    """

    def __call__(
        self,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B S K D"],
        value: Float[Array, "B S K D"],
        patterns: Patterns,
        query_places: Places,
        key_places: Places,
        kept: Kept | None = None,
        *,
        scale: float,
    ) -> Float[Array, "B T H D"]: ...


@dataclass(frozen=True)
class Implementation:
    """A forward for one kind of device.

    unavailable(): None where it runs on this machine, else the reason in words.
    unsupported(query, key, kept): None where it takes such arrays, else the reason in words.
    """

    name: str
    forward: Forward
    unavailable: Callable[[], str | None]
    unsupported: Callable[[Array, Array, Kept | None], str | None]
