"""Vertical-slash attention (MInference, arXiv 2407.02490): lines chosen for each prompt by what its end looks at."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from dmattn_jax.nn import MultiHeadAttention
from dmattn_jax.nn.attend import attend_dense_cache
from pallas_kernels.patterns import Patterns, Places, pattern_attention

LAST = 64
"""Queries from which the lines are chosen."""
SLASH_SHARES = (0.25, 0.5, 0.75)
"""Of the budget, for diagonals: each head takes what covers most of its last queries' attention."""


class VerticalSlashAttention(MultiHeadAttention):
    """Softmax over each head's chosen columns and diagonals, which together show `density` of the causal pairs.

    As the method does, a prompt is read through its lines, all of it at once (into an empty cache), and generated
    tokens see everything. For measuring: lines are looked up in vectors as long as the prompt.
    """

    def __init__(self, dense: MultiHeadAttention, density: float):
        for name, value in vars(dense).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        # A variable for each layer, so that all densities share a program.
        self.density = nnx.Variable(jnp.full(dense.query[...].shape[0], density, jnp.float32))

    def _attend(self, query, key, value, segment_ids):
        batch, length = key.shape[:2]
        token = jnp.ones((batch, length), bool) if segment_ids is None else segment_ids != 0

        def one(row: tuple[jax.Array, ...]) -> jax.Array:
            query, key, value, token = row
            patterns = self._patterns(query, key, token.sum(dtype=jnp.int32))
            places = Places(jnp.arange(length, dtype=jnp.int32)[None], jnp.where(token, 0, -1)[None])
            return pattern_attention(
                query[None], key[None], value[None], patterns, places, places, scale=self.head_dim**-0.5
            )[0]

        return jax.lax.map(one, (query, key, value, token))

    def _attend_cached(self, query, key, value, token, cache):
        if query.shape[1] == 1:
            return attend_dense_cache(query, key, value, token, cache)
        return self._attend(query, key, value, token.astype(jnp.int32)), cache.append(key, value, token)

    def _patterns(self, query: jax.Array, key: jax.Array, count: jax.Array) -> Patterns:
        length, heads = query.shape[:2]
        density = self.density[...].reshape(-1)[0]
        diagonals, verticals = choose_lines(last_attention(query, key, count, self.head_dim**-0.5), count, density)
        shared = verticals.reshape(key.shape[1], -1, length).any(1)
        # Rising, and unused places at the end.
        columns = jnp.sort(jnp.where(shared, jnp.arange(length, dtype=jnp.int32), length), axis=1)
        columns = jnp.where(columns < length, columns, -1)
        return Patterns(jnp.ones((heads, 1, 1), bool), diagonals, verticals, columns, length)


def last_attention(
    query: Float[Array, "T H D"], key: Float[Array, "T K D"], count: Int32[Array, ""], scale: float
) -> Float[Array, "H Q T"]:
    """Attention of the last queries of `count` tokens, float32; rows before the first token are 0."""
    length, heads, dim = query.shape
    row = count - LAST + jnp.arange(LAST, dtype=jnp.int32)
    grouped = query[jnp.clip(row, 0, length - 1)].reshape(LAST, key.shape[1], -1, dim)
    logits = jnp.einsum("tkgd,skd->kgts", grouped, key, preferred_element_type=jnp.float32) * scale
    seen = jnp.arange(length) <= row[:, None]
    weights = jax.nn.softmax(jnp.where(seen, logits, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.where(seen & (row >= 0)[:, None], weights, 0).reshape(heads, LAST, length)


def choose_lines(
    weights: Float[Array, "H Q T"], count: Int32[Array, ""], density: Float[Array, ""]
) -> tuple[Bool[Array, "H T"], Bool[Array, "H T"]]:
    """Diagonals by distance and verticals by column: those of most weight, as many as show at most `density` of the
    causal pairs of `count` tokens, and the diagonal of distance 0 in any case."""
    length = weights.shape[2]
    row = count - LAST + jnp.arange(LAST, dtype=jnp.int32)
    place = jnp.arange(length, dtype=jnp.int32)
    budget = density * count.astype(jnp.float32) * (count + 1).astype(jnp.float32) / 2
    column = row[:, None] - place
    of_distance = jnp.where(column >= 0, jnp.take_along_axis(weights, jnp.maximum(column, 0)[None], axis=2), 0)
    own = place == 0
    diagonal_mass = jnp.where(own, jnp.inf, of_distance.sum(1))
    vertical_mass = weights.sum(1)
    cells = jnp.maximum(count - place, 0).astype(jnp.float32)

    def most(mass: jax.Array, cells: jax.Array, budget: jax.Array) -> jax.Array:
        """The lines of most mass, until the next would pass the budget."""
        order = jnp.argsort(-mass, axis=1)
        taken = jnp.cumsum(jnp.take_along_axis(cells, order, axis=1), axis=1) <= budget
        head = jnp.arange(mass.shape[0])[:, None]
        return jnp.zeros(mass.shape, bool).at[head, order].set(taken)

    def lines(share: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        every = jnp.broadcast_to(cells, diagonal_mass.shape)
        diagonals = most(diagonal_mass, every, share * budget) | own
        left = budget - jnp.where(diagonals, cells, 0).sum(1, keepdims=True)
        # Of a column's cells those are new that lie on no chosen diagonal: distances up to count − 1 − column.
        below = jnp.cumsum(diagonals & (place < count), axis=1)[:, jnp.clip(count - 1 - place, 0, length - 1)]
        verticals = most(vertical_mass, cells - jnp.where(place < count, below, 0), left) & (place < count)
        shown = jnp.where(column >= 0, diagonals[:, jnp.maximum(column, 0)], False) | verticals[:, None]
        return diagonals, verticals, jnp.where(shown, weights, 0).sum((1, 2))

    diagonals, verticals, mass = (jnp.stack(parts) for parts in zip(*map(lines, SLASH_SHARES), strict=True))
    best, head = jnp.argmax(mass, axis=0), jnp.arange(weights.shape[0])
    return diagonals[best, head], verticals[best, head]
