"""The device side of continuous batching: a fixed number of rows, in one compiled decode step, that requests enter
and leave. A row of a dynamic-mask model is its w slots a layer and head, whatever its request has read."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dmattn_jax.decoding import Decoder, Drawn, Rows, advance, empty_rows, for_many_tokens, padded, read_chunk
from dmattn_jax.nn.linear import in_compute_dtype
from dmattn_jax.sampling import RowSampling, Sampling, row_sampling

TOP_LOGPROBS = 20
"""Likeliest tokens of which log-probabilities can be had at every step."""


class Slots:
    """`count` rows on the device. Only these programs run, each compiled once: read a chunk, enter, decode."""

    def __init__(self, model: Decoder, count: int, max_length: int, chunk: int) -> None:
        """max_length: tokens a row may reach, prompt included. chunk: prompt tokens read at once."""
        model = in_compute_dtype(model)
        self._graph, self._state = nnx.split(model)
        self._max_length, self._chunk = max_length, chunk
        self._top = min(TOP_LOGPROBS, model.config.vocab_size)
        # Prompts are read by the model as it is, whose program for a chunk is short; tokens perhaps by another form.
        decoder, self._rows = for_many_tokens(model, empty_rows(self._graph, self._state, count, max_length))
        self._decoder = nnx.split(decoder)
        self._from_stack = decoder.from_stack
        self._axes = _batch_axes(decoder, max_length)
        self._options = row_sampling([Sampling()] * count, range(count))

    def read(self, row: Rows | None, prompt: np.ndarray, start: int) -> tuple[Rows, int]:
        """Read one chunk of a prompt into a row of its own (None: a fresh one); the row, and where to go on."""
        if row is None:
            row = empty_rows(self._graph, self._state, 1, self._max_length)
        end = min(start + self._chunk, len(prompt))
        return read_chunk(self._graph, self._state, row, *padded([prompt[start:end]], self._chunk)), end

    def enter(self, row: Rows, slot: int, sampling: Sampling, number: int) -> None:
        """Put a row that has read its prompt in a slot, over whatever was there. number: by which it draws."""
        options = row_sampling([sampling], [number])
        row = row._replace(cache=self._from_stack(row.cache))
        self._rows, self._options = _enter(self._axes, self._rows, self._options, row, options, jnp.int32(slot))

    def decode(self, active: np.ndarray, top_wanted: bool) -> Drawn:
        """One token for every active slot, on the host; the likeliest tokens are filled in only where wanted."""
        self._rows, drawn = _decode(
            *self._decoder,
            self._rows,
            self._options,
            jnp.asarray(active),
            jnp.bool_(top_wanted),
            top=self._top,
        )
        return jax.device_get(drawn)


@functools.partial(jax.jit, static_argnums=0, static_argnames="top", donate_argnums=2)
def _decode(graph, state, rows: Rows, options: RowSampling, active, top_wanted, *, top: int) -> tuple[Rows, Drawn]:
    def likeliest() -> tuple[jax.Array, jax.Array]:
        values, tokens = jax.lax.top_k(jax.nn.log_softmax(rows.logits, axis=-1), top)
        return tokens.astype(jnp.int32), values

    def nothing() -> tuple[jax.Array, jax.Array]:
        shape = (rows.logits.shape[0], top)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    tokens, values = jax.lax.cond(top_wanted, likeliest, nothing)
    rows, drawn = advance(graph, state, rows, options, active, 0)
    return rows, drawn._replace(top_tokens=tokens, top_logprobs=values)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _enter(axes: tuple[int, ...], rows: Rows, options: RowSampling, row: Rows, own: RowSampling, slot):
    def put(axis: int, into: jax.Array, value: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(into, value, slot, axis)

    leaves, structure = jax.tree.flatten(rows.cache)
    cache = jax.tree.unflatten(structure, list(map(put, axes, leaves, jax.tree.leaves(row.cache))))
    others = (put(0, into, value) for into, value in zip(rows[1:], row[1:], strict=True))
    return Rows(cache, *others), RowSampling(*(put(0, into, value) for into, value in zip(options, own, strict=True)))


def _batch_axes(model: Decoder, max_length: int) -> tuple[int, ...]:
    """Which axis of every array of the caches is the batch: the one that grows with it."""
    one, two = (jax.tree.leaves(jax.eval_shape(lambda n=n: model.init_cache(n, max_length))) for n in (1, 2))
    return tuple(
        next(axis for axis, sizes in enumerate(zip(a.shape, b.shape, strict=True)) if sizes[0] != sizes[1])
        for a, b in zip(one, two, strict=True)
    )
