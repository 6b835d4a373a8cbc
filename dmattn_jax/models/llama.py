"""The dense decoder of the Llama family: Llama, SmolLM2, Qwen3."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dmattn_jax import nn
from dmattn_jax.models.decoder import HIDDEN, CausalDecoder
from dmattn_jax.models.llama_config import LlamaConfig
from dmattn_jax.partitioning import constrain


class LlamaBlock(nnx.Module):
    """x ← x + Attn(RMSNorm x); x ← x + SwiGLU(RMSNorm x), with dense causal attention."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        c = config
        numeric: dict[str, Any] = {"dtype": c.dtype, "param_dtype": c.param_dtype, "init_std": c.init_std}
        self.attention_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps, param_dtype=c.param_dtype)
        self.attention = nn.MultiHeadAttention(
            c.hidden_size,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            qk_norm=c.qk_norm,
            bias=c.attention_bias,
            rope_theta=c.rope_theta,
            rope_scaling=c.rope_scaling,
            norm_eps=c.norm_eps,
            **numeric,
            rngs=rngs,
        )
        self.mlp_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps, param_dtype=c.param_dtype)
        self.mlp = nn.SwiGLU(c.hidden_size, c.intermediate_size, bias=c.mlp_bias, **numeric, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T M"], segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T M"], Float[Array, ""]]:
        """The block's output, and the balance loss of its experts: 0, as there are none."""
        x = constrain(x + self.attention(x, segment_ids, self.attention_norm), HIDDEN)
        return self._feed_forward(x), jnp.float32(0)

    def decode(
        self, x: Float[Array, "B T M"], cache: Any, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T M"], Any]:
        mixed, cache = self.attention.decode(self.attention_norm(x), cache, segment_ids)
        return self._feed_forward(constrain(x + mixed, HIDDEN)), cache

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        return constrain(x + self.mlp(x, self.mlp_norm), HIDDEN)


class LlamaForCausalLM(CausalDecoder):
    """A decoder of `num_layers` Llama blocks."""

    config: LlamaConfig

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        super().__init__(config, functools.partial(LlamaBlock, config), rngs=rngs)
