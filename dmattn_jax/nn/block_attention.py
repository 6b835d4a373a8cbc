"""Attention to compressed blocks, and to the whole blocks that the compressed ones recommend, in chunks of queries."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from dmattn_jax.documents import Documents

CHUNK_ELEMENTS = 2**25
"""Logits held at once: queries are cut into chunks of at most this many, over all heads and keys."""

PARTS = 4
"""Pieces of whole rows, each against the keys up to its end: 5/8 of all products, for four times the program."""
SHORTEST_PART = 256
"""Tokens of a piece at least."""


class BlockQueries(NamedTuple):
    """raw, rotated: before and after the rotary embedding. slot: the query's own key; start: its document's first."""

    raw: Float[Array, "B T H D"]
    rotated: Float[Array, "B T H D"]
    slot: Int32[Array, "B T"]
    start: Int32[Array, "B T"]


class BlockContext(NamedTuple):
    """Keys and values of all slots, and of the compressed blocks after one row that is always visible.

    compressed_end, selection_end: the last slot of every whole block, ascending; S where there is none.
    """

    key: Float[Array, "B S K D"]
    value: Float[Array, "B S K D"]
    compressed_key: Float[Array, "B 1+C K D"]
    compressed_value: Float[Array, "B 1+C K D"]
    compressed_end: Int32[Array, "B C"]
    selection_end: Int32[Array, "B N"]


def block_ends(documents: Documents | None, batch: int, length: int, size: int) -> Int32[Array, "B N"]:
    """Last slots of the blocks of `size` tokens, counted from each document's start, that are whole; at most
    length // size of them, then `length`. documents: None for one document a row; else padding must be at the end."""
    slot = jnp.arange(length, dtype=jnp.int32)
    if documents is None:
        return jnp.broadcast_to(slot[size - 1 :: size], (batch, length // size))
    last = documents.token & ((slot - documents.start + 1) % size == 0)
    return jnp.sort(jnp.where(last, slot, length), axis=1)[:, : length // size]


def take_blocks(rows: Float[Array, "B S K D"], ends: Int32[Array, "B C"], size: int) -> Float[Array, "B C s K D"]:
    """The `size` rows up to each end; rows that are not there are clipped to some that are."""
    index = ends[..., None] - jnp.arange(size - 1, -1, -1)
    flat = index.reshape(index.shape[0], index.shape[1] * size, 1, 1)
    return jnp.take_along_axis(rows, flat, axis=1, mode="clip").reshape(*index.shape, *rows.shape[2:])


def block_attention(
    queries: BlockQueries,
    context: BlockContext,
    *,
    compression_block: int,
    selection_block: int,
    selected_blocks: int,
    whole_rows: bool,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"]]:
    """The compressed and the selected branch of native sparse attention (`NativeSparseAttention` has the equations).

    whole_rows: query t stands in slot t, so that no key after it has to be read.
    Memory is that of one chunk of queries against all keys; the backward pass computes each chunk again, whatever a
    `jax.checkpoint` around it would keep.
    """

    def run(queries: BlockQueries, context: BlockContext) -> tuple[jax.Array, jax.Array]:
        length = queries.raw.shape[1]
        parts = min(PARTS, max(1, length // SHORTEST_PART)) if whole_rows else 1
        ends = [length * (part + 1) // parts for part in range(parts)]
        branches = []
        for first, end in itertools.pairwise([0, *ends]):
            seen = _up_to(context, end, compression_block, selection_block) if whole_rows else context
            rows = BlockQueries(*(array[:, first:end] for array in queries))
            branches.append(_in_chunks(rows, seen, compression_block, selection_block, selected_blocks))
        compressed, selected = (jnp.concatenate(part, axis=1) for part in zip(*branches, strict=True))
        return compressed, selected

    # A policy that keeps products would keep the logits, T×S, were it to look into the chunks: it sees this instead.
    attention = jax.custom_vjp(run)
    attention.defvjp(
        lambda *inputs: (run(*inputs), inputs), lambda inputs, gradient: jax.vjp(run, *inputs)[1](gradient)
    )
    return attention(queries, context)


def _up_to(context: BlockContext, end: int, compression_block: int, selection_block: int) -> BlockContext:
    """What queries before slot `end` can see: blocks are in order of their ends, and so many can have ended."""
    compressed, chosen = end // compression_block, end // selection_block
    return BlockContext(
        context.key[:, :end],
        context.value[:, :end],
        context.compressed_key[:, : 1 + compressed],
        context.compressed_value[:, : 1 + compressed],
        context.compressed_end[:, :compressed],
        context.selection_end[:, :chosen],
    )


def _in_chunks(
    queries: BlockQueries,
    context: BlockContext,
    compression_block: int,
    selection_block: int,
    selected_blocks: int,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"]]:
    """`block_attention` and, differentiated, its backward pass: a loop over chunks of queries."""
    batch, length, heads, head_dim = queries.raw.shape
    slots = context.key.shape[1]
    size = max(1, min(length, CHUNK_ELEMENTS // (batch * heads * slots)))
    inside = _blocks_inside(context, selection_block // compression_block)
    dtype = context.key.dtype
    key_slot = jnp.arange(slots, dtype=jnp.int32)
    block_of_key = _block_of_key(context.selection_end, slots, selection_block)
    # Every chunk adds to the gradients of all keys: in float32, whatever the keys are.
    wide = [array.astype(jnp.promote_types(dtype, jnp.float32)) for array in context[:4]]

    @jax.checkpoint
    def one_chunk(chunk: BlockQueries) -> tuple[jax.Array, jax.Array]:
        key, value, compressed_key, compressed_value = (array.astype(dtype) for array in wide)
        logits = _logits(chunk.raw, compressed_key)
        ended = _ended_within(context.compressed_end, compression_block, chunk.start, chunk.slot)
        always = jnp.ones((*ended.shape[:2], 1), bool)
        compressed = _attend(logits, jnp.concatenate([always, ended], axis=-1)[:, None], compressed_value)
        own_start = chunk.start + (chunk.slot - chunk.start) // selection_block * selection_block
        candidate = _ended_within(context.selection_end, selection_block, chunk.start, own_start - 1)
        chosen = _choose(jax.lax.stop_gradient(logits[..., 1:]), inside, candidate, selected_blocks)
        # One column more, for the keys that are in no whole block.
        chosen = jnp.pad(chosen, ((0, 0), (0, 0), (0, 0), (0, 1)))
        seen = jax.vmap(lambda of_row, block: jnp.take(of_row, block, axis=-1, mode="clip"))(chosen, block_of_key)
        own = (key_slot >= own_start[..., None]) & (key_slot <= chunk.slot[..., None])
        selected = _attend(_logits(chunk.rotated, key), seen | own[:, None], value)
        return compressed, selected

    count = -(-length // size)

    def cut(array: jax.Array) -> jax.Array:
        widths = [(0, 0), (0, count * size - length)] + [(0, 0)] * (array.ndim - 2)
        return jnp.moveaxis(jnp.pad(array, widths).reshape(batch, count, size, *array.shape[2:]), 1, 0)

    def whole(chunks: jax.Array) -> jax.Array:
        # [chunks, B, K, G, t, D]
        rows = jnp.moveaxis(chunks, 0, 3).reshape(*chunks.shape[1:4], count * size, head_dim)
        return jnp.moveaxis(rows, 3, 1)[:, :length].reshape(batch, length, heads, head_dim)

    compressed, selected = jax.lax.map(one_chunk, BlockQueries(*map(cut, queries)))
    return whole(compressed), whole(selected)


def _logits(query: Float[Array, "B t H D"], key: Float[Array, "B n K D"]) -> Float[Array, "B K G t n"]:
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1])
    scale = query.shape[-1] ** -0.5
    return jnp.einsum("btkgd,bnkd->bkgtn", grouped, key, preferred_element_type=jnp.float32) * scale


def _attend(
    logits: Float[Array, "B K G t n"], visible: Bool[Array, "B _ t n"], value: Float[Array, "B n K D"]
) -> Float[Array, "B K G t D"]:
    """softmax over the visible keys, of which every query has one, times value."""
    weights = jax.nn.softmax(jnp.where(visible[:, :, None], logits, -jnp.inf), axis=-1).astype(value.dtype)
    out = jnp.einsum("bkgtn,bnkd->bkgtd", weights, value, preferred_element_type=jnp.float32)
    return out.astype(value.dtype)


def _ended_within(
    ends: Int32[Array, "B n"], size: int, first: Int32[Array, "B t"], last: Int32[Array, "B t"]
) -> Bool[Array, "B t n"]:
    """Whether each block lies in first … last."""
    ends = ends[:, None, :]
    return (ends <= last[..., None]) & (ends - size + 1 >= first[..., None])


def _choose(
    logits: Float[Array, "B K G t C"],
    inside: Int32[Array, "B N r"],
    candidate: Bool[Array, "B t N"],
    count: int,
) -> Bool[Array, "B K t N"]:
    """The `count` candidates of greatest importance."""
    importance = logits.mean(axis=2)
    batch, blocks, ratio = inside.shape
    flat = inside.reshape(batch, 1, 1, blocks * ratio)
    importance = jnp.take_along_axis(importance, flat, axis=-1, mode="clip")
    importance = importance.reshape(*importance.shape[:3], blocks, ratio).mean(axis=-1)
    score = jnp.where(candidate[:, None], importance, -jnp.inf)
    best, index = jax.lax.top_k(score, min(count, blocks))
    index = jnp.where(jnp.isneginf(best), blocks, index)
    return (index[..., None] == jnp.arange(blocks)).any(axis=-2)


def _blocks_inside(context: BlockContext, ratio: int) -> Int32[Array, "B N r"]:
    """Of every selection block, which compressed blocks it is made of."""
    last = jax.vmap(jnp.searchsorted)(context.compressed_end, context.selection_end).astype(jnp.int32)
    return last[..., None] - jnp.arange(ratio - 1, -1, -1, dtype=jnp.int32)


def _block_of_key(ends: Int32[Array, "B N"], slots: int, size: int) -> Int32[Array, "B S"]:
    """The selection block of every slot; N for those in none that is whole."""
    blocks = ends.shape[1]
    slot = jnp.arange(slots, dtype=jnp.int32)
    block = jax.vmap(lambda row: jnp.searchsorted(row, slot))(ends).astype(jnp.int32)
    end = jnp.take_along_axis(jnp.pad(ends, ((0, 0), (0, 1)), constant_values=2 * slots + size), block, axis=1)
    return jnp.where(end - size < slot, block, blocks)
