"""Gradients of heads that were RMS-normed and then rotated, in one pass over them.

XLA makes two: the gradient of a norm wants a sum over the row first, and the unrotated cotangent is written in between.
Here a program holds what it sums. Nothing is multiplied by matrices and nothing shared, so registers are all it needs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.gpu.device import multiprocessors
from pallas_kernels.gpu.pipeline import load_as, load_vector, store_rows

ROWS = 64
"""Tokens of a program."""

COLUMNS = 32
"""Dimensions of a half of a head at a time: for a whole half of 64 there are not enough registers."""


def unsupported(shape: tuple[int, ...], dtype: DTypeLike) -> str | None:
    """Why `head_gradients` does not take heads [B, T, H, D] of this shape and dtype; None where it does."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes float16 and bfloat16, got {jnp.dtype(dtype)}"
    if shape[3] not in (64, 128):
        return f"it takes head sizes of 64 and 128, got {shape[3]}"
    if shape[1] % ROWS:
        return f"it takes multiples of {ROWS} tokens, got {shape[1]}"
    return None


def head_gradients(
    heads: Float[Array, "B T H D"],
    cotangent: Float[Array, "B T H D"],
    cos: Float[Array, "b T N"],
    sin: Float[Array, "b T N"],
    weight: Float[Array, " D"],
    *,
    eps: float,
) -> tuple[Float[Array, "B T H D"], Float[Array, " D"], Float[Array, "B T"]]:
    """With z = heads / √(mean(heads²) + eps) · weight, and z_i, z_{i+N} turned by the angle of (cos, sin)_i:

    ∂heads for the cotangent of the turned z, ∂weight (float32), and Σ heads · ∂heads of every token (float32).
    N = D/2; b is 1 or B. Of what `unsupported` takes.
    """
    batch, length, count, dim = heads.shape
    half, tiles = dim // 2, length // ROWS
    # As many as run at once: each leaves a sum of ROWS rows for ∂weight.
    pieces = batch * tiles
    programs = min(pieces, 2 * multiprocessors())
    layout = plgpu.Layout.WGMMA_UPCAST_4X
    by_row, by_column = layout.reduce(1), layout.reduce(0)
    shape = (ROWS, COLUMNS)
    starts = range(0, half, COLUMNS)

    def program(heads_ref, d_ref, cos_ref, sin_ref, weight_ref, dheads_ref, dweight_ref, dot_ref):
        own = lax.axis_index("program")

        def read(ref, *place):
            return load_as(ref.at[place], layout, optimized=False).astype(jnp.float32)

        def spread(vector, axis):
            return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, [axis]), layout)

        def pair(item, at, head, start):
            """Of COLUMNS dimensions and their partners: heads, cotangents of z, and those by the weight."""
            first, second = pl.ds(start, COLUMNS), pl.ds(half + start, COLUMNS)
            c, s = (read(ref, 0 if cos.shape[0] == 1 else item, at, first) for ref in (cos_ref, sin_ref))
            d1, d2 = (read(d_ref, item, at, head, part) for part in (first, second))
            d1, d2 = d1 * c + d2 * s, d2 * c - d1 * s
            found = []
            for part, d in ((first, d1), (second, d2)):
                by = load_vector(weight_ref.at[part], by_column).astype(jnp.float32)
                y = read(heads_ref, item, at, head, part)
                found.append((part, y, d, d * spread(by, 1)))
            return found

        def visit(item, at, head, carry):
            sums, dot = carry
            square = product = zero_row
            for start in starts:
                for _, y, _, weighted in pair(item, at, head, start):
                    square, product = square + (y * y).sum(axis=1), product + (weighted * y).sum(axis=1)
            scale = lax.rsqrt(square * (1 / dim) + eps)
            size, lean = spread(scale, 0), spread(product * scale * scale * (1 / dim), 0)
            added: list[jax.Array] = []
            for start in starts:
                # Once more, from the first cache.
                for part, y, d, weighted in pair(item, at, head, start):
                    store_rows(dheads_ref.at[item, at, head, part], (size * (weighted - y * lean)).astype(heads.dtype))
                    added.append(sums[len(added)] + d * y * size)
            return tuple(added), dot + product * (scale * scale * scale * eps)

        def piece(number, sums):
            number = own + number * programs
            item, tile = lax.div(number, jnp.int32(tiles)), lax.rem(number, jnp.int32(tiles))
            at = pl.ds(tile * ROWS, ROWS)
            sums, dot = lax.fori_loop(0, count, lambda head, carry: visit(item, at, head, carry), (sums, zero_row))
            store_rows(dot_ref.at[item, at], dot)
            return sums

        zero = plgpu.layout_cast(jnp.full(shape, 0, jnp.float32), layout)
        zero_row = plgpu.layout_cast(jnp.full((ROWS,), 0, jnp.float32), by_row)
        rounds, left = divmod(pieces, programs)
        sums = lax.fori_loop(0, rounds + (own < left).astype(jnp.int32), piece, (zero,) * (2 * len(starts)))
        places = [offset + start for start in starts for offset in (0, half)]
        for start, total in zip(places, sums, strict=True):
            store_rows(dweight_ref.at[own, :, pl.ds(start, COLUMNS)], total)

    program.__name__ = "head_gradients"
    dheads, dweight, dot = plgpu.kernel(
        program,
        out_type=[
            jax.ShapeDtypeStruct(heads.shape, heads.dtype),
            jax.ShapeDtypeStruct((programs, ROWS, dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, length), jnp.float32),
        ],
        grid=(programs,),
        grid_names=("program",),
    )(heads, cotangent, cos, sin, weight)
    return dheads, dweight.sum((0, 1)), dot
