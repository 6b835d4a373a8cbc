"""Cross-entropy over a vocabulary without ever holding the logits of all tokens."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmattn_jax.partitioning import axis_size


class LossOutput(NamedTuple):
    """Scalars, float32. loss = cross_entropy + auxiliary is what is minimised.

    cross_entropy: mean over the targets that count, in nats; 0 when none does.
    token_count: the sum of their weights, which is their number where no weights were given.
    auxiliary: weighted balance loss of the experts, 0 for a dense model.
    """

    loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    token_count: Float[Array, ""]
    auxiliary: Float[Array, ""]


@jax.named_scope("loss")
def chunked_cross_entropy(
    hidden: Float[Array, "B T M"],
    unembedding: Float[Array, "M V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"] | None = None,
    *,
    chunk_tokens: int = 2048,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(Σ weight · −log softmax(hidden · unembedding)[target], Σ weight), over targets >= 0; float32.

    The [tokens, V] float32 logits exist for about chunk_tokens tokens a device at a time. The matrix product runs in
    hidden's dtype and sums in float32. Under differentiation a chunk's gradients are made beside its loss, while its
    logits are there: they would have to be computed again later.
    """
    batch, length, _ = hidden.shape
    weights = jnp.ones((batch, length), jnp.float32) if weights is None else weights.astype(jnp.float32)
    weights = jnp.where(targets >= 0, weights, 0)
    size = min(length, max(1, chunk_tokens * axis_size("batch") // batch))
    targets = jnp.maximum(targets, 0)
    return _summed_loss(hidden, unembedding.astype(hidden.dtype), targets, weights, size), weights.sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed_loss(
    hidden: Float[Array, "B T M"],
    unembedding: Float[Array, "M V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    size: int,
) -> Float[Array, ""]:
    """Σ weight · −log softmax(hidden · unembedding)[target], `size` tokens of each row at a time."""

    def add_chunk(total, chunk):
        rows, target, weight = chunk
        _, nll = _chunk_loss(rows, unembedding, target)
        return total + _weighted(nll, weight).sum(), None

    return jax.lax.scan(add_chunk, jnp.float32(0), _cut(size, hidden, targets, weights))[0]


def _loss_forward(hidden, unembedding, targets, weights, size):
    def add_chunk(carry, chunk):
        total, d_unembedding = carry
        rows, target, weight = chunk
        softmax, nll = _chunk_loss(rows, unembedding, target)
        chosen = jnp.arange(unembedding.shape[1]) == target[..., None]
        # As a product's operand in hidden's dtype, like all others; sums over tokens are float32.
        d_logits = _weighted(softmax - chosen, weight[..., None]).astype(hidden.dtype)
        d_rows = jnp.einsum("btv,mv->btm", d_logits, unembedding, preferred_element_type=jnp.float32)
        part = jnp.einsum("btm,btv->mv", rows, d_logits, preferred_element_type=jnp.float32)
        carry = (total + _weighted(nll, weight).sum(), d_unembedding + part)
        return carry, (d_rows.astype(hidden.dtype), nll)

    start = (jnp.float32(0), jnp.zeros(unembedding.shape, jnp.float32))
    (total, d_unembedding), parts = jax.lax.scan(add_chunk, start, _cut(size, hidden, targets, weights))
    d_hidden, nll = (_join(part, targets.shape[1]) for part in parts)
    return total, (d_hidden, d_unembedding.astype(unembedding.dtype), nll)


def _loss_backward(size, gradients, cotangent):
    d_hidden, d_unembedding, nll = gradients
    return (
        (cotangent * d_hidden).astype(d_hidden.dtype),
        (cotangent * d_unembedding).astype(d_unembedding.dtype),
        None,
        cotangent * nll,
    )


_summed_loss.defvjp(_loss_forward, _loss_backward)


def _chunk_loss(rows, unembedding, target):
    """softmax [B, t, V] and −log softmax[target] [B, t]."""
    logits = jnp.einsum("btm,mv->btv", rows, unembedding, preferred_element_type=jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return jnp.exp(logits - normalizer[..., None]), normalizer - picked


def _weighted(array: jax.Array, weight: jax.Array) -> jax.Array:
    # Not 0 · array: a token that does not count must not spread a NaN.
    return jnp.where(weight != 0, weight * array, 0)


def _cut(size: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [B, T, …] as chunks [n, B, size, …], zeros at the end."""

    def cut(array: jax.Array) -> jax.Array:
        # Along time, so that a batch split over devices stays split.
        batch, length = array.shape[:2]
        widths = [(0, 0), (0, -length % size)] + [(0, 0)] * (array.ndim - 2)
        return jnp.moveaxis(jnp.pad(array, widths).reshape(batch, -1, size, *array.shape[2:]), 1, 0)

    return tuple(cut(array) for array in arrays)


def _join(chunks: Float[Array, "n B t *rest"], length: int) -> Float[Array, "B T *rest"]:
    """What `_cut` cut."""
    array = jnp.moveaxis(chunks, 0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])[:, :length]
