"""What a Doge decoder is made of, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AttentionKind = Literal["dma", "mha", "swa"]


@dataclass(frozen=True)
class DogeConfig:
    """Shape and kind of a Doge decoder (2508.02124v6 §4; defaults are the method's own).

    attention: `dma` (dynamic mask), `swa` (sliding window of the same budget), `mha` (dense causal).
    window: keys a query sees (`dma`, `swa`); an int, or one per kv head.
    num_experts: 0 for a dense SwiGLU MLP; otherwise a square number of single-neuron experts (CDMoE) is added.
    dtype: compute dtype; parameters stay in param_dtype.
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
    gate_activation: Literal["exp", "linear"] = "exp"
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    num_experts: int = 0
    num_experts_per_token: int = 64
    balance_loss_weight: float = 1e-2
    init_std: float = 0.02
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
