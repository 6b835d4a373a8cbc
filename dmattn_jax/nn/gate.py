"""The learned gate of dynamic-mask attention: which keys deserve to be seen, read off their values."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dmattn_jax.nn.exact import exact_row_products
from dmattn_jax.partitioning import normal, parameter
from pallas_kernels import RESIDUALS

GateActivation = Literal["exp", "linear"]

LARGEST = 2.0**40
"""The exponential ends here, so that gradients, which it multiplies, and their squares stay finite: at high learning
rates exponents run away (docs/journal.md). Keys that reach it are equal: the later wins."""


class DynamicMaskGate(nnx.Module):
    """δ[h, j] = exp(A[h] · softplus(v_j · Δ[:, h])), at most 2^40; v_j: all kv heads' values of key j, concatenated.

    arXiv 2508.02124v6, equation for δ; `linear` drops the exp: δ = A · softplus(v · Δ). A starts at 0, so at
    initialisation every δ is the same (1, or 0 for `linear`) and the attention is a sliding window.

    The choice of keys is discrete: a gate that rounds differently in training, prefill and decoding picks other
    keys. So δ is float32, from the values as rounded to the compute dtype (what a cache holds), by a sum that has
    the same bits for any number of rows and any mesh (`exact_row_products`).

    step: 0 is the paper. Above 0, δ is rounded to a multiple of it, and its gradient passes as if it were not: keys
    whose δ differ by less are equal, so the later one wins, and a key must earn its place by a margin. With step 0
    the first update breaks all ties, however little gates differ, and heads forget the last few keys.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        activation: GateActivation = "exp",
        step: float = 0.0,
        init_std: float = 0.02,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if activation not in ("exp", "linear"):
            raise ValueError(f"gate_activation must be 'exp' or 'linear', got {activation!r}")
        if not 0 <= step < math.inf:
            raise ValueError(f"gate_step must be >= 0 and finite, got {step}")
        self.A = parameter(jnp.zeros(num_kv_heads, param_dtype), ("kv_heads",))
        # [K, K·D]: one row a head, so that the sum runs along memory.
        self.delta = parameter(
            normal(rngs, (num_kv_heads, num_kv_heads * head_dim), init_std, param_dtype), ("kv_heads", None)
        )
        self.activation = activation
        self.step = step

    @jax.named_scope("gate")
    def __call__(self, value: Float[Array, "B S K D"]) -> Float[Array, "B S K"]:
        rows = value.reshape(*value.shape[:2], value.shape[2] * value.shape[3])
        score = checkpoint_name(exact_row_products(rows, self.delta[...].astype(jnp.float32)), RESIDUALS)
        exponent = self.A[...].astype(jnp.float32) * jax.nn.softplus(score)
        gate = jnp.exp(jnp.minimum(exponent, math.log(LARGEST))) if self.activation == "exp" else exponent
        if not self.step:
            return gate
        return _round_straight_through(gate, self.step)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _round_straight_through(gate: Float[Array, "B S K"], step: float) -> Float[Array, "B S K"]:
    return step * jnp.round(gate / step)


@_round_straight_through.defjvp
def _pass_gradient(step, primals, tangents):
    return _round_straight_through(primals[0], step), tangents[0]
