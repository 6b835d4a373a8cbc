"""Examples of multi-query associative recall, made on the device from a seed and a number: nothing is stored."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int32, PRNGKeyArray

from train.experiments.mqar_config import MQARConfig


class Examples(NamedTuple):
    """Pair i has its key at 2i and its value at 2i + 1; its key comes again at position[i], labelled with the value.

    All other positions have no label.
    """

    tokens: Int32[Array, "B L"]
    position: Int32[Array, "B n"]
    value: Int32[Array, "B n"]


def make_examples(config: MQARConfig, key: PRNGKeyArray, index: Int[Array, " B"]) -> Examples:
    """The examples number `index` of the stream of `key`: each is a function of (key, its number). Traceable.

    n pairs k₁v₁…kₙvₙ first, keys distinct in 1…⌊V/2⌋−1, values distinct in ⌊V/2⌋…V−1. Then (L − 2n)/2 slots of two
    positions; n gaps g drawn one after the other without replacement with P(g) ∝ (g + 1)^(power − 1), and key i again
    at 2n + 2gᵢ. What is left is uniform in 0…V−1. config: resolved.
    """
    assert config.pairs is not None
    assert config.vocab_size is not None
    length, pairs, vocabulary, half = config.length, config.pairs, config.vocab_size, config.vocab_size // 2
    slots = (length - 2 * pairs) // 2
    # The largest of log P + Gumbel noise, in falling order, are draws without replacement.
    log_share = (config.power - 1) * jnp.log1p(jnp.arange(slots, dtype=jnp.float32))

    def one(number: jax.Array) -> Examples:
        for_keys, for_values, for_gaps, for_rest = jax.random.split(jax.random.fold_in(key, number), 4)
        keys = 1 + jax.lax.top_k(jax.random.uniform(for_keys, (half - 1,)), pairs)[1]
        values = half + jax.lax.top_k(jax.random.uniform(for_values, (vocabulary - half,)), pairs)[1]
        gaps = jax.lax.top_k(log_share + jax.random.gumbel(for_gaps, (slots,)), pairs)[1]
        position = 2 * pairs + 2 * gaps
        tokens = jax.random.randint(for_rest, (length,), 0, vocabulary, jnp.int32)
        tokens = tokens.at[: 2 * pairs].set(jnp.stack([keys, values], axis=1).reshape(-1))
        tokens = tokens.at[position].set(keys, unique_indices=True)
        return Examples(tokens, position.astype(jnp.int32), values.astype(jnp.int32))

    return jax.vmap(one)(index)
