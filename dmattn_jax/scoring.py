"""How likely a model finds given text: sums of log-probabilities, read chunk by chunk in bounded memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from dmattn_jax.decoding import Decoder, bucket, check_prompt, padded

CHUNK = 512
"""Tokens of a row read at once; a power of two."""

LOGITS_AT_ONCE = 64
"""Of those, the positions whose logits over the vocabulary exist together; a power of two."""


class Score(NamedTuple):
    """logprob: Σ log p(token | all before). greedy: whether each of the tokens was the likeliest."""

    logprob: float
    greedy: bool


def score(
    model: Decoder, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], *, batch_size: int = 8
) -> list[Score]:
    """The score of every continuation after its context.

    Rows of any length, `batch_size` at a time; nothing is cut off. The memory is that of one chunk and the caches.
    Raises: ValueError on an empty context (nothing precedes the first token: give a bos or eos), an id out of the
    vocabulary, or batch_size < 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    rows, starts = [], []
    for index, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        before = check_prompt(model, context, f"contexts[{index}]")
        after = check_prompt(model, continuation, f"continuations[{index}]") if len(continuation) else before[:0]
        rows.append(np.concatenate([before, after]))
        starts.append(len(before))
    graph, state = nnx.split(model)
    scores = [Score(0.0, True)] * len(rows)
    # Like lengths together: rows of a batch wait for the longest.
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        sums, greedy = _score_batch(graph, state, [rows[i] for i in chosen], [starts[i] for i in chosen], batch_size)
        for position, index in enumerate(chosen):
            scores[index] = Score(float(sums[position]), bool(greedy[position]))
    return scores


def _score_batch(
    graph: Any, state: Any, rows: Sequence[np.ndarray], starts: Sequence[int], batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Float64 sums over the chunks, and whether all was greedy. Missing rows of the batch read nothing."""
    nothing = np.zeros(0, np.int32)
    inputs = [row[:-1] for row in rows] + [nothing] * (batch - len(rows))
    # −1 where nothing is to be predicted: inside the context.
    targets = [np.where(np.arange(1, len(row)) >= start, row[1:], -1) for row, start in zip(rows, starts, strict=True)]
    targets += [nothing] * (batch - len(rows))
    longest = max(map(len, inputs))
    width = min(bucket(max(longest, 1)), CHUNK)
    cache = _empty_cache(graph, state, batch, bucket(max(longest, 1)))
    sums, greedy = np.zeros(batch), np.ones(batch, bool)
    for start in range(0, longest, width):
        tokens, segment_ids = padded([row[start : start + width] for row in inputs], width)
        wanted, _ = padded([row[start : start + width] for row in targets], width)
        wanted = jnp.where(segment_ids != 0, wanted, -1)
        cache, part, right = _score_chunk(graph, state, cache, tokens, wanted, segment_ids)
        sums += np.asarray(part, np.float64)
        greedy &= np.asarray(right)
    return sums, greedy


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _empty_cache(graph: Any, state: Any, batch: int, max_length: int) -> Any:
    return nnx.merge(graph, state).init_cache(batch, max_length)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _score_chunk(
    graph: Any,
    state: Any,
    cache: Any,
    tokens: Int32[Array, "B T"],
    targets: Int32[Array, "B T"],
    segment_ids: Int32[Array, "B T"],
) -> tuple[Any, Float[Array, " B"], Bool[Array, " B"]]:
    model = nnx.merge(graph, state)
    hidden, cache = model.decode(tokens, cache, segment_ids)
    size = min(LOGITS_AT_ONCE, tokens.shape[1])

    def cut(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(array.shape[0], -1, size, *array.shape[2:]), 1, 0)

    def one(parts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, target = parts
        logits = model.logits(hidden)
        chosen = jnp.take_along_axis(logits, jnp.maximum(target, 0)[..., None], axis=-1)[..., 0]
        logprob = chosen - jax.nn.logsumexp(logits, axis=-1)
        counted = target >= 0
        right = ~counted | (jnp.argmax(logits, axis=-1) == target)
        return jnp.where(counted, logprob, 0).sum(axis=1), right.all(axis=1)

    sums, right = jax.lax.map(one, (cut(hidden), cut(targets)))
    return cache, sums.sum(axis=0), right.all(axis=0)
