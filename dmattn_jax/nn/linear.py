"""Tokens times weights."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def linear(x: Float[Array, "B ... M"], weight: Float[Array, "M ..."], axes: int = 1) -> Float[Array, "B ..."]:
    """x · weight over the last `axes` axes of x and the first of weight, in x's dtype.

    A single token in half precision is multiplied as two. XLA makes no matrix product of one row: it rounds every
    term to half precision and, on a GPU, writes all of them to memory before it adds them.
    """
    rows = math.prod(x.shape[: x.ndim - axes])
    if rows != 1 or jnp.finfo(x.dtype).bits > 16:
        return jnp.tensordot(x, weight, axes)
    return jnp.tensordot(jnp.concatenate([x, jnp.zeros_like(x)]), weight, axes)[:1]
