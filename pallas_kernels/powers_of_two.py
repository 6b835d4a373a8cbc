"""Biases of a softmax in powers of two, which is what the kernels' exponentials are."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

LOG2E = math.log2(math.e)
LARGEST = 1e38
"""Of a finite bias in base 2: differences of two, and sums with logits, stay finite."""


def base_2(bias: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """A bias for powers of two. What is finite stays finite: only −inf hides, and only +inf and NaN make NaN."""
    most = float(jnp.finfo(bias.dtype).max)
    # No `isfinite`: kernels have none.
    finite = (bias >= -most) & (bias <= most)
    return jnp.where(finite, jnp.minimum(jnp.maximum(bias * LOG2E, -LARGEST), LARGEST), bias)
