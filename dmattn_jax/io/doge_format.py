"""Doge as transformers stores it: `config.json` and the names of its tensors.

Where the two implementations differ:

- A key is visible by rank among the keys so far in both (transformers: among the `keep_window_size` largest of the
  row after the causal mask). At equal gates the later key wins here; there it is left to `topk`. Gates are equal in
  an untrained model, and where a text repeats a token.
- CDMoE: transformers splits the router's output [tokens, 2K] by a reshape to [2, tokens, K], which mixes the scores
  of different tokens unless there is one token alone. Here every token is routed by its own scores: the first K
  outputs are one side of the grid, the last K the other, which is what transformers computes in decoding.
- A row without a visible key (padding) is 0 here, and an average of everything there.
- Rotary positions of type `dynamic` are those of type `default` up to max_position_embeddings tokens, and read as such.

What transformers' Doge cannot express (attention other than `dma`, the linear gate, a window for each head) is
written as the model type `dmattn_doge`, which it refuses instead of computing something else.
"""

from __future__ import annotations

import math
from typing import Any

from dmattn_jax.io.decoder_tensors import LAYER, block_specs, head_norm_specs, table_specs
from dmattn_jax.io.errors import CheckpointFormatError
from dmattn_jax.io.json_fields import Fields
from dmattn_jax.io.rope_format import read_rope
from dmattn_jax.io.tensor_map import TensorSpec
from dmattn_jax.models.config import DogeConfig
from dmattn_jax.models.field_checks import one_of

STANDARD = "doge"
EXTENDED = "dmattn_doge"
STORED_ATTENTIONS = ("dma", "swa", "mha")


def read_doge_config(fields: Fields, numeric: dict[str, Any]) -> DogeConfig:
    """The configuration in a `config.json`; numeric: dtype and param_dtype.

    Raises: CheckpointFormatError or ValueError naming the field.
    """
    for name in ("attention_bias", "mlp_bias"):
        fields.must_be(name, False, "a bias")
    fields.must_be("hidden_act", "silu", "another activation")
    if fields.content.get("sliding_window") is not None:
        raise CheckpointFormatError(f"{fields.source}: sliding_window beside the dynamic mask is not supported")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    hidden = fields.integer("hidden_size")
    experts = fields.integer("num_experts", 16_384) if fields.flag("is_moe", False) else 0
    window: int | tuple[int, ...] = fields.integer("keep_window_size", 2048)
    extended: dict[str, Any] = {}
    if fields.content.get("model_type") == EXTENDED:
        extended = {
            "attention": _stored_attention(fields.text("attention")),
            "gate_activation": fields.text("gate_activation"),
            "gate_step": fields.number("gate_step", 0.0),
        }
        windows = fields.get("windows", list, None)
        window = window if windows is None else tuple(windows)
    return DogeConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=fields.integer("head_dim", hidden // max(heads, 1)),
        window=window,
        rope_theta=read_rope(fields, ("default", "dynamic"))[0],
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        num_experts=experts,
        num_experts_per_token=fields.integer("num_experts_per_tok", 64),
        balance_loss_weight=fields.number("router_aux_loss_coef", 0.001),
        init_std=fields.number("initializer_range", 0.02),
        **extended,
        **numeric,
    )


def _stored_attention(attention: str) -> str:
    """Raises: ValueError for the attentions that no file format has; their models stay in the folders of runs."""
    one_of("attention", attention, STORED_ATTENTIONS)
    return attention


def write_doge_config(config: DogeConfig) -> dict[str, Any]:
    """The content of a `config.json`, without the types of numbers and the tokenizer's ids."""
    _stored_attention(config.attention)
    windows = (config.window,) * config.num_kv_heads if isinstance(config.window, int) else config.window
    as_published = config.gate_activation == "exp" and config.gate_step == 0
    standard = config.attention == "dma" and as_published and len(set(windows)) == 1
    content: dict[str, Any] = {
        "architectures": ["DogeForCausalLM"],
        "model_type": STANDARD if standard else EXTENDED,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "keep_window_size": max(windows),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        # both spellings, for transformers before and since version 5
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "is_moe": config.num_experts > 0,
        "num_experts_per_tok": config.num_experts_per_token,
        "norm_topk_prob": False,
        "router_aux_loss_coef": config.balance_loss_weight,
    }
    if config.num_experts:
        content["num_experts"] = config.num_experts
    if not standard:
        content |= {
            "architectures": ["DmattnDogeForCausalLM"],
            "attention": config.attention,
            "gate_activation": config.gate_activation,
            "gate_step": config.gate_step,
        }
        if not isinstance(config.window, int):
            content["windows"] = list(windows)
    return content


def doge_specs(config: DogeConfig) -> list[TensorSpec]:
    """Every parameter of a `DogeForCausalLM` and its tensor."""
    hidden, kv_heads = config.hidden_size, config.num_kv_heads

    def spec(parameter: str, tensor: str, sizes: tuple[int, ...], axes: tuple[tuple[int, ...], ...]) -> TensorSpec:
        return TensorSpec(f"blocks.{parameter}", LAYER + tensor, sizes, axes, config.num_layers)

    specs = table_specs(config) + block_specs(config, "mlp.shared" if config.num_experts else "mlp")
    specs += head_norm_specs(config)
    specs += [
        spec("attention_residual", "input_residual", (hidden,), ((0,),)),
        spec("mlp_residual", "post_attention_residual", (hidden,), ((0,),)),
    ]
    if config.attention == "dma":
        width = kv_heads * config.head_dim
        specs += [
            spec("attention.gate.A", "self_attn.A", (kv_heads,), ((0,),)),
            spec("attention.gate.delta", "self_attn.dt_proj.weight", (kv_heads, width), ((0,), (1,))),
        ]
    if config.num_experts:
        side = math.isqrt(config.num_experts)
        experts = (config.num_experts, hidden)
        specs += [
            spec("mlp.router", "mlp.router_gate.weight", (hidden, 2, side), ((1, 2), (0,))),
            spec("mlp.expert_down", "mlp.down_embed.weight", experts, ((0,), (1,))),
            spec("mlp.expert_up", "mlp.up_embed.weight", experts, ((0,), (1,))),
        ]
    return specs
