"""Attention layers that exist to be compared with dynamic-mask attention: nobody should train with them otherwise."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from dmattn_jax import nn
from dmattn_jax.attention import choose_intervals, dynamic_mask_attention
from dmattn_jax.dispatch import choose_implementation
from dmattn_jax.documents import Documents, document_bounds, document_positions
from dmattn_jax.models import DogeConfig, DogeForCausalLM
from dmattn_jax.models.decoder import CausalDecoder
from dmattn_jax.models.doge import DogeBlock
from dmattn_jax.nn.attend import attend
from dmattn_jax.partitioning import normal, parameter
from dmattn_jax.permutation import inverse
from dmattn_jax.selection import choose_keys, last_keys
from dmattn_jax.validation import check_window
from pallas_kernels import Intervals, interval_attention


def earlier_first(gate: Float[Array, "B S K"]) -> Float[Array, "B S K"]:
    """Other gates, all different, in the same order; of equal ones the earlier is the larger. −inf stays.

    Exact for up to 2^24 positions.
    """
    rows = jnp.moveaxis(jax.lax.stop_gradient(gate), 1, 2)
    place = inverse(jnp.argsort(-rows, axis=-1, stable=True).astype(jnp.int32))
    ranked = jnp.where(jnp.isneginf(rows), -jnp.inf, -place.astype(jnp.float32))
    return jnp.moveaxis(ranked, 2, 1)


def earlier_first_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    gate: Float[Array, "B T K"],
    *,
    window: tuple[int, ...],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H D"]:
    """`dynamic_mask_attention` in which the earlier of equal keys wins, as with a top-k that takes the lowest index."""
    batch, length, kv_heads = gate.shape
    windows = check_window(window, kv_heads)
    documents = document_bounds(segment_ids, batch, length)
    backend = choose_implementation(None, query.dtype, query.shape[3])
    blocks = backend.block_sizes(length, length, max(windows), query.shape[3], query.dtype)
    ranked = jnp.moveaxis(earlier_first(gate), 2, 1)
    packed = None if segment_ids is None else documents
    intervals = choose_intervals(ranked, windows, packed, length, backend, blocks)
    return _through(intervals, documents, query, key, value, gate, backend, blocks)


def _through(intervals: Intervals, documents: Documents, query, key, value, gate, backend, blocks) -> jax.Array:
    token = documents.token[:, :, None, None]
    query = jnp.where(token, query, 0)
    out = interval_attention(query, key, value, gate, intervals, backend, query.shape[3] ** -0.5, blocks)
    return jnp.where(token, out, 0)


class EarlierFirstAttention(nn.DynamicMaskAttention):
    """Of keys with equal gates the earlier is kept: before training the first `window` keys of the text, for ever."""

    def gates(self, x: Float[Array, "B T M"]) -> Float[Array, "B T K"]:
        """Numbers that `select_keys` turns into this layer's mask; not δ, whose ties it would break otherwise."""
        return earlier_first(super().gates(x))

    def _attend(self, query, key, value, segment_ids):
        gate = self.gate(value)
        return attend(earlier_first_attention, query, key, value, gate, segment_ids=segment_ids, windows=self.windows)

    def decode(self, x, cache, segment_ids=None):
        raise NotImplementedError("earlier_ties is trained and measured on whole texts, not decoded")


def half_recent_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    gate: Float[Array, "B T K"],
    *,
    window: tuple[int, ...],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H D"]:
    """`dynamic_mask_attention` over the last window // 2 keys and as many of largest gate as are left of the window."""
    batch, length, kv_heads = gate.shape
    documents = document_bounds(segment_ids, batch, length)
    backend = choose_implementation(None, query.dtype, query.shape[3])
    # As in dense attention: the lists of epochs are of keys that end in the order of their gates.
    blocks = backend.block_sizes(length, length, length, query.shape[3], query.dtype)
    ranked = jnp.moveaxis(jax.lax.stop_gradient(gate), 2, 1)
    expiry = half_recent(ranked, check_window(window, kv_heads), documents)
    start = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), expiry.shape)
    intervals = Intervals(start, expiry, starts_at_key=True)
    return _through(intervals, documents, query, key, value, gate, backend, blocks)


