"""Arithmetic on one tile, the same in both passes: logits, mask and products in the accumulation type."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.xla.rows import Epoch, Rows


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def matmul(spec: str, left: Array, right: Array, dtype: jnp.dtype) -> Array:
    """einsum accumulated in `dtype`; float32 operands are never rounded to TF32 or bfloat16 on the way."""
    exact = jnp.promote_types(left.dtype, right.dtype).itemsize >= 4
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jnp.einsum(spec, left, right, precision=precision, preferred_element_type=dtype)


def logits(
    tile: Float[Array, "B t K G D"], rows: Rows, epoch: Epoch, scale: float, dtype: jnp.dtype
) -> tuple[Float[Array, "B K G t c"], Bool[Array, "B K 1 t c"]]:
    """Biased logits of a tile, −∞ where the key is not visible, and the visibility itself."""
    position = epoch.positions[:, None]
    visible = (rows.start[:, :, None, :] <= position) & (position < rows.end[:, :, None, :])
    visible = visible[:, :, None]
    scores = scale * matmul("btkgd,bkcd->bkgtc", tile, rows.key, dtype)
    scores = scores + rows.bias[:, :, None, None, :].astype(dtype)
    return jnp.where(visible, scores, -jnp.inf), visible


def pad_queries(array: Array, size: int) -> Array:
    """Pad axis 1 with zeros to a multiple of `size`; the same array where it is one already."""
    missing = -array.shape[1] % size
    if not missing:
        return array
    return jnp.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2))
