"""The contract's two passes on Hopper: pad, gather, run the kernels, sum gradients over epochs."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.contract import BlockSizes, Intervals, Normalizer
from pallas_kernels.gpu.backward_key import key_gradients
from pallas_kernels.gpu.backward_query import query_gradient
from pallas_kernels.gpu.config import HopperBlockSizes
from pallas_kernels.gpu.epoch_sums import sum_over_epochs
from pallas_kernels.gpu.forward import attend
from pallas_kernels.gpu.tiles import gather_rows, key_walks, padded_length, query_runs
from pallas_kernels.powers_of_two import LOG2E


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
    """`contract.Forward` for half precision and head sizes up to 256."""
    assert isinstance(blocks, HopperBlockSizes)
    queries, dim = query.shape[1], query.shape[3]
    query = _pad(query, blocks)
    key, value = (pad_heads(array, blocks.head_dim) for array in (key, value))
    rows = gather_rows(key, value, bias, intervals, queries=queries)
    runs = query_runs(rows, blocks.forward.block_k)
    out, shift, total = attend(query, rows, runs, scale=scale, sizes=blocks.forward)
    shift, total = (jnp.moveaxis(array[..., :queries], 1, 2) for array in (shift, total))
    return out[:, :queries, :, :dim], Normalizer(shift / LOG2E, total)


def backward(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    bias: Float[Array, "B S K"],
    intervals: Intervals,
    out: Float[Array, "B T H D"],
    normalizer: Normalizer,
    dout: Float[Array, "B T H D"],
    *,
    scale: float,
    blocks: BlockSizes,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K D"], Float[Array, "B S K"]]:
    """`contract.Backward`; lists are gathered again rather than kept."""
    assert isinstance(blocks, HopperBlockSizes)
    queries, length, dim = query.shape[1], key.shape[1], query.shape[3]
    stats = statistics(out, normalizer, dout)
    query, dout = _pad(query, blocks), _pad(dout, blocks)
    padded_key, padded_value = (pad_heads(array, blocks.head_dim) for array in (key, value))
    rows = gather_rows(padded_key, padded_value, bias, intervals, queries=queries)
    runs = query_runs(rows, blocks.query_gradient.block_k)
    walks = key_walks(rows, blocks.key_gradient.block_k)
    dquery, lack = query_gradient(query, dout, stats, rows, runs, scale=scale, sizes=blocks.query_gradient)
    if lack is not None:
        stats = stats.at[:, :, 2].add(lack)
    gradients, dbias = key_gradients(query, dout, stats, rows, walks, scale=scale, sizes=blocks.key_gradient)
    dbias = jnp.moveaxis(dbias, 1, 2)
    if intervals.lists is None:
        dkey, dvalue = (array[:, :length] for array in gradients)
        dbias = dbias[:, :length]
    else:
        (both,) = gradients
        sizes = {"length": length, "queries": queries}
        dkey, dvalue = sum_over_epochs(both, intervals, parts=2, dtype=key.dtype, **sizes)
        dbias = sum_over_epochs(dbias[..., None], intervals, parts=1, dtype=jnp.float32, **sizes)[0][..., 0]
    return (
        dquery[:, :queries, :, :dim],
        dkey[..., :dim].astype(key.dtype),
        dvalue[..., :dim].astype(value.dtype),
        dbias.astype(bias.dtype),
    )


def statistics(
    out: Float[Array, "B T H D"], normalizer: Normalizer, dout: Float[Array, "B T H D"]
) -> Float[Array, "B H 3 _"]:
    """What the backward kernels know of each query: the softmax's shift in base 2, 1/total, and Σ dout·out."""
    # Apart from the rest, or the compiler would read both arrays once for each of the three rows that it belongs to.
    delta = lax.optimization_barrier(jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1))
    total = jnp.where(normalizer.total == 0, 1, normalizer.total)
    stats = jnp.stack([jnp.moveaxis(array, 1, 2) for array in (normalizer.shift * LOG2E, 1 / total, delta)], axis=2)
    queries = out.shape[1]
    return jnp.pad(stats, [(0, 0), (0, 0), (0, 0), (0, padded_length(queries) - queries)])


def pad_heads(array: Float[Array, "B N H D"], size: int) -> Float[Array, "B N H _"]:
    """Zeros up to a head size the kernels have: they add nothing to any product."""
    dim = array.shape[3]
    return jnp.pad(array, [(0, 0), (0, 0), (0, 0), (0, size - dim)]) if size > dim else array


def _pad(array: Float[Array, "B T H D"], blocks: HopperBlockSizes) -> Float[Array, "B _ H _"]:
    queries = array.shape[1]
    missing = padded_length(queries) - queries
    array = pad_heads(array, blocks.head_dim)
    return jnp.pad(array, [(0, 0), (0, missing), (0, 0), (0, 0)]) if missing else array
