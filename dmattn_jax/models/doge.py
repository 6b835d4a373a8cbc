"""The Doge decoder: a causal language model whose attention is a field of its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dmattn_jax import nn
from dmattn_jax.models.config import DogeConfig
from dmattn_jax.models.loss import LossOutput, chunked_cross_entropy
from dmattn_jax.partitioning import constrain, normal, parameter

HIDDEN = ("batch", None, None)


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
        mixed = self.attention(self.attention_norm(x), segment_ids)
        return self._feed_forward(self._residual(self.attention_residual, x, mixed), segment_ids)

    def decode(
        self, x: Float[Array, "B T M"], cache: Any, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T M"], Any]:
        mixed, cache = self.attention.decode(self.attention_norm(x), cache, segment_ids)
        return self._feed_forward(self._residual(self.attention_residual, x, mixed), segment_ids)[0], cache

    def _feed_forward(self, x: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        normed = self.mlp_norm(x)
        balance = jnp.float32(0)
        if isinstance(self.mlp, nn.CDMoE):
            out, balance = self.mlp(normed, segment_ids)
        else:
            out = self.mlp(normed)
        return self._residual(self.mlp_residual, x, out), balance

    @staticmethod
    def _residual(scale: nnx.Param, x: jax.Array, update: jax.Array) -> jax.Array:
        return constrain(scale[...].astype(x.dtype) * x + update, HIDDEN)


class DogeForCausalLM(nnx.Module):
    """Embedding, `num_layers` Doge blocks, final norm, unembedding (the embedding's transpose when tied).

    The blocks are one block whose parameters have a leading "layers" axis, and run in one `scan`: compile time
    does not grow with depth. Parameters are param_dtype, computation is dtype, logits and losses float32.
    """

    def __init__(self, config: DogeConfig, *, rngs: nnx.Rngs):
        table = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embedding = parameter(normal(rngs, table, config.init_std, config.param_dtype), ("vocab", "embed"))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs: nnx.Rngs) -> DogeBlock:
            return DogeBlock(config, rngs=rngs)

        self.blocks = stack(rngs)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps, param_dtype=config.param_dtype)
        if not config.tie_embeddings:
            initial = normal(rngs, table[::-1], config.init_std, config.param_dtype)
            self.unembedding = parameter(initial, ("embed", "vocab"))

    def __call__(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the next token, float32. segment_ids: documents packed into a row, 0 = padding.

        For training use `loss`, which never holds all logits at once.
        """
        hidden, _ = self.hidden(tokens, segment_ids)
        return self.logits(hidden)

    def loss(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        weights: Float[Array, "B T"] | None = None,
    ) -> LossOutput:
        """Mean cross-entropy of targets [B, T] (token to predict at each position; < 0: not counted)."""
        hidden, balance = self.hidden(tokens, segment_ids)
        total, count = chunked_cross_entropy(hidden, self._unembedding(), targets, weights)
        cross_entropy = total / jnp.where(count > 0, count, 1)
        auxiliary = self.config.balance_loss_weight * balance
        return LossOutput(cross_entropy + auxiliary, cross_entropy, count, auxiliary)

    def hidden(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T M"], Float[Array, ""]]:
        """The final norm's output and the mean balance loss of the layers."""

        def block(layer: DogeBlock, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return layer(x, segment_ids)

        x, balance = self._scan(block, self._embed(tokens))
        return self.norm(x), balance.mean()

    def gates(self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "L B T K"]:
        """δ of every layer, position and kv head. `select_keys(gates[l], window, segment_ids)` is the layer's mask.

        Raises: ValueError unless the model's attention is "dma".
        """
        if self.config.attention != "dma":
            raise ValueError(f"gates exist only in a model with attention='dma', got {self.config.attention!r}")

        def block(layer: DogeBlock, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            gate = layer.attention.gates(layer.attention_norm(x))
            return layer(x, segment_ids)[0], gate

        return self._scan(block, self._embed(tokens))[1]

    def init_cache(self, batch: int, max_length: int) -> Any:
        """Empty decoding caches of all layers (a leading layers axis), for at most max_length tokens a row."""
        # It depends on the layer's sizes alone, which stacking does not change.
        cache = self.blocks.attention.init_cache(batch, max_length)
        layers = self.config.num_layers
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (layers, *leaf.shape)), cache)

    def decode(
        self, tokens: Int[Array, "B T"], cache: Any, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T M"], Any]:
        """The final norm's output (see `logits`) for the next T tokens of every row, and the caches after them.

        segment_ids 0 marks padding, so that rows may append unequal numbers of tokens.
        """

        def block(layer: DogeBlock, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            return layer.decode(x, cache, segment_ids)

        x, cache = self._scan(block, self._embed(tokens), cache)
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "*n M"]) -> Float[Array, "*n V"]:
        """Unembed the output of `hidden` or `decode`; float32."""
        unembedding = self._unembedding().astype(hidden.dtype)
        return jnp.einsum("...m,mv->...v", hidden, unembedding, preferred_element_type=jnp.float32)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        # Whole rows on every device of fsdp before the look-up: its result is split by batch, not by feature.
        table = constrain(self.embedding[...], ("vocab", None))
        return constrain(table[tokens].astype(self.config.dtype), HIDDEN)

    def _unembedding(self) -> jax.Array:
        return self.embedding[...].T if self.config.tie_embeddings else self.unembedding[...]

    def _scan(
        self, block: Callable[..., tuple[jax.Array, Any]], x: jax.Array, *per_layer: Any
    ) -> tuple[jax.Array, Any]:
        """Run `block(layer, x, …) -> (x, y)` through the layers; the y of all layers, stacked."""
        graph, parameters = nnx.split(self.blocks)

        def step(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            parameters, *others = layer
            return block(nnx.merge(graph, parameters), x, *others)

        if self.config.remat:
            # A scan keeps the recomputation apart by itself.
            step = jax.checkpoint(step, prevent_cse=False)
        return jax.lax.scan(step, x, (parameters, *per_layer))


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
    return nn.DynamicMaskAttention(
        *shape, window=config.window, gate_activation=config.gate_activation, gate_step=config.gate_step, **common
    )
