"""The Llama family as transformers stores it (Llama, SmolLM2, Qwen3): `config.json` and the names of its tensors."""

from __future__ import annotations

from typing import Any

from dmattn_jax.io.decoder_tensors import LAYER, block_specs, head_norm_specs, table_specs
from dmattn_jax.io.errors import CheckpointFormatError
from dmattn_jax.io.json_fields import Fields
from dmattn_jax.io.rope_format import read_rope, write_rope
from dmattn_jax.io.tensor_map import TensorSpec
from dmattn_jax.models.llama_config import LlamaConfig

LLAMA = "llama"
QWEN3 = "qwen3"


def read_llama_config(fields: Fields, numeric: dict[str, Any]) -> LlamaConfig:
    """The configuration in a `config.json`; numeric: dtype and param_dtype.

    Raises: CheckpointFormatError or ValueError naming the field.
    """
    qwen3 = fields.text("model_type") == QWEN3
    fields.must_be("hidden_act", "silu", "another activation")
    layers = fields.integer("num_hidden_layers")
    _refuse_windows(fields, layers)
    theta, scaling = read_rope(fields)
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    return LlamaConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", 128 if qwen3 else hidden // max(heads, 1)),
        max_position_embeddings=fields.integer("max_position_embeddings", 32_768 if qwen3 else 2048),
        qk_norm=qwen3,
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False) and not qwen3,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        init_std=fields.number("initializer_range", 0.02),
        **numeric,
    )


def _refuse_windows(fields: Fields, layers: int) -> None:
    """Raises: CheckpointFormatError, naming the field, where a layer sees only a window of the keys.

    Qwen3's files name a window and do not use it; with use_sliding_window, layers from max_window_layers on would.
    """
    kinds = fields.get("layer_types", list, [])
    if any(kind != "full_attention" for kind in kinds):
        raise CheckpointFormatError(f"{fields.source}: layer_types must all be full_attention, got {kinds!r:.80}")
    if not fields.flag("use_sliding_window", False) or kinds:
        return
    first = fields.integer("max_window_layers", 28)
    if fields.integer("sliding_window", 4096) and first < layers:
        raise CheckpointFormatError(
            f"{fields.source}: use_sliding_window must be false, or max_window_layers at least the {layers} layers, "
            f"got true and {first}: sliding-window attention in the Llama family is not supported"
        )


def write_llama_config(config: LlamaConfig) -> dict[str, Any]:
    """The content of a `config.json`, without the types of numbers and the tokenizer's ids.

    Raises: ValueError on rotary factors, which a GGUF file may have, and on an MLP's biases beside normed queries:
    a config.json cannot say them.
    """
    if config.mlp_bias and config.qk_norm:
        raise ValueError("mlp_bias must be False with qk_norm to be written in a config.json: Qwen3's MLP has no bias")
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": QWEN3 if config.qk_norm else LLAMA,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "rms_norm_eps": config.norm_eps,
        **write_rope(config.rope_theta, config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
    }


def llama_specs(config: LlamaConfig) -> list[TensorSpec]:
    """Every parameter of a `LlamaForCausalLM` and its tensor."""
    specs = table_specs(config) + block_specs(config, "mlp")
    if config.qk_norm:
        specs += head_norm_specs(config)
    biases: list[tuple[str, str, tuple[int, ...]]] = []
    if config.attention_bias:
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        biases += [
            ("attention.query_bias", "self_attn.q_proj.bias", (heads, head_dim)),
            ("attention.key_bias", "self_attn.k_proj.bias", (kv_heads, head_dim)),
            ("attention.value_bias", "self_attn.v_proj.bias", (kv_heads, head_dim)),
            ("attention.out_bias", "self_attn.o_proj.bias", (config.hidden_size,)),
        ]
    if config.mlp_bias:
        biases += [
            ("mlp.gate_bias", "mlp.gate_proj.bias", (config.intermediate_size,)),
            ("mlp.up_bias", "mlp.up_proj.bias", (config.intermediate_size,)),
            ("mlp.down_bias", "mlp.down_proj.bias", (config.hidden_size,)),
        ]
    for ours, theirs, sizes in biases:
        axes = (tuple(range(len(sizes))),)
        specs.append(TensorSpec(f"blocks.{ours}", f"{LAYER}{theirs}", sizes, axes, config.num_layers))
    return specs
