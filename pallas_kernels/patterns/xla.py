"""Portable pattern attention: a scan over blocks of queries, an online softmax over the blocks of keys that they see.

Diagonals are read as bands: of the keys within reach, the blocks that no diagonal crosses are skipped. Columns further
back are gathered. The pairs of the two parts are told apart by distance, so none counts twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.patterns.contract import Implementation, Kept, Patterns, Places
from pallas_kernels.xla.tiles import accumulation_dtype, matmul, pad_queries

BLOCK = 128
"""Queries, and keys, of one matrix product."""

NEVER = jnp.iinfo(jnp.int32).max


class _Rows(NamedTuple):
    """A block of keys. order and start: [B, 1, c] for keys that all heads share, [B, K, c] for gathered ones."""

    key: Float[Array, "B K c D"]
    value: Float[Array, "B K c D"]
    order: Int32[Array, "B k c"]
    start: Int32[Array, "B k c"]


def pattern_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    patterns: Patterns,
    query_places: Places,
    key_places: Places,
    kept: Kept | None = None,
    *,
    scale: float,
) -> Float[Array, "B T H D"]:
    """`contract.Forward`."""
    batch, queries, heads, dim = query.shape
    kv_heads = key.shape[2]
    dtype = accumulation_dtype(query.dtype)
    size_q, size_k = min(BLOCK, queries), min(BLOCK, key.shape[1])
    # Only the document that a block of queries begins in can have columns further back than the block is long.
    far = patterns.reach if kept is not None else max(patterns.reach, size_q)
    tiles, places = _in_blocks(query, size_q), _blocks_of_places(query_places, size_q)
    key, value = pad_queries(key, size_k), pad_queries(value, size_k)
    key_order, key_start = _padded_places(key_places, size_k)
    spans = _spans(key_order, key_start, size_k)
    band_counts = jnp.cumsum(jnp.pad(patterns.diagonals.any(0), (1, 0)).astype(jnp.int32))
    columns = patterns.columns
    chunk = min(BLOCK, columns.shape[1])
    columns = jnp.pad(columns, ((0, 0), (0, -columns.shape[1] % chunk if chunk else 0)), constant_values=-1)
    if kept is not None:
        kept = _padded_kept(kept, columns.shape[1])

    def one_tile(_: None, tile_and_places: Any) -> tuple[None, jax.Array]:
        tile, place = tile_and_places
        tile = tile.reshape(batch, size_q, kv_heads, -1, dim)
        first = jnp.where(place.start < 0, NEVER, place.start).min(1)

        def band(block: jax.Array, state: Any) -> Any:
            at = block * size_k
            rows = _Rows(
                *(jnp.moveaxis(jax.lax.dynamic_slice_in_dim(a, at, size_k, 1), 2, 1) for a in (key, value)),
                *(jax.lax.dynamic_slice_in_dim(a, at, size_k, 1)[:, None] for a in (key_order, key_start)),
            )
            distance = place.order[:, None, :, None] - rows.order[:, :, None, :]
            shown = _visible(patterns, place, rows) & (distance < far)[:, :, None]
            return _accumulate(tile, rows, shown, state, scale, dtype)

        def gathered(number: jax.Array, state: Any) -> Any:
            column = jax.lax.dynamic_slice_in_dim(columns, number * chunk, chunk, axis=1)
            rows = _columns(key, value, key_start, first, column, kept, number * chunk)
            distance = place.order[:, None, :, None] - rows.order[:, :, None, :]
            shown = _visible(patterns, place, rows) & (distance >= far)[:, :, None]
            return _accumulate(tile, rows, shown, state, scale, dtype)

        shape = (batch, kv_heads, heads // kv_heads, size_q)
        state = (jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype), jnp.zeros((*shape, dim), dtype))
        seen = _visited(place, spans, band_counts, patterns, far)
        low = jnp.argmax(seen).astype(jnp.int32)
        high = jnp.where(seen.any(), seen.shape[0] - jnp.argmax(seen[::-1]), 0).astype(jnp.int32)
        state = jax.lax.fori_loop(
            low, high, lambda b, s: jax.lax.cond(seen[b], band, lambda _, same: same, b, s), state
        )
        if chunk:
            latest = jnp.where(place.start < 0, -1, place.order).max(1)
            # columns rise, and unused places are at the end
            reached = (columns[None] >= 0) & (latest[:, None, None] - first[:, None, None] - columns[None] >= far)
            count = reached.any((0, 1)).reshape(-1, chunk).any(1).sum(dtype=jnp.int32)
            state = jax.lax.fori_loop(0, count, gathered, state)
        _, total, weighted = state
        out = weighted / jnp.where(total == 0, 1, total)[..., None]
        return None, jnp.moveaxis(out, 3, 1).reshape(batch, size_q, heads, dim).astype(query.dtype)

    _, out = jax.lax.scan(one_tile, None, (tiles, places))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, dim)[:, :queries]


def _in_blocks(array: jax.Array, size: int) -> jax.Array:
    """[B, N, …] -> [N/size, B, size, …], zeros past the end."""
    array = pad_queries(array, size)
    return jnp.moveaxis(array.reshape(array.shape[0], -1, size, *array.shape[2:]), 1, 0)


def _padded_places(places: Places, size: int) -> Places:
    missing = -places.order.shape[1] % size
    return Places(
        jnp.pad(places.order, ((0, 0), (0, missing))),
        jnp.pad(places.start, ((0, 0), (0, missing)), constant_values=-1),
    )


def _blocks_of_places(places: Places, size: int) -> Places:
    return Places(*(_in_blocks(array, size) for array in _padded_places(places, size)))


def _padded_kept(kept: Kept, slots: int) -> Kept:
    missing = slots - kept.key.shape[2]
    wide = ((0, 0), (0, 0), (0, missing), (0, 0))
    start = jnp.pad(kept.start, wide[:3], constant_values=-1)
    return Kept(jnp.pad(kept.key, wide), jnp.pad(kept.value, wide), start)


class _Spans(NamedTuple):
    """Of each block of keys and row: the first and last order of its tokens, and its least position in a document."""

    first: Int32[Array, "B n"]
    last: Int32[Array, "B n"]
    position: Int32[Array, "B n"]


def _spans(order: jax.Array, start: jax.Array, size: int) -> _Spans:
    token = start >= 0

    def least(array: jax.Array) -> jax.Array:
        return jnp.where(token, array, NEVER).reshape(array.shape[0], -1, size).min(-1)

    last = jnp.where(token, order, -1).reshape(order.shape[0], -1, size).max(-1)
    return _Spans(least(order), last, least(order - start))


def _visited(place: Places, spans: _Spans, band_counts: jax.Array, patterns: Patterns, far: int) -> Bool[Array, " n"]:
    """Which blocks of keys hold a pair that may be visible to a block of queries, in any row and head."""
    token = place.start >= 0
    low = jnp.where(token, place.order, NEVER).min(1)[:, None]
    high = jnp.where(token, place.order, -1).max(1)[:, None]
    some = token.any(1)[:, None] & (spans.last >= 0)
    within = some & (spans.first <= high) & (low - spans.last < far)
    bands = band_counts.shape[0] - 1
    nearest = jnp.clip(jnp.where(within, low - spans.last, 0), 0, bands)
    furthest = jnp.clip(jnp.where(within, high - spans.first, -1) + 1, 0, bands)
    crossed = band_counts[jnp.maximum(furthest, nearest)] > band_counts[nearest]
    mapped = (token & (place.order - place.start < patterns.inside.shape[1])).any(1)[:, None]
    column = spans.position < patterns.verticals.shape[1]
    return (within & (crossed | mapped | column)).any(0)


def _visible(patterns: Patterns, place: Places, rows: _Rows) -> Bool[Array, "B K G t c"]:
    """The contract's rule, head by head."""
    kv_heads = rows.key.shape[1]
    side = patterns.inside.shape[1]
    position = place.order - place.start
    mapped = position < side

    def of_head(inside, diagonals, verticals, order, start):
        key_position = order - start
        distance = position[:, :, None] - key_position[:, None, :]
        cell = jnp.clip(position, 0, side - 1)[:, :, None] * side + jnp.clip(key_position, 0, side - 1)[:, None, :]
        empty = jnp.zeros((inside.shape[0], *cell.shape), bool)
        within = jax.lax.cond(mapped.any(), lambda: inside[:, cell], lambda: empty)
        diagonal = diagonals.at[:, jnp.maximum(distance, 0)].get(mode="fill", fill_value=False)
        vertical = verticals.at[:, jnp.maximum(key_position, 0)].get(mode="fill", fill_value=False)
        shown = jnp.where(mapped[None, :, :, None], within, diagonal | vertical[:, :, None, :])
        same = (place.start[:, :, None] == start[:, None, :]) & (start >= 0)[:, None, :] & (distance >= 0)
        return jnp.moveaxis(shown & same, 0, 1)

    def grouped(array: jax.Array) -> jax.Array:
        array = array.reshape(array.shape[0], -1)
        return array.reshape(kv_heads, -1, array.shape[1])

    # Keys that all heads share are not copied for each.
    shared = rows.order.shape[1] == 1
    axis, order, start = (None, rows.order[:, 0], rows.start[:, 0]) if shared else (1, rows.order, rows.start)
    return jax.vmap(of_head, (0, 0, 0, axis, axis), 1)(
        grouped(patterns.inside), grouped(patterns.diagonals), grouped(patterns.verticals), order, start
    )


