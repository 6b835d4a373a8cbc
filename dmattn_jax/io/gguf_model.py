"""A Llama model in a GGUF file: its configuration and where its parameters are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dmattn_jax.io.decoder_tensors import FROM_HEADS, TO_HEADS, TRANSPOSED
from dmattn_jax.io.errors import CheckpointFormatError
from dmattn_jax.io.gguf_file import GgufFile
from dmattn_jax.io.json_fields import Fields
from dmattn_jax.io.tensor_map import TensorSpec
from dmattn_jax.models.llama_config import LlamaConfig
from dmattn_jax.nn.rope import FactorsRope, LinearRope, Llama3Rope, RopeScaling

ARCHITECTURE = "llama"
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_CONTEXT = 8192

TURNED = ((1, 3, 2), (0,))
"""llama.cpp turns neighbouring dimensions of a head together, transformers those half a head apart: a head's rows
are stored as (pair, half) and wanted as (half, pair)."""


def open_gguf_model(path: Path, dtype: str) -> tuple[LlamaConfig, list[TensorSpec], GgufFile, set[str]]:
    """Configuration, tensors, their file, and the tensors that hold no parameter.

    Raises: CheckpointFormatError naming key or tensor.
    """
    file = GgufFile(path)
    config = _read_config(file, dtype)
    return config, _specs(config), file, {ROPE_FACTORS}


def _read_config(file: GgufFile, dtype: Any) -> LlamaConfig:
    fields = Fields(file.metadata, str(file.path))
    architecture = fields.text("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointFormatError(
            f"{file.path}: general.architecture must be {ARCHITECTURE}, got {architecture!r:.80}"
        )
    if fields.integer("llama.expert_count", 0):
        raise CheckpointFormatError(f"{file.path}: llama.expert_count must be 0: mixtures of experts are not supported")
    hidden, heads = fields.integer("llama.embedding_length"), fields.integer("llama.attention.head_count")
    head_dim = fields.integer("llama.attention.key_length", hidden // max(heads, 1))
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.integer(name, head_dim) != head_dim:
            raise CheckpointFormatError(
                f"{file.path}: {name} must be the head size {head_dim}, got {fields.integer(name)}"
            )
    if "token_embd.weight" not in file.names():
        raise CheckpointFormatError(f"{file.path}: tensor token_embd.weight is missing")
    try:
        return LlamaConfig(
            vocab_size=file.shape("token_embd.weight")[0],
            hidden_size=hidden,
            intermediate_size=fields.integer("llama.feed_forward_length"),
            num_layers=fields.integer("llama.block_count"),
            num_heads=heads,
            num_kv_heads=fields.integer("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=fields.integer("llama.context_length", 2048),
            rope_theta=fields.number("llama.rope.freq_base", 10_000.0),
            rope_scaling=_rope_scaling(file, fields, head_dim),
            norm_eps=_shortest(fields.number("llama.attention.layer_norm_rms_epsilon")),
            tie_embeddings="output.weight" not in file.names(),
            dtype=dtype,
            param_dtype=dtype,
        )
    except CheckpointFormatError:
        raise
    except ValueError as error:
        raise CheckpointFormatError(f"{file.path}: {error}") from None


def _shortest(value: float) -> float:
    """The decimal number that was rounded to this float32: 1e-5, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GgufFile, fields: Fields, head_dim: int) -> RopeScaling | None:
    if ROPE_FACTORS in file.names():
        if file.shape(ROPE_FACTORS) != (head_dim // 2,):
            raise CheckpointFormatError(
                f"{file.where(ROPE_FACTORS)} must have shape {[head_dim // 2]}, got {list(file.shape(ROPE_FACTORS))}"
            )
        factors = file.read(ROPE_FACTORS, (slice(None),))
        return _as_llama3(factors, fields.number("llama.rope.freq_base", 10_000.0))
    kind = fields.text("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return LinearRope(fields.number("llama.rope.scaling.factor"))
    raise CheckpointFormatError(f"{file.path}: llama.rope.scaling.type must be none or linear, got {kind!r:.80}")


def _as_llama3(factors: np.ndarray, theta: float) -> RopeScaling:
    """Factors under the name that a config.json has for them, where they are those of Llama 3.1 and later."""
    if np.isfinite(factors).all() and factors.max() > 1:
        known = Llama3Rope(float(factors.max()), 1.0, 4.0, LLAMA3_CONTEXT)
        frequency = theta ** (-jnp.arange(len(factors), dtype=jnp.float32) / len(factors))
        if np.allclose(factors, np.asarray(frequency / known.scale(frequency)), rtol=1e-4):
            return known
    return FactorsRope(tuple(float(factor) for factor in factors))


def _specs(config: LlamaConfig) -> list[TensorSpec]:
    hidden, wide, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_heads, config.num_kv_heads
    table = (config.vocab_size, hidden)

    def spec(parameter: str, tensor: str, sizes: tuple[int, ...], axes: tuple[tuple[int, ...], ...]) -> TensorSpec:
        return TensorSpec(f"blocks.{parameter}", f"blk.{{layer}}.{tensor}.weight", sizes, axes, config.num_layers)

    specs = [
        TensorSpec("embedding", "token_embd.weight", table, ((0,), (1,))),
        TensorSpec("norm.weight", "output_norm.weight", (hidden,), ((0,),)),
        spec("attention_norm.weight", "attn_norm", (hidden,), ((0,),)),
        spec("mlp_norm.weight", "ffn_norm", (hidden,), ((0,),)),
        spec("attention.query", "attn_q", (hidden, heads, 2, head_dim // 2), TURNED),
        spec("attention.key", "attn_k", (hidden, kv_heads, 2, head_dim // 2), TURNED),
        spec("attention.value", "attn_v", (hidden, kv_heads, head_dim), TO_HEADS),
        spec("attention.out", "attn_output", (heads, head_dim, hidden), FROM_HEADS),
        spec("mlp.gate_projection", "ffn_gate", (hidden, wide), TRANSPOSED),
        spec("mlp.up_projection", "ffn_up", (hidden, wide), TRANSPOSED),
        spec("mlp.down_projection", "ffn_down", (wide, hidden), TRANSPOSED),
    ]
    if not config.tie_embeddings:
        specs.append(TensorSpec("unembedding", "output.weight", table[::-1], TRANSPOSED))
    return specs
