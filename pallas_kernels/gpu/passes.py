"""The contract's two passes on Hopper: pad, gather, run the kernels, sum gradients over epochs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.contract import BlockSizes, EpochLists, Intervals, Normalizer
from pallas_kernels.gpu.backward_key import key_gradients
from pallas_kernels.gpu.backward_query import query_gradient
from pallas_kernels.gpu.config import HEAD_SIZES, HopperBlockSizes
from pallas_kernels.gpu.forward import attend
from pallas_kernels.gpu.tiles import LOG2E, gather_rows, key_walks, padded_length, query_runs


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
    """`contract.Forward` for half precision and head sizes up to 128."""
    assert isinstance(blocks, HopperBlockSizes)
    queries, dim = query.shape[1], query.shape[3]
    query, key, value = _pad(query, queries, blocks), _pad_heads(key), _pad_heads(value)
    rows = gather_rows(key, value, bias, intervals, queries=queries, sizes=blocks)
    out, shift, total = attend(query, rows, query_runs(rows, queries, blocks), scale=scale, sizes=blocks)
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
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    total = jnp.where(normalizer.total == 0, 1, normalizer.total)
    stats = jnp.stack([jnp.moveaxis(array, 1, 2) for array in (normalizer.shift * LOG2E, 1 / total, delta)], axis=2)
    padded = padded_length(queries, blocks)
    stats = jnp.pad(stats, [(0, 0), (0, 0), (0, 0), (0, padded - queries)])
    query, dout = _pad(query, queries, blocks), _pad(dout, queries, blocks)
    padded_key, padded_value = _pad_heads(key), _pad_heads(value)
    rows = gather_rows(padded_key, padded_value, bias, intervals, queries=queries, sizes=blocks)
    runs, walks = query_runs(rows, queries, blocks), key_walks(rows, blocks)
    dquery = query_gradient(query, dout, stats, rows, runs, scale=scale, sizes=blocks)
    both, dbias = key_gradients(query, dout, stats, rows, walks, scale=scale, sizes=blocks)
    dbias = jnp.moveaxis(dbias, 1, 2)
    if intervals.lists is not None:
        both, dbias = sum_over_epochs((both, dbias), intervals.lists, length=length, queries=queries)
    wide = padded_key.shape[3]
    dkey, dvalue = both[:, :length, :, :dim], both[:, :length, :, wide : wide + dim]
    return (
        dquery[:, :queries, :, :dim],
        dkey.astype(key.dtype),
        dvalue.astype(value.dtype),
        dbias[:, :length].astype(bias.dtype),
    )


def sum_over_epochs(parts: tuple[Array, ...], lists: EpochLists, *, length: int, queries: int) -> tuple[Array, ...]:
    """Gradients [B, E·C, K, …] of list rows, summed to those of the keys, [B, S, K, …]; always in the same order.

    From the last epoch to the first, every slot adds what its key collected later; a key's sum is read out at the
    epoch in which it entered. Keys before the first query are read out of epoch 0.
    """
    batch, kv_heads, epochs, capacity = lists.index.shape
    offset, size = length - queries, lists.epoch_size
    item = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    head = jnp.arange(kv_heads, dtype=jnp.int32)

    def take(array, slot):
        return array.at[item, slot, head].get(mode="fill", fill_value=0)

    def by_epoch(array):
        return jnp.moveaxis(array.reshape(batch, epochs, capacity, *array.shape[2:]), 1, 0)

    entry = jnp.moveaxis(lists.entry_slot, 1, 2)
    missing = epochs * size - queries
    entries = jnp.pad(entry[:, offset:], [(0, 0), (0, missing), (0, 0)], constant_values=capacity)
    entries = jnp.moveaxis(entries.reshape(batch, epochs, size, kv_heads), 1, 0)
    following = jnp.moveaxis(lists.next_slot, (2, 3), (0, 2))

    def step(later, epoch):
        own, next_slot, slot = epoch
        total = tuple(part + take(after, next_slot) for part, after in zip(own, later, strict=True))
        return total, tuple(take(part, slot) for part in total)

    own = tuple(by_epoch(part) for part in parts)
    start = tuple(jnp.zeros_like(part[0]) for part in own)
    first, found = jax.lax.scan(step, start, (own, following, entries), reverse=True)
    found = tuple(
        jnp.moveaxis(part, 0, 1).reshape(batch, epochs * size, *part.shape[3:])[:, :queries] for part in found
    )
    if not offset:
        return found
    before = tuple(take(part, entry[:, :offset]) for part in first)
    return tuple(jnp.concatenate(pair, axis=1) for pair in zip(before, found, strict=True))


def _pad_heads(array: Float[Array, "B N H D"]) -> Float[Array, "B N H _"]:
    """Zeros up to a head size the kernels have: they add nothing to any product."""
    dim = array.shape[3]
    size = next(size for size in HEAD_SIZES if size >= dim)
    return jnp.pad(array, [(0, 0), (0, 0), (0, 0), (0, size - dim)]) if size > dim else array


def _pad(array: Float[Array, "B T H D"], queries: int, sizes: HopperBlockSizes) -> Float[Array, "B _ H _"]:
    missing = padded_length(queries, sizes) - queries
    array = _pad_heads(array)
    return jnp.pad(array, [(0, 0), (0, missing), (0, 0), (0, 0)]) if missing else array
