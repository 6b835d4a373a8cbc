"""Text generation: batched, with caches that hold exactly what the model's attention can see."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int32

from dmattn_jax.decoding import Decoder, Drawn, Rows, advance, bucket, check_ids, check_prompt, for_many_tokens, prefill
from dmattn_jax.io.tokenizers import Tokenizer
from dmattn_jax.nn.linear import in_compute_dtype
from dmattn_jax.sampling import RowSampling, Sampling, row_sampling
from dmattn_jax.text_stream import TextStream, continuation

STOP_STRING_STEPS = 16
"""Tokens decoded between two looks for stop strings, which only the host can see."""


@dataclass
class Completion:
    """The new tokens of one prompt. logprobs: the model's own, before temperature and cuts. top_logprobs: of the
    likeliest tokens at every step, by id. text: only with a tokenizer; it ends before the stop string.
    finish_reason: "stop" for a stop token or string, "length" for max_new_tokens."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    text: str | None = None
    finish_reason: Literal["stop", "length"] = "length"


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    prefill_chunk: int | None = None,
) -> list[list[int]]:
    """Continue every prompt: the new tokens of each, at most max_new_tokens.

    prompts: token ids, of unequal lengths. temperature … seed: see `Sampling`. A row ends before the first of
    stop_tokens, which is not returned, and before the token in which one of stop_strings begins; those need the
    tokenizer. The same seed gives the same text; row r of a batch draws what row r of any other batch with that
    prompt draws. prefill_chunk: read prompts that many tokens at a time, in the memory of one chunk; None: whole.

    Prompts and outputs are padded to powers of two, so that a new length seldom compiles anew; the number of
    prompts does.
    Raises: ValueError on an empty prompt, an id out of the vocabulary, or an option out of its range.
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    completions = complete(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        prefill_chunk=prefill_chunk,
    )
    return [completion.tokens for completion in completions]


def complete(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    top_logprobs: int = 0,
    prefill_chunk: int | None = None,
) -> list[Completion]:
    """`generate`, with log-probabilities, text, and why each row ended.

    top_logprobs: how many of the likeliest tokens to give at every step; another number compiles anew.
    Raises: as `generate`.
    """
    rows = [check_prompt(model, prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)]
    _check(model, max_new_tokens, stop_tokens, prefill_chunk)
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer that reads them: pass tokenizer=")
    if not 0 <= top_logprobs <= model.config.vocab_size:
        raise ValueError(f"top_logprobs must be in 0 … {model.config.vocab_size}, got {top_logprobs}")
    if not rows:
        return []
    streams = [TextStream(tokenizer, stop_strings, row.tolist()) for row in rows] if tokenizer else []
    texts, pushed = [""] * len(streams), [0] * len(streams)
    run = _Run(model, rows, sampling or Sampling(), stop_tokens, max_new_tokens, top_logprobs, prefill_chunk)
    steps = STOP_STRING_STEPS if stop_strings else max_new_tokens
    while not run.ended:
        run.advance(steps)
        for row, stream in enumerate(streams):
            for token in run.tokens(row, pushed[row]):
                texts[row] += stream.push(token)
            pushed[row] = run.counts[row]
            if stream.stopped:
                run.end(row)
    completions = run.completions()
    for row, stream in enumerate(streams):
        completions[row].text = texts[row] + stream.finish()
        if stream.stopped:
            assert tokenizer is not None
            _cut(completions[row], tokenizer, rows[row].tolist())
    return completions


def generate_stream(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
    prefill_chunk: int | None = None,
) -> Iterator[int]:
    """The tokens of `generate(model, [prompt], …)[0]`, one by one as they come.

    Raises: as `generate`, at the call.
    """
    row = check_prompt(model, prompt, "prompt")
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    _check(model, max_new_tokens, stop_tokens, prefill_chunk)

    def stream() -> Iterator[int]:
        run = _Run(model, [row], sampling, stop_tokens, max_new_tokens, 0, prefill_chunk)
        while not run.ended:
            before = run.counts[0]
            run.advance(1)
            yield from run.tokens(0, before)

    return stream()


def stream_text(
    model: Decoder,
    prompt: Sequence[int],
    tokenizer: Tokenizer,
    *,
    stop_strings: Sequence[str] = (),
    continues: bool = True,
    **options: Any,
) -> Iterator[str]:
    """The text that continues the prompt, in pieces of whole characters. continues: False for an answer, which begins
    a text of its own. options: as for `generate_stream`."""
    tokens = generate_stream(model, prompt, **options)
    stream = TextStream(tokenizer, stop_strings, prompt if continues else ())

    def pieces() -> Iterator[str]:
        for token in tokens:
            if piece := stream.push(token):
                yield piece
            if stream.stopped:
                return
        if piece := stream.finish():
            yield piece

    return pieces()


class _Progress(NamedTuple):
    """Rows and what they have drawn, in buffers of a power of two."""

    rows: Rows
    drawn: Drawn  # each with the buffer's axis after the batch's
    done: Bool[Array, " B"]
    step: Int32[Array, ""]


class _Run:
    """One batch of prompts on its way: on the device until `advance` returns, then readable."""

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        stop_tokens: Sequence[int],
        limit: int,
        top: int,
        chunk: int | None,
    ) -> None:
        model = in_compute_dtype(model)
        self._sampling = row_sampling([sampling] * len(prompts), range(len(prompts)))
        self._stops = _stop_array(stop_tokens)
        self._limit = limit
        batch, capacity = len(prompts), bucket(limit)
        max_length = bucket(max(map(len, prompts))) + capacity
        rows = prefill(*nnx.split(model), prompts, max_length=max_length, chunk=chunk)
        model, rows = for_many_tokens(model, rows)
        self._graph, self._state = nnx.split(model)
        self._progress = _Progress(
            rows,
            Drawn(
                jnp.zeros((batch, capacity), jnp.int32),
                jnp.zeros((batch, capacity), jnp.float32),
                jnp.zeros((batch, capacity, top), jnp.int32),
                jnp.zeros((batch, capacity, top), jnp.float32),
            ),
            jnp.zeros(batch, bool),
            jnp.int32(0),
        )
        self.counts = [0] * batch
        self._finished = np.zeros(batch, bool)

    @property
    def ended(self) -> bool:
        return bool(self._finished.all()) or int(self._progress.step) >= self._limit

    def advance(self, steps: int) -> None:
        """Draw up to `steps` tokens more in every row that has not ended."""
        until = min(int(self._progress.step) + steps, self._limit)
        self._progress = _decode_until(
            self._graph, self._state, self._progress, self._sampling, self._stops, jnp.int32(until)
        )
        self._finished = np.array(self._progress.done)
        self.counts = np.asarray(self._progress.rows.step).tolist()

    def end(self, row: int) -> None:
        self._finished[row] = True
        self._progress = self._progress._replace(done=jnp.asarray(self._finished))

    def tokens(self, row: int, start: int) -> list[int]:
        return np.asarray(self._progress.drawn.token[row])[start : self.counts[row]].tolist()

    def completions(self) -> list[Completion]:
        tokens, logprobs, top_tokens, top_logprobs = (np.asarray(array) for array in self._progress.drawn)
        return [
            Completion(
                tokens[row, :count].tolist(),
                logprobs[row, :count].tolist(),
                [
                    dict(zip(ids.tolist(), values.tolist(), strict=True))
                    for ids, values in zip(top_tokens[row, :count], top_logprobs[row, :count], strict=True)
                ],
                finish_reason="stop" if self._finished[row] else "length",
            )
            for row, count in enumerate(self.counts)
        ]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode_until(graph, state, progress: _Progress, sampling: RowSampling, stops, until) -> _Progress:
    top = progress.drawn.top_tokens.shape[2]

    def running(progress: _Progress):
        return (progress.step < until) & ~progress.done.all()

    def one(progress: _Progress):
        # A stop token is drawn, read and not counted.
        rows, drawn = advance(graph, state, progress.rows, sampling, ~progress.done, top)
        done = progress.done | (drawn.token[:, None] == stops).any(axis=1)
        rows = rows._replace(step=jnp.where(done, progress.rows.step, rows.step))
        kept = jax.tree.map(lambda buffer, new: buffer.at[:, progress.step].set(new), progress.drawn, drawn)
        return _Progress(rows, kept, done, progress.step + 1)

    return jax.lax.while_loop(running, one, progress)


def _cut(completion: Completion, tokenizer: Tokenizer, prompt: list[int]) -> None:
    """Drop the tokens from the one in which the stop string begins."""
    assert completion.text is not None
    count = len(completion.tokens)
    while count and not completion.text.startswith(continuation(tokenizer, prompt, completion.tokens[:count])):
        count -= 1
    del completion.tokens[count:], completion.logprobs[count:], completion.top_logprobs[count:]
    completion.finish_reason = "stop"


def _stop_array(stop_tokens: Sequence[int]) -> Int32[Array, " N"]:
    """Stop tokens padded to a power of two with −1, which is no token."""
    size = 1 << max(len(stop_tokens) - 1, 0).bit_length()
    return jnp.asarray(np.array([*stop_tokens, *[-1] * (size - len(stop_tokens))], np.int32))


def _check(model: Decoder, max_new_tokens: int, stop_tokens: Sequence[int], prefill_chunk: int | None) -> None:
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an int >= 1, got {max_new_tokens}")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk must be >= 1, got {prefill_chunk}: None reads whole prompts")
    if np.ndim(stop_tokens) != 1:
        raise ValueError(f"stop_tokens must be a sequence of ids, got {stop_tokens!r}")
    if len(stop_tokens):
        check_ids(model, np.asarray(stop_tokens), "stop_tokens")
