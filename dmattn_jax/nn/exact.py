"""Sums without rounding, and so without an order.

A floating-point sum depends on its order, and compilers and libraries choose another order for another number of
rows. Dynamic-mask attention ranks keys by a gate, and ranks are discrete: equal tokens have equal gates, of which
the later must win, and one differing last bit between prefill and decoding would pick another key. So what the gate
is computed from is summed here as integers, which gives the same bits for any batch, length, backend and mesh.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

COARSE = 2.0**8
"""Steps a unit of the coarser of the two integers of `exact_sum`."""

SHIFT = 1.5 * 2.0**23
SHIFT_BITS = 0x4B400000
"""A float32 whose last bit counts ones, as does that of every number within 2^22 of it; and its bits."""

SLICE_BITS = 8
"""Bits of a slice of `exact_projection`: integers of at most 2^7, which even bfloat16 products multiply exactly."""

SLICES = 3
EXACT_TERMS = 2 ** (24 - 2 * (SLICE_BITS - 1))
"""Products of two slices that float32 adds without rounding, whatever the order."""


def exact_sum(terms: Float[Array, "*n C"]) -> Float[Array, "*n"]:
    """The sum over the last axis, float32: the same bits in any order.

    Each term is split into two integers (steps of 2^−8, and of at most C·2^−38 of the rest), which are summed. A
    term beyond ±2^22/C counts as that; one that is not finite makes the sum NaN. Not differentiable.
    """
    count = terms.shape[-1]
    finite = jnp.isfinite(terms)
    limit = 2.0**30 / count
    # What is not finite becomes any integers here: the sum is NaN then. (Zeros in its place, XLA would move out of a
    # loop over layers, as an array of the terms' size that every layer reads.)
    scaled = jnp.clip(terms * COARSE, -limit, limit)
    coarse = _nearest(scaled, limit)
    fine = 2.0 ** (31 - count.bit_length())
    rest = _nearest((scaled - coarse.astype(jnp.float32)) * fine, fine / 2)
    # One reduction of three operands: compilers fuse it with what makes the terms, which need no array then.
    coarse_sum, fine_sum, all_finite = jax.lax.reduce(
        (coarse, rest, finite),
        (jnp.int32(0), jnp.int32(0), jnp.bool_(True)),
        lambda a, b: (a[0] + b[0], a[1] + b[1], a[2] & b[2]),
        (terms.ndim - 1,),
    )
    total = coarse_sum.astype(jnp.float32) / COARSE + fine_sum.astype(jnp.float32) / (COARSE * fine)
    return jnp.where(all_finite, total, jnp.nan)


def _nearest(x: Float[Array, "*n"], limit: float) -> Int32[Array, "*n"]:
    """The nearest integer of |x| <= limit, even of two.

    Up to 2^22 by a number so large that its last bit counts ones: plain additions, where a GPU rounds and converts at
    an eighth of its speed, which would be most of the time of a gate.
    """
    if limit > 2**22:
        return jnp.round(x).astype(jnp.int32)
    return jax.lax.bitcast_convert_type(x + SHIFT, jnp.int32) - SHIFT_BITS


@jax.custom_vjp
def exact_row_products(rows: Float[Array, "B S C"], weight: Float[Array, "K C"]) -> Float[Array, "B S K"]:
    """rows · weightᵀ in float32 by `exact_sum`; for few output columns K."""
    return exact_sum(rows.astype(jnp.float32)[:, :, None, :] * weight)


def _row_products_forward(rows, weight):
    return exact_row_products(rows, weight), (rows, weight)


def _row_products_backward(saved, cotangent):
    # Gradients choose nothing, and need no [B, S, K, C] array. A sum of K terms, which fuses with what it is added to.
    rows, weight = saved
    d_rows = sum(cotangent[..., k, None] * weight[k] for k in range(weight.shape[0]))
    highest = jax.lax.Precision.HIGHEST
    d_weight = jnp.einsum("bsk,bsc->kc", cotangent, rows.astype(jnp.float32), precision=highest)
    return d_rows.astype(rows.dtype), d_weight


exact_row_products.defvjp(_row_products_forward, _row_products_backward)


@jax.custom_vjp
def exact_mean_square(x: Float[Array, "*n C"]) -> Float[Array, "*n 1"]:
    """mean(x²) over the last axis, float32, by `exact_sum` of squares scaled into 0 … 1.

    Under differentiation, where no second pass must agree, the ordinary mean: one read of x in place of three.
    """
    scale, inverse = _powers_of_two(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    return (exact_sum(jnp.square(x * inverse)) / x.shape[-1])[..., None] * scale * scale


exact_mean_square.defvjp(
    lambda x: (jnp.mean(jnp.square(x), axis=-1, keepdims=True), x),
    lambda x, cotangent: (2 / x.shape[-1] * x * cotangent,),
)


@jax.custom_vjp
def exact_projection(x: Float[Array, "B T M"], weight: Float[Array, "M K D"]) -> Float[Array, "B T K D"]:
    """x · weight, where the bits of a row do not depend on the other rows; rounded once to x's dtype.

    Both are cut into slices of small integers, scaled by the row's and the column's greatest element; the products
    of slices are summed as integers. The error is that of 22-bit operands: below float32's own for long sums. Six
    small products in place of one, so under differentiation (training, where no second pass must agree) the ordinary
    product is used.
    """
    shape = weight.shape
    columns = weight.reshape(shape[0], -1)
    x_slices, x_scale = _slices(x.astype(jnp.float32), axis=-1)
    w_slices, w_scale = _slices(columns.astype(jnp.float32), axis=0)
    single = x.shape[0] * x.shape[1] == 1
    products = (_products_of_one_row if single else _products)(x_slices, w_slices)
    # From the smallest to the greatest, in this order everywhere. Scaling by a power of two is exact: no fused
    # multiply-add can round otherwise.
    total = jnp.zeros((*x.shape[:2], columns.shape[1]), jnp.float32)
    for order in reversed(range(SLICES)):
        total = total + products[order].astype(jnp.float32) * 2.0 ** (-SLICE_BITS * order)
    scaled = total * x_scale * w_scale
    return scaled.astype(x.dtype).reshape(*x.shape[:2], *shape[1:])


def _projection_forward(x, weight):
    return jnp.einsum("btm,mkd->btkd", x, weight), (x, weight)


def _projection_backward(saved, cotangent):
    x, weight = saved
    return jnp.einsum("btkd,mkd->btm", cotangent, weight), jnp.einsum("btm,btkd->mkd", x, cotangent)


exact_projection.defvjp(_projection_forward, _projection_backward)


def _pairs(order: int) -> list[tuple[int, int]]:
    """The slices whose products count 2^(−8·order)."""
    return [(i, order - i) for i in range(order + 1)]


def _products(x_slices: list[jax.Array], w_slices: list[jax.Array]) -> list[jax.Array]:
    """By order, the sums over M of products of slices, int32 [B, T, C]: of parts that float32 holds exactly."""
    features, sums = w_slices[0].shape[0], []
    for order in range(SLICES):
        total = jnp.zeros((), jnp.int32)
        for i, j in _pairs(order):
            for start in range(0, features, EXACT_TERMS):
                part = slice(start, start + EXACT_TERMS)
                product = jnp.einsum(
                    "btm,mc->btc", x_slices[i][..., part], w_slices[j][part], preferred_element_type=jnp.float32
                )
                total = total + product.astype(jnp.int32)
        sums.append(total)
    return sums


def _products_of_one_row(x_slices: list[jax.Array], w_slices: list[jax.Array]) -> list[jax.Array]:
    """The same integers by one reduction over M: a step of decoding needs one program for it in place of six."""
    terms = []
    for order in range(SLICES):
        products = [x_slices[i][..., None] * w_slices[j] for i, j in _pairs(order)]
        terms.append(functools.reduce(jnp.add, products).astype(jnp.int32))
    zeros = (jnp.int32(0),) * SLICES
    return list(jax.lax.reduce(tuple(terms), zeros, lambda a, b: tuple(map(jax.lax.add, a, b)), (2,)))


def _slices(x: jax.Array, axis: int) -> tuple[list[jax.Array], jax.Array]:
    """x ≈ scale · Σ_i slice_i · 2^(−8i): integers of at most 2^7, and a power of two per row along the axis.

    A row with an infinity or NaN has the scale NaN, and any integers.
    """
    scale, inverse = _powers_of_two(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    one = 2.0 ** (1 - SLICE_BITS)
    rest, slices = x * (inverse / one), []
    for _ in range(SLICES):
        slices.append(jnp.round(rest))
        rest = (rest - slices[-1]) * 2.0**SLICE_BITS
    return slices, jnp.where(jnp.isfinite(scale), scale * one, jnp.nan)


def _powers_of_two(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The power of two in (x, 2x] of a float32 x >= 0, from 2^−100 to 2^100, and its inverse.

    Where x is infinite or NaN the power is x, and the inverse that of 2^100.

    By its bits: a few integer operations, which compilers do again wherever the power is used. Those of frexp and
    ldexp, and a division, cost a GPU a program of their own.
    """
    exponent = jnp.clip((jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) + 1, 27, 227)
    power, inverse = (jax.lax.bitcast_convert_type(bits << 23, jnp.float32) for bits in (exponent, 254 - exponent))
    return jnp.where(jnp.isfinite(x), power, x), inverse
