"""Where the documents of a packed row begin and end.

`segment_ids` number the documents of a row; 0 is padding. A document is one stretch of one id: padding inside
a stretch belongs to it (unseen and unseeing), and an id that returns after another one starts a new document.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32


class Documents(NamedTuple):
    """Per position: its document's first position, the position after its document's last token, and whether it
    is a token at all (not padding). Positions of padding before the first document have an empty document."""

    start: Int32[Array, "B S"]
    end: Int32[Array, "B S"]
    token: Bool[Array, "B S"]


def document_bounds(segment_ids: Int[Array, "B S"] | None, batch: int, length: int) -> Documents:
    """Bounds of every position's document; one document of `length` tokens a row without `segment_ids`."""
    position = jnp.arange(length, dtype=jnp.int32)
    if segment_ids is None:
        whole = jnp.zeros((batch, length), jnp.int32)
        return Documents(whole, whole + length, jnp.ones((batch, length), bool))
    token = segment_ids != 0
    # The id of the last token so far; 0 before the first. Scans, because a TPU gathers single numbers slowly.
    current = jax.lax.associative_scan(lambda old, new: jnp.where(new == 0, old, new), segment_ids, axis=1)
    changes = jnp.concatenate([jnp.ones((batch, 1), bool), current[:, 1:] != current[:, :-1]], axis=1)
    start = jax.lax.cummax(jnp.where(changes, position, 0), axis=1)
    after_last = jax.lax.cummax(jnp.where(token, position + 1, 0), axis=1)
    closes = jnp.concatenate([changes[:, 1:], jnp.ones((batch, 1), bool)], axis=1)
    end = jax.lax.cummin(jnp.where(closes, after_last, length), axis=1, reverse=True)
    return Documents(start, end, token)


def document_positions(segment_ids: Int[Array, "B S"] | None, length: int) -> Int32[Array, "B S"] | Int32[Array, "1 S"]:
    """How many tokens of its document stand before each: what RoPE should rotate by. Padding takes no position, as in a
    cache. Without documents one row for the whole batch: what depends on positions alone is computed once, and read by
    all rows."""
    position = jnp.arange(length, dtype=jnp.int32)
    if segment_ids is None:
        return position[None]
    documents = document_bounds(segment_ids, segment_ids.shape[0], length)
    before = jnp.cumsum(documents.token, axis=1, dtype=jnp.int32) - documents.token
    return before - jax.lax.cummax(jnp.where(position == documents.start, before, 0), axis=1)
