"""The model of the recall experiment: two plain blocks around any of the five attentions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from dmattn_jax import nn
from dmattn_jax.partitioning import normal
from train.experiments.ablation_layers import LAYERS
from train.experiments.mqar_config import MQARConfig


class ToldGate(nn.DynamicMaskGate):
    """A gate that knows the task: δ is larger at the values of the pairs, the odd places of the first 2n tokens."""

    def __init__(self, published: nn.DynamicMaskGate, pairs: int):
        """published: the gate in whose place it stands. Its parameters stay, and are not used."""
        self.A, self.delta, self.pairs = published.A, published.delta, pairs

    def __call__(self, value: Float[Array, "B T K D"]) -> Float[Array, "B T K"]:
        place = jnp.arange(value.shape[1])
        told = jnp.where((place < 2 * self.pairs) & (place % 2 == 1), 2.0, 1.0)
        return jnp.broadcast_to(told[:, None], value.shape[:3])


class RecallBlock(nnx.Module):
    """x ← x + Attn(LayerNorm x); x ← x + W₂ GELU(W₁ LayerNorm x), four times as wide inside."""

    def __init__(self, config: MQARConfig, number: int, *, rngs: nnx.Rngs):
        """number: the layer's, from 0."""
        dim, dtype = config.dim, jnp.dtype(config.dtype)
        assert config.init_std is not None
        initial = nnx.initializers.normal(config.init_std)
        self.attention_norm = nnx.LayerNorm(dim, rngs=rngs)
        self.attention = _attention(config, number, rngs)
        self.mlp_norm = nnx.LayerNorm(dim, rngs=rngs)
        self.up = nnx.Linear(dim, 4 * dim, kernel_init=initial, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * dim, dim, kernel_init=initial, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L M"]) -> Float[Array, "B L M"]:
        x = x + self.attention(self.attention_norm(x)).astype(x.dtype)
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x)))).astype(x.dtype)


class RecallModel(nnx.Module):
    """Token and learned position embeddings, `num_layers` blocks, LayerNorm, and the embedding again as the head.

    One head of the model's width, no rotary positions, no norms of queries and keys. The residual stream is float32.
    `mla` has the paper's ratios: a latent row of dim / 4 and, beside the head, dim / 2 dimensions shared by all heads
    (here not rotated). `nsa` has its blocks of 32 and 64, 16 of them selected.
    """

    def __init__(self, config: MQARConfig, *, rngs: nnx.Rngs):
        """config: resolved."""
        assert config.vocab_size is not None
        assert config.init_std is not None
        self.embedding = nnx.Param(normal(rngs, (config.vocab_size, config.dim), config.init_std, jnp.float32))
        self.position = nnx.Param(normal(rngs, (config.length, config.dim), config.init_std, jnp.float32))
        self.blocks = nnx.List([RecallBlock(config, n, rngs=rngs) for n in range(config.num_layers)])
        self.norm = nnx.LayerNorm(config.dim, rngs=rngs)
        self.config = config

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L M"]:
        """The final norm's output; see `logits`."""
        x = self._embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def logits(self, hidden: Float[Array, "*n M"]) -> Float[Array, "*n V"]:
        dtype = jnp.dtype(self.config.dtype)
        table = self.embedding[...].astype(dtype)
        return jnp.einsum("...m,vm->...v", hidden.astype(dtype), table, preferred_element_type=jnp.float32)

    def gates(self, tokens: Int[Array, "B L"]) -> Float[Array, "N B L K"]:
        """δ of every layer, position and kv head; the model's attention must be "dma"."""
        x, gates = self._embed(tokens), []
        for block in self.blocks:
            gates.append(block.attention.gates(block.attention_norm(x)))
            x = block(x)
        return jnp.stack(gates)

    def lifetimes(self, gates: Float[Array, "B L K"]) -> Int32[Array, "B L K"]:
        """The masks that one layer's `gates` make; all layers make them alike."""
        return self.blocks[0].attention.lifetimes(gates)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        # Read at every token, not broadcast: the gradient of a broadcast is a sum over examples, for which XLA lays all
        # of the residual stream out with the examples last, and turns it around at every product.
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.embedding[...][tokens] + self.position[...][places]


def _attention(config: MQARConfig, number: int, rngs: nnx.Rngs) -> Any:
    dim = config.dim
    common: dict[str, Any] = {
        "rope_theta": None,
        "qk_norm": False,
        "init_std": config.init_std,
        "dtype": jnp.dtype(config.dtype),
        "rngs": rngs,
    }
    if config.attention == "mla":
        return nn.MultiHeadLatentAttention(dim, 1, dim, latent_dim=dim // 4, **common)
    shape = (dim, 1, 1, dim)
    if config.attention == "mha":
        return nn.MultiHeadAttention(*shape, **common)
    assert config.window is not None
    if config.attention == "swa":
        return nn.SlidingWindowAttention(*shape, window=config.window, **common)
    if config.attention == "nsa":
        return nn.NativeSparseAttention(*shape, latent_dim=dim // 4, window=config.window, **common)
    layer = LAYERS.get(config.change, nn.DynamicMaskAttention)
    attention = layer(
        *shape,
        window=config.window,
        gate_step=config.gate_step,
        gate_activation=config.gate_activation,
        **common,
    )
    if config.change == "told_gate" and number:
        assert config.pairs is not None
        attention.gate = ToldGate(attention.gate, config.pairs)
    return attention
