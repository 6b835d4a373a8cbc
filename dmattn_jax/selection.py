"""From gates to lifetimes: which keys the dynamic mask shows, as one integer a key.

The w-th largest gate of a growing prefix never falls, so a key that has left the top w never returns: key j
is visible to query i if and only if j <= i < expiry[j], and `expiry` is the whole N×N mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from dmattn_jax.documents import Documents, document_bounds
from dmattn_jax.permutation import inverse, partition, place
from dmattn_jax.validation import check_gate, check_segment_ids, check_window


def select_keys(
    gate: Float[Array, "B S K"],
    window: int | Sequence[int],
    segment_ids: Int[Array, "B S"] | None = None,
    *,
    causal: bool = True,
) -> Int32[Array, "B S K"]:
    """expiry[b, j, k]: the first position that no longer sees key j (arXiv 2508.02124v6, Listing 1).

    Query i sees key j iff both are tokens of one document, j <= i, and gate j is among the `window` largest of
    the document up to i; the later key wins among equals. Then j <= i < expiry[j], and expiry[j] is at most the
    end of j's document. A key that nobody sees has expiry[j] = j: padding, and gates of −inf. +inf and NaN rank
    above every number (NaN last), so a diverged gate is seen rather than hidden.

    With causal=False there is one selection a document, of its `window` largest gates over all its keys; a chosen
    key has the end of its document as expiry and is visible to all of it.

    gate: any float type; ranked as it comes. window: an int >= 1 or one per kv head. O(S log S) work, O(S) memory.
    No gradient flows through the choice.
    Raises: ValueError on a window below 1 or of the wrong length, or wrong shapes.
    """
    check_gate(gate)
    batch, length, heads = gate.shape
    windows = check_window(window, heads)
    check_segment_ids(segment_ids, batch, length)
    documents = document_bounds(segment_ids, batch, length)
    rows = jnp.moveaxis(jax.lax.stop_gradient(gate), 2, 1)
    return jnp.moveaxis(choose_keys(rows, windows, documents, causal=causal).expiry, 1, 2)


class Choice(NamedTuple):
    """Lifetimes, and the order in which keys fall out of the window.

    priority: of two keys that some query sees both, the one of lower priority expires first. It follows from the
    two keys alone, which expiry does not: an order by priority tells nothing of the future.
    """

    expiry: Int32[Array, "B K S"]
    priority: Int32[Array, "B K S"]


def choose_keys(gate: Float[Array, "B K S"], windows: tuple[int, ...], documents: Documents, *, causal: bool) -> Choice:
    """`select_keys` on head-major gates and known documents."""
    length = gate.shape[-1]
    position = jnp.arange(length, dtype=jnp.int32)
    gate = jnp.where(documents.token[:, None], gate, -jnp.inf)
    start, end = documents.start[:, None], documents.end[:, None]
    # Ascending and stable: among equal gates the later key ranks higher, and so wins.
    rank = inverse(jnp.argsort(gate, axis=-1, stable=True).astype(jnp.int32))
    if min(windows) >= length:
        expiry = jnp.broadcast_to(end, gate.shape)
    else:
        budget = jnp.asarray([min(window, length) for window in windows], jnp.int32)
        # Without causality the only prefix that counts is the whole document.
        until = position + 1 if causal else jnp.maximum(end, 1)
        threshold = _kth_largest_rank(rank, start, until, budget[None, :, None])
        first, last = (position, end) if causal else (jnp.maximum(end, 1) - 1, end)
        expiry = _first_above(threshold, rank, first, last)
        if not causal:
            expiry = jnp.where(expiry >= end, expiry, position)
    expiry = jnp.where(jnp.isneginf(gate), position, jnp.maximum(expiry, position))
    return Choice(expiry, rank)


def last_keys(windows: tuple[int, ...], documents: Documents) -> Choice:
    """What `choose_keys` gives when all gates are equal: the last `window` positions of the document.

    Counted in positions, so padding inside a document takes places in the window.
    """
    length = documents.start.shape[1]
    position = jnp.arange(length, dtype=jnp.int32)
    span = jnp.asarray([min(window, length) for window in windows], jnp.int32)[None, :, None]
    # end - position first: position + window could pass 2^31.
    life = jnp.minimum(span, (documents.end - position)[:, None])
    expiry = jnp.where(documents.token[:, None], position + jnp.maximum(life, 0), position)
    return Choice(expiry, jnp.broadcast_to(position, expiry.shape))


def _kth_largest_rank(rank, start, until, kth) -> Int32[Array, "B K S"]:
    """The kth largest of rank[start:until], per position; −1 where the range holds fewer.

    `rank` is a permutation of 0 … S−1. Descends a wavelet matrix: from the highest bit to the lowest the row is
    partitioned by that bit, zeros first, order kept; a range of the row stays a range, whose ends move by
    prefix counts. One cumulative sum, one scatter and two gathers a bit.
    """
    length = rank.shape[-1]
    bits = max((length - 1).bit_length(), 1)
    shape = rank.shape
    low, high, left = (jnp.broadcast_to(array, shape).astype(jnp.int32) for array in (start, until, kth))
    short = high - low < left

    def descend(state, level):
        row, low, high, left, answer = state
        before, moved = partition((row >> level) & 1 == 1)
        zeros = length - before[..., -1:]
        ones_low, ones_high = (jnp.take_along_axis(before, end, axis=-1) for end in (low, high))
        inside = ones_high - ones_low
        go_up = inside >= left
        low = jnp.where(go_up, zeros + ones_low, low - ones_low)
        high = jnp.where(go_up, zeros + ones_high, high - ones_high)
        left = jnp.where(go_up, left, left - inside)
        answer = answer | (go_up.astype(jnp.int32) << level)
        return (place(row, moved, length, 0), low, high, left, answer), None

    state = (rank, low, high, left, jnp.zeros(shape, jnp.int32))
    levels = jnp.arange(bits - 1, -1, -1, dtype=jnp.int32)
    answer = jax.lax.scan(descend, state, levels)[0][-1]
    return jnp.where(short, -1, answer)


def _first_above(threshold, rank, first, last) -> Int32[Array, "B K S"]:
    """Per key the first position in [first, last) whose threshold is above the key's rank; `last` where none.

    Within a document the threshold never falls, so this is a binary search.
    """
    shape = rank.shape
    low, high = (jnp.broadcast_to(array, shape).astype(jnp.int32) for array in (first, last))

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        above = jnp.take_along_axis(threshold, jnp.minimum(middle, shape[-1] - 1), axis=-1) > rank
        searching = low < high
        low = jnp.where(searching & ~above, middle + 1, low)
        return low, jnp.where(searching & above, middle, high)

    return jax.lax.fori_loop(0, shape[-1].bit_length() + 1, halve, (low, high))[1]
