"""Cross-domain mixture of experts (2508.02124v6): one shared SwiGLU and many single-neuron experts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dmattn_jax.nn.mlp import SwiGLU
from dmattn_jax.partitioning import constrain, normal, parameter

GATHERED_ELEMENTS = 2**22
"""Elements of the expert rows gathered at once: tokens are cut into chunks of at most this many."""


class CDMoE(nnx.Module):
    """y = SwiGLU(x) + Σ_{e ∈ top k} g_e · SiLU(⟨D_e, x⟩) · U_e.

    Expert e = (a, b) on a K×K grid, K² = num_experts, has score z^x_a + z^y_b, where the router maps x to
    z = (z^x, z^y); g is the softmax over the chosen scores. Every token is routed by its own scores.
    Returns y and the balance loss E · Σ_e f_e · P_e: f_e the share of choices that fell on e, P_e the mean softmax
    probability of e over all experts. It is 1 when both are uniform, and only P carries a gradient.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_experts_per_token: int,
        *,
        init_std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        side = math.isqrt(max(num_experts, 0))
        if num_experts < 1 or side * side != num_experts:
            raise ValueError(f"num_experts must be a square number >= 1, got {num_experts}: use {max(side, 1) ** 2}")
        if not 1 <= num_experts_per_token <= num_experts:
            raise ValueError(f"num_experts_per_token must be in 1 … {num_experts}, got {num_experts_per_token}")
        self.shared = SwiGLU(
            hidden_size, intermediate_size, init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.router = parameter(normal(rngs, (hidden_size, 2, side), init_std, param_dtype), ("embed", None, "router"))
        self.expert_down = parameter(
            normal(rngs, (num_experts, hidden_size), init_std, param_dtype), ("experts", "embed")
        )
        self.expert_up = parameter(
            normal(rngs, (num_experts, hidden_size), init_std, param_dtype), ("experts", "embed")
        )
        self.side = side
        self.chosen = num_experts_per_token
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self, x: Float[Array, "B T M"], segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T M"], Float[Array, ""]]:
        """Padding (segment id 0) is routed too, but does not count in the balance loss. O(B·T·M) memory."""
        batch, length, hidden = x.shape
        x = x.astype(self.dtype)
        counted = jnp.ones((batch, length), bool) if segment_ids is None else segment_ids != 0
        counted = counted.astype(jnp.float32)
        size = max(1, min(length, GATHERED_ELEMENTS // (self.chosen * hidden * max(1, batch))))
        padding = -length % size
        # Cut along time, so that a batch split over devices stays split.
        chunks = [
            jnp.moveaxis(jnp.pad(array, widths).reshape(batch, -1, size, *array.shape[2:]), 1, 0)
            for array, widths in ((x, ((0, 0), (0, padding), (0, 0))), (counted, ((0, 0), (0, padding))))
        ]
        side = self.side
        zero = (jnp.zeros((side, side), jnp.float32), jnp.zeros(side * side, jnp.float32))
        router = self.router[...]
        # Whole rows on every device of fsdp before the look-up: its result is split by batch, not by feature.
        down, up = (constrain(table[...], ("experts", None)) for table in (self.expert_down, self.expert_up))

        @jax.checkpoint
        def one_chunk(sums, chunk):
            tokens, weight = chunk
            experts, gates, probabilities = self._route(tokens, router)
            neurons = jnp.einsum(
                "btkm,btm->btk", down[experts].astype(self.dtype), tokens, preferred_element_type=jnp.float32
            )
            active = (gates * jax.nn.silu(neurons)).astype(self.dtype)
            out = jnp.einsum(
                "btk,btkm->btm", active, up[experts].astype(self.dtype), preferred_element_type=jnp.float32
            )
            # Padding may hold anything, and 0 · NaN is NaN.
            rows, columns = (jnp.where(weight[..., None] > 0, each, 0) for each in probabilities)
            grid = jnp.einsum("bta,btc->ac", rows, columns, precision=jax.lax.Precision.HIGHEST)
            counts = sums[1].at[experts].add(jnp.broadcast_to(weight[..., None], experts.shape))
            return (sums[0] + grid, counts), out.astype(self.dtype)

        (grid, counts), routed = jax.lax.scan(one_chunk, zero, tuple(chunks))
        routed = jnp.moveaxis(routed, 0, 1).reshape(batch, -1, hidden)[:, :length]
        tokens = jnp.maximum(counted.sum(), 1)
        share = jax.lax.stop_gradient(counts) / (tokens * self.chosen)
        balance = side * side * jnp.sum(share * (grid.reshape(-1) / tokens))
        return self.shared(x) + routed, balance

    def _route(
        self, x: jax.Array, router: jax.Array
    ) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"], tuple[jax.Array, jax.Array]]:
        """Experts and gates of each token, and the softmax of each side of the grid; float32 throughout."""
        scores = jnp.einsum(
            "btm,msk->sbtk",
            x.astype(jnp.float32),
            router.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        # A pair among the best k of the sums has both halves among the best k of their sides.
        kept = min(self.chosen, self.side)
        (rows, row_index), (columns, column_index) = (jax.lax.top_k(side, kept) for side in (scores[0], scores[1]))
        pairs = (rows[..., :, None] + columns[..., None, :]).reshape(*rows.shape[:-1], kept * kept)
        best, pair = jax.lax.top_k(pairs, self.chosen)
        experts = jnp.take_along_axis(row_index, pair // kept, axis=-1) * self.side
        experts = experts + jnp.take_along_axis(column_index, pair % kept, axis=-1)
        probabilities = (jax.nn.softmax(scores[0], axis=-1), jax.nn.softmax(scores[1], axis=-1))
        return experts, jax.nn.softmax(best, axis=-1), probabilities
