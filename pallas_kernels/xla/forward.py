"""Forward pass: a scan over epochs of queries, an online softmax over each one's blocks of keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.contract import BlockSizes, Intervals, Normalizer
from pallas_kernels.xla.rows import Epoch, key_blocks
from pallas_kernels.xla.tiles import accumulation_dtype, logits, matmul, pad_queries


def forward(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    bias: Float[Array, "B S K"],
    intervals: Intervals,
    *,
    scale: float,
    blocks: BlockSizes,
) -> tuple[Float[Array, "B T H D"], Normalizer]:
    """`contract.Forward`; the algorithm is FlashAttention's (arXiv 2205.14135) over gathered keys."""
    # Lifetimes and a bias that do not depend on the input (a window's) are known before any layer runs. Tied to the
    # query they stay where they are; else the differentiation of a loop over checkpointed layers would compute the
    # masks of all tiles ahead of the loop, and keep them: T×S in all.
    query, bias, intervals = jax.lax.optimization_barrier((query, bias, intervals))
    batch, queries, heads, dim = query.shape
    keys, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    size = blocks.epoch
    dtype = accumulation_dtype(query.dtype)
    walk = key_blocks(key, value, bias, intervals, blocks)
    padded = pad_queries(query, size)
    count = padded.shape[1] // size

    def epoch_step(whole, number):
        epoch = Epoch(number, keys - queries + number * size, size)
        tile = jax.lax.dynamic_slice_in_dim(padded, number * size, size, axis=1)
        tile = tile.reshape(batch, size, kv_heads, group, dim)

        def visit(block, state):
            largest, total, weighted = state
            rows = walk.rows(epoch, block)
            scores, visible = logits(tile, rows, epoch, scale, dtype)
            new = jnp.maximum(largest, scores.max(-1))
            # −∞ − −∞ is NaN: a row that has seen nothing yet keeps a finite reference.
            reference = jnp.where(jnp.isneginf(new), 0, new)
            weights = jnp.where(visible, jnp.exp(scores - reference[..., None]), 0)
            rescale = jnp.exp(largest - reference)
            weighted = weighted * rescale[..., None] + matmul(
                "bkgtc,bkcd->bkgtd", weights.astype(value.dtype), rows.value, dtype
            )
            return new, total * rescale + weights.sum(-1), weighted

        def step(block, state):
            return jax.lax.cond(walk.visited(epoch, block), visit, lambda _, same: same, block, state)

        shape = (batch, kv_heads, group, size)
        state = (jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype), jnp.zeros((*shape, dim), dtype))
        largest, total, weighted = jax.lax.fori_loop(0, walk.count, step, state)
        tile_out = weighted / jnp.where(total == 0, 1, total)[..., None]
        tile_out = jnp.moveaxis(tile_out, 3, 1).reshape(batch, size, heads, dim).astype(query.dtype)
        shift, total = (
            jnp.moveaxis(array, 3, 1).reshape(batch, size, heads)
            for array in (jnp.where(jnp.isneginf(largest), 0, largest), total)
        )
        parts = zip(whole, (tile_out, shift, total), strict=True)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(array, part, number * size, axis=1) for array, part in parts
        ), None

    rows = jnp.zeros(padded.shape[:3], dtype)
    whole, _ = jax.lax.scan(epoch_step, (jnp.zeros_like(padded), rows, rows), jnp.arange(count, dtype=jnp.int32))
    out, shift, total = (array[:, :queries] for array in whole)
    return out, Normalizer(shift, total)
