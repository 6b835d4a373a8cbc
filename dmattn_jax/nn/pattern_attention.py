"""Attention over fixed diagonals and verticals, in place of a dense layer's."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from dmattn_jax.cache import token_positions
from dmattn_jax.documents import document_bounds
from dmattn_jax.nn.attention import MultiHeadAttention
from dmattn_jax.partitioning import axis_size, map_over_mesh
from dmattn_jax.pattern_cache import PatternCache
from pallas_kernels.patterns import Patterns, Places, pattern_attention


class Mask(nnx.Variable):
    """Fixed arrays of a mask: neither trained nor saved as parameters."""


class PatternAttention(MultiHeadAttention):
    """softmax(qkᵀ/√d)v over the keys that `Patterns` show (arXiv 2506.11104); the projections are a dense layer's.

    patterns: of this layer, or of all layers of a stack, with one more axis in front.
    """

    def __init__(self, dense: MultiHeadAttention, patterns: Patterns):
        for name, value in vars(dense).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.inside = Mask(patterns.inside)
        self.diagonals = Mask(patterns.diagonals)
        self.verticals = Mask(patterns.verticals)
        self.columns = Mask(patterns.columns)
        self.reach = patterns.reach

    @property
    def patterns(self) -> Patterns:
        return Patterns(self.inside[...], self.diagonals[...], self.verticals[...], self.columns[...], reach=self.reach)

    def init_cache(self, batch: int, max_length: int) -> Any:
        # Of a stack of layers the last axis alone counts.
        slots = self.columns.shape[-1]
        return PatternCache.create(
            batch, self.reach, slots, self.num_kv_heads, self.head_dim, max_length=max_length, dtype=self.dtype
        )

    def _attend(self, query, key, value, segment_ids):
        """On a mesh each device attends with its own heads, or with all of them where the mesh does not divide them."""

        def local(query, key, value, inside, diagonals, verticals, columns, ids=None):
            patterns = Patterns(inside, diagonals, verticals, columns, reach=self.reach)
            batch, length = key.shape[:2]
            documents = document_bounds(ids, batch, length)
            index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
            places = Places(index, jnp.where(documents.token, documents.start, -1))
            return pattern_attention(query, key, value, patterns, places, places, scale=self.head_dim**-0.5)

        divides = key.shape[2] % axis_size("kv_heads") == 0
        heads, kv_heads = ("heads", "kv_heads") if divides else (None, None)
        own, keys = ("batch", None, heads, None), ("batch", None, kv_heads, None)
        masks = self.patterns
        arrays = [query, key, value, masks.inside, masks.diagonals, masks.verticals, masks.columns]
        names = [own, keys, keys, (heads, None, None), (heads, None), (heads, None), (kv_heads, None)]
        if segment_ids is not None:
            arrays, names = [*arrays, segment_ids], [*names, ("batch", None)]
        return map_over_mesh(local, arrays, names, own)

    def _attend_cached(self, query, key, value, token, cache):
        patterns = self.patterns
        position = token_positions(cache.length, token)
        start = jnp.where(token, 0, -1)
        keys, values, places = cache.joined(key, value, Places(position, start))
        after = cache.append(key, value, token, patterns.columns)
        return pattern_attention(
            query,
            keys.astype(query.dtype),
            values.astype(query.dtype),
            patterns,
            Places(position, start),
            places,
            after.kept(patterns.columns, query.dtype),
            scale=self.head_dim**-0.5,
        ), after
