"""How far away the keys are that a trained model keeps, and how much it looks at them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dmattn_jax import nn
from dmattn_jax.documents import document_bounds, document_positions
from dmattn_jax.selection import last_keys
from train.experiments.ablation_layers import HiddenGateAttention
from train.parameters import Skeleton


def distance_edges(length: int) -> list[int]:
    """Lower ends of the bins of distances below `length`: 0, 1, 2, 4, 8, …"""
    return [0, *(2**power for power in range(max(length - 1, 1).bit_length()))]


def measure_distances(
    skeleton: Skeleton,
    params: Mapping[str, jax.Array],
    tokens: Int[np.ndarray, "B T"],
    segment_ids: Int[np.ndarray, "B T"],
) -> dict[str, Any]:
    """Shares by distance of query and key, over queries with at least `window` earlier tokens in their document.

    Of a model with `dma` or `swa` attention, one row after the other; dense capture, so each layer holds [H, T, T].
    Returns JSON: edges; queries, their number; visible and weight [layers, kv heads, bins]: share of the visible
    (query, key) pairs, and of the attention, in a bin; far_visible and far_weight [layers, kv heads]: those at
    distances of `window` (of that head) and more, where a sliding window has none.
    """
    edges = distance_edges(tokens.shape[1])

    @jax.jit
    def totals_of(params, tokens, segment_ids):
        def one_row(row: tuple[jax.Array, jax.Array]) -> dict[str, Array]:
            return _row_totals(skeleton.merge(params), row[0][None], row[1][None])

        return jax.tree.map(lambda leaf: leaf.sum(0), jax.lax.map(one_row, (tokens, segment_ids)))

    totals = totals_of(dict(params), jnp.asarray(tokens), jnp.asarray(segment_ids))
    found = {name: np.asarray(value, np.float64) for name, value in totals.items()}
    pairs, weights = (np.maximum(found[name].sum(-1), 1e-30) for name in ("visible", "weight"))
    return {
        "edges": edges,
        "queries": int(found["queries"]),
        "visible": (found["visible"] / pairs[..., None]).tolist(),
        "weight": (found["weight"] / weights[..., None]).tolist(),
        "far_visible": (found["far_visible"] / pairs).tolist(),
        "far_weight": (found["far_weight"] / weights).tolist(),
    }


def _row_totals(model: Any, tokens: Int[Array, "1 T"], segment_ids: Int[Array, "1 T"]) -> dict[str, Array]:
    x, layers = model.embed(tokens), []
    for index in range(model.config.num_layers):
        layer = model.layer(index)
        layers.append(_layer_totals(layer.attention, layer.attention_norm(x), segment_ids))
        x = layer(x, segment_ids)[0]
    stacked = {name: jnp.stack([totals[name] for totals in layers]) for name in layers[0]}
    return stacked | {"queries": stacked["queries"][0]}


def _layer_totals(attention: Any, x: Float[Array, "1 T M"], segment_ids: Int[Array, "1 T"]) -> dict[str, Array]:
    length = x.shape[1]
    within = document_positions(segment_ids, length)
    query, key, value = attention._project(x, within)
    visible = visible_keys(attention, x, value, segment_ids)[0]
    grouped = query[0].reshape(length, attention.num_kv_heads, -1, attention.head_dim)
    logits = jnp.einsum("tkgd,skd->kgts", grouped, key[0], preferred_element_type=jnp.float32)
    logits = logits * attention.head_dim**-0.5 + _bias(attention, x, value)[0].T[:, None, None, :]
    shown = visible[:, None]
    weights = jnp.where(shown, jax.nn.softmax(jnp.where(shown, logits, -1e30), axis=-1), 0).mean(axis=1)
    windows = jnp.asarray(attention.windows)
    counted = (within[0] >= max(attention.windows)) & (segment_ids[0] != 0)
    pairs = (visible & counted[:, None]).astype(jnp.float32)
    weights = weights * counted[:, None]
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    far = distance >= windows[:, None, None]
    edges = [*distance_edges(length), length]
    bins = [(distance >= low) & (distance < high) for low, high in itertools.pairwise(edges)]
    return {
        "visible": jnp.stack([(pairs * one).sum((1, 2)) for one in bins], axis=-1),
        "weight": jnp.stack([(weights * one).sum((1, 2)) for one in bins], axis=-1),
        "far_visible": (pairs * far).sum((1, 2)),
        "far_weight": (weights * far).sum((1, 2)),
        "queries": counted.sum(),
    }


def visible_keys(
    attention: Any, x: Float[Array, "B T M"], value: Float[Array, "B T K D"], segment_ids: Int[Array, "B T"]
) -> Bool[Array, "B K T T"]:
    """The mask [query, key] of a `dma` or `swa` layer."""
    documents = document_bounds(segment_ids, *x.shape[:2])
    if isinstance(attention, nn.DynamicMaskAttention):
        expiry = jnp.moveaxis(attention.lifetimes(attention.gates(x), segment_ids), 2, 1)
    else:
        expiry = last_keys(attention.windows, documents).expiry
    position = jnp.arange(x.shape[1])
    seen = (position <= position[:, None]) & (position[:, None] < expiry[:, :, None, :])
    same = (position >= documents.start[:, :, None]) & documents.token[:, :, None]
    return seen & same[:, None]


def _bias(attention: Any, x: Float[Array, "1 T M"], value: Float[Array, "1 T K D"]) -> Float[Array, "1 T K"]:
    """δ itself, which `gates` is not in every ablation."""
    if isinstance(attention, HiddenGateAttention):
        return attention.gates(x)
    if isinstance(attention, nn.DynamicMaskAttention):
        return attention.gate(value)
    return jnp.zeros((*x.shape[:2], attention.num_kv_heads), jnp.float32)
