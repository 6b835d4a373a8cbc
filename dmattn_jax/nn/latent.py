"""Multi-head latent attention: keys and values of all heads from one small latent row a token."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dmattn_jax.attention import causal_attention
from dmattn_jax.cache import DenseCache, token_positions
from dmattn_jax.documents import document_positions
from dmattn_jax.nn.attend import attend, attend_dense_cache
from dmattn_jax.nn.linear import linear
from dmattn_jax.nn.norms import RMSNorm
from dmattn_jax.nn.rope import apply_rope
from dmattn_jax.partitioning import normal, parameter


class MultiHeadLatentAttention(nnx.Module):
    """Dense causal attention over heads that are expanded from c = RMSNorm(x W_c), c of size C (arXiv 2405.04434).

    Head h has k = [c W_k^h (D), x W_r (D/2, one for all heads)], v = c W_v^h (D) and q = x W_q^h (D + D/2); the last
    D/2 of q and k carry the rotary position, the scale is (D + D/2)^−½. With qk_norm, q and k of each head are
    RMS-normed over all D + D/2 numbers before the rotation, as the heads of the other variants are.

    The cache holds c and x W_r: C + D/2 numbers a token, whatever the number of heads; decoding expands it.
    Values are padded to the keys' size, so this runs through `causal_attention`: on Hopper, cuDNN takes it up to
    D + D/2 = 256 (published: 192) and the Hopper kernels its packed rows; before Hopper cuDNN takes it up to 128, and
    the rest is portable XLA. No path holds T×T logits.
    """

    matrices: ClassVar[tuple[str, ...]] = ("query", "compress", "rope_key", "key", "value", "out")

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        latent_dim: int,
        rope_theta: float | None = 10_000.0,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """head_dim: D, a multiple of 4; latent_dim: C; rope_theta: None leaves out the rotation, not its dimensions."""
        for name, size in (("hidden_size", hidden_size), ("num_heads", num_heads), ("latent_dim", latent_dim)):
            if size < 1:
                raise ValueError(f"{name} must be >= 1, got {size}")
        if head_dim < 4 or head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4, half of which is rotated in pairs, got {head_dim}")
        self.rope_dim = head_dim // 2

        def matrix(*sizes: tuple[int, str | None]) -> nnx.Param:
            shape, names = zip(*sizes, strict=True)
            return parameter(normal(rngs, shape, init_std, param_dtype), names)

        embed, heads, latent = (hidden_size, "embed"), (num_heads, "heads"), (latent_dim, None)
        self.query = matrix(embed, heads, (head_dim + self.rope_dim, "head_dim"))
        self.compress = matrix(embed, latent)
        self.rope_key = matrix(embed, (self.rope_dim, "head_dim"))
        self.key = matrix(latent, heads, (head_dim, "head_dim"))
        self.value = matrix(latent, heads, (head_dim, "head_dim"))
        self.out = matrix(heads, (head_dim, "head_dim"), embed)
        self.latent_norm = RMSNorm(latent_dim, eps=norm_eps, axis=None, param_dtype=param_dtype)
        if qk_norm:
            size = head_dim + self.rope_dim
            self.query_norm = RMSNorm(size, eps=norm_eps, axis="head_dim", param_dtype=param_dtype)
            self.key_norm = RMSNorm(size, eps=norm_eps, axis="head_dim", param_dtype=param_dtype)
        self.qk_norm = qk_norm
        self.rope_theta = rope_theta
        self.dtype = jnp.dtype(dtype)
        self.latent_dim = latent_dim
        self.head_dim = head_dim

    def __call__(
        self, x: Float[Array, "B T M"], segment_ids: Int[Array, "B T"] | None = None, norm: RMSNorm | None = None
    ) -> Float[Array, "B T M"]:
        """Attention within each document of segment_ids (0 = padding, whose output is 0); computes in `dtype`.

        norm: of x, applied first.
        """
        x = (x if norm is None else norm(x)).astype(self.dtype)
        position = document_positions(segment_ids, x.shape[1])
        key, value = self._expand(*self._compress(x), position)
        out = attend(causal_attention, self._queries(x, position), key, value, segment_ids=segment_ids)
        return self._merge(out)

    def init_cache(self, batch: int, max_length: int) -> DenseCache:
        """Its keys are the latent rows c, its values the rows x W_r before the rotation."""
        return DenseCache.create(batch, max_length, 1, self.latent_dim, value_dim=self.rope_dim, dtype=self.dtype)

    def decode(
        self, x: Float[Array, "B T M"], cache: DenseCache, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T M"], DenseCache]:
        """The next T tokens of every row's one document; segment_ids 0 marks padding, anywhere in the chunk."""
        x = x.astype(self.dtype)
        token = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids != 0
        position = token_positions(cache.length, token)
        latent, shared = self._compress(x)
        key, value = self._expand(latent, shared, position)
        slots = jnp.arange(cache.keys.shape[1], dtype=jnp.int32)[None]
        held = DenseCache(*self._expand(cache.keys[:, :, 0], cache.values[:, :, 0], slots), cache.length)
        out, _ = attend_dense_cache(self._queries(x, position), key, value, token, held)
        return self._merge(out), cache.append(latent[:, :, None], shared[:, :, None], token)

    def _compress(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """c [B, T, C] and the shared part of the keys [B, T, D/2], which is what a cache holds."""
        latent = self.latent_norm(linear(x, self.compress[...].astype(self.dtype)))
        return latent, linear(x, self.rope_key[...].astype(self.dtype))

    def _expand(self, latent: jax.Array, shared: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of all heads, the values padded to the keys' size."""
        own = linear(latent, self.key[...].astype(self.dtype))
        shared = jnp.broadcast_to(shared[:, :, None], (*own.shape[:3], self.rope_dim))
        key = jnp.concatenate([own, shared], axis=-1)
        value = linear(latent, self.value[...].astype(self.dtype))
        return self._rotate(self.key_norm(key) if self.qk_norm else key, position), jnp.pad(
            value, ((0, 0), (0, 0), (0, 0), (0, self.rope_dim))
        )

    def _queries(self, x: jax.Array, position: jax.Array) -> jax.Array:
        query = linear(x, self.query[...].astype(self.dtype))
        return self._rotate(self.query_norm(query) if self.qk_norm else query, position)

    def _rotate(self, heads: jax.Array, position: jax.Array) -> jax.Array:
        if self.rope_theta is None:
            return heads
        still, turning = heads[..., : self.head_dim], heads[..., self.head_dim :]
        return jnp.concatenate([still, apply_rope(turning, position, theta=self.rope_theta)], axis=-1)

    def _merge(self, heads: jax.Array) -> jax.Array:
        return linear(heads[..., : self.head_dim], self.out[...].astype(self.dtype), axes=2)
