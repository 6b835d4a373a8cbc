"""Query gradients: the forward's walk, with weights recomputed from the softmax's shift and total."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.tpu.config import LANES, TpuBlockSizes, compiler_params, interpret_mode
from pallas_kernels.tpu.tiles import NN, NT, Rows, columns, logits, product, visible, walk
from pallas_kernels.tpu.vmem import dquery_bytes


def query_gradient(
    query: Float[Array, "B K G T D"],
    dout: Float[Array, "B K G T D"],
    stats: Float[Array, "B K tiles 8 R"],
    rows: Rows,
    *,
    scale: float,
    sizes: TpuBlockSizes,
) -> Float[Array, "B K G T D"]:
    """dquery. stats: rows 0, 1 and 2 are shift (base 2), 1/total and Σ dout·out of each query of a tile."""
    batch, kv_heads, group, queries, dim = query.shape
    blocks, capacity = rows.key.shape[2:4]
    block_q, wide = sizes.block_q, min(sizes.wide, capacity)
    count = group * block_q
    chunks = 1 if rows.listed else blocks

    def body(bounds_ref, key_ref, value_ref, bias_ref, span_ref, query_ref, dout_ref, stats_ref, out_ref, acc, saved):
        chunk = pl.program_id(3)
        first = lax.rem(pl.program_id(2), rows.tiles) * block_q
        last = first + block_q - 1

        @pl.when(chunk == 0)
        def _start():
            acc[...] = jnp.zeros_like(acc)
            for stat in range(3):
                saved[stat] = columns(stats_ref[stat : stat + 1, :])

        def step(at, width, masked):
            slots = pl.ds(at, width)
            shift, inverse, delta = (jnp.tile(saved[stat], (1, width // LANES)) for stat in range(3))
            scores = logits(query_ref[...].reshape(count, dim), key_ref, bias_ref, slots, scale)
            weights = jnp.exp2(scores - shift) * inverse
            dweights = product(dout_ref[...].reshape(count, dim), value_ref[slots, :], NT)
            dscores = weights * (dweights - delta)
            if masked:
                seen = visible(span_ref, slots, first, block_q)
                # A weight that rounds to 1 leaves nothing for the others: its exact ds is below rounding.
                keep = seen[None] & (weights.reshape(group, block_q, width) != 1.0)
                dscores = jnp.where(keep, dscores.reshape(group, block_q, width), 0.0).reshape(count, width)
            acc[...] += product(dscores.astype(query_ref.dtype), key_ref[slots, :], NN)

        walk(bounds_ref, capacity, wide, first, last, step)

        @pl.when(chunk == chunks - 1)
        def _finish():
            out_ref[...] = (acc[...] * scale).reshape(group, block_q, dim).astype(out_ref.dtype)

    of_rows = rows.specs(lambda b, k, t, c: (b, k, rows.met_by(t, c)))
    of_tile = pl.BlockSpec((None, None, group, block_q, dim), lambda b, k, t, c: (b, k, 0, t, 0))
    return pl.pallas_call(
        body,
        grid=(batch, kv_heads, queries // block_q, chunks),
        in_specs=[
            *of_rows,
            of_tile,
            of_tile,
            pl.BlockSpec((None, None, None, 8, count), lambda b, k, t, c: (b, k, t, 0, 0)),
        ],
        out_specs=of_tile,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        scratch_shapes=[pltpu.VMEM((count, dim), jnp.float32), pltpu.VMEM((3, count, LANES), jnp.float32)],
        compiler_params=compiler_params(
            "parallel",
            "parallel",
            "parallel",
            "arbitrary",
            needed=dquery_bytes(capacity, count, dim, query.dtype.itemsize, wide),
        ),
        interpret=interpret_mode(),
        name="interval_attention_dquery",
    )(*rows.arrays, query, dout, stats)
