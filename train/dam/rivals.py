"""What masks are compared with, at the same density: windows, lines chosen for each prompt, and the true top keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from dmattn_jax.dam import DamError, Masks, apply_masks, windows_and_sinks
from dmattn_jax.decoding import bucket
from dmattn_jax.models.decoder import CausalDecoder
from dmattn_jax.nn import MultiHeadAttention
from train.dam.vertical_slash import VerticalSlashAttention

QUERIES = 64
"""Queries whose logits over all keys exist together."""
GRANULE = 128
"""Masks are filled up to multiples of it: those of like sizes share a compiled program."""


class Rival(NamedTuple):
    """A model, and its visible over causal pairs: the mean of layers and heads."""

    model: CausalDecoder
    density: float


def rivals(model: CausalDecoder, masks: Masks, length: int, sinks: int) -> dict[str, Rival]:
    """The masked model and its rivals at a length. Windows and budgets are whole keys, vertical and slash lines whole
    lines: their densities are the nearest there are.

    Raises: DamError where the masks do not fit the model.
    """
    layers, heads = masks.fallback.shape
    density = float(masks.density(length).mean())
    window = nearest_window(density, length, 0)
    fixed = {
        "dam": masks,
        "sliding_window": windows_and_sinks(layers, heads, window),
        "sink_and_window": windows_and_sinks(layers, heads, nearest_window(density, length, sinks), sinks),
    }
    found = {
        name: Rival(apply_masks(model, each, GRANULE), float(each.density(length).mean()))
        for name, each in fixed.items()
    }
    dense = model.blocks.attention
    lines = with_attention(model, VerticalSlashAttention(dense, density))
    # The first queries have fewer keys than they may take, as in a window.
    top = with_attention(model, ExactTopAttention(dense, window))
    return {**found, "vertical_slash": Rival(lines, density), "exact_top": Rival(top, found["sliding_window"].density)}


def with_attention(model: CausalDecoder, attention: nnx.Module) -> CausalDecoder:
    """The model with another attention in every layer; parameters are shared, not copied."""
    changed = nnx.merge(*nnx.split(model))
    changed.blocks.attention = attention
    return changed


def nearest_window(density: float, length: int, sinks: int) -> int:
    """The window whose density, with the sinks, is nearest."""
    position = np.arange(length)
    windows = np.arange(1, length + 1)
    # Of the sinks those count that the window does not reach.
    seen = np.minimum(position + 1, windows[:, None])
    seen = seen + np.clip(position + 1 - windows[:, None], 0, sinks)
    return int(windows[np.argmin(np.abs(seen.sum(1) / (length * (length + 1) / 2) - density))])


class ExactTopAttention(MultiHeadAttention):
    """Softmax over each query's `budget` keys of largest logit: the best that a choice of keys can do, at the price
    of all logits. Whole sequences of one document; for measuring only. Ties at the boundary are all seen."""

    def __init__(self, dense: MultiHeadAttention, budget: int):
        for name, value in vars(dense).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        # A variable for each layer: budgets up to the same power of two share a program.
        self.budget = nnx.Variable(jnp.full(dense.query[...].shape[0], budget, jnp.int32))
        self.most = bucket(budget)

    def _attend_cached(self, query, key, value, token, cache):
        raise DamError("exact top attention reads whole sequences: it does not generate")

    def _attend(self, query, key, value, segment_ids):
        del segment_ids
        return attend_to_top(query, key, value, self.budget[...].reshape(-1)[0], self.most)


def attend_to_top(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    budget: Int32[Array, ""],
    most: int,
) -> Float[Array, "B T H D"]:
    """Causal attention to the `budget` keys of largest logit, at most `most` and T; QUERIES queries at a time."""
    batch, length, heads, dim = query.shape
    missing = -length % QUERIES
    most = min(most, length)
    last = jnp.minimum(budget, most) - 1
    tiles = jnp.pad(query, ((0, 0), (0, missing), (0, 0), (0, 0)))
    tiles = jnp.moveaxis(tiles.reshape(batch, -1, QUERIES, key.shape[2], heads // key.shape[2], dim), 1, 0)

    def tile(first: jax.Array, query: jax.Array) -> tuple[jax.Array, Any]:
        logits = jnp.einsum("btkgd,bskd->bkgts", query, key, preferred_element_type=jnp.float32) * dim**-0.5
        causal = jnp.arange(length) <= first + jnp.arange(QUERIES)[:, None]
        logits = jnp.where(causal, logits, -jnp.inf)
        least = jax.lax.top_k(logits, most)[0]
        least = jnp.take_along_axis(least, jnp.broadcast_to(last, (*least.shape[:-1], 1)), axis=-1)
        weights = jax.nn.softmax(jnp.where(logits >= least, logits, -jnp.inf), axis=-1)
        out = jnp.einsum("bkgts,bskd->bkgtd", weights.astype(value.dtype), value)
        return first + QUERIES, jnp.moveaxis(out, 3, 1).reshape(batch, QUERIES, heads, dim)

    _, out = jax.lax.scan(tile, jnp.int32(0), tiles)
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, dim)[:, :length].astype(query.dtype)
