"""Cross-entropy over a vocabulary without ever holding the logits of all tokens."""

from __future__ import annotations

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


def chunked_cross_entropy(
    hidden: Float[Array, "B T M"],
    unembedding: Float[Array, "M V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"] | None = None,
    *,
    chunk_tokens: int = 2048,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(Σ weight · −log softmax(hidden · unembedding)[target], Σ weight), over targets >= 0; float32.

    The [tokens, V] float32 logits exist for about chunk_tokens tokens a device at a time, in the backward pass
    too, which computes them again. The matrix product runs in hidden's dtype and sums in float32.
    """
    batch, length, _ = hidden.shape
    weights = jnp.ones((batch, length), jnp.float32) if weights is None else weights.astype(jnp.float32)
    weights = jnp.where(targets >= 0, weights, 0)
    size = min(length, max(1, chunk_tokens * axis_size("batch") // batch))
    padding = -length % size

    def cut(array: jax.Array) -> jax.Array:
        # Along time, so that a batch split over devices stays split.
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2)
        return jnp.moveaxis(jnp.pad(array, widths).reshape(batch, -1, size, *array.shape[2:]), 1, 0)

    unembedding = unembedding.astype(hidden.dtype)

    @jax.checkpoint
    def one_chunk(total, chunk):
        rows, target, weight = chunk
        logits = jnp.einsum("btm,mv->btv", rows, unembedding, preferred_element_type=jnp.float32)
        nll = _negative_log_likelihood(logits, jnp.maximum(target, 0))
        # Not 0 · nll: a token that does not count must not spread a NaN.
        return total + jnp.sum(jnp.where(weight != 0, weight * nll, 0)), None

    total, _ = jax.lax.scan(one_chunk, jnp.float32(0), (cut(hidden), cut(targets), cut(weights)))
    return total, weights.sum()


@jax.custom_vjp
def _negative_log_likelihood(logits: Float[Array, "B T V"], target: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """−log softmax(logits)[target]. Its gradient is written out, or it would be a scatter into all logits."""
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _likelihood_forward(logits, target):
    return _negative_log_likelihood(logits, target), (logits, target)


def _likelihood_backward(saved, cotangent):
    logits, target = saved
    chosen = jnp.arange(logits.shape[-1]) == target[..., None]
    weight = jax.nn.softmax(logits, axis=-1) - chosen
    return jnp.where(cotangent[..., None] != 0, cotangent[..., None] * weight, 0), None


_negative_log_likelihood.defvjp(_likelihood_forward, _likelihood_backward)
