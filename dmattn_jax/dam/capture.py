"""Recording a frozen model's attention over calibration text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from tqdm import tqdm

from dmattn_jax.dam.errors import DamError
from dmattn_jax.dam.fingerprint import fingerprint
from dmattn_jax.decoding import check_prompt, padded
from dmattn_jax.models.decoder import CausalDecoder
from dmattn_jax.nn import MultiHeadAttention


@dataclasses.dataclass(frozen=True)
class Maps:
    """Σ A·mᵢmⱼ of every layer and head (N layers) and Σ mᵢmⱼ over rows of calibration text, with m = 1 for tokens.

    model: the fingerprint of the model. rows, tokens: how much text.
    """

    total: Float[np.ndarray, "N H L L"]
    count: Float[np.ndarray, "L L"]
    model: str
    rows: int
    tokens: int

    @property
    def length(self) -> int:
        return self.count.shape[0]


def capture(
    model: CausalDecoder,
    documents: Sequence[Sequence[int]],
    *,
    length: int,
    batch_size: int = 8,
    progress: bool = False,
) -> Maps:
    """Step 1 of arXiv 2506.11104: accumulate attention over documents of token ids, cut into rows of `length`.

    The sums are float32 on the host, layers × heads × length²; of the maps, those of one layer and one batch are on
    the device at a time. Pieces of fewer than two tokens are left out.

    Raises: DamError where the model's attention is not dense, length is beyond its positions or < 2, or no row is
    left; ValueError on an id out of the vocabulary or batch_size < 1.
    """
    check_dense(model)
    positions = getattr(model.config, "max_position_embeddings", None)
    if length < 2 or (positions is not None and length > positions):
        raise DamError(f"length must be in 2 … {positions or 'any number'}, the model's positions, got {length}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    rows = []
    for number, document in enumerate(documents):
        ids = check_prompt(model, document, f"documents[{number}]")
        rows += [ids[at : at + length] for at in range(0, len(ids), length) if len(ids) - at >= 2]
    if not rows:
        raise DamError("no calibration text: give documents of at least two tokens")
    graph, state = nnx.split(model)
    layers, heads = model.config.num_layers, model.config.num_heads
    total = np.zeros((layers, heads, length, length), np.float32)
    count = np.zeros((length, length), np.float32)
    empty = np.zeros(0, np.int32)
    with tqdm(total=len(rows), desc="capture", unit="row", disable=not progress) as bar:
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            tokens, segment_ids = padded([*batch, *[empty] * (batch_size - len(batch))], length)
            x = _embed(graph, state, tokens)
            for layer in range(layers):
                x, maps = _layer(graph, state, layer, x, segment_ids)
                total[layer] += np.asarray(maps)
            mask = np.asarray(segment_ids, np.float32)
            count += mask.T @ mask
            bar.update(len(batch))
    return Maps(total, count, fingerprint(model), len(rows), sum(map(len, rows)))


def check_dense(model: CausalDecoder) -> None:
    """Raises: DamError unless the model's attention is dense and its layers are stacked."""
    if model.is_unrolled:
        raise DamError("the model's layers must be stacked: take the decoder from which unrolled() made this one")
    kind = type(model.blocks.attention)
    if kind is not MultiHeadAttention:
        raise DamError(
            f"the model's attention must be dense (MultiHeadAttention), got {kind.__name__}: masks are recorded from, "
            "and applied to, a frozen dense model"
        )


@functools.partial(jax.jit, static_argnums=0)
def _embed(graph: Any, state: Any, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).embed(tokens)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _layer(
    graph: Any, state: Any, layer: jax.Array, x: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The layer's output and its attention [H, L, L], summed over the rows."""
    block = nnx.merge(graph, state).layer(layer)
    maps = block.attention.maps(block.attention_norm(x), segment_ids)
    out, _ = block(x, segment_ids)
    return out, maps.sum(0).astype(jnp.float32)
