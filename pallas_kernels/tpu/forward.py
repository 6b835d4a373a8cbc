"""Forward kernel: tiles of queries over blocks of slots, an online softmax in base 2."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.tpu.config import LANES, TpuBlockSizes, compiler_params, interpret_mode
from pallas_kernels.tpu.tiles import NN, Rows, fold_lanes, logits, product, row, visible, walk
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

    def body(bounds_ref, key_ref, value_ref, bias_ref, span_ref, query_ref, out_ref, stats_ref, largest, total, acc):
        chunk = pl.program_id(3)
        first = lax.rem(pl.program_id(2), rows.tiles) * block_q
        last = first + block_q - 1

        @pl.when(chunk == 0)
        def _start():
            largest[...] = jnp.full_like(largest, -jnp.inf)
            total[...] = jnp.zeros_like(total)
            acc[...] = jnp.zeros_like(acc)

        def step(at, width, masked):
            slots = pl.ds(at, width)
            scores = logits(query_ref[...].reshape(count, dim), key_ref, bias_ref, slots, scale)
            if masked:
                seen = visible(span_ref, slots, first, block_q)
                scores = jnp.where(seen[None], scores.reshape(group, block_q, width), -jnp.inf)
                scores = scores.reshape(count, width)
            before = largest[...]
            new = jnp.maximum(before, scores.max(axis=1, keepdims=True))
            # −∞ − −∞ is NaN: a row that has seen nothing yet keeps a finite reference.
            reference = jnp.where(new == -jnp.inf, 0.0, new)
            weights = jnp.exp2(scores - jnp.tile(reference, (1, width // LANES)))
            rescale = jnp.exp2(before - reference)
            largest[...] = new
            # Summed over lanes only once, at the end: sums across lanes are dear.
            total[...] = total[...] * rescale + fold_lanes(weights)
            values = product(weights.astype(value_ref.dtype), value_ref[slots, :], NN)
            acc[...] = acc[...] * _lanes(rescale, dim) + values

        walk(bounds_ref, capacity, wide, first, last, step)

        @pl.when(chunk == chunks - 1)
        def _finish():
            sums = jnp.broadcast_to(total[...].sum(axis=1, keepdims=True), total.shape)
            divisor = jnp.where(sums == 0.0, 1.0, sums)
            out = acc[...] / _lanes(divisor, dim)
            out_ref[...] = out.reshape(group, block_q, dim).astype(out_ref.dtype)
            shift = jnp.where(largest[...] == -jnp.inf, 0.0, largest[...])
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
        scratch_shapes=[
            pltpu.VMEM((count, LANES), jnp.float32),
            pltpu.VMEM((count, LANES), jnp.float32),
            pltpu.VMEM((count, dim), jnp.float32),
        ],
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


def _lanes(column: Float[Array, "R 128"], dim: int) -> Float[Array, "R D"]:
    """A number a row, standing in all lanes, widened or cut to `dim` of them."""
    return jnp.tile(column, (1, -(-dim // LANES)))[:, :dim]
