"""Dynamic-mask attention in JAX: content-chosen sparse attention at about the cost of a sliding window."""

from dmattn_jax.attention import causal_attention, dynamic_mask_attention, sliding_window_attention
from dmattn_jax.dispatch import explain
from dmattn_jax.oracle import attention_oracle
from dmattn_jax.selection import select_keys

__all__ = [
    "attention_oracle",
    "causal_attention",
    "dynamic_mask_attention",
    "explain",
    "select_keys",
    "sliding_window_attention",
]
