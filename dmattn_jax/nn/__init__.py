"""Flax NNX layers: dynamic-mask attention, the attentions it is compared with, norms, MLPs."""

from dmattn_jax.nn.attention import DynamicMaskAttention, MultiHeadAttention, SlidingWindowAttention
from dmattn_jax.nn.gate import DynamicMaskGate
from dmattn_jax.nn.latent import MultiHeadLatentAttention
from dmattn_jax.nn.mlp import SwiGLU
from dmattn_jax.nn.moe import CDMoE
from dmattn_jax.nn.native_sparse import NativeSparseAttention
from dmattn_jax.nn.norms import RMSNorm
from dmattn_jax.nn.rope import FactorsRope, LinearRope, Llama3Rope, RopeScaling, YarnRope, apply_rope

__all__ = [
    "CDMoE",
    "DynamicMaskAttention",
    "DynamicMaskGate",
    "FactorsRope",
    "LinearRope",
    "Llama3Rope",
    "MultiHeadAttention",
    "MultiHeadLatentAttention",
    "NativeSparseAttention",
    "RMSNorm",
    "RopeScaling",
    "SlidingWindowAttention",
    "SwiGLU",
    "YarnRope",
    "apply_rope",
]
