"""The Doge decoder: a causal language model whose attention is a field of its configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from dmattn_jax import nn
from dmattn_jax.models.config import DogeConfig
from dmattn_jax.models.decoder import HIDDEN, CausalDecoder
from dmattn_jax.partitioning import constrain, parameter


class DogeBlock(nnx.Module):
    """x ← r₁⊙x + Attn(RMSNorm x); x ← r₂⊙x + MLP(RMSNorm x); r₁ and r₂ start at 1."""

    def __init__(self, config: DogeConfig, *, rngs: nnx.Rngs):
        c = config
        numeric: dict[str, Any] = {"dtype": c.dtype, "param_dtype": c.param_dtype, "init_std": c.init_std}
        self.attention_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps, param_dtype=c.param_dtype)
        self.attention = _attention(c, numeric, rngs)
        self.attention_residual = parameter(jnp.ones(c.hidden_size, c.param_dtype), ("embed",))
        self.mlp_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps, param_dtype=c.param_dtype)
        self.mlp: nn.SwiGLU | nn.CDMoE
        if c.num_experts:
            self.mlp = nn.CDMoE(
                c.hidden_size,
                c.intermediate_size,
                c.num_experts,
                c.num_experts_per_token,
                **numeric,
                rngs=rngs,
            )
        else:
            self.mlp = nn.SwiGLU(c.hidden_size, c.intermediate_size, **numeric, rngs=rngs)
        self.mlp_residual = parameter(jnp.ones(c.hidden_size, c.param_dtype), ("embed",))

    def __call__(
        self, x: Float[Array, "B T M"], segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T M"], Float[Array, ""]]:
        """The block's output and its balance loss (0 for a dense MLP)."""
        mixed = self.attention(x, segment_ids, self.attention_norm)
        return self._feed_forward(self._residual(self.attention_residual, x, mixed), segment_ids)

    def decode(
        self, x: Float[Array, "B T M"], cache: Any, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T M"], Any]:
        mixed, cache = self.attention.decode(self.attention_norm(x), cache, segment_ids)
        return self._feed_forward(self._residual(self.attention_residual, x, mixed), segment_ids)[0], cache

    def _feed_forward(self, x: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        balance = jnp.float32(0)
        if isinstance(self.mlp, nn.CDMoE):
            out, balance = self.mlp(self.mlp_norm(x), segment_ids)
        else:
            out = self.mlp(x, self.mlp_norm)
        return self._residual(self.mlp_residual, x, out), balance

    @staticmethod
    def _residual(scale: nnx.Param, x: jax.Array, update: jax.Array) -> jax.Array:
        return constrain(scale[...].astype(x.dtype) * x + update, HIDDEN)


class DogeForCausalLM(CausalDecoder):
    """A decoder of `num_layers` Doge blocks."""

    config: DogeConfig

    def __init__(self, config: DogeConfig, *, rngs: nnx.Rngs):
        super().__init__(config, functools.partial(DogeBlock, config), rngs=rngs)

    def gates(self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "L B T K"]:
        """δ of every layer, position and kv head. `select_keys(gates[l], window, segment_ids)` is the layer's mask.

        Raises: ValueError unless the model's attention is "dma".
        """
        return self._of_gates(tokens, segment_ids, lambda attention, gates: gates)

    def lifetimes(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Int32[Array, "L B T K"]:
        """The masks: of every layer, key and kv head the first position that no longer sees the key.

        Raises: ValueError unless the model's attention is "dma".
        """
        return self._of_gates(tokens, segment_ids, lambda attention, gates: attention.lifetimes(gates, segment_ids))

    def _of_gates(self, tokens, segment_ids, function: Callable[[Any, jax.Array], jax.Array]) -> jax.Array:
        if self.config.attention != "dma":
            raise ValueError(f"gates exist only in a model with attention='dma', got {self.config.attention!r}")

        def block(layer: DogeBlock, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = function(layer.attention, layer.attention.gates(layer.attention_norm(x)))
            return layer(x, segment_ids)[0], found

        return jnp.asarray(self._scan(block, self.embed(tokens))[1])


def _attention(config: DogeConfig, numeric: dict[str, Any], rngs: nnx.Rngs) -> Any:
    shape = (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)
    common: dict[str, Any] = {
        **numeric,
        "rope_theta": config.rope_theta,
        "norm_eps": config.norm_eps,
        "rngs": rngs,
    }
    if config.attention == "mha":
        return nn.MultiHeadAttention(*shape, **common)
    if config.attention == "swa":
        return nn.SlidingWindowAttention(*shape, window=config.window, **common)
    if config.attention == "mla":
        sizes = (config.hidden_size, config.num_heads, config.head_dim)
        return nn.MultiHeadLatentAttention(*sizes, latent_dim=config.latent_dim, **common)
    if config.attention == "nsa":
        return nn.NativeSparseAttention(
            *shape,
            latent_dim=config.latent_dim,
            window=config.window,
            compression_block=config.compression_block,
            selection_block=config.selection_block,
            selected_blocks=config.selected_blocks,
            **common,
        )
    return nn.DynamicMaskAttention(
        *shape, window=config.window, gate_activation=config.gate_activation, gate_step=config.gate_step, **common
    )
