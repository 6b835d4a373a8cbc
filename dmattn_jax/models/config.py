"""What a Doge decoder is made of, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dmattn_jax.models.field_checks import at_least, check_decoder, one_of

AttentionKind = Literal["dma", "mha", "swa"]
GateActivation = Literal["exp", "linear"]


@dataclass(frozen=True)
class DogeConfig:
    """Shape and kind of a Doge decoder (2508.02124v6 §4; defaults are the method's own).

    attention: `dma` (dynamic mask), `swa` (sliding window of the same budget), `mha` (dense causal).
    window: keys a query sees (`dma`, `swa`); an int, or one per kv head.
    gate_step: margin in δ by which an older key must beat a later one (`dma`); 0 is the paper.
    num_experts: 0 for a dense SwiGLU MLP; otherwise a square number of single-neuron experts (CDMoE) is added.
    dtype: compute dtype; parameters stay in param_dtype.
    remat: keep only the residual stream of each layer for the backward pass, and compute the rest again.

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

    def __post_init__(self) -> None:
        if isinstance(self.window, list):
            object.__setattr__(self, "window", tuple(self.window))
        check_decoder(self)
        for name, kinds in (("attention", AttentionKind), ("gate_activation", GateActivation)):
            one_of(name, getattr(self, name), get_args(kinds))
        windows = (self.window,) if isinstance(self.window, int) else self.window
        if not isinstance(self.window, int) and len(windows) != self.num_kv_heads:
            raise ValueError(
                f"window must be an int or one per kv head: expected {self.num_kv_heads} values, got {self.window}"
            )
        for window in windows:
            at_least("window", window, 1)
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

    def num_parameters(self, embeddings: bool = True) -> int:
        """Parameters of the model; without `embeddings` the token embedding and unembedding are left out."""
        hidden, kv_heads, head_dim = self.hidden_size, self.num_kv_heads, self.head_dim
        layer = 2 * hidden * head_dim * (self.num_heads + kv_heads)  # query, out; key, value
        layer += 2 * head_dim + 4 * hidden  # query and key norms; two norms and two residual scales
        layer += 3 * hidden * self.intermediate_size
        if self.attention == "dma":
            layer += kv_heads + kv_heads * kv_heads * head_dim  # A and Δ
        if self.num_experts:
            layer += 2 * hidden * math.isqrt(self.num_experts) + 2 * hidden * self.num_experts
        tables = self.vocab_size * hidden * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + hidden + (tables if embeddings else 0)
