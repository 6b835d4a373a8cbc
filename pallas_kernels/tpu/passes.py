"""`contract.Forward` and `contract.Backward` by the TPU kernels: shapes in, kernels, shapes out."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.contract import BlockSizes, EpochLists, Intervals, Normalizer
from pallas_kernels.powers_of_two import LOG2E, base_2
from pallas_kernels.tpu.backward_key import key_gradients
from pallas_kernels.tpu.backward_query import query_gradient
from pallas_kernels.tpu.config import LANES, TpuBlockSizes
from pallas_kernels.tpu.forward import attend
from pallas_kernels.tpu.stream import from_planes, stream_rows, to_planes
from pallas_kernels.tpu.tiles import Rows, make_rows, padded_length
from pallas_kernels.xla.rows import take_slots


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
    """`contract.Forward` for bfloat16 and float32 and head sizes up to 256."""
    assert isinstance(blocks, TpuBlockSizes)
    queries = query.shape[1]
    parts, blocks = cut_groups(query.shape[2] // key.shape[2], blocks)
    key, value, bias, intervals = repeat_heads(key, value, bias, intervals, parts)
    rows = lay_rows(key, value, bias, intervals, queries=queries, sizes=blocks)
    tiled = by_head(query, key.shape[2], padded_length(queries, blocks, rows.listed))
    out, stats = attend(tiled, rows, scale=scale, sizes=blocks)
    shift, total = (by_query(stats[:, :, :, row], key.shape[2], blocks, queries) for row in (0, 1))
    return by_token(out, queries, query.shape[3]), Normalizer(shift / LOG2E, total)


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
    """`contract.Backward`; rows are streamed again rather than kept."""
    assert isinstance(blocks, TpuBlockSizes)
    parts, blocks = cut_groups(query.shape[2] // key.shape[2], blocks)
    key, value, bias, intervals = repeat_heads(key, value, bias, intervals, parts)
    (_, queries, _, dim), (length, kv_heads) = query.shape, key.shape[1:3]
    lists = intervals.lists
    rows = lay_rows(key, value, bias, intervals, queries=queries, sizes=blocks)
    padded = padded_length(queries, blocks, rows.listed)
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    inverse = 1 / jnp.where(normalizer.total == 0, 1, normalizer.total)
    three = [by_tile(array, kv_heads, blocks, padded) for array in (normalizer.shift * LOG2E, inverse, delta)]
    # Eight rows: a whole tile of registers.
    stats = jnp.stack([*three, *[jnp.zeros_like(delta, shape=three[0].shape)] * 5], axis=3)
    query, dout = (by_head(array, kv_heads, padded) for array in (query, dout))
    dquery = query_gradient(query, dout, stats, rows, scale=scale, sizes=blocks)
    entry_slot = None if lists is None else own_entries(lists, length - queries, padded)
    dkey, dvalue, dbias, of_first = key_gradients(
        query, dout, stats, rows, lists, entry_slot, before=length > queries, scale=scale, sizes=blocks
    )
    dbias = dbias[:, :, 0]
    if lists is not None:
        dkey, dvalue, dbias = (array[:, :, :queries] for array in (dkey, dvalue, dbias))
        if length > queries:
            # Keys from before the first query: epoch 0 carries them.
            slot = lists.entry_slot[:, :, : length - queries]
            before = [take_slots(array, slot) for array in (of_first[0], of_first[1], of_first[2][:, :, 0])]
            dkey, dvalue, dbias = (
                jnp.concatenate([early.astype(late.dtype), late], axis=2)
                for early, late in zip(before, (dkey, dvalue, dbias), strict=True)
            )
    dkey, dvalue, dbias = (
        add_parts(jnp.moveaxis(array[:, :, :length], 2, 1), parts) for array in (dkey, dvalue, dbias)
    )
    return (
        by_token(dquery, queries, dim),
        dkey[..., :dim],
        dvalue[..., :dim],
        dbias.astype(bias.dtype),
    )


def cut_groups(group: int, sizes: TpuBlockSizes) -> tuple[int, TpuBlockSizes]:
    """Into how many parts a group's query heads are cut so that those of LANES positions fit in a tile, and tiles as
    long as the parts allow."""
    parts = next(parts for parts in range(1, group + 1) if group % parts == 0 and group // parts * LANES <= sizes.rows)
    return parts, sizes if group // parts * sizes.block_q <= sizes.rows else replace(sizes, block_q=LANES)


def repeat_heads(key, value, bias, intervals: Intervals, parts: int):
    """Each kv head as often as its group has parts: a part then is a group of its own."""
    if parts == 1:
        return key, value, bias, intervals
    key, value, bias = (jnp.repeat(array, parts, axis=2) for array in (key, value, bias))
    return key, value, bias, jax.tree.map(lambda array: jnp.repeat(array, parts, axis=1), intervals)


def add_parts(gradient: Float[Array, "B S KP *D"], parts: int) -> Float[Array, "B S K *D"]:
    """Sums over the parts of a group, in float32."""
    if parts == 1:
        return gradient
    by_part = gradient.reshape(*gradient.shape[:2], -1, parts, *gradient.shape[3:])
    return by_part.sum(axis=3, dtype=jnp.float32).astype(gradient.dtype)


def lay_rows(key, value, bias, intervals: Intervals, *, queries: int, sizes: TpuBlockSizes) -> Rows:
    """The rows of every epoch's list, or all keys in blocks of `chunk`, with scalars relative to their queries."""
    batch, length, kv_heads = key.shape[:3]
    lists, offset = intervals.lists, length - queries
    finite = jnp.isfinite(key).all(-1) & jnp.isfinite(value).all(-1)
    bias = jnp.moveaxis(jnp.where(finite, base_2(bias.astype(jnp.float32)), jnp.nan), 2, 1)
    # 0 · NaN is NaN: a row that holds one keeps it in its bias, which only queries that see the row read.
    key, value = (pad_heads(jnp.moveaxis(jnp.where(finite[..., None], array, 0), 2, 1)) for array in (key, value))
    start, end = intervals.start - offset, intervals.end - offset
    if lists is None:
        chunk = min(sizes.chunk, -(-length // sizes.wide) * sizes.wide)
        blocks = -(-length // chunk)

        def chunked(array, *rest):
            missing = blocks * chunk - length
            array = jnp.pad(array, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * len(rest))
            return array.reshape(batch, kv_heads, blocks, chunk, *rest)

        span = jnp.stack([chunked(jnp.maximum(start, 0)), chunked(jnp.maximum(end, 0))], axis=3)
        return make_rows(
            chunked(key, key.shape[3]),
            chunked(value, key.shape[3]),
            chunked(bias)[:, :, :, None],
            span,
            listed=False,
            tiles=padded_length(queries, sizes, False) // sizes.block_q,
        )
    planes = to_planes(bias, end, start)
    initial = None
    if offset:
        first = lists.index[:, :, 0, : lists.carried]
        initial = (
            take_slots(key, first),
            take_slots(value, first),
            jnp.moveaxis(take_slots(jnp.moveaxis(planes, 2, 3), first), 3, 2),
        )
    padded = padded_length(queries, sizes, True)
    own_key, own_value = (
        jnp.pad(array[:, :, offset:], [(0, 0), (0, 0), (0, padded - queries), (0, 0)]) for array in (key, value)
    )
    planes = jnp.pad(planes[..., offset:], [(0, 0), (0, 0), (0, 0), (0, padded - queries)])
    entry_slot = own_entries(lists, offset, padded)
    key, value, planes = stream_rows(own_key, own_value, planes, lists, entry_slot, initial)
    scalars = from_planes(planes)
    first = jnp.arange(padded // lists.epoch_size, dtype=jnp.int32)[:, None, None] * lists.epoch_size
    begin, end = (jnp.clip(scalars[..., row : row + 1, :] - first, 0, lists.epoch_size) for row in (2, 1))
    return make_rows(
        key,
        value,
        jnp.asarray(scalars[..., 0:1, :]).view(jnp.float32),
        jnp.concatenate([begin, end], axis=3),
        listed=True,
        tiles=lists.epoch_size // sizes.block_q,
    )


def own_entries(lists: EpochLists, offset: int, padded: int) -> Int32[Array, "B K N"]:
    """Slots in which the queries' own positions enter; past every list where they do not."""
    slot = lists.entry_slot[:, :, offset:]
    missing = padded - slot.shape[2]
    return jnp.pad(slot, [(0, 0), (0, 0), (0, missing)], constant_values=lists.index.shape[3])


def pad_heads(array: Float[Array, "*n D"]) -> Float[Array, "*n _"]:
    """Zeros up to a multiple of 64, or of 128 beyond: they add nothing to any product."""
    dim = array.shape[-1]
    unit = 64 if dim <= LANES else LANES
    missing = -dim % unit
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array


def by_head(array: Float[Array, "B T H D"], kv_heads: int, padded: int) -> Float[Array, "B K G _ _"]:
    batch, queries, heads, dim = array.shape
    array = jnp.pad(array, [(0, 0), (0, padded - queries), (0, 0), (0, 0)])
    array = array.reshape(batch, padded, kv_heads, heads // kv_heads, dim)
    return pad_heads(jnp.transpose(array, (0, 2, 3, 1, 4)))


def by_token(array: Float[Array, "B K G T D"], queries: int, dim: int) -> Float[Array, "B _ H _"]:
    batch, kv_heads, group, padded, wide = array.shape
    array = jnp.transpose(array, (0, 3, 1, 2, 4)).reshape(batch, padded, kv_heads * group, wide)
    return array[:, :queries, :, :dim]


def by_tile(array: Float[Array, "B T H"], kv_heads: int, sizes: TpuBlockSizes, padded: int):
    """A scalar a query as [B, K, tiles, R], R = G · block_q, the order in which kernels hold the rows of a tile."""
    batch, queries, heads = array.shape
    array = jnp.pad(array, [(0, 0), (0, padded - queries), (0, 0)])
    array = array.reshape(batch, padded // sizes.block_q, sizes.block_q, kv_heads, heads // kv_heads)
    array = jnp.transpose(array, (0, 3, 1, 4, 2))
    return array.reshape(*array.shape[:3], -1)


def by_query(array: Float[Array, "B K tiles R"], kv_heads: int, sizes: TpuBlockSizes, queries: int):
    """The inverse of `by_tile`: [B, T, H]."""
    batch, _, tiles, count = array.shape
    array = array.reshape(batch, kv_heads, tiles, count // sizes.block_q, sizes.block_q)
    array = jnp.transpose(array, (0, 2, 4, 1, 3))
    return array.reshape(batch, tiles * sizes.block_q, -1)[:, :queries]
