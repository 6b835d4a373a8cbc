"""Pattern attention by a kernel that reads whole rows of one document each, and by the portable path elsewhere."""

from __future__ import annotations

from collections.abc import Callable

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
