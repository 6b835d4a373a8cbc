"""Forward kernel: tiles of queries over blocks of slots, an online softmax in base 2."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.tpu.config import TpuBlockSizes, compiler_params, interpret_mode
from pallas_kernels.tpu.softmax import OnlineSoftmax
from pallas_kernels.tpu.tiles import Rows, logits, row, visible, walk
from pallas_kernels.tpu.vmem import forward_bytes


def attend(
    query: Float[Array, "B K G T D"], rows: Rows, *, scale: float, sizes: TpuBlockSizes
) -> tuple[Float[Array, "B K G T D"], Float[Array, "B K tiles 2 R"]]:
    """Output, and per query tile the softmax's shift (base 2) and total of its R = G · block_q rows.

    T is a multiple of block_q. Queries that see nothing give 0 with shift 0 and total 0.
    """
    batch, kv_heads, group, queries, dim = query.shape
    blocks, capacity = rows.key.shape[2:4]
    block_q, wide = sizes.block_q, min(sizes.wide, capacity)
    count = group * block_q
    chunks = 1 if rows.listed else blocks

    def body(bounds_ref, key_ref, value_ref, bias_ref, span_ref, query_ref, out_ref, stats_ref, *state):
        softmax = OnlineSoftmax(*state)
        chunk = pl.program_id(3)
        first = lax.rem(pl.program_id(2), rows.tiles) * block_q
        last = first + block_q - 1

        @pl.when(chunk == 0)
        def _start():
            softmax.start()

        def step(at, width, masked):
            slots = pl.ds(at, width)
            scores = logits(query_ref[...].reshape(count, dim), key_ref, bias_ref, slots, scale)
            if masked:
                seen = visible(span_ref, slots, first, block_q)
                scores = jnp.where(seen[None], scores.reshape(group, block_q, width), -jnp.inf)
                scores = scores.reshape(count, width)
            softmax.add(scores, value_ref[slots, :])

        walk(bounds_ref, capacity, wide, first, last, step)

        @pl.when(chunk == chunks - 1)
        def _finish():
            out, shift, sums = softmax.finish()
            out_ref[...] = out.reshape(group, block_q, dim).astype(out_ref.dtype)
            stats_ref[0:1], stats_ref[1:2] = row(shift), row(sums)

    of_rows = rows.specs(lambda b, k, t, c: (b, k, rows.met_by(t, c)))
    of_tile = pl.BlockSpec((None, None, group, block_q, dim), lambda b, k, t, c: (b, k, 0, t, 0))
    tiles = queries // block_q
    return pl.pallas_call(
        body,
        grid=(batch, kv_heads, tiles, chunks),
        in_specs=[
            *of_rows,
            of_tile,
        ],
        out_specs=[of_tile, pl.BlockSpec((None, None, None, 2, count), lambda b, k, t, c: (b, k, t, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, tiles, 2, count), jnp.float32),
        ],
        scratch_shapes=OnlineSoftmax.scratch(count, dim),
        compiler_params=compiler_params(
            "parallel",
            "parallel",
            "parallel",
            "arbitrary",
            needed=forward_bytes(capacity, count, dim, query.dtype.itemsize, wide),
        ),
        interpret=interpret_mode(),
        name="interval_attention_forward",
    )(*rows.arrays, query)
