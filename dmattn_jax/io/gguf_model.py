"""A Llama or Qwen3 model in a GGUF file: its configuration and where its parameters are."""

from __future__ import annotations

import dataclasses
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
from dmattn_jax.nn.rope import FactorsRope, LinearRope, Llama3Rope, RopeScaling, YarnRope

LLAMA = "llama"
QWEN3 = "qwen3"
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_CONTEXT = 8192

TURNED = ((1, 3, 2), (0,))
"""In its files of Llama, llama.cpp turns neighbouring dimensions of a head together, transformers those half a head
apart: a head's rows are stored as (pair, half) and wanted as (half, pair). Qwen3's are stored as wanted."""


def open_gguf_model(path: Path, dtype: str) -> tuple[LlamaConfig, list[TensorSpec], GgufFile, set[str]]:
    """Configuration, tensors, their file, and the tensors that hold no parameter.

    Raises: CheckpointFormatError naming key or tensor.
    """
    file = GgufFile(path)
    config = _read_config(file, dtype)
    return config, _specs(config), file, {ROPE_FACTORS}


def _read_config(file: GgufFile, dtype: Any) -> LlamaConfig:
    everything = Fields(file.metadata, str(file.path))
    architecture = everything.text("general.architecture")
    if architecture not in (LLAMA, QWEN3):
        raise CheckpointFormatError(
            f"{file.path}: general.architecture must be {LLAMA} or {QWEN3}, got {architecture!r:.80}"
        )
    fields = _Keys(everything, architecture)
    if fields.integer("expert_count", 0):
        raise CheckpointFormatError(f"{file.path}: {architecture}.expert_count must be 0: no mixtures of experts")
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", hidden // max(heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(name, head_dim) != head_dim:
            raise CheckpointFormatError(
                f"{file.path}: {architecture}.{name} must be the head size {head_dim}, got {fields.integer(name)}"
            )
    if "token_embd.weight" not in file.names():
        raise CheckpointFormatError(f"{file.path}: tensor token_embd.weight is missing")
    try:
        return LlamaConfig(
            vocab_size=file.shape("token_embd.weight")[0],
            hidden_size=hidden,
            intermediate_size=fields.integer("feed_forward_length"),
            num_layers=fields.integer("block_count"),
            num_heads=heads,
            num_kv_heads=fields.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=fields.integer("context_length", 2048),
            qk_norm=architecture == QWEN3,
            rope_theta=fields.number("rope.freq_base", 10_000.0),
            rope_scaling=_rope_scaling(file, fields, head_dim),
            norm_eps=_shortest(fields.number("attention.layer_norm_rms_epsilon")),
            tie_embeddings="output.weight" not in file.names(),
            dtype=dtype,
            param_dtype=dtype,
        )
    except CheckpointFormatError:
        raise
    except ValueError as error:
        raise CheckpointFormatError(f"{file.path}: {error}") from None


class _Keys:
    """The metadata below an architecture's name."""

    def __init__(self, fields: Fields, architecture: str) -> None:
        self._fields, self._prefix = fields, architecture

    def integer(self, name: str, *default: Any) -> int:
        return self._fields.integer(f"{self._prefix}.{name}", *default)

    def number(self, name: str, *default: Any) -> float:
        return self._fields.number(f"{self._prefix}.{name}", *default)

    def text(self, name: str, *default: Any) -> str:
        return self._fields.text(f"{self._prefix}.{name}", *default)


def _shortest(value: float) -> float:
    """The decimal number that was rounded to this float32: 1e-5, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GgufFile, fields: _Keys, head_dim: int) -> RopeScaling | None:
    theta = fields.number("rope.freq_base", 10_000.0)
    if ROPE_FACTORS in file.names():
        if file.shape(ROPE_FACTORS) != (head_dim // 2,):
            raise CheckpointFormatError(
                f"{file.where(ROPE_FACTORS)} must have shape {[head_dim // 2]}, got {list(file.shape(ROPE_FACTORS))}"
            )
        return _as_llama3(file.read(ROPE_FACTORS, (slice(None),)), theta)
    kind = fields.text("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return LinearRope(fields.number("rope.scaling.factor"))
    if kind == "yarn":
        yarn = YarnRope(
            fields.number("rope.scaling.factor"),
            fields.integer("rope.scaling.original_context_length"),
            fields.number("rope.scaling.yarn_beta_fast", 32.0),
            fields.number("rope.scaling.yarn_beta_slow", 1.0),
        )
        # In a file it multiplies the paper's factor; in a config.json it stands for it.
        more = fields.number("rope.scaling.attn_factor", 1.0)
        return yarn if more == 1 else dataclasses.replace(yarn, attention_factor=more * yarn.magnitude)
    raise CheckpointFormatError(f"{file.path}: rope.scaling.type must be none, linear or yarn, got {kind!r:.80}")


def _as_llama3(factors: np.ndarray, theta: float) -> RopeScaling:
    """Factors under the name that a config.json has for them, where they are those of Llama 3.1 and later."""
    if np.isfinite(factors).all() and factors.max() > 1:
        known = Llama3Rope(float(factors.max()), 1.0, 4.0, LLAMA3_CONTEXT)
        frequency = theta ** (-jnp.arange(len(factors), dtype=jnp.float32) / len(factors))
        if np.allclose(factors, np.asarray(frequency / known.scale(frequency, theta)), rtol=1e-4):
            return known
    return FactorsRope(tuple(float(factor) for factor in factors))


def _specs(config: LlamaConfig) -> list[TensorSpec]:
    hidden, wide, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_heads, config.num_kv_heads
    table = (config.vocab_size, hidden)
    qwen3 = config.qk_norm

    def turned(heads: int) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        return ((hidden, heads, head_dim), TO_HEADS) if qwen3 else ((hidden, heads, 2, head_dim // 2), TURNED)

    def spec(parameter: str, tensor: str, sizes: tuple[int, ...], axes: tuple[tuple[int, ...], ...]) -> TensorSpec:
        return TensorSpec(f"blocks.{parameter}", f"blk.{{layer}}.{tensor}.weight", sizes, axes, config.num_layers)

    specs = [
        TensorSpec("embedding", "token_embd.weight", table, ((0,), (1,))),
        TensorSpec("norm.weight", "output_norm.weight", (hidden,), ((0,),)),
        spec("attention_norm.weight", "attn_norm", (hidden,), ((0,),)),
        spec("mlp_norm.weight", "ffn_norm", (hidden,), ((0,),)),
        spec("attention.query", "attn_q", *turned(heads)),
        spec("attention.key", "attn_k", *turned(kv_heads)),
        spec("attention.value", "attn_v", (hidden, kv_heads, head_dim), TO_HEADS),
        spec("attention.out", "attn_output", (heads, head_dim, hidden), FROM_HEADS),
        spec("mlp.gate_projection", "ffn_gate", (hidden, wide), TRANSPOSED),
        spec("mlp.up_projection", "ffn_up", (hidden, wide), TRANSPOSED),
        spec("mlp.down_projection", "ffn_down", (wide, hidden), TRANSPOSED),
    ]
    if qwen3:
        specs += [
            spec(f"attention.{one}_norm.weight", f"attn_{one[0]}_norm", (head_dim,), ((0,),))
            for one in ("query", "key")
        ]
    if not config.tie_embeddings:
        specs.append(TensorSpec("unembedding", "output.weight", table[::-1], TRANSPOSED))
    return specs
