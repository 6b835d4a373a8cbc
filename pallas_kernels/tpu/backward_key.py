"""Key, value and bias gradients, from the last block of slots to the first.

Logits stand here with keys down and queries across: both products into the gradients are then plain ones. With
lists, the gradients of an epoch's slots start from what the same keys collected in the epoch after, moved back by
the same 0/1 products that moved the rows; a key's sum is complete in the epoch that it entered, and is read out there
by position. So no list gradient ever leaves VMEM, nothing is added by a race, and the order of every sum is fixed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.contract import EpochLists
from pallas_kernels.powers_of_two import LOG2E
from pallas_kernels.tpu.config import LANES, TpuBlockSizes, compiler_params, interpret_mode
from pallas_kernels.tpu.stream import tile_ranges
from pallas_kernels.tpu.tiles import NN, NT, Rows, columns, fold_lanes, parts, product, walk
from pallas_kernels.tpu.vmem import dkey_bytes

WIDE = 2 * LANES
"""Slots of a step without a mask; more are no faster."""


def key_gradients(
    query: Float[Array, "B K G T D"],
    dout: Float[Array, "B K G T D"],
    stats: Float[Array, "B K tiles 8 R"],
    rows: Rows,
    lists: EpochLists | None,
    entry_slot: Int32[Array, "B K T"] | None,
    *,
    before: bool,
    scale: float,
    sizes: TpuBlockSizes,
) -> tuple[Array, Array, Array, tuple[Array, ...]]:
    """dkey, dvalue [B, K, N, D] and dbias [B, K, 1, N] of the queries' own positions, N = T, and, where there are keys
    `before` the first query, the same of the slots that epoch 0 carries; without lists of all keys, N = blocks · C.

    stats as in `query_gradient`.
    """
    batch, kv_heads, group, _, dim = query.shape
    blocks, capacity = rows.key.shape[2:4]
    block_q = sizes.block_q
    count = group * block_q
    tiles = rows.tiles
    carried = 0 if lists is None else lists.carried
    own = capacity if lists is None else lists.epoch_size
    dtype, exact = query.dtype, query.dtype == jnp.float32

    def body(bounds_ref, key_ref, value_ref, bias_ref, span_ref, query_ref, dout_ref, stats_ref, *rest):
        if lists is None:
            dkey_out, dvalue_out, dbias_out, dkey, dvalue, dbias, bias, begin, end = rest
        else:
            moves_ref, next_ref, enters_ref, entry_ref = rest[:4]
            dkey_out, dvalue_out, dbias_out, *first_outs, dkey, dvalue, dbias, bias, begin, end = rest[4:-3]
            later = rest[-3:]
        tables = (dkey, dvalue, dbias)
        # Counted from the last epoch.
        epoch, tile = pl.program_id(2), pl.program_id(3)
        first = tile * block_q
        last = first + block_q - 1

        @pl.when(tile == 0)
        def _start():
            for table in tables:
                table[...] = jnp.zeros_like(table)
            for ref, row in ((bias, bias_ref[0:1]), (begin, span_ref[0:1]), (end, span_ref[1:2])):
                ref[...] = columns(row)

        if lists is not None:

            @pl.when((tile == 0) & (epoch > 0))
            def _collect():
                def one(part, _):
                    here = pl.ds(pl.multiple_of(part * LANES, LANES), LANES)
                    found = gather(next_ref, here, moves_ref[0, part], moves_ref[1, part], later, exact)
                    for table, kept in zip(tables, found, strict=True):
                        table[here, :] = kept

                lax.fori_loop(0, capacity // LANES, one, None)

        def step(at, width, masked):
            slots = pl.ds(at, width)
            q, do = query_ref[...].reshape(count, dim), dout_ref[...].reshape(count, dim)
            shift, inverse, delta = (stats_ref[stat : stat + 1, :] for stat in range(3))
            repeat = (1, count // LANES)
            scores = product(key_ref[slots, :], q, NT) * (scale * LOG2E) + jnp.tile(bias[slots, :], repeat)
            weights = jnp.exp2(scores - shift) * inverse
            dscores = weights * (product(value_ref[slots, :], do, NT) - delta)
            if masked:
                position = first + lax.broadcasted_iota(jnp.int32, (width, block_q), 1)
                cut = (1, block_q // LANES)
                visible = (jnp.tile(begin[slots, :], cut) <= position) & (position < jnp.tile(end[slots, :], cut))
                visible = jnp.tile(visible.astype(jnp.float32), (1, group)) > 0.0
                dscores = jnp.where(visible & (weights != 1.0), dscores, 0.0)
                weights = jnp.where(visible, weights, 0.0)
            dvalue[slots, :] += product(weights.astype(dtype), do, NN)
            dkey[slots, :] += product(dscores.astype(dtype), q, NN)
            dbias[slots, :] += fold_lanes(dscores)

        walk(bounds_ref, capacity, WIDE, first, last, step)

        @pl.when(tile == tiles - 1)
        def _finish():
            if lists is None:
                dkey_out[...] = (dkey[...] * scale).astype(dtype)
                dvalue_out[...] = dvalue[...].astype(dtype)
                dbias_out[...] = dbias[...].T.sum(axis=0, keepdims=True)
                return

            def one(part, _):
                here = pl.ds(pl.multiple_of(part * LANES, LANES), LANES)
                found = gather(entry_ref, here, enters_ref[0, part], enters_ref[1, part], tables, exact)
                dkey_out[here, :] = (found[0] * scale).astype(dtype)
                dvalue_out[here, :] = found[1].astype(dtype)
                dbias_out[:, here] = found[2].T.sum(axis=0, keepdims=True)

            lax.fori_loop(0, own // LANES, one, None)
            for table, ref in zip(tables, later, strict=True):
                ref[...] = table[:carried, :]

            if before:

                @pl.when(epoch == blocks - 1)
                def _first():
                    first_outs[0][...] = dkey[:carried, :] * scale
                    first_outs[1][...] = dvalue[:carried, :]
                    first_outs[2][...] = dbias[:carried, :].T.sum(axis=0, keepdims=True)

    def block(number):
        """Blocks go from the last to the first: what a later epoch collected is needed by the one before."""
        return blocks - 1 - number

    def of_block(*shape, memory_space=pltpu.VMEM):
        return pl.BlockSpec(
            (None, None, None, *shape), lambda b, k, n, t: (b, k, block(n), 0, 0), memory_space=memory_space
        )

    def query_tile(n, t):
        return t if lists is None else block(n) * tiles + t

    of_tile = pl.BlockSpec((None, None, group, block_q, dim), lambda b, k, n, t: (b, k, 0, query_tile(n, t), 0))
    in_specs = [
        *rows.specs(lambda b, k, n, t: (b, k, block(n))),
        of_tile,
        of_tile,
        pl.BlockSpec((None, None, None, 8, count), lambda b, k, n, t: (b, k, query_tile(n, t), 0, 0)),
    ]
    inputs = [*rows.arrays, query, dout, stats]
    by_position = pl.BlockSpec((None, None, own, dim), lambda b, k, n, t: (b, k, block(n), 0))
    out_specs = [by_position, by_position, pl.BlockSpec((None, None, 1, own), lambda b, k, n, t: (b, k, 0, block(n)))]
    out_shape = [
        jax.ShapeDtypeStruct((batch, kv_heads, blocks * own, dim), dtype),
        jax.ShapeDtypeStruct((batch, kv_heads, blocks * own, dim), dtype),
        jax.ShapeDtypeStruct((batch, kv_heads, 1, blocks * own), jnp.float32),
    ]
    widths = (dim, dim, LANES)
    scratch = [pltpu.VMEM((capacity, width), jnp.float32) for width in widths]
    scratch.append(pltpu.VMEM((capacity, LANES), jnp.float32))
    scratch += [pltpu.VMEM((capacity, LANES), jnp.int32) for _ in range(2)]
    if lists is not None:
        assert entry_slot is not None
        entry_slot = entry_slot.reshape(batch, kv_heads, blocks, own)
        in_specs += [
            of_block(2, capacity // LANES, memory_space=pltpu.SMEM),
            of_block(1, capacity),
            of_block(2, own // LANES, memory_space=pltpu.SMEM),
            of_block(1, own),
        ]
        inputs += [
            tile_ranges(lists.next_slot, 0, carried),
            lists.next_slot[:, :, :, None],
            tile_ranges(entry_slot, carried, capacity),
            entry_slot[:, :, :, None],
        ]
        for shape in ((carried, dim), (carried, dim), (1, carried)) if before else ():
            out_specs.append(pl.BlockSpec((None, None, *shape), lambda b, k, n, t: (b, k, 0, 0)))
            out_shape.append(jax.ShapeDtypeStruct((batch, kv_heads, *shape), jnp.float32))
        scratch += [pltpu.VMEM((carried, width), jnp.float32) for width in widths]
    needed = dkey_bytes(
        capacity, carried, own, count, dim, dtype.itemsize, listed=lists is not None, before=bool(lists) and before
    )
    dkey, dvalue, dbias, *of_first = pl.pallas_call(
        body,
        grid=(batch, kv_heads, blocks, tiles),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=compiler_params("parallel", "parallel", "arbitrary", "arbitrary", needed=needed),
        interpret=interpret_mode(),
        name="interval_attention_dkey",
    )(*inputs)
    return dkey, dvalue, dbias, tuple(of_first)


def gather(slot_ref, entries, low, high, tables, exact: bool) -> tuple[Array, ...]:
    """What stands in the tables at the slots that LANES entries name: rows of 0 for entries that name none.

    low, high: the tiles of slots that any of the entries names.
    """
    # Every lane of a row holds the slot that its entry names.
    slots = columns(slot_ref[:, entries])

    def add(tile, found):
        there = pl.multiple_of(tile * LANES, LANES)
        hot = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1) + there == slots).astype(jnp.bfloat16)
        return tuple(
            sum((product(hot, part, NN) for part in parts(table[pl.ds(there, LANES), :], exact)), start=total)
            for total, table in zip(found, tables, strict=True)
        )

    nothing = tuple(jnp.zeros((LANES, table.shape[1]), jnp.float32) for table in tables)
    return lax.fori_loop(low, high, add, nothing)
