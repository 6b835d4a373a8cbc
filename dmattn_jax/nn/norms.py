"""Root-mean-square normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dmattn_jax.nn.exact import exact_mean_square
from dmattn_jax.partitioning import parameter


class RMSNorm(nnx.Module):
    """x / √(mean(x²) + eps) · weight over the last axis; float32 inside, the input's dtype outside.

    A row's bits do not depend on the other rows: see `dmattn_jax.nn.exact`.
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float = 1e-6,
        axis: str | None = "embed",
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        """size: of the last axis; axis: its logical name; the weight starts at 1, so rngs is not drawn from."""
        self.weight = parameter(jnp.ones(size, param_dtype), (axis,))
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*n M"]) -> Float[Array, "*n M"]:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(exact_mean_square(wide) + self.eps)
        if x.ndim == 4:
            # Of heads, whose rotation follows: it reads x and the scale, where XLA would write and read x normed as
            # float32 in between.
            scale = jax.lax.optimization_barrier(scale)
        return (wide * scale * self.weight[...].astype(jnp.float32)).astype(x.dtype)
