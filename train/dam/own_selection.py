"""A model that chooses its own keys (dynamic-mask attention), beside others of the same budget on the same weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dmattn_jax.attention import sliding_window_attention
from dmattn_jax.dam import windows_and_sinks
from dmattn_jax.decoding import bucket
from dmattn_jax.models.decoder import CausalDecoder
from dmattn_jax.nn import DynamicMaskAttention
from train.dam.rivals import Rival, attend_to_top, with_attention


def own_rivals(model: CausalDecoder, length: int) -> tuple[CausalDecoder, dict[str, Rival]]:
    """The model seeing every key, with its gates' bias as in training, and what sees as many keys as the model's own
    windows: its own selection, the last keys, and each query's keys of largest logit."""
    layer = model.blocks.attention
    opened = nnx.merge(*nnx.split(model))
    opened.blocks.attention.windows = (length,) * len(layer.windows)
    densities = [windows_and_sinks(1, 1, window).density(length).item() for window in layer.windows]
    density = float(np.mean(densities))
    return opened, {
        "own_selection": Rival(model, density),
        "sliding_window": Rival(with_attention(model, GatedWindowAttention(layer)), density),
        "exact_top": Rival(with_attention(model, GatedTopAttention(layer)), density),
    }


class _GatedAttention(DynamicMaskAttention):
    """Softmax of logits plus the gates' bias over other keys than those of largest gate; float32, for measuring."""

    def __init__(self, layer: DynamicMaskAttention):
        for name, value in vars(layer).items():
            if not name.startswith("_"):
                setattr(self, name, value)

    def _attend(self, query, key, value, segment_ids):
        del segment_ids
        dim = query.shape[3]
        gate = self.gate(value)[..., None].astype(jnp.float32)
        query, key, value = (array.astype(jnp.float32) for array in (query, key, value))
        # One more feature carries the bias through any attention that divides by the root of the features.
        root = (dim + 1) ** 0.5
        query = jnp.concatenate([query * (root / dim**0.5), jnp.full((*query.shape[:3], 1), root)], axis=-1)
        key, value = jnp.concatenate([key, gate], axis=-1), jnp.concatenate([value, jnp.zeros_like(gate)], axis=-1)
        return self._chosen(query, key, value)[..., :dim].astype(self.dtype)

    def _chosen(self, query: jax.Array, key: jax.Array, value: jax.Array) -> Float[Array, "B T H D"]:
        raise NotImplementedError


class GatedWindowAttention(_GatedAttention):
    """Over the last keys, as many as the layer's windows have."""

    def _chosen(self, query, key, value):
        return sliding_window_attention(query, key, value, window=self.windows)


class GatedTopAttention(_GatedAttention):
    """Over each query's keys of largest logit, as many as the layer's windows have on average."""

    def _chosen(self, query, key, value):
        budget = round(sum(self.windows) / len(self.windows))
        return attend_to_top(query, key, value, jnp.int32(budget), bucket(budget))
