"""The attention layers. All share projections, head norms, rotary positions, and two calls:

    layer(x [B, T, M], segment_ids=None) -> [B, T, M]                          whole sequences
    layer.decode(x [B, T, M], cache, segment_ids=None) -> ([B, T, M], cache)   the next T tokens of each row

`layer.init_cache(batch, max_length)` makes the cache. Both calls see the same keys: decoding a document in any
chunks gives what the whole sequence gives. Only padding amid a document is another matter for
`SlidingWindowAttention`: in a whole sequence it takes places in the window, in a chunk none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from dmattn_jax.attention import causal_attention, dynamic_mask_attention, sliding_window_attention
from dmattn_jax.cache import DenseCache, WindowCache, token_positions
from dmattn_jax.documents import document_bounds, document_positions
from dmattn_jax.nn.attend import attend, attend_dense_cache, attend_window_cache
from dmattn_jax.nn.exact import exact_projection
from dmattn_jax.nn.gate import DynamicMaskGate, GateActivation
from dmattn_jax.nn.linear import linear
from dmattn_jax.nn.norms import Projection, RMSNorm, Rotation, normed_together
from dmattn_jax.nn.rope import RopeScaling, rotation, turn
from dmattn_jax.partitioning import normal, parameter
from dmattn_jax.selection import select_keys
from dmattn_jax.validation import check_window


class _GroupedQueryAttention(nnx.Module):
    """What the variants share: x → q, k, v (q and k RMS-normed per head, then rotated) and heads → output.

    qk_norm: whether q and k are normed. bias: whether the four projections have one (starting at 0).
    rope_theta: None leaves queries and keys without rotary positions.
    rope_scaling: how the rotary frequencies are changed for longer contexts.
    """

    matrices: ClassVar[tuple[str, ...]] = ("query", "key", "value", "out")
    """Parameters that are read in `dtype` alone: see `dmattn_jax.nn.linear.in_compute_dtype`."""
    exact_values = False
    """Whether the bits of a value do not depend on the other rows: see `dmattn_jax.nn.exact`."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        rope_theta: float | None = 10_000.0,
        rope_scaling: RopeScaling | None = None,
        qk_norm: bool = True,
        bias: bool = False,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got num_heads={num_heads}, num_kv_heads={num_kv_heads}"
            )
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be even and >= 2 for rotary positions, got {head_dim}")

        def matrix(shape: Sequence[int], names: Sequence[str | None]) -> nnx.Param:
            return parameter(normal(rngs, shape, init_std, param_dtype), names)

        self.query = matrix((hidden_size, num_heads, head_dim), ("embed", "heads", "head_dim"))
        self.key = matrix((hidden_size, num_kv_heads, head_dim), ("embed", "kv_heads", "head_dim"))
        self.value = matrix((hidden_size, num_kv_heads, head_dim), ("embed", "kv_heads", "head_dim"))
        self.out = matrix((num_heads, head_dim, hidden_size), ("heads", "head_dim", "embed"))
        if qk_norm:
            self.query_norm = RMSNorm(head_dim, eps=norm_eps, axis="head_dim", param_dtype=param_dtype)
            self.key_norm = RMSNorm(head_dim, eps=norm_eps, axis="head_dim", param_dtype=param_dtype)
        if bias:
            kv_shape, kv_names = (num_kv_heads, head_dim), ("kv_heads", "head_dim")
            self.query_bias = parameter(jnp.zeros((num_heads, head_dim), param_dtype), ("heads", "head_dim"))
            self.key_bias = parameter(jnp.zeros(kv_shape, param_dtype), kv_names)
            self.value_bias = parameter(jnp.zeros(kv_shape, param_dtype), kv_names)
            self.out_bias = parameter(jnp.zeros(hidden_size, param_dtype), ("embed",))
        self.qk_norm = qk_norm
        self.bias = bias
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.dtype = jnp.dtype(dtype)
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim

    def __call__(
        self, x: Float[Array, "B T M"], segment_ids: Int[Array, "B T"] | None = None, norm: RMSNorm | None = None
    ) -> Float[Array, "B T M"]:
        """Attention within each document of segment_ids (0 = padding, whose output is 0); computes in `dtype`.

        norm: of x, applied first; its gradient then costs less than that of a norm outside.
        """
        position = document_positions(segment_ids, x.shape[1])
        query, key, value = self._project(x, position, norm)
        return self._merge(self._attend(query, key, value, segment_ids))

    def decode(
        self, x: Float[Array, "B T M"], cache: Any, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T M"], Any]:
        """The next T tokens of every row's one document; segment_ids 0 marks padding, anywhere in the chunk."""
        token = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids != 0
        query, key, value = self._project(x, token_positions(cache.length, token))
        out, cache = self._attend_cached(query, key, value, token, cache)
        return self._merge(out), cache

    def _project(
        self, x: jax.Array, position: jax.Array, norm: RMSNorm | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        if norm is not None and self.qk_norm and not self.bias:
            query, key, value = (matrix[...].astype(self.dtype) for matrix in (self.query, self.key, self.value))
            query, key, value = norm.project(
                x.astype(self.dtype),
                Projection(query, self.query_norm),
                Projection(key, self.key_norm),
                Projection(value, exact=self.exact_values),
                rotation=self._rotation(position),
            )
            return query, key, value
        query, key, value = self._heads(x if norm is None else norm(x))
        return self._rotate(query, position), self._rotate(key, position), value

    def _heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k (normed, not yet rotated) and v."""
        x = x.astype(self.dtype)
        query = linear(x, self.query[...].astype(self.dtype))
        key = linear(x, self.key[...].astype(self.dtype))
        value = self._values(x)
        if self.bias:
            query = query + self.query_bias[...].astype(self.dtype)
            key = key + self.key_bias[...].astype(self.dtype)
            value = value + self.value_bias[...].astype(self.dtype)
        if self.qk_norm:
            query, key = normed_together((query, self.query_norm), (key, self.key_norm))
        return query, key, value

    def _rotation(self, position: jax.Array) -> Rotation | None:
        if self.rope_theta is None:
            return None
        return rotation(position, self.head_dim, theta=self.rope_theta, scaling=self.rope_scaling)

    def _rotate(self, heads: jax.Array, position: jax.Array) -> jax.Array:
        found = self._rotation(position)
        return heads if found is None else turn(heads, *found)

    def _values(self, x: jax.Array) -> jax.Array:
        value = self.value[...].astype(self.dtype)
        return exact_projection(x, value) if self.exact_values else linear(x, value)

    def _merge(self, heads: jax.Array) -> jax.Array:
        out = linear(heads, self.out[...].astype(self.dtype), axes=2)
        return out + self.out_bias[...].astype(self.dtype) if self.bias else out

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        raise NotImplementedError

    def _attend_cached(
        self, query: jax.Array, key: jax.Array, value: jax.Array, token: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        raise NotImplementedError


class MultiHeadAttention(_GroupedQueryAttention):
    """softmax(qkᵀ/√d)v over all earlier keys of the document; grouped queries when num_kv_heads < num_heads."""

    def maps(self, x: Float[Array, "B T M"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B H T T"]:
        """The attention weights themselves, float32, for recording short texts: this array is T². Padding has 0."""
        batch, length = x.shape[:2]
        documents = document_bounds(segment_ids, batch, length)
        query, key, _ = self._project(x, document_positions(segment_ids, length))
        grouped = query.reshape(batch, length, self.num_kv_heads, -1, self.head_dim)
        logits = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
        position = jnp.arange(length)
        # Of one document, not later, and neither of the two padding.
        seen = (position[None, None] >= documents.start[:, :, None]) & (position[None] <= position[:, None])
        seen = (seen & documents.token[:, None] & documents.token[:, :, None])[:, None, None]
        logits = jnp.where(seen, logits * self.head_dim**-0.5, jnp.finfo(jnp.float32).min)
        weights = jnp.where(seen, jax.nn.softmax(logits, axis=-1), 0)
        return weights.reshape(batch, -1, length, length)

    def init_cache(self, batch: int, max_length: int) -> DenseCache:
        return DenseCache.create(batch, max_length, self.num_kv_heads, self.head_dim, dtype=self.dtype)

    def _attend(self, query, key, value, segment_ids):
        return attend(causal_attention, query, key, value, segment_ids=segment_ids)

    def _attend_cached(self, query, key, value, token, cache):
        return attend_dense_cache(query, key, value, token, cache)


class SlidingWindowAttention(_GroupedQueryAttention):
    """Attention to the last `window` keys of the document, self included; window: an int or one per kv head."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        window: int | Sequence[int],
        rope_theta: float | None = 10_000.0,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            rope_theta=rope_theta,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            init_std=init_std,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.windows = check_window(window, num_kv_heads)

    def init_cache(self, batch: int, max_length: int) -> WindowCache:
        return WindowCache.create(
            batch, self.windows, self.num_kv_heads, self.head_dim, max_length=max_length, dtype=self.dtype
        )

    def _attend(self, query, key, value, segment_ids):
        return attend(sliding_window_attention, query, key, value, segment_ids=segment_ids, windows=self.windows)

    def _attend_cached(self, query, key, value, token, cache):
        # Equal gates: the latest win, and the cache is a ring.
        gate = jnp.zeros(key.shape[:3], jnp.float32)
        return attend_window_cache(query, key, value, gate, token, cache)


class DynamicMaskAttention(SlidingWindowAttention):
    """softmax(qkᵀ/√d + δ)v over the `window` keys of largest δ so far (arXiv 2508.02124v6).

    δ comes from the values by `DynamicMaskGate`, one per key and kv head; at initialisation all are equal, and the
    layer is exactly `SlidingWindowAttention`. The choice carries no gradient; A, Δ and the values learn through
    the bias δ on the keys that are seen.
    """

    # Equal tokens must have equal gates in prefill and in decoding, or ties are broken by rounding.
    exact_values = True

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        window: int | Sequence[int],
        gate_activation: GateActivation = "exp",
        gate_step: float = 0.0,
        rope_theta: float | None = 10_000.0,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            window=window,
            rope_theta=rope_theta,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            init_std=init_std,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.gate = DynamicMaskGate(
            num_kv_heads,
            head_dim,
            activation=gate_activation,
            step=gate_step,
            init_std=init_std,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def gates(self, x: Float[Array, "B T M"]) -> Float[Array, "B T K"]:
        """δ of every position, as the layer would use it: float32."""
        return self.gate(self._values(x.astype(self.dtype)))

    def lifetimes(
        self, gates: Float[Array, "B T K"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Int32[Array, "B T K"]:
        """The mask that `gates` make: of every key the first position that no longer sees it, as `select_keys` says."""
        return select_keys(gates, self.windows, segment_ids)

    def _attend(self, query, key, value, segment_ids):
        gate = self.gate(value)
        return attend(dynamic_mask_attention, query, key, value, gate, segment_ids=segment_ids, windows=self.windows)

    def _attend_cached(self, query, key, value, token, cache):
        return attend_window_cache(query, key, value, self.gate(value), token, cache)
