"""Attention over fixed diagonals and verticals, in place of a dense layer's."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from dmattn_jax.cache import token_positions
from dmattn_jax.documents import document_bounds
from dmattn_jax.nn.attend import attend_patterns
from dmattn_jax.nn.attention import MultiHeadAttention
from dmattn_jax.pattern_cache import PatternCache
from pallas_kernels.patterns import Patterns, Places, pattern_attention


class Mask(nnx.Variable):
    """Fixed arrays of a mask: neither trained nor saved as parameters."""


class PatternAttention(MultiHeadAttention):
    """softmax(qkᵀ/√d)v over the keys that `Patterns` show (arXiv 2506.11104); the projections are a dense layer's.

    patterns: of this layer, or of all layers of a stack, with one more axis in front. Padding amid a document takes
      places in whole sequences, where the mask counts them, and none in decoding.
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
        arrays = (self.inside[...], self.diagonals[...], self.verticals[...], self.columns[...])
        return Patterns(*arrays, reach=self.reach)

    def init_cache(self, batch: int, max_length: int) -> Any:
        # Of a stack of layers the last axis alone counts.
        slots = self.columns.shape[-1]
        return PatternCache.create(
            batch, self.reach, slots, self.num_kv_heads, self.head_dim, max_length=max_length, dtype=self.dtype
        )

    def _attend(self, query, key, value, segment_ids):
        batch, length = key.shape[:2]
        documents = document_bounds(segment_ids, batch, length)
        index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        places = Places(index, jnp.where(documents.token, documents.start, -1))
        return attend_patterns(query, key, value, self.patterns, places)

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
