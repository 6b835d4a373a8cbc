"""The paper's equations, dense and slow: the truth every test compares with.

Nothing here is shared with the fast path: visibility is found by sorting each query's own row, the mask is
materialised, and gradients come from autodiff alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def visible_keys_oracle(
    gate: Float[Array, "B S K"],
    window: int | Sequence[int],
    *,
    causal: bool = True,
    segment_ids: Int[Array, "B S"] | None = None,
) -> Bool[Array, "B K S S"]:
    """`visible[b, k, i, j]`: query position i sees key j (arXiv 2508.02124v6, Listing 1, per query row).

    Of the keys a query may see (its document; up to itself when causal; not padding, gate above −inf) the
    `window` of largest gate are visible, the later key first among equals. NaN ranks above +inf.
    """
    batch, length, heads = gate.shape
    budget = jnp.asarray([min(one, length) for one in np.broadcast_to(window, heads).tolist()], jnp.int32)
    position = jnp.arange(length)
    allowed = jnp.ones((batch, length, length), bool)
    if causal:
        allowed &= position[None, None, :] <= position[None, :, None]
    if segment_ids is not None:
        document = _document_numbers(segment_ids)
        allowed &= document[:, :, None] == document[:, None, :]
        allowed &= (segment_ids != 0)[:, :, None] & (segment_ids != 0)[:, None, :]
    scores = jnp.moveaxis(gate, 1, 2)
    allowed = allowed[:, None] & ~jnp.isneginf(scores)[:, :, None, :]
    # How many allowed keys of the row rank above key j: greater gate, or an equal one that comes later.
    order = jnp.lexsort((jnp.broadcast_to(position, scores.shape), scores), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    row = jnp.where(allowed, rank[:, :, None, :], -1)
    descending = -jnp.sort(-row, axis=-1)
    wth = jnp.take_along_axis(descending, jnp.minimum(budget, length)[None, :, None, None] - 1, axis=-1)
    return allowed & (row >= wth)


def attention_oracle(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    gate: Float[Array, "B S K"],
    *,
    window: int | Sequence[int],
    causal: bool = True,
    segment_ids: Int[Array, "B S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H D"]:
    """Dynamic-mask attention by its definition: O(T·S) memory, any float type, differentiable by autodiff.

    `softmax_j(scale · q_i·k_j + gate_j)` over the visible keys of `visible_keys_oracle`; a query that sees
    none gives 0. Queries are the last T of the S positions. Arguments as in `dynamic_mask_attention`.
    """
    length, queries, head_dim = key.shape[1], query.shape[1], query.shape[-1]
    group = query.shape[2] // key.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    visible = visible_keys_oracle(jax.lax.stop_gradient(gate), window, causal=causal, segment_ids=segment_ids)[
        :, :, length - queries :
    ]
    visible = jnp.repeat(visible, group, axis=1)
    # A key that nobody sees must not reach the products at all: 0 · NaN is NaN, forward and backward.
    seen = jnp.repeat(jnp.moveaxis(visible.any(axis=2), 1, 2)[..., None], 1, axis=-1)
    key = jnp.where(seen, jnp.repeat(key, group, axis=2), 0)
    value = jnp.where(seen, jnp.repeat(value, group, axis=2), 0)
    bias = jnp.moveaxis(jnp.where(seen[..., 0], jnp.repeat(gate, group, axis=2), 0), 1, 2)
    logits = scale * jnp.einsum("bthd,bshd->bhts", query, key) + bias[:, :, None, :]
    some = visible.any(axis=-1, keepdims=True)
    logits = jnp.where(visible, logits, -jnp.inf)
    weights = jax.nn.softmax(jnp.where(some, logits, 0), axis=-1)
    weights = jnp.where(some & visible, weights, 0)
    return jnp.einsum("bhts,bshd->bthd", weights, value)


def _document_numbers(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Number the documents of a row: an id that returns after another one starts a new document.

    Padding (0) inside or after a document takes that document's number.
    """

    def step(carry, current):
        last, number = carry
        starts = (current != 0) & (current != last)
        number = number + starts
        return (jnp.where(current == 0, last, current), number), number

    rows = jnp.moveaxis(segment_ids, 1, 0)
    zero = jnp.zeros_like(rows[0])
    return jnp.moveaxis(jax.lax.scan(step, (zero, zero), rows)[1], 0, 1)
