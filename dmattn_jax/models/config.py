"""What a Doge decoder is made of, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dmattn_jax.models.field_checks import at_least, check_decoder, one_of
from dmattn_jax.nn.gate import GateActivation
from dmattn_jax.nn.native_sparse import check_blocks

AttentionKind = Literal["dma", "mha", "swa", "mla", "nsa"]


@dataclass(frozen=True)
class DogeConfig:
    """Shape and kind of a Doge decoder (2508.02124v6 §4; defaults are the method's own).

    attention: `dma` (dynamic mask), `swa` (sliding window of the same budget), `mha` (dense causal), `mla` (dense,
      keys and values from a latent row of hidden_size / 4), `nsa` (native sparse: compressed, selected, recent keys).
    window: keys a query sees (`dma`, `swa`), the recent ones of `nsa`; an int, or one per kv head.
    compression_block, selection_block, selected_blocks: of `nsa`.
    gate_step: margin in δ by which an older key must beat a later one (`dma`); 0 is the paper.
    num_experts: 0 for a dense SwiGLU MLP; otherwise a square number of single-neuron experts (CDMoE) is added.
    dtype: compute dtype; parameters stay in param_dtype.
    remat: keep only the residual stream of each layer for the backward pass, and compute the rest again.
    unroll_layers: compile every layer by itself instead of one loop over all: faster steps, for nothing is copied into
      a loop's stacks, and a compilation several times as long.

    Raises: ValueError on a field that cannot work, naming it, its value and what would do.
    """

    vocab_size: int = 256
    hidden_size: int = 256
    intermediate_size: int = 512
    num_layers: int = 8
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 128
    attention: AttentionKind = "dma"
    window: int | tuple[int, ...] = 1024
    gate_activation: GateActivation = "exp"
    gate_step: float = 0.0
    compression_block: int = 32
    selection_block: int = 64
    selected_blocks: int = 16
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    num_experts: int = 0
    num_experts_per_token: int = 64
    balance_loss_weight: float = 1e-2
    init_std: float = 0.02
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    remat: bool = False
    unroll_layers: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.window, list):
            object.__setattr__(self, "window", tuple(self.window))
        check_decoder(self)
        for name, kinds in (("attention", AttentionKind), ("gate_activation", GateActivation)):
            one_of(name, getattr(self, name), get_args(kinds))
        windows = self.window if isinstance(self.window, tuple) else (self.window,)
        if isinstance(self.window, tuple) and len(windows) != self.num_kv_heads:
            raise ValueError(
                f"window must be an int or one per kv head: expected {self.num_kv_heads} values, got {self.window}"
            )
        for window in windows:
            at_least("window", window, 1)
        check_blocks(self.compression_block, self.selection_block, self.selected_blocks)
        if self.attention == "mla" and self.head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4 for attention='mla', got {self.head_dim}")
        self._check_experts()
        if not 0 <= self.gate_step < math.inf:
            raise ValueError(f"gate_step must be >= 0 and finite, got {self.gate_step}")
        if not self.balance_loss_weight >= 0:
            raise ValueError(f"balance_loss_weight must be >= 0, got {self.balance_loss_weight}")

    def _check_experts(self) -> None:
        at_least("num_experts", self.num_experts, 0)
        if self.num_experts == 0:
            return
        side = math.isqrt(self.num_experts)
        if side * side != self.num_experts:
            raise ValueError(
                f"num_experts must be 0 or a square number, got {self.num_experts}: use {side**2} or {(side + 1) ** 2}"
            )
        if not 1 <= self.num_experts_per_token <= self.num_experts:
            raise ValueError(
                f"num_experts_per_token must be in 1 … num_experts={self.num_experts}, got {self.num_experts_per_token}"
            )

    @property
    def latent_dim(self) -> int:
        """Numbers of a token's latent row (`mla`), hidden units that compress a block (`nsa`): those of the paper."""
        return max(self.hidden_size // 4, 1)

    def num_parameters(self, embeddings: bool = True) -> int:
        """Parameters of the model; without `embeddings` the token embedding and unembedding are left out."""
        hidden = self.hidden_size
        layer = self._attention_parameters() + 4 * hidden  # two norms and two residual scales
        layer += 3 * hidden * self.intermediate_size
        if self.num_experts:
            layer += 2 * hidden * math.isqrt(self.num_experts) + 2 * hidden * self.num_experts
        tables = self.vocab_size * hidden * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + hidden + (tables if embeddings else 0)

    def _attention_parameters(self) -> int:
        hidden, heads, kv_heads, head_dim = self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim
        latent = self.latent_dim
        if self.attention == "mla":
            rope = head_dim // 2
            projections = hidden * heads * (2 * head_dim + rope)  # query with its rotated part, out
            projections += hidden * (latent + rope) + 2 * latent * heads * head_dim  # into the latent row, out of it
            return projections + latent + 2 * (head_dim + rope)  # norms of the latent row, queries and keys
        count = 2 * hidden * head_dim * (heads + kv_heads) + 2 * head_dim  # query, out; key, value; norms
        if self.attention == "dma":
            count += kv_heads + kv_heads * kv_heads * head_dim  # A and Δ
        if self.attention == "nsa":
            count += 2 * head_dim * (kv_heads + self.compression_block)  # memory rows, positions in a block
            count += self.compressor_parameters() + 3 * heads * (hidden + 1)  # branch gates
        return count

    def compressor_parameters(self) -> int:
        """Parameters of a layer's two block MLPs (`nsa`), which run once a block and kv head, not once a token."""
        return 2 * (self.compression_block + 1) * self.head_dim * self.latent_dim
