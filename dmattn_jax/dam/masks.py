"""Masks of all layers and heads as two bit vectors and a small map each, and what follows from them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from dmattn_jax.dam.errors import DamError
from pallas_kernels.patterns import Patterns


@dataclasses.dataclass(frozen=True)
class Masks:
    """Step 5 of arXiv 2506.11104 for N layers of H heads: visible ⇔ inside[i, j] for i < L; beyond, j <= i and
    (diagonals[i − j] or verticals[j]).

    fallback: heads in which nothing matched, and whose patterns are therefore self and the first key.
    model: the fingerprint of the model that they are of; "" fits any of the shape. settings: how they were made.
    """

    inside: Bool[np.ndarray, "N H L L"]
    diagonals: Bool[np.ndarray, "N H R"]
    verticals: Bool[np.ndarray, "N H C"]
    fallback: Bool[np.ndarray, "N H"]
    model: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def patterns(self, kv_heads: int, granule: int = 1) -> Patterns:
        """The kernel's arrays, each with a leading layers axis; shapes and reach are the largest layer's, rounded up
        to multiples of granule."""

        def filled(array: np.ndarray, value: int = 0) -> jnp.ndarray:
            missing = -array.shape[-1] % granule
            return jnp.asarray(np.pad(array, ((0, 0), (0, 0), (0, missing)), constant_values=value))

        return Patterns(
            jnp.asarray(self.inside),
            filled(self.diagonals),
            filled(self.verticals),
            filled(_columns(self.verticals, kv_heads), -1),
            -(-self.reach(kv_heads) // granule) * granule,
        )

    def reach(self, kv_heads: int) -> int:
        """1 + the largest distance of a visible pair whose key is no column of its kv head."""
        furthest = int(np.flatnonzero(self.diagonals.any((0, 1))).max(initial=0))
        layers, heads, side = self.inside.shape[:3]
        columns = self.verticals.reshape(layers, kv_heads, -1, self.verticals.shape[2]).any(2)
        columns = np.pad(columns, ((0, 0), (0, 0), (0, max(0, side - columns.shape[2]))))[..., :side]
        for layer in range(layers):
            for head in range(heads):
                query, key = np.nonzero(self.inside[layer, head] & ~columns[layer, head * kv_heads // heads])
                furthest = max(furthest, int((query - key).max(initial=0)))
        return furthest + 1

    def density(self, length: int) -> Float[np.ndarray, "N H"]:
        """Visible pairs over causal pairs at a length, per layer and head."""
        side = min(self.inside.shape[2], length)
        pairs = self.inside[:, :, :side, :side].sum((2, 3)).astype(np.float64)
        position = np.arange(side, length)
        diagonals, verticals = (_cumulative(array, length)[..., side:] for array in (self.diagonals, self.verticals))
        for layer, head in np.ndindex(*pairs.shape):
            # Distances r and columns c with r + c = i are the pairs that both vectors show.
            both = np.convolve(self.diagonals[layer, head].astype(float), self.verticals[layer, head].astype(float))
            both = np.where(position < len(both), both[np.minimum(position, len(both) - 1)], 0)
            pairs[layer, head] += (diagonals[layer, head] + verticals[layer, head] - np.rint(both)).sum()
        return pairs / (length * (length + 1) / 2)

    def empty_queries(self) -> int:
        """Queries inside the map, of all heads, that see nothing: their attention gives 0."""
        return int(np.logical_not(self.inside.any(-1)).sum())

    def summary(self, length: int) -> dict[str, Any]:
        """What `dmattn dam` reports of the masks."""
        density = self.density(length)
        diagonals, verticals = self.diagonals.sum(-1), self.verticals.sum(-1)
        return {
            "capture_length": int(self.inside.shape[2]),
            "heads": int(self.fallback.size),
            "heads_fallen_back": int(self.fallback.sum()),
            "heads_fallen_back_per_layer": self.fallback.sum(1).tolist(),
            "diagonals_per_head": float(diagonals[~self.fallback].mean()) if not self.fallback.all() else 0.0,
            "verticals_per_head": float(verticals[~self.fallback].mean()) if not self.fallback.all() else 0.0,
            "density_inside": float(self.density(self.inside.shape[2]).mean()),
            "empty_queries_inside": self.empty_queries(),
            "length": length,
            "density": float(density.mean()),
            "density_per_layer": density.mean(1).tolist(),
        }


def windows_and_sinks(layers: int, heads: int, window: int, sinks: int = 0) -> Masks:
    """Masks of the last `window` keys and the first `sinks`, the same in all heads. Raises: ValueError when
    window < 1 or sinks < 0."""
    if window < 1 or sinks < 0:
        raise ValueError(f"window must be >= 1 and sinks >= 0, got {window} and {sinks}")
    shape = (layers, heads)
    return Masks(
        inside=np.ones((*shape, 1, 1), bool),
        diagonals=np.ones((*shape, window), bool),
        verticals=np.ones((*shape, sinks), bool) if sinks else np.zeros((*shape, 1), bool),
        fallback=np.zeros(shape, bool),
        settings={"window": window, "sinks": sinks},
    )


def check_shape(masks: Masks, layers: int, heads: int) -> None:
    """Raises: DamError unless the masks are of so many layers and heads."""
    if masks.fallback.shape != (layers, heads):
        raise DamError(
            f"the masks are of {masks.fallback.shape[0]} layers of {masks.fallback.shape[1]} heads, the model has "
            f"{layers} of {heads}: capture this model"
        )


def _columns(verticals: np.ndarray, kv_heads: int) -> np.ndarray:
    """[N, K, V] int32: the columns of each kv head's query heads, rising, then −1."""
    layers = verticals.shape[0]
    union = np.asarray(verticals.reshape(layers, kv_heads, -1, verticals.shape[2]).any(2))
    columns = np.full((layers, kv_heads, max(1, int(union.sum(-1).max(initial=0)))), -1, np.int32)
    for at in np.ndindex(layers, kv_heads):
        found = np.flatnonzero(union[at])
        columns[at][: found.size] = found
    return columns


def _cumulative(vector: np.ndarray, length: int) -> np.ndarray:
    """How many of a vector's true places are <= i, for i below length."""
    vector = np.pad(vector, ((0, 0), (0, 0), (0, max(0, length - vector.shape[2]))))[..., :length]
    return np.cumsum(vector, axis=-1, dtype=np.int64)
