"""Continuous batching: whoever shares the slots, and whenever it joins, a request gets what it gets alone."""

import numpy as np
import pytest
from test_generation import LONG, MODEL, PROMPTS, make

from dmattn_jax import decoding
from dmattn_jax.generation import generate
from dmattn_jax.sampling import Sampling
from pallas_kernels.decoding import room_for
from serve import slots
from serve.engine import BusyError, Engine, EngineStoppedError, Finished, Request, Token, TooLongError


def engine_of(model=MODEL, **changes) -> Engine:
    return Engine(model, **({"slots": 3, "max_length": 64, "prefill_chunk": 8, "max_waiting": 5} | changes))


ENGINE = engine_of()


class Heard(list):
    """A listener."""

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self if isinstance(event, Token)]

    @property
    def reason(self) -> str | None:
        return self[-1].reason if self and isinstance(self[-1], Finished) else None


def submit(engine: Engine, request: Request):
    heard = Heard()
    (ticket,) = engine.submit([(request, heard.append)])
    return heard, ticket


def drain(engine: Engine) -> None:
    while engine.step():
        pass


REQUESTS = [
    Request(LONG, 9),
    Request(PROMPTS[1], 13, Sampling(temperature=1.3, seed=7)),
    Request(PROMPTS[2], 5, Sampling(temperature=0.9, top_k=9, seed=3), row=2),
    Request(PROMPTS[0], 11, Sampling(repetition_penalty=1.4)),
    Request(LONG[:8], 3, Sampling(temperature=2.0, min_p=0.05)),
    Request(PROMPTS[2], 13),
]


def test_requests_that_join_and_leave_get_what_they_get_alone():
    together = []
    for request in REQUESTS:
        together.append(submit(ENGINE, request)[0])
        ENGINE.step()
    compiled = slots._decode._cache_size(), slots._enter._cache_size(), decoding.read_chunk._cache_size()
    drain(ENGINE)
    assert [heard.reason for heard in together] == ["length"] * 6
    for request, heard in zip(REQUESTS, together, strict=True):
        single = submit(ENGINE, request)[0]
        drain(ENGINE)
        assert heard == single, "the same tokens and the same log-probabilities"
    assert (slots._decode._cache_size(), slots._enter._cache_size(), decoding.read_chunk._cache_size()) == compiled


def test_layers_side_by_side_serve_the_same(monkeypatch):
    """What a GPU with room for copies does."""
    monkeypatch.setattr(decoding, "_has_room_for_copies", lambda arrays: True)
    engine = engine_of(slots=2)
    for served in (engine, ENGINE):
        heard = [submit(served, request)[0] for request in REQUESTS[:3]]
        drain(served)
        if served is engine:
            first = heard
    for one, other in zip(first, heard, strict=True):
        assert (one.tokens, one.reason) == (other.tokens, other.reason)


@pytest.mark.slow
def test_dense_models_are_served_too():
    model = make("mha")
    engine = engine_of(model, slots=2, max_length=32)
    heard = [submit(engine, Request(prompt, 5))[0] for prompt in PROMPTS]
    drain(engine)
    assert [h.tokens for h in heard] == generate(model, PROMPTS, max_new_tokens=5)


def test_a_row_of_a_dynamic_mask_model_is_its_window():
    cache = engine_of(max_length=1 << 20)._slots._rows.cache
    # A GPU with room has a cache a layer.
    keys = cache.keys if hasattr(cache, "keys") else np.stack([layer.keys for layer in cache])
    assert keys.shape == (2, 3, 2, room_for(7, 10, keys.dtype), 10)


def test_stop_tokens_and_logprobs():
    free, _ = submit(ENGINE, Request(LONG, 9))
    drain(ENGINE)
    stop = free.tokens[4]
    heard, _ = submit(ENGINE, Request(LONG, 9, stop_tokens=(stop,), top_logprobs=3))
    drain(ENGINE)
    cut = free.tokens.index(stop)
    assert heard.tokens == free.tokens[:cut]
    assert heard.reason == "stop"
    for event in heard[:-1]:
        assert event.top[0] == (event.token, pytest.approx(event.logprob, abs=1e-5)), "greedy: the likeliest"
        assert len(event.top) == 3
    assert [event.logprob for event in heard[:-1]] == [event.logprob for event in free[:cut]]


def test_a_cancelled_request_frees_its_slot_and_says_nothing_more():
    heard = [submit(ENGINE, Request(PROMPTS[0], 40)) for _ in range(5)]
    for _ in range(4):
        ENGINE.step()
    assert (ENGINE.running, ENGINE.waiting) == (3, 2)
    said = [len(h) for h, _ in heard]
    for _, ticket in heard[1:]:
        ENGINE.cancel(ticket)
    ENGINE.step()
    assert (ENGINE.running, ENGINE.waiting) == (1, 0)
    drain(ENGINE)
    assert [len(h) for h, _ in heard[1:]] == said[1:]
    assert heard[0][0].reason == "length"
    assert len(heard[0][0].tokens) == 40


def test_what_does_not_fit_is_refused():
    with pytest.raises(TooLongError, match="may have 64 tokens, got 19 in the prompt and 46 to generate"):
        submit(ENGINE, Request(LONG, 46))
    with pytest.raises(ValueError, match="prompt must hold token ids in 0 … 60, got 61"):
        submit(ENGINE, Request([61], 1))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        ENGINE.submit([(Request([1], 1), print), (Request([], 1), print)])
    tickets = [submit(ENGINE, Request([1], 1))[1] for _ in range(8)]
    with pytest.raises(BusyError, match="0 requests are running and 8 waiting, of at most 5"):
        submit(ENGINE, Request([1], 1))
    for ticket in tickets:
        ENGINE.cancel(ticket)
    drain(ENGINE)
    with pytest.raises(ValueError, match="max_length must be >= 2, got 1"):
        Engine(MODEL, max_length=1)
    with pytest.raises(ValueError, match="slots must be >= 1, got 0"):
        engine_of(slots=0)


def test_a_failure_reaches_every_request(monkeypatch):
    engine = engine_of()
    heard = [submit(engine, Request([1], 9))[0] for _ in range(4)]
    monkeypatch.setattr(engine._slots, "decode", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine._loop()
    assert [h.reason for h in heard] == ["error"] * 4
    assert "ZeroDivisionError" in heard[0][-1].error
    with pytest.raises(EngineStoppedError, match="ZeroDivisionError"):
        submit(engine, Request([1], 1))


def test_closing_ends_what_is_under_way():
    engine = engine_of()
    engine.start()
    heard, _ = submit(engine, Request([1], 63))
    engine.close()
    assert heard.reason in ("error", "length")
    with pytest.raises(EngineStoppedError, match="shutting down"):
        submit(engine, Request([1], 1))