def _columns(key, value, key_start, first, column, kept: Kept | None, at) -> _Rows:
    """The keys of some columns [K, c]: of the document that begins at `first` [B], or from what is kept."""
    if kept is not None:
        slots = column.shape[1]
        parts = (jax.lax.dynamic_slice_in_dim(array, at, slots, axis=2) for array in kept)
        keys, values, start = parts
        start = jnp.where(column[None] >= 0, start, -1)
        return _Rows(keys, values, jnp.maximum(start, 0) + column[None], start)
    length = key.shape[1]
    valid = (column[None] >= 0) & (first < length)[:, None, None]
    row = jnp.where(valid, jnp.minimum(first, length)[:, None, None] + column[None], length)
    batch = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None, None]
    head = jnp.arange(key.shape[2], dtype=jnp.int32)[None, :, None]
    keys, values = (array.at[batch, row, head].get(mode="fill", fill_value=0) for array in (key, value))
    start = key_start.at[batch, row].get(mode="fill", fill_value=-1)
    return _Rows(keys, values, row, start)


def _accumulate(tile, rows: _Rows, shown, state, scale: float, dtype):
    """One more block in the online softmax (FlashAttention, arXiv 2205.14135)."""
    largest, total, weighted = state
    # 0 · NaN is NaN: what is not finite moves into a bias that only the queries that see the row read.
    finite = jnp.isfinite(rows.key).all(-1) & jnp.isfinite(rows.value).all(-1)
    keys, values = (jnp.where(finite[..., None], array, 0) for array in (rows.key, rows.value))
    scores = scale * matmul("btkgd,bkcd->bkgtc", tile, keys, dtype)
    scores = scores + jnp.where(finite, 0, jnp.nan).astype(dtype)[:, :, None, None, :]
    scores = jnp.where(shown, scores, -jnp.inf)
    new = jnp.maximum(largest, scores.max(-1))
    reference = jnp.where(jnp.isneginf(new), 0, new)
    weights = jnp.where(shown, jnp.exp(scores - reference[..., None]), 0)
    rescale = jnp.exp(largest - reference)
    weighted = weighted * rescale[..., None] + matmul("bkgtc,bkcd->bkgtd", weights.astype(values.dtype), values, dtype)
    return new, total * rescale + weights.sum(-1), weighted


XLA = Implementation("xla", pattern_attention, unavailable=lambda: None, unsupported=lambda *_: None)
