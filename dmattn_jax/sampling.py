"""How the next token is drawn from logits: each row by its own options, and by its own stream of random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt32

GENERATOR = "threefry2x32"


@dataclass(frozen=True)
class Sampling:
    """Options of one prompt. The order in which they act is the order in which they stand.

    repetition_penalty: logits of tokens that the prompt or the output already has are divided by it where positive
      and multiplied where negative (1909.05858, §4.1); 1 changes nothing.
    temperature: 0 takes the likeliest token (the lowest id among equals); otherwise softmax(logits / temperature).
    top_k: the likeliest k tokens only. top_p: of those the fewest whose probability reaches top_p.
    min_p: of those the ones with at least min_p times the probability of the likeliest (2407.01082).
    seed: of the random numbers; row r of a batch draws by (seed, r).

    Raises: ValueError on an option out of its range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise ValueError(f"repetition_penalty must be > 0 and finite, got {self.repetition_penalty}: 1 is none")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be >= 0 and finite, got {self.temperature}: 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {self.top_k}: None keeps all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}: None keeps all tokens")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}: None keeps all tokens")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit 64 bits, got {self.seed}")


class RowSampling(NamedTuple):
    """`Sampling` of each row, traced, so that other values compile nothing anew. key: raw bits of a random key."""

    repetition_penalty: Float[Array, " B"]
    temperature: Float[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    key: UInt32[Array, "B 2"]


def row_sampling(options: Sequence[Sampling], rows: Sequence[int]) -> RowSampling:
    """One entry per row; rows: the row number by which each draws."""
    everything = np.iinfo(np.int32).max

    def column(values: list, dtype: type) -> jax.Array:
        return jnp.asarray(np.array(values, dtype))

    keys = [jax.random.fold_in(_key(o.seed), row) for o, row in zip(options, rows, strict=True)]
    return RowSampling(
        column([o.repetition_penalty for o in options], np.float32),
        column([o.temperature for o in options], np.float32),
        column([everything if o.top_k is None else min(o.top_k, everything) for o in options], np.int32),
        column([1.0 if o.top_p is None else o.top_p for o in options], np.float32),
        column([0.0 if o.min_p is None else o.min_p for o in options], np.float32),
        jnp.stack([jax.random.key_data(key) for key in keys]),
    )


def _key(seed: int) -> jax.Array:
    """`jax.random.key` of all 64 bits, of which without x64 it takes 32."""
    words = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl=GENERATOR)


def draw(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], step: Int32[Array, " B"], sampling: RowSampling
) -> Int32[Array, " B"]:
    """The next token of every row. seen: tokens that the row already has. step: how many tokens it has drawn."""
    penalty = sampling.repetition_penalty[:, None]
    penalised = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    best = jnp.argmax(penalised, axis=-1).astype(jnp.int32)
    random = sampling.temperature > 0

    def drawn() -> jax.Array:
        # Likeliest first; stable, so that equals keep the order of their ids.
        order = jnp.argsort(-penalised, axis=-1, stable=True)
        temperature = jnp.where(random, sampling.temperature, 1)[:, None]
        scaled = jnp.take_along_axis(penalised, order, axis=-1) / temperature
        kept = kept_tokens(scaled, sampling.top_k[:, None], sampling.top_p[:, None], sampling.min_p[:, None])
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(sampling.key, impl=GENERATOR), step)
        choice = jax.vmap(jax.random.categorical)(keys, jnp.where(kept, scaled, -jnp.inf))
        return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)

    # Sorting the vocabulary costs more than a small model's step: greedy batches skip it, in the same program.
    return jnp.where(random, jax.lax.cond(random.any(), drawn, lambda: best), best)


def kept_tokens(
    descending: Float[Array, "B V"],
    top_k: Int32[Array, "B 1"] | int,
    top_p: Float[Array, "B 1"] | float,
    min_p: Float[Array, "B 1"] | float = 0.0,
) -> Bool[Array, "B V"]:
    """Of logits sorted likeliest first: the first top_k, of those the fewest whose probability reaches top_p, and
    of those the ones of at least min_p times the likeliest's probability.

    The likeliest is always kept. The probabilities that top_p adds up are those among the top_k.
    """
    kept = jnp.arange(descending.shape[-1]) < top_k
    probability = jax.nn.softmax(jnp.where(kept, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # Rounded sums may reach 1 early: top_p = 1 cuts nothing.
    nucleus = (before < top_p) | (jnp.asarray(top_p) >= 1)
    likely = probability >= min_p * probability[..., :1]
    return kept & (nucleus & likely).at[..., 0].set(True)
