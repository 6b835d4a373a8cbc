"""Decoding step by step: read prompts in chunks into caches, then draw and read one token a row.

Everything that generates text, here or in a server, is made of these three programs: `empty_rows`, `read_chunk` and
`advance`. Their shapes are the number of rows, the chunk and the caches' capacity; no prompt length is among them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32

from dmattn_jax.sampling import RowSampling, draw

SMALLEST_BUCKET = 16


class Decoder(Protocol):
    """What decoding needs of a language model: an `nnx.Module` with these methods, and `config.vocab_size`."""

    @property
    def config(self) -> Any: ...

    def init_cache(self, batch: int, max_length: int) -> Any:
        """Empty caches for at most max_length tokens a row: a pytree of arrays, each with an axis of layers (a list
        of layers' caches when unrolled) and one of the batch."""
        ...

    def decode(
        self, tokens: Int[Array, "B T"], cache: Any, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T M"], Any]:
        """Hidden states of the next T tokens of every row, and the caches after them; segment id 0 is padding."""
        ...

    def logits(self, hidden: Float[Array, "*n M"]) -> Float[Array, "*n V"]: ...

    def unrolled(self) -> Decoder:
        """The same decoder with its layers, and the caches that it takes, as a list; itself if it has them so."""
        ...

    def from_stack(self, cache: Any) -> Any:
        """The caches of this decoder before it was unrolled, or its own, as it takes them."""
        ...


class Rows(NamedTuple):
    """Where every row stands. logits: of its next token. seen: which tokens it has. step: tokens drawn so far."""

    cache: Any
    logits: Float[Array, "B V"]
    seen: Bool[Array, "B V"]
    step: Int32[Array, " B"]


class Drawn(NamedTuple):
    """One token a row, its log-probability, and the N likeliest tokens with theirs.

    Log-probabilities are the model's own: log softmax of the logits, before penalty, temperature and cuts.
    """

    token: Int32[Array, " B"]
    logprob: Float[Array, " B"]
    top_tokens: Int32[Array, "B N"]
    top_logprobs: Float[Array, "B N"]


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def empty_rows(graph: Any, state: Any, batch: int, max_length: int) -> Rows:
    """Rows that have read nothing, with caches for max_length tokens each. graph, state: `nnx.split(model)`."""
    model = nnx.merge(graph, state)
    vocabulary = model.config.vocab_size
    return Rows(
        model.init_cache(batch, max_length),
        jnp.zeros((batch, vocabulary), jnp.float32),
        jnp.zeros((batch, vocabulary), bool),
        jnp.zeros(batch, jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_chunk(
    graph: Any, state: Any, rows: Rows, tokens: Int32[Array, "B T"], segment_ids: Int32[Array, "B T"]
) -> Rows:
    """Read the next tokens of every row, where segment_ids is 1, padding on the right; some rows may have none."""
    model = nnx.merge(graph, state)
    hidden, cache = model.decode(tokens, rows.cache, segment_ids)
    count = segment_ids.sum(axis=1)
    last = jnp.maximum(count - 1, 0)[:, None, None]
    logits = model.logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0])
    vocabulary = rows.seen.shape[1]
    row = jnp.arange(tokens.shape[0])[:, None]
    seen = rows.seen.at[row, jnp.where(segment_ids != 0, tokens, vocabulary)].set(True, mode="drop")
    return rows._replace(cache=cache, logits=jnp.where(count[:, None] > 0, logits, rows.logits), seen=seen)


def advance(
    graph: Any, state: Any, rows: Rows, sampling: RowSampling, active: Bool[Array, " B"], top: int
) -> tuple[Rows, Drawn]:
    """Draw the next token of every row and read it; rows that are not active stay as they are. Traced by callers.

    top: of how many likeliest tokens log-probabilities are wanted; static.
    """
    model = nnx.merge(graph, state)
    token = draw(rows.logits, rows.seen, rows.step, sampling)
    normaliser = jax.nn.logsumexp(rows.logits, axis=-1, keepdims=True)
    logprob = jnp.take_along_axis(rows.logits, token[:, None], axis=-1) - normaliser
    top_logits, top_tokens = jax.lax.top_k(rows.logits, top)
    drawn = Drawn(token, logprob[:, 0], top_tokens.astype(jnp.int32), top_logits - normaliser)
    hidden, cache = model.decode(token[:, None], rows.cache, active.astype(jnp.int32)[:, None])
    logits = jnp.where(active[:, None], model.logits(hidden[:, 0]), rows.logits)
    seen = rows.seen.at[jnp.arange(token.shape[0]), token].max(active)
    return Rows(cache, logits, seen, rows.step + active), drawn


def for_many_tokens(model: Decoder, rows: Rows) -> tuple[Decoder, Rows]:
    """What a loop over tokens is best given: the same, with layers and caches as lists where that pays.

    On a GPU it does: a loop over layers copies each layer's parameters and caches out of their stacks, and caches back,
    for every token. It takes room for a second copy of both, and the longer compilation of a program of all layers;
    where there is no room, and elsewhere, model and rows are returned as they are.
    """
    if not _has_room_for_copies((nnx.state(model), rows.cache)):
        return model, rows
    decoder = model.unrolled()
    return decoder, rows._replace(cache=decoder.from_stack(rows.cache))


def _has_room_for_copies(arrays: Any) -> bool:
    """Whether these are on a GPU whose memory holds them twice, and a tenth of it stays free."""
    shards = [shard.data for leaf in jax.tree.leaves(arrays) for shard in getattr(leaf, "addressable_shards", ())]
    # Not `pop`: the set is the array's own.
    device = next(iter(shards[0].devices())) if shards else None
    memory = device.memory_stats() if device is not None and device.platform == "gpu" else None
    if not memory:
        return False
    held = sum(shard.nbytes for shard in shards if device in shard.devices())
    return memory["bytes_in_use"] + held < 0.9 * memory["bytes_limit"]


def prefill(
    graph: Any, state: Any, prompts: Sequence[np.ndarray], *, max_length: int, chunk: int | None = None
) -> Rows:
    """Read whole prompts, `chunk` tokens at a time (None: all at once, padded to a power of two).

    max_length: tokens a row that the caches must take, prompt included. Memory besides the caches is that of one
    chunk. The result does not depend on the chunk, up to rounding.
    """
    longest = max(len(prompt) for prompt in prompts)
    width = bucket(longest)
    if chunk is not None:
        width = min(width, chunk)
    rows = empty_rows(graph, state, len(prompts), max_length)
    for start in range(0, longest, width):
        rows = read_chunk(graph, state, rows, *padded([prompt[start : start + width] for prompt in prompts], width))
    return rows


def padded(rows: Sequence[np.ndarray], width: int) -> tuple[Int32[Array, "B T"], Int32[Array, "B T"]]:
    """Token rows padded on the right to `width`, and 1 where a token is."""
    tokens = np.zeros((len(rows), width), np.int32)
    segment_ids = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        segment_ids[index, : len(row)] = 1
    return jnp.asarray(tokens), jnp.asarray(segment_ids)


def bucket(length: int) -> int:
    """The power of two to which a length is padded, so that a new length seldom compiles anew."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def check_prompt(model: Decoder, prompt: Sequence[int], name: str) -> np.ndarray:
    """The prompt as int32. Raises: ValueError when it is empty, or holds anything but ids of the vocabulary."""
    row = np.asarray(prompt)
    if row.ndim != 1:
        raise ValueError(f"{name} must be a sequence of token ids, got shape {row.shape}")
    if row.size == 0:
        raise ValueError(f"{name} is empty: give at least one token, such as the tokenizer's bos_id or eos_id")
    if not np.issubdtype(row.dtype, np.integer):
        raise ValueError(f"{name} must hold integer token ids, got {row.dtype}: encode the text first")
    check_ids(model, row, name)
    return row.astype(np.int32)


def check_ids(model: Decoder, ids: np.ndarray, name: str) -> None:
    """Raises: ValueError on an id out of the vocabulary."""
    vocabulary = model.config.vocab_size
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if wrong.size:
        raise ValueError(f"{name} must hold token ids in 0 … {vocabulary - 1}, got {wrong[0]}")
