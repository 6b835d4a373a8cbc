"""Epoch lists without a gather: rows live on in VMEM from one epoch to the next.

A TPU fetches rows of 256 bytes one by one, and slowly. But the list of an epoch holds nothing but keys of the list
before and keys of the epoch's own, and those stand in memory in order. So a kernel walks the epochs, keeps the last
list in VMEM, and moves its surviving rows to their next slots by products with 0/1 matrices, which are exact. Most
tiles of those matrices are empty, because survivors keep their order; only the others are multiplied.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.contract import EpochLists
from pallas_kernels.tpu.config import LANES, compiler_params, interpret_mode
from pallas_kernels.tpu.tiles import NN, NT, product
from pallas_kernels.tpu.vmem import stream_bytes

PLANES = 16
"""Rows of the scalars that travel with a slot, one byte each: 4 of bias, 4 of end, 4 of start, 4 unused."""


def to_planes(*scalars: Array) -> Float[Array, "*n 16 N"]:
    """The bytes of up to four arrays of 32 bits as bfloat16 numbers, which hold 0 … 255 exactly."""
    bits = [lax.bitcast_convert_type(scalar, jnp.int32) for scalar in scalars]
    planes = [(array >> (8 * byte)) & 255 for array in bits for byte in range(4)]
    planes += [jnp.zeros_like(bits[0])] * (PLANES - len(planes))
    return jnp.stack(planes, axis=-2).astype(jnp.bfloat16)


def from_planes(planes: Float[Array, "*n 16 N"]) -> Int32[Array, "*n 3 N"]:
    """The 32 bits of each of the first three arrays."""
    byte = planes[..., :12, :].astype(jnp.int32).reshape(*planes.shape[:-2], 3, 4, planes.shape[-1])
    return byte[..., 0, :] | (byte[..., 1, :] << 8) | (byte[..., 2, :] << 16) | (byte[..., 3, :] << 24)


def tile_ranges(slot: Int32[Array, "*n N"], first: int, until: int) -> Int32[Array, "*n 2 tiles"]:
    """For each LANES entries, the tiles of slots within [first, until) that any of them names: from, to."""
    by_tile = slot.reshape(*slot.shape[:-1], -1, LANES)
    named = (by_tile >= first) & (by_tile < until)
    low = jnp.where(named, by_tile, until).min(-1) // LANES
    high = jnp.where(named, by_tile // LANES + 1, 0).max(-1)
    return jnp.stack([low, high], axis=-2)


def stream_rows(
    key: Float[Array, "B K N D"],
    value: Float[Array, "B K N D"],
    planes: Float[Array, "B K 16 N"],
    lists: EpochLists,
    entry_slot: Int32[Array, "B K N"],
    initial: tuple[Array, Array, Array] | None,
) -> tuple[Float[Array, "B K E C D"], Float[Array, "B K E C D"], Float[Array, "B K E 16 C"]]:
    """The rows of every epoch's list, in slot order.

    key, value, planes, entry_slot: those of the queries' own positions, N = E · epoch_size.
    initial: rows that epoch 0 carries, [B, K, carried, D] twice and [B, K, 16, carried]; None for none.
    """
    batch, kv_heads, _, dim = key.shape
    epochs, capacity = lists.index.shape[2:]
    size, carried = lists.epoch_size, lists.carried
    moves = tile_ranges(lists.next_slot, 0, carried)
    enters = tile_ranges(entry_slot.reshape(batch, kv_heads, epochs, size), carried, capacity)
    dtype = key.dtype

    def body(moves_ref, enters_ref, next_ref, entry_ref, key_ref, value_ref, planes_ref, *rest):
        initial_refs, (key_out, value_out, planes_out, key_table, value_table, planes_table) = rest[:-6], rest[-6:]
        outs, tables = (key_out, value_out), (key_table, value_table)
        epoch = pl.program_id(2)
        for ref in (*outs, planes_out):
            ref[...] = jnp.zeros_like(ref)

        def move(slot_row, sources, source_planes, at, first, last):
            """Add the rows at [at, at + LANES) to the tiles [first, last) of the list."""
            source = pl.ds(at, LANES)
            slots = slot_row[:, source]

            def to(tile, width):
                there = pl.ds(pl.multiple_of(tile * LANES, LANES), width)
                hot = lax.broadcasted_iota(jnp.int32, (width, LANES), 0) + tile * LANES == slots
                for from_ref, out in zip(sources, outs, strict=True):
                    moved = product(hot.astype(dtype), from_ref[source, :], NN)
                    out[there, :] += moved.astype(dtype)
                moved = product(source_planes[:, source], hot.astype(jnp.bfloat16), NT)
                planes_out[:, there] += moved.astype(jnp.bfloat16)

            # Survivors of one tile mostly go to two.
            pairs = lax.div(last - first, 2)
            lax.fori_loop(0, pairs, lambda pair, _: to(first + 2 * pair, 2 * LANES), None)

            @pl.when(first + 2 * pairs < last)
            def _last():
                to(last - 1, LANES)

        @pl.when(epoch > 0)
        def _carry():
            def one(tile, _):
                at = pl.multiple_of(tile * LANES, LANES)
                move(next_ref, tables, planes_table, at, moves_ref[0, tile], moves_ref[1, tile])

            lax.fori_loop(0, capacity // LANES, one, None)

        if initial_refs:

            @pl.when(epoch == 0)
            def _begin():
                for out, ref in zip(outs, initial_refs[:2], strict=True):
                    out[:carried, :] = ref[...]
                planes_out[:, :carried] = initial_refs[2][...]

        def enter(tile, _):
            at = pl.multiple_of(tile * LANES, LANES)
            move(entry_ref, (key_ref, value_ref), planes_ref, at, enters_ref[0, tile], enters_ref[1, tile])

        lax.fori_loop(0, size // LANES, enter, None)
        for table, out in zip((*tables, planes_table), (*outs, planes_out), strict=True):
            table[...] = out[...]

    def of_epoch(*block, memory_space=pltpu.VMEM):
        return pl.BlockSpec((None, None, None, *block), lambda b, k, e: (b, k, e, 0, 0), memory_space=memory_space)

    def of_the_last(*block, memory_space=pltpu.VMEM):
        return pl.BlockSpec(
            (None, None, None, *block), lambda b, k, e: (b, k, jnp.maximum(e - 1, 0), 0, 0), memory_space=memory_space
        )

    of_head = [pl.BlockSpec((None, None, *array.shape[2:]), lambda b, k, e: (b, k, 0, 0)) for array in initial or ()]
    return pl.pallas_call(
        body,
        grid=(batch, kv_heads, epochs),
        in_specs=[
            of_the_last(2, capacity // LANES, memory_space=pltpu.SMEM),
            of_epoch(2, size // LANES, memory_space=pltpu.SMEM),
            of_the_last(1, capacity),
            of_epoch(1, size),
            pl.BlockSpec((None, None, size, dim), lambda b, k, e: (b, k, e, 0)),
            pl.BlockSpec((None, None, size, dim), lambda b, k, e: (b, k, e, 0)),
            pl.BlockSpec((None, None, PLANES, size), lambda b, k, e: (b, k, 0, e)),
            *of_head,
        ],
        out_specs=[of_epoch(capacity, dim), of_epoch(capacity, dim), of_epoch(PLANES, capacity)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, kv_heads, epochs, capacity, dim), dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, epochs, capacity, dim), dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, epochs, PLANES, capacity), jnp.bfloat16),
        ],
        scratch_shapes=[
            pltpu.VMEM((capacity, dim), dtype),
            pltpu.VMEM((capacity, dim), dtype),
            pltpu.VMEM((PLANES, capacity), jnp.bfloat16),
        ],
        compiler_params=compiler_params(
            "parallel",
            "parallel",
            "arbitrary",
            needed=stream_bytes(capacity, carried, size, dim, dtype.itemsize, before=initial is not None),
        ),
        interpret=interpret_mode(),
        name="stream_rows",
    )(
        moves,
        enters,
        lists.next_slot[:, :, :, None],
        entry_slot.reshape(batch, kv_heads, epochs, 1, size),
        key,
        value,
        planes,
        *(initial or ()),
    )
