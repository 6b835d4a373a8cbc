"""The Llama family as transformers stores it (Llama, SmolLM2, Qwen3): `config.json` and the names of its tensors."""

from __future__ import annotations

from typing import Any

from dmattn_jax.io.decoder_tensors import LAYER, block_specs, head_norm_specs, table_specs
from dmattn_jax.io.errors import CheckpointFormatError
from dmattn_jax.io.json_fields import Fields
from dmattn_jax.io.tensor_map import TensorSpec
from dmattn_jax.models.llama_config import LlamaConfig
from dmattn_jax.nn.rope import LinearRope, Llama3Rope, RopeScaling

LLAMA = "llama"
QWEN3 = "qwen3"


def read_llama_config(fields: Fields, numeric: dict[str, Any]) -> LlamaConfig:
    """The configuration in a `config.json`; numeric: dtype and param_dtype.

    Raises: CheckpointFormatError or ValueError naming the field.
    """
    qwen3 = fields.text("model_type") == QWEN3
    fields.must_be("hidden_act", "silu", "another activation")
    fields.must_be("mlp_bias", False, "a bias in the MLP")
    fields.must_be("use_sliding_window", False, "sliding-window attention")
    kinds = fields.get("layer_types", list, [])
    if any(kind != "full_attention" for kind in kinds):
        raise CheckpointFormatError(f"{fields.source}: layer_types must all be full_attention, got {kinds!r:.80}")
    theta, scaling = _rope(fields)
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    return LlamaConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", 128 if qwen3 else hidden // max(heads, 1)),
        max_position_embeddings=fields.integer("max_position_embeddings", 32_768 if qwen3 else 2048),
        qk_norm=qwen3,
        attention_bias=fields.flag("attention_bias", False),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        init_std=fields.number("initializer_range", 0.02),
        **numeric,
    )


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """θ and the scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = fields.rope()
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1:
        raise CheckpointFormatError(f"{rope.source}: partial_rotary_factor must be 1: rotating a part is not supported")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearRope(rope.number("factor"))
    if kind == "llama3":
        return theta, Llama3Rope(
            rope.number("factor"),
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
            rope.integer("original_max_position_embeddings"),
        )
    raise CheckpointFormatError(f"{rope.source}: rope_type must be default, linear or llama3, got {kind!r:.80}")


def write_llama_config(config: LlamaConfig) -> dict[str, Any]:
    """The content of a `config.json`, without the types of numbers and the tokenizer's ids.

    Raises: ValueError on rotary factors, which a GGUF file may have and a config.json cannot say.
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    if isinstance(config.rope_scaling, LinearRope):
        rope = {"rope_type": "linear", "factor": config.rope_scaling.factor}
    elif isinstance(config.rope_scaling, Llama3Rope):
        rope = {"rope_type": "llama3", **vars(config.rope_scaling)}
    elif config.rope_scaling is not None:
        raise ValueError(
            "rope_scaling must be None, LinearRope or Llama3Rope to be written in a config.json, got "
            f"{type(config.rope_scaling).__name__}: a scaling by the factors of a GGUF file has no name there"
        )
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
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        # both spellings, for transformers before and since version 5
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
    }


def llama_specs(config: LlamaConfig) -> list[TensorSpec]:
    """Every parameter of a `LlamaForCausalLM` and its tensor."""
    specs = table_specs(config) + block_specs(config, "mlp")
    if config.qk_norm:
        specs += head_norm_specs(config)
    if config.attention_bias:
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        for ours, theirs, sizes in (
            ("query_bias", "q_proj.bias", (heads, head_dim)),
            ("key_bias", "k_proj.bias", (kv_heads, head_dim)),
            ("value_bias", "v_proj.bias", (kv_heads, head_dim)),
            ("out_bias", "o_proj.bias", (config.hidden_size,)),
        ):
            axes = (tuple(range(len(sizes))),)
            specs.append(
                TensorSpec(f"blocks.attention.{ours}", f"{LAYER}self_attn.{theirs}", sizes, axes, config.num_layers)
            )
    return specs
