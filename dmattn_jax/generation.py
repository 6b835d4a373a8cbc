"""Text generation: batched, with caches that hold exactly what the model's attention can see."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from dmattn_jax.models.decoder import CausalDecoder

SMALLEST_BUCKET = 16


class Sampling(NamedTuple):
    """How the next token is drawn. Traced, so that other values compile nothing anew; `temperature` 0 is greedy."""

    temperature: Float[Array, ""]
    top_k: Int32[Array, ""]
    top_p: Float[Array, ""]


def generate(
    model: CausalDecoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """Continue every prompt: the new tokens of each, at most max_new_tokens.

    prompts: token ids, of unequal lengths. temperature 0 takes the likeliest token (the lowest id among equals);
    otherwise tokens are drawn from softmax(logits / temperature), cut to the top_k likeliest and then to the
    smallest set of probability >= top_p. A row ends before the first of stop_tokens, which is not returned.
    The same seed gives the same text; row r of a batch draws what row r of any other batch with that prompt draws.

    Prompts and outputs are padded to powers of two, so that a new length seldom compiles anew; the number of
    prompts does.
    Raises: ValueError on an empty prompt, an id out of the vocabulary, or an option out of its range.
    """
    rows = [_checked_prompt(model, prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)]
    _check_options(model, max_new_tokens, temperature, top_k, top_p, stop_tokens)
    if not rows:
        return []
    graph, state = nnx.split(model)
    tokens, segment_ids = _padded(rows)
    capacity = _bucket(max_new_tokens)
    out, counts = _generate(
        graph,
        state,
        tokens,
        segment_ids,
        jax.random.key(seed),
        _sampling(model, temperature, top_k, top_p),
        _stop_array(stop_tokens),
        jnp.int32(max_new_tokens),
        greedy=temperature == 0,
        capacity=capacity,
    )
    return [row[:count].tolist() for row, count in zip(np.asarray(out), np.asarray(counts), strict=True)]


def generate_stream(
    model: CausalDecoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
) -> Iterator[int]:
    """The tokens of `generate(model, [prompt], …)[0]`, one by one as they come.

    Raises: as `generate`, at the call.
    """
    row = _checked_prompt(model, prompt, "prompt")
    _check_options(model, max_new_tokens, temperature, top_k, top_p, stop_tokens)
    sampling = _sampling(model, temperature, top_k, top_p)

    def stream() -> Iterator[int]:
        graph, state = nnx.split(model)
        tokens, segment_ids = _padded([row])
        keys = _row_keys(jax.random.key(seed), 1)
        logits, cache = _prefill(graph, state, tokens, segment_ids, capacity=_bucket(max_new_tokens))
        stops = set(stop_tokens)
        for step in range(max_new_tokens):
            token = _sample_jit(logits, keys, jnp.int32(step), sampling, greedy=temperature == 0)
            if int(token[0]) in stops:
                return
            yield int(token[0])
            if step + 1 < max_new_tokens:
                logits, cache = _decode_one(graph, state, token, cache)

    return stream()


@functools.partial(jax.jit, static_argnums=0, static_argnames=("greedy", "capacity"))
def _generate(graph, state, tokens, segment_ids, key, sampling, stops, limit, *, greedy: bool, capacity: int):
    batch = tokens.shape[0]
    logits, cache = _prefill(graph, state, tokens, segment_ids, capacity=capacity)
    keys = _row_keys(key, batch)

    def running(carry):
        step, *_, done = carry
        return (step < limit) & ~done.all()

    def one(carry):
        step, logits, cache, out, counts, done = carry
        token = _sample(logits, keys, step, sampling, greedy=greedy)
        done = done | (token[:, None] == stops).any(axis=1)
        out = out.at[:, step].set(jnp.where(done, 0, token))
        counts = counts + ~done
        logits, cache = _step(graph, state, token, cache, done)
        return step + 1, logits, cache, out, counts, done

    start = (
        jnp.int32(0),
        logits,
        cache,
        jnp.zeros((batch, capacity), jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, bool),
    )
    _, _, _, out, counts, _ = jax.lax.while_loop(running, one, start)
    return out, counts


@functools.partial(jax.jit, static_argnums=0, static_argnames="capacity")
def _prefill(graph, state, tokens, segment_ids, *, capacity: int) -> tuple[Float[Array, "B V"], Any]:
    """Read the prompts: the logits after each one's last token, and caches with room for `capacity` more."""
    model = nnx.merge(graph, state)
    cache = model.init_cache(tokens.shape[0], tokens.shape[1] + capacity)
    hidden, cache = model.decode(tokens, cache, segment_ids)
    last = segment_ids.sum(axis=1) - 1
    return model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]), cache


