"""Pattern attention for TPUs: a Mosaic kernel for rows that hold one document each, from their first position on.

A tile of queries visits, by lists that a kv head's bits decide before the kernel starts: beside the map, the blocks of
keys at the distances that any diagonal crosses, and then the gathered columns; within the map, its blocks that hold
anything. A block that diagonals cross looks the same wherever it stands, so there are as many masks as block distances.
Columns are taken out of the diagonals' blocks, so no pair counts twice.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int, Int32

from pallas_kernels.patterns.contract import Implementation, Kept, Patterns
from pallas_kernels.patterns.whole_rows import isolate_non_finite, whole_rows
from pallas_kernels.powers_of_two import LOG2E
from pallas_kernels.tpu import config
from pallas_kernels.tpu.config import LANES, compiler_params, interpret_mode
from pallas_kernels.tpu.passes import by_head, by_token, pad_heads
from pallas_kernels.tpu.softmax import OnlineSoftmax
from pallas_kernels.tpu.tiles import NT, product
from pallas_kernels.tpu.vmem import pattern_bytes

MAX_ROWS = 1024
"""Query heads × positions of a tile."""


class Visits(NamedTuple):
    """What tiles of queries visit, for the kernel's scalar memory; lists are flat, and repeat their last entry.

    distances [K · D]: blocks back, of which count_distances [K] count. mapped [K · M · M]: blocks of keys of each tile
    within the map, of which count_mapped [K · M] count. first_column [K · V]: of each block of columns.
    """

    distances: Int32[Array, " KD"]
    count_distances: Int32[Array, " K"]
    mapped: Int32[Array, " KMM"]
    count_mapped: Int32[Array, " KM"]
    first_column: Int32[Array, " KV"]


def _of_one_document(query, key, value, patterns: Patterns, token: Bool[Array, "B S"], scale: float):
    batch, queries, heads, dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    block = 2 * LANES if group * 2 * LANES <= MAX_ROWS else LANES
    tiles = -(-queries // block)
    padded = tiles * block

    def of_heads(array: Array) -> Array:
        return array.reshape(kv_heads, group, *array.shape[1:])

    masks, mapped = _mapped_masks(patterns, block, min(tiles, -(-patterns.inside.shape[1] // block)))
    diagonals = of_heads(patterns.diagonals)[..., :padded]
    masks = jnp.concatenate([of_heads(masks), _banded_masks(diagonals, block)], axis=2).astype(jnp.int8)
    distances = masks.shape[2] - mapped * mapped

    columns = _padded(jnp.where(patterns.columns < 0, padded, patterns.columns), block, padded)
    verticals = _cut_to(of_heads(patterns.verticals), padded)
    own = verticals.at[jnp.arange(kv_heads)[:, None], :, columns].get(mode="fill", fill_value=False)
    on_column = jnp.moveaxis(own, 2, 1).astype(jnp.int8)
    visits = _visits(diagonals.any(1), masks[:, :, : mapped * mapped].any((1, 3, 4)), mapped, distances, columns, block)

    key, value, bias = isolate_non_finite(key, value, token)
    bias = jnp.moveaxis(bias, 2, 1)
    key, value = (pad_heads(_padded(jnp.moveaxis(array, 2, 1), block, 0, axis=2)) for array in (key, value))
    bias = _padded(bias, block, -jnp.inf)[:, :, None]
    row = jnp.minimum(columns, key.shape[2] - 1)
    far_key, far_value = (jnp.take_along_axis(array, row[None, :, :, None], axis=2) for array in (key, value))
    far_bias = jnp.take_along_axis(bias, row[None, :, None, :], axis=3)
    tiled = by_head(query, kv_heads, padded)
    steps = max(mapped, distances), columns.shape[1] // block
    wide = tiled.shape[4]

    def body(
        distances_ref, count_ref, mapped_ref, count_mapped_ref, first_column_ref,
        query_ref, key_ref, value_ref, bias_ref, mask_ref, vertical_ref,
        far_key_ref, far_value_ref, far_bias_ref, column_ref, on_column_ref,
        out_ref, *state,
    ):  # fmt: skip
        softmax = OnlineSoftmax(*state)
        head, tile, step = pl.program_id(1), pl.program_id(2), pl.program_id(3)
        inside = tile < mapped

        @pl.when(step == 0)
        def _start():
            softmax.start()

        def add(keys, values, biases, shown: Int[Array, "G t c"]):
            scores = product(query_ref[...].reshape(group * block, wide), keys[...], NT) * (scale * LOG2E) + biases[...]
            scores = jnp.where(shown.reshape(group * block, block) != 0, scores, -jnp.inf)
            softmax.add(scores, values[...])

        # Blocks back past the first are in no row.
        back = _distance(distances_ref, count_ref, head, step, distances)
        count = jnp.where(inside, count_mapped_ref[head * mapped + jnp.minimum(tile, mapped - 1)], count_ref[head])

        @pl.when((step < count) & (inside | (back <= tile)))
        def _block():
            shown = mask_ref[...].astype(jnp.int32)
            column = jnp.where(inside, 0, vertical_ref[...].astype(jnp.int32))
            add(key_ref, value_ref, bias_ref, shown * (1 - column)[:, None, :])

        number = jnp.maximum(step - steps[0], 0)
        first = first_column_ref[head * steps[1] + number]

        @pl.when((step >= steps[0]) & jnp.logical_not(inside) & (first < (tile + 1) * block))
        def _columns():
            position = tile * block + lax.broadcasted_iota(jnp.int32, (block, block), 0)
            reached = jnp.where(column_ref[...] <= position, 1, 0)
            shown = on_column_ref[...].astype(jnp.int32)[:, None, :] * reached[None]
            add(far_key_ref, far_value_ref, far_bias_ref, shown)

        @pl.when(step == sum(steps) - 1)
        def _finish():
            out_ref[...] = softmax.finish()[0].reshape(group, block, wide).astype(out_ref.dtype)

    def block_of_keys(k, i, n, lists: Visits):
        """Number of the block of keys of a step and of its mask."""
        at = jnp.minimum(i, mapped - 1)
        last = jnp.maximum(lists.count_mapped[k * mapped + at] - 1, 0)
        of_map = lists.mapped[(k * mapped + at) * mapped + jnp.minimum(n, last)]
        back = _distance(lists.distances, lists.count_distances, k, n, distances)
        inside = i < mapped
        keys = jnp.where(inside, of_map, jnp.maximum(i - back, 0))
        return keys, jnp.where(inside, at * mapped + of_map, mapped * mapped + back)

    def keys(*shape, at):
        def place(b, k, i, n, *lists):
            number = block_of_keys(k, i, n, Visits(*lists))[0]
            return (b, k, number, 0) if at == 2 else (b, k, 0, number)

        return pl.BlockSpec((None, None, *shape), place)

    def far(*shape, at, of_batch=True):
        def place(b, k, i, n, *lists):
            number = jnp.maximum(n - steps[0], 0)
            rest = (k, number, 0) if at == 2 else (k, 0, number)
            return (b, *rest) if of_batch else rest

        return pl.BlockSpec((*((None,) if of_batch else ()), None, *shape), place)

    of_tile = pl.BlockSpec((None, None, group, block, wide), lambda b, k, i, n, *lists: (b, k, 0, i, 0))
    of_mask = pl.BlockSpec(
        (None, group, None, block, block),
        lambda b, k, i, n, *lists: (k, 0, block_of_keys(k, i, n, Visits(*lists))[1], 0, 0),
    )
    of_vertical = pl.BlockSpec(
        (None, group, block), lambda b, k, i, n, *lists: (k, 0, block_of_keys(k, i, n, Visits(*lists))[0])
    )
    out = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(batch, kv_heads, tiles, sum(steps)),
            in_specs=[
                of_tile,
                keys(block, wide, at=2),
                keys(block, wide, at=2),
                keys(1, block, at=3),
                of_mask,
                of_vertical,
                far(block, wide, at=2),
                far(block, wide, at=2),
                far(1, block, at=3),
                far(1, block, at=3, of_batch=False),
                far(group, block, at=3, of_batch=False),
            ],
            out_specs=of_tile,
            scratch_shapes=OnlineSoftmax.scratch(group * block, wide),
        ),
        out_shape=jax.ShapeDtypeStruct(tiled.shape, query.dtype),
        compiler_params=compiler_params(
            "parallel",
            "parallel",
            "parallel",
            "arbitrary",
            needed=pattern_bytes(block, group, wide, query.dtype.itemsize),
        ),
        interpret=interpret_mode(),
        name="pattern_attention",
    )(*visits, tiled, key, value, bias, masks, verticals.astype(jnp.int8), far_key, far_value, far_bias,
      columns[:, None], on_column)  # fmt: skip
    return jnp.where(token[:, :queries, None, None], by_token(out, queries, dim), 0)


def _distance(distances, counts, head, step, most: int):
    """Blocks back at a step; the last entry again past the end, so that nothing more is fetched."""
    return distances[head * most + jnp.minimum(step, jnp.maximum(counts[head] - 1, 0))]


def _mapped_masks(patterns: Patterns, block: int, blocks: int) -> tuple[Bool[Array, "H MM b b"], int]:
    """The rule among the first blocks · block positions, which are all that the map reaches, by pairs of blocks."""
    heads, side = patterns.inside.shape[:2]
    length = blocks * block
    inside = _cut_to(jnp.swapaxes(_cut_to(patterns.inside, length), 1, 2), length)
    inside = jnp.swapaxes(inside, 1, 2)
    if length > side:
        # Rows of the last block that stand below the map.
        distance = jnp.arange(side, length)[:, None] - jnp.arange(length)[None, :]
        below = patterns.diagonals.at[:, jnp.abs(distance)].get(mode="fill", fill_value=False)
        below |= _cut_to(patterns.verticals, length)[:, None, :]
        inside = inside.at[:, side:].set(below & (distance >= 0))
    # A map may hold anything above its diagonal.
    inside &= jnp.tril(jnp.ones((length, length), bool))
    by_block = inside.reshape(heads, blocks, block, blocks, block)
    return jnp.swapaxes(by_block, 2, 3).reshape(heads, blocks * blocks, block, block), blocks


def _banded_masks(diagonals: Bool[Array, "K G R"], block: int) -> Bool[Array, "K G D b b"]:
    """What a block of keys shows to queries n blocks further on: entry (t, c) is diagonals[n · block + t − c].

    Rows of a matrix of that kind are one vector, each a place further on: cut from the vector's repetition.
    """
    lead, reach = diagonals.shape[:2], diagonals.shape[2]
    blocks = -(-(reach + block - 1) // block)
    # Distances n · block + block − 1 down to n · block − block + 1, then one place that nothing reads.
    line = jnp.pad(diagonals, ((0, 0), (0, 0), (block, (blocks + 1) * block - reach)))
    parts = line.reshape(*lead, -1, block)
    both = jnp.concatenate([parts[:, :, :-1], parts[:, :, 1:]], axis=-1)[:, :, :blocks]
    # both[x] is the distance n · block − block + x; entry (t, c) wants x = block + t − c.
    turned = jnp.roll(both[..., ::-1], 1 - block, axis=-1)
    rows = jnp.broadcast_to(turned[..., None, :], (*turned.shape[:-1], block, 2 * block))
    skewed = rows.reshape(*turned.shape[:-1], -1)[..., : block * (2 * block - 1)]
    return skewed.reshape(*turned.shape[:-1], block, 2 * block - 1)[..., :block]


def _visits(diagonals: Bool[Array, "K R"], mapped, size: int, distances: int, columns, block: int) -> Visits:
    """Lists from prefix counts of the bits. mapped: [K, M · M], which blocks of the map hold anything."""
    before = jnp.cumsum(jnp.pad(diagonals, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
    reach = diagonals.shape[1]
    number = jnp.arange(distances, dtype=jnp.int32) * block
    low, high = jnp.clip(number - block + 1, 0, reach), jnp.clip(number + block, 0, reach)
    crossed = before[:, high] > before[:, low]

    def listed(wanted: Bool[Array, "*n m"]):
        """The places that are wanted, in order and first, and their count."""
        place = jnp.arange(wanted.shape[-1], dtype=jnp.int32)
        order = jnp.sort(jnp.where(wanted, place, wanted.shape[-1]), axis=-1)
        return jnp.minimum(order, wanted.shape[-1] - 1).reshape(-1), wanted.sum(-1, dtype=jnp.int32).reshape(-1)

    back, count_back = listed(crossed)
    of_map, count_of_map = listed(mapped.reshape(-1, size, size))
    return Visits(back, count_back, of_map, count_of_map, columns[:, ::block].reshape(-1))


def _padded(array: Array, unit: int, fill, axis: int = -1) -> Array:
    """Up to a multiple of `unit`, and to one at least."""
    axis %= array.ndim
    missing = max(-array.shape[axis] % unit, unit - array.shape[axis])
    return jnp.pad(array, [(0, missing if at == axis else 0) for at in range(array.ndim)], constant_values=fill)


def _cut_to(array: Bool[Array, "*n m"], length: int) -> Bool[Array, "*n l"]:
    """The first `length` bits of vectors; false past their end."""
    array = array[..., :length]
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, length - array.shape[-1])])


def unsupported(query: Array, key: Array, kept: Kept | None) -> str | None:
    """None for whole sequences of what the interval kernels take; else what is out of range."""
    if kept is not None or query.shape[1] != key.shape[1]:
        return "it attends within whole sequences, not to a cache"
    if query.shape[2] // key.shape[2] * LANES > MAX_ROWS:
        return f"it takes groups of up to {MAX_ROWS // LANES} query heads, not {query.shape[2] // key.shape[2]}"
    return config.unsupported(query.dtype, query.shape[3])


MOSAIC_TPU = Implementation("mosaic_tpu", whole_rows(_of_one_document), config.unavailable, unsupported)
