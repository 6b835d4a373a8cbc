"""Pattern attention by a kernel that reads whole rows of one document each, and by the portable path elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.patterns import xla
from pallas_kernels.patterns.contract import Forward, Kept, Patterns, Places

Kernel = Callable[[Array, Array, Array, Patterns, Bool[Array, "B T"], float], Array]
"""(query [B, T, H, D], key, value [B, T, K, D], patterns, token [B, T], scale) -> out. token: False where none is."""


def whole_rows(kernel: Kernel) -> Forward:
    """`contract.Forward`. Rows of several documents, or whose first token is not at 0, take the portable path."""

    def pattern_attention(
        query: Float[Array, "B T H D"],
        key: Float[Array, "B S K D"],
        value: Float[Array, "B S K D"],
        patterns: Patterns,
        query_places: Places,
        key_places: Places,
        kept: Kept | None = None,
        *,
        scale: float,
    ) -> Float[Array, "B T H D"]:
        assert kept is None
        alone = (key_places.start <= 0).all() & (query_places.start <= 0).all()
        return lax.cond(
            alone,
            lambda: kernel(query, key, value, patterns, key_places.start == 0, scale),
            lambda: xla.pattern_attention(query, key, value, patterns, query_places, key_places, scale=scale),
        )

    return pattern_attention


def isolate_non_finite(
    key: Float[Array, "B T K D"], value: Float[Array, "B T K D"], token: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K D"], Float[Array, "B T K"]]:
    """Keys and values of products, and a bias: 0 · NaN is NaN, so what is not finite moves into a bias that only the
    queries that see the row read. Where there is no token the bias hides the row, which is 0."""
    finite = jnp.isfinite(key).all(-1) & jnp.isfinite(value).all(-1)
    bias = jnp.where(token[..., None], jnp.where(finite, 0.0, jnp.nan), -jnp.inf).astype(jnp.float32)
    kept = (finite & token[..., None])[..., None]
    return jnp.where(kept, key, 0), jnp.where(kept, value, 0), bias