def half_recent(gate: Float[Array, "B K S"], windows: tuple[int, ...], documents: Documents) -> Int32[Array, "B K S"]:
    """Lifetimes: a key ends when it is among neither the last window // 2 nor the largest, as many as are left."""
    recent = tuple(window // 2 for window in windows)
    chosen = choose_keys(gate, tuple(w - r for w, r in zip(windows, recent, strict=True)), documents, causal=True)
    # A window of 1 has no room for recent keys.
    last = last_keys(tuple(max(r, 1) for r in recent), documents).expiry
    last = jnp.where(jnp.asarray(recent)[:, None] > 0, last, 0)
    return jnp.where(jnp.isneginf(gate), chosen.expiry, jnp.maximum(chosen.expiry, last))


class HalfRecentAttention(nn.DynamicMaskAttention):
    """Half of every window is the last keys, whatever their gates."""

    def lifetimes(self, gates, segment_ids=None):
        documents = document_bounds(segment_ids, *gates.shape[:2])
        return jnp.moveaxis(half_recent(jnp.moveaxis(gates, 2, 1), self.windows, documents), 1, 2)

    def _attend(self, query, key, value, segment_ids):
        gate = self.gate(value)
        return attend(half_recent_attention, query, key, value, gate, segment_ids=segment_ids, windows=self.windows)

    def decode(self, x, cache, segment_ids=None):
        raise NotImplementedError("half_recent is trained and measured on whole texts, not decoded")


class HiddenGateAttention(nn.DynamicMaskAttention):
    """δ from the layer's input instead of its values: exp(A · softplus(x · Δ)), Δ [K, M]."""

    def __init__(self, hidden_size: int, *args: Any, rngs: nnx.Rngs, **options: Any):
        super().__init__(hidden_size, *args, rngs=rngs, **options)
        init_std, dtype = options.get("init_std", 0.02), options.get("param_dtype", jnp.float32)
        self.gate.delta = parameter(normal(rngs, (self.num_kv_heads, hidden_size), init_std, dtype), ("kv_heads", None))

    def __call__(
        self, x: Float[Array, "B T M"], segment_ids: Int[Array, "B T"] | None = None, norm: nn.RMSNorm | None = None
    ) -> Float[Array, "B T M"]:
        x = x if norm is None else norm(x)
        query, key, value = self._project(x, document_positions(segment_ids, x.shape[1]))
        return self._merge(
            attend(
                dynamic_mask_attention, query, key, value, self.gates(x), segment_ids=segment_ids, windows=self.windows
            )
        )

    def gates(self, x: Float[Array, "B T M"]) -> Float[Array, "B T K"]:
        rows = x.astype(self.dtype)
        return self.gate(rows.reshape(*x.shape[:2], self.num_kv_heads, -1))

    def decode(self, x, cache, segment_ids=None):
        raise NotImplementedError("hidden_gate is trained and measured on whole texts, not decoded")


class DetachedGateAttention(nn.DynamicMaskAttention):
    """Values learn by what is read of them alone; the gate learns from them, and they nothing from it."""

    def _attend(self, query, key, value, segment_ids):
        gate = self.gate(jax.lax.stop_gradient(value))
        return attend(dynamic_mask_attention, query, key, value, gate, segment_ids=segment_ids, windows=self.windows)


LAYERS: Mapping[str, type[nn.DynamicMaskAttention]] = {
    "earlier_ties": EarlierFirstAttention,
    "hidden_gate": HiddenGateAttention,
    "detached_gate": DetachedGateAttention,
    "half_recent": HalfRecentAttention,
}
"""Ablations that are layers of their own, by name."""


class AblatedBlock(DogeBlock):
    """A Doge block with another attention in its place."""

    def __init__(self, config: DogeConfig, attention: type[nn.DynamicMaskAttention], *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.attention = attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            window=config.window,
            gate_activation=config.gate_activation,
            gate_step=config.gate_step,
            rope_theta=config.rope_theta,
            norm_eps=config.norm_eps,
            init_std=config.init_std,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )


class AblatedDoge(DogeForCausalLM):
    """A Doge decoder with `attention` in the place of dynamic-mask attention."""

    def __init__(self, config: DogeConfig, attention: type[nn.DynamicMaskAttention], *, rngs: nnx.Rngs):
        CausalDecoder.__init__(self, config, functools.partial(AblatedBlock, config, attention), rngs=rngs)
