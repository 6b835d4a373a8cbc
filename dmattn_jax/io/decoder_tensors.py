"""The tensors that Doge and the Llama family have in common, under the names of transformers."""

from __future__ import annotations

from dmattn_jax.io.tensor_map import TensorSpec
from dmattn_jax.models.config import DogeConfig
from dmattn_jax.models.llama_config import LlamaConfig

EMBEDDING = "model.embed_tokens.weight"
UNEMBEDDING = "lm_head.weight"
LAYER = "model.layers.{layer}."

# A linear layer of PyTorch keeps [out, in]. Of the parameter's axes (in, out…) or (in…, out), whichever there are:
TRANSPOSED = ((1,), (0,))
FROM_HEADS = ((2,), (0, 1))
TO_HEADS = ((1, 2), (0,))


def table_specs(config: DogeConfig | LlamaConfig) -> list[TensorSpec]:
    """Embedding, final norm, and the unembedding where it is not tied."""
    table = (config.vocab_size, config.hidden_size)
    specs = [
        TensorSpec("embedding", EMBEDDING, table, ((0,), (1,))),
        TensorSpec("norm.weight", "model.norm.weight", (config.hidden_size,), ((0,),)),
    ]
    if not config.tie_embeddings:
        specs.append(TensorSpec("unembedding", UNEMBEDDING, table[::-1], TRANSPOSED))
    return specs


def block_specs(config: DogeConfig | LlamaConfig, mlp: str) -> list[TensorSpec]:
    """Projections of attention and MLP, and the two norms; `mlp` is the path of the SwiGLU in a block."""
    hidden, wide = config.hidden_size, config.intermediate_size
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim

    def spec(parameter: str, tensor: str, sizes: tuple[int, ...], axes: tuple[tuple[int, ...], ...]) -> TensorSpec:
        return TensorSpec(f"blocks.{parameter}", LAYER + tensor, sizes, axes, config.num_layers)

    return [
        spec("attention_norm.weight", "input_layernorm.weight", (hidden,), ((0,),)),
        spec("mlp_norm.weight", "post_attention_layernorm.weight", (hidden,), ((0,),)),
        spec("attention.query", "self_attn.q_proj.weight", (hidden, heads, head_dim), TO_HEADS),
        spec("attention.key", "self_attn.k_proj.weight", (hidden, kv_heads, head_dim), TO_HEADS),
        spec("attention.value", "self_attn.v_proj.weight", (hidden, kv_heads, head_dim), TO_HEADS),
        spec("attention.out", "self_attn.o_proj.weight", (heads, head_dim, hidden), FROM_HEADS),
        spec(f"{mlp}.gate_projection", "mlp.gate_proj.weight", (hidden, wide), TRANSPOSED),
        spec(f"{mlp}.up_projection", "mlp.up_proj.weight", (hidden, wide), TRANSPOSED),
        spec(f"{mlp}.down_projection", "mlp.down_proj.weight", (wide, hidden), TRANSPOSED),
    ]


def head_norm_specs(config: DogeConfig | LlamaConfig) -> list[TensorSpec]:
    """The norms of every head's query and key."""
    return [
        TensorSpec(
            f"blocks.attention.{ours}.weight",
            f"{LAYER}self_attn.{theirs}.weight",
            (config.head_dim,),
            ((0,),),
            config.num_layers,
        )
        for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm"))
    ]
