"""The gated feed-forward layer."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dmattn_jax.nn.linear import linear
from dmattn_jax.nn.norms import Projection, RMSNorm
from dmattn_jax.partitioning import normal, parameter


class SwiGLU(nnx.Module):
    """(SiLU(x W_gate) ⊙ x W_up) W_down; computes in `dtype`, parameters in `param_dtype`.

    bias: whether the three projections have one (starting at 0).
    """

    matrices: ClassVar[tuple[str, ...]] = ("gate_projection", "up_projection", "down_projection")

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        init_std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        wide = (hidden_size, intermediate_size)
        self.gate_projection = parameter(normal(rngs, wide, init_std, param_dtype), ("embed", "mlp"))
        self.up_projection = parameter(normal(rngs, wide, init_std, param_dtype), ("embed", "mlp"))
        self.down_projection = parameter(normal(rngs, wide[::-1], init_std, param_dtype), ("mlp", "embed"))
        if bias:
            self.gate_bias = parameter(jnp.zeros(intermediate_size, param_dtype), ("mlp",))
            self.up_bias = parameter(jnp.zeros(intermediate_size, param_dtype), ("mlp",))
            self.down_bias = parameter(jnp.zeros(hidden_size, param_dtype), ("embed",))
        self.bias = bias
        self.dtype = jnp.dtype(dtype)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "*n M"], norm: RMSNorm | None = None) -> Float[Array, "*n M"]:
        """norm: of x, applied first; its gradient then costs less than that of a norm outside."""
        weights = (self.gate_projection[...].astype(self.dtype), self.up_projection[...].astype(self.dtype))
        x = x.astype(self.dtype)
        if norm is None:
            gate, up = (linear(x, weight) for weight in weights)
        else:
            gate, up = norm.project(x, *map(Projection, weights))
        if self.bias:
            gate = gate + self.gate_bias[...].astype(self.dtype)
            up = up + self.up_bias[...].astype(self.dtype)
        out = linear(jax.nn.silu(gate) * up, self.down_projection[...].astype(self.dtype))
        return out + self.down_bias[...].astype(self.dtype) if self.bias else out
