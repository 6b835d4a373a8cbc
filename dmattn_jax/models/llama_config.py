"""What a decoder of the Llama family is made of, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dmattn_jax.models.field_checks import at_least, check_decoder
from dmattn_jax.nn.rope import FactorsRope, RopeScaling, YarnRope


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a dense causal decoder: Llama 2 and 3, SmolLM2 (the defaults are its 135M), Qwen3.

    head_dim: stands alone: num_heads · head_dim need not be hidden_size.
    max_position_embeddings: tokens of context that the model was trained for; it is told, not enforced.
    qk_norm: RMSNorm of every head's query and key (Qwen3).
    attention_bias, mlp_bias: biases of the four attention projections, of the three of the MLP.
    rope_scaling: how the rotary frequencies are changed for longer contexts; None leaves them.
    dtype: compute dtype; parameters are param_dtype.
    remat: keep only the residual stream of each layer for the backward pass, and compute the rest again.
    unroll_layers: compile every layer by itself instead of one loop over all: faster steps, for nothing is copied into
      a loop's stacks, and a compilation several times as long.

    Raises: ValueError on a field that cannot work, naming it, its value and what would do.
    """

    vocab_size: int = 49_152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    max_position_embeddings: int = 8192
    qk_norm: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 100_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    init_std: float = 0.02
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    remat: bool = False
    unroll_layers: bool = False

    balance_loss_weight: ClassVar[float] = 0.0
    """There are no experts to balance."""

    def __post_init__(self) -> None:
        check_decoder(self)
        at_least("max_position_embeddings", self.max_position_embeddings, 1)
        scaling = self.rope_scaling
        if isinstance(scaling, FactorsRope) and len(scaling.factors) != self.head_dim // 2:
            raise ValueError(
                f"rope_scaling.factors must be head_dim / 2 = {self.head_dim // 2} numbers, got {len(scaling.factors)}"
            )
        if isinstance(scaling, YarnRope) and not self.rope_theta > 1:
            raise ValueError(f"rope_theta must be > 1 with YarnRope, got {self.rope_theta}")

    def num_parameters(self, embeddings: bool = True) -> int:
        """Parameters of the model; without `embeddings` the token embedding and unembedding are left out."""
        hidden, heads, kv_heads, head_dim = self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim
        layer = 2 * hidden * head_dim * (heads + kv_heads)  # query, out; key, value
        layer += 2 * hidden + 3 * hidden * self.intermediate_size
        if self.qk_norm:
            layer += 2 * head_dim
        if self.attention_bias:
            layer += head_dim * (heads + 2 * kv_heads) + hidden
        if self.mlp_bias:
            layer += 2 * self.intermediate_size + hidden
        tables = self.vocab_size * hidden * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + hidden + (tables if embeddings else 0)
