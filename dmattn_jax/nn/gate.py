"""The learned gate of dynamic-mask attention: which keys deserve to be seen, read off their values."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dmattn_jax.nn.exact import exact_row_products
from dmattn_jax.partitioning import normal, parameter

GateActivation = Literal["exp", "linear"]


class DynamicMaskGate(nnx.Module):
    """δ[h, j] = exp(A[h] · softplus(v_j · Δ[:, h])), v_j all kv heads' values of key j, concatenated.

    arXiv 2508.02124v6, equation for δ; `linear` drops the exp: δ = A · softplus(v · Δ). A starts at 0, so at
    initialisation every δ is the same (1, or 0 for `linear`) and the attention is a sliding window.

    The choice of keys is discrete: a gate that rounds differently in training, prefill and decoding picks other
    keys. So δ is float32, from the values as rounded to the compute dtype (what a cache holds), by a sum that has
    the same bits for any number of rows and any mesh (`exact_row_products`).
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        activation: GateActivation = "exp",
        init_std: float = 0.02,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if activation not in ("exp", "linear"):
            raise ValueError(f"gate_activation must be 'exp' or 'linear', got {activation!r}")
        self.A = parameter(jnp.zeros(num_kv_heads, param_dtype), ("kv_heads",))
        # [K, K·D]: one row a head, so that the sum runs along memory.
        self.delta = parameter(
            normal(rngs, (num_kv_heads, num_kv_heads * head_dim), init_std, param_dtype), ("kv_heads", None)
        )
        self.activation = activation

    def __call__(self, value: Float[Array, "B S K D"]) -> Float[Array, "B S K"]:
        rows = value.reshape(*value.shape[:2], -1)
        score = exact_row_products(rows, self.delta[...].astype(jnp.float32))
        exponent = self.A[...].astype(jnp.float32) * jax.nn.softplus(score)
        return jnp.exp(exponent) if self.activation == "exp" else exponent
