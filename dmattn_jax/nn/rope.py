"""Rotary position embedding, half-split: dimension i turns with dimension i + D/2."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def apply_rope(
    x: Float[Array, "B T H D"], position: Int[Array, "B T"] | Int[Array, "1 T"], *, theta: float = 10_000.0
) -> Float[Array, "B T H D"]:
    """Rotate each pair (x_i, x_{i+D/2}) by position · theta^(−2i/D); float32 inside, x's dtype outside.

    Angles are float32: beyond 2^24 positions they are those of the nearest representable position.
    Raises: ValueError when D is odd.
    """
    head_dim = x.shape[-1]
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary positions, got {head_dim}")
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[:, :, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