def _step(graph, state, token, cache, done) -> tuple[Float[Array, "B V"], Any]:
    """Read one token a row; rows that are done read nothing."""
    model = nnx.merge(graph, state)
    hidden, cache = model.decode(token[:, None], cache, (~done).astype(jnp.int32)[:, None])
    return model.logits(hidden[:, 0]), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _decode_one(graph, state, token, cache):
    return _step(graph, state, token, cache, jnp.zeros(token.shape, bool))


def _sample(logits, keys, step, sampling: Sampling, *, greedy: bool) -> Int32[Array, " B"]:
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Likeliest first; stable, so that equals keep the order of their ids.
    order = jnp.argsort(-logits, axis=-1, stable=True)
    scaled = jnp.take_along_axis(logits, order, axis=-1) / sampling.temperature
    kept = kept_tokens(scaled, sampling.top_k, sampling.top_p)
    step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    choice = jax.vmap(jax.random.categorical)(step_keys, jnp.where(kept, scaled, -jnp.inf))
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


_sample_jit = jax.jit(_sample, static_argnames="greedy")


def kept_tokens(
    descending: Float[Array, "B V"], top_k: Int32[Array, ""] | int, top_p: Float[Array, ""] | float
) -> Bool[Array, "B V"]:
    """Of logits sorted likeliest first: the first top_k, and of those the fewest whose probability reaches top_p.

    The likeliest is always kept. Probabilities are those among the top_k.
    """
    kept = jnp.arange(descending.shape[-1]) < top_k
    probability = jax.nn.softmax(jnp.where(kept, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # Rounded sums may reach 1 early: top_p = 1 cuts nothing.
    nucleus = (before < top_p) | (jnp.asarray(top_p) >= 1)
    return kept & nucleus.at[..., 0].set(True)


def _row_keys(key: jax.Array, batch: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))


def _padded(rows: Sequence[np.ndarray]) -> tuple[Int32[Array, "B T"], Int32[Array, "B T"]]:
    """Prompts padded on the right to a common power of two, and 1 where a token is."""
    length = _bucket(max(len(row) for row in rows))
    tokens = np.zeros((len(rows), length), np.int32)
    segment_ids = np.zeros((len(rows), length), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        segment_ids[index, : len(row)] = 1
    return jnp.asarray(tokens), jnp.asarray(segment_ids)


def _bucket(length: int) -> int:
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _stop_array(stop_tokens: Sequence[int]) -> Int32[Array, " N"]:
    """Stop tokens padded to a power of two with −1, which is no token."""
    size = 1 << max(len(stop_tokens) - 1, 0).bit_length()
    return jnp.asarray(np.array([*stop_tokens, *[-1] * (size - len(stop_tokens))], np.int32))


def _sampling(model: CausalDecoder, temperature: float, top_k: int | None, top_p: float | None) -> Sampling:
    vocabulary = model.config.vocab_size
    return Sampling(
        jnp.float32(temperature if temperature > 0 else 1.0),
        jnp.int32(vocabulary if top_k is None else min(top_k, vocabulary)),
        jnp.float32(1.0 if top_p is None else top_p),
    )


def _checked_prompt(model: CausalDecoder, prompt: Sequence[int], name: str) -> np.ndarray:
    row = np.asarray(prompt)
    if row.ndim != 1:
        raise ValueError(f"{name} must be a sequence of token ids, got shape {row.shape}")
    if row.size == 0:
        raise ValueError(f"{name} is empty: give at least one token, such as the tokenizer's bos_id or eos_id")
    if not np.issubdtype(row.dtype, np.integer):
        raise ValueError(f"{name} must hold integer token ids, got {row.dtype}: encode the text first")
    _check_ids(model, row, name)
    return row.astype(np.int32)


def _check_ids(model: CausalDecoder, ids: np.ndarray, name: str) -> None:
    vocabulary = model.config.vocab_size
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if wrong.size:
        raise ValueError(f"{name} must hold token ids in 0 … {vocabulary - 1}, got {wrong[0]}")


def _check_options(model, max_new_tokens, temperature, top_k, top_p, stop_tokens) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be >= 0 and finite, got {temperature}: 0 is greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}: None keeps all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}: None keeps all tokens")
    if len(stop_tokens):
        _check_ids(model, np.asarray(stop_tokens), "stop_tokens")
