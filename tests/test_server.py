"""The server, as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import json
import math
import socket
import threading
import time
import urllib.request

import jax.numpy as jnp
import openai
import pytest
import uvicorn
from flax import nnx

from dmattn_jax.generation import complete
from dmattn_jax.io.tokenizers import ByteTokenizer
from dmattn_jax.models import DogeConfig, DogeForCausalLM
from dmattn_jax.sampling import Sampling
from serve import app as serve_app
from serve.answers import Choice, Form
from serve.engine import Engine, Finished, Request, Token
from serve.generation import Generation

NAME = "tiny"
TOKENIZER = ByteTokenizer()


def make_model() -> DogeForCausalLM:
    config = DogeConfig(
        vocab_size=257,
        hidden_size=22,
        intermediate_size=37,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=10,
        window=(5, 7),
        dtype="float32",
        init_std=0.5,
    )
    model = DogeForCausalLM(config, rngs=nnx.Rngs(1))
    model.blocks.attention.gate.A[...] = jnp.asarray([[0.9, -0.6], [-0.5, 1.1]])
    # ASCII only, and no end of the text: what is sampled has text, and as much of it as was asked for.
    model.embedding[...] = model.embedding[...].at[128:].set(0)
    return model


MODEL = make_model()


@pytest.fixture(scope="module")
def engine():
    return Engine(MODEL, slots=3, max_length=96, prefill_chunk=16, max_waiting=4)


@pytest.fixture(scope="module")
def address(engine):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(serve_app.create_app(engine, TOKENIZER, NAME), port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    yield f"127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def get(address: str, path: str) -> str:
    with urllib.request.urlopen(f"http://{address}{path}") as answer:
        return answer.read().decode()


def until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen within ten seconds")


def expected(prompt: str, row: int = 0, max_new_tokens: int = 16, **options) -> str:
    prompts = [TOKENIZER.encode(prompt)] * (row + 1)
    completions = complete(
        MODEL,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(**options),
        tokenizer=TOKENIZER,
        stop_tokens=[256],
    )
    return completions[row].text


def test_completions(client):
    answer = client.completions.create(model=NAME, prompt="hello", temperature=0)
    assert answer.choices[0].text == expected("hello")
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 16, 21)
    assert answer.object == "text_completion"
    ids = client.completions.create(model=NAME, prompt=TOKENIZER.encode("hello"), temperature=0)
    assert ids.choices[0].text == answer.choices[0].text
    assert client.completions.create(model=NAME, prompt="", temperature=0, max_tokens=3).choices[0].text


@pytest.mark.slow
def test_several_prompts_and_choices_have_a_seed(client):
    options = {"temperature": 1.2, "top_p": 0.9, "seed": 5}
    answer = client.completions.create(model=NAME, prompt=["one", "other"], n=2, **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert texts == [expected(prompt, row, **options) for prompt in ("one", "other") for row in (0, 1)]
    again = client.completions.create(model=NAME, prompt="one", n=2, **options)
    assert [choice.text for choice in again.choices] == texts[:2]
    unseeded = [client.completions.create(model=NAME, prompt="one", temperature=2.0).choices[0].text for _ in "ab"]
    assert unseeded[0] != unseeded[1]


def test_chat(client):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    answer = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_completion_tokens=7)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected("be brief\nhi\n", max_new_tokens=7)
    unlimited = client.chat.completions.create(model=NAME, messages=messages, temperature=0)
    assert unlimited.usage.total_tokens <= 96


def test_streams_are_the_whole_answer_in_pieces(client):
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 12, "stream": True}
    chunks = list(client.completions.create(model=NAME, prompt="abc", n=2, **options))
    for row in (0, 1):
        texts = [c.choices[0].text for c in chunks if c.choices[0].index == row]
        assert "".join(texts) == expected("abc", row, max_new_tokens=12, temperature=1.0, seed=3)
        assert len(texts) > 3
    assert [c.choices[0].finish_reason for c in chunks].count("length") == 2
    messages = [{"role": "user", "content": "abc"}]
    chunks = list(
        client.chat.completions.create(model=NAME, messages=messages, stream_options={"include_usage": True}, **options)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected("abc\n", max_new_tokens=12, temperature=1.0, seed=3)
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-2].choices[0].finish_reason == "length"


def test_stop_strings_end_the_text_before_them(client):
    text = expected("hello")
    stop = text[4:6]
    answer = client.completions.create(model=NAME, prompt="hello", temperature=0, stop=[stop, "\x00\x00\x00"])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    stream = client.completions.create(model=NAME, prompt="hello", temperature=0, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_logprobs(client):
    plain = complete(MODEL, [TOKENIZER.encode("abc")], max_new_tokens=4)[0]
    text = client.completions.create(model=NAME, prompt="abc", temperature=0, max_tokens=4, logprobs=2)
    assert text.choices[0].logprobs.token_logprobs == pytest.approx(plain.logprobs, abs=1e-3)
    assert all(len(top) == 2 for top in text.choices[0].logprobs.top_logprobs)
    messages = [{"role": "user", "content": "abc"}]
    chat = client.chat.completions.create(
        model=NAME, messages=messages, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2
    )
    entries = chat.choices[0].logprobs.content
    assert len(entries) == 4
    assert entries[0].top_logprobs[0].logprob == pytest.approx(entries[0].logprob)
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == chat.choices[0].message.content
    pieces = client.completions.create(model=NAME, prompt="abc", temperature=0, max_tokens=4, logprobs=2, stream=True)
    offsets = [offset for piece in pieces for offset in piece.choices[0].logprobs.text_offset]
    assert offsets == text.choices[0].logprobs.text_offset == [0, 1, 2, 3]


def test_logprobs_of_pieces_of_characters():
    form = Form.new(TOKENIZER, NAME, chat=False, logprobs=True)
    top = ((0xC3, -0.1), (ord("a"), -3.0), (0xFF, -9.0), (300, -10.0), (256, -11.0))
    choice = Choice("é", [Token(0xC3, -0.1, top), Token(0xA9, -math.inf)], [0, 0])
    found = form.whole([choice], {})["choices"][0]["logprobs"]
    assert found["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert found["token_logprobs"] == [-0.1, -9999.0]
    assert found["top_logprobs"][0] == {"bytes:\\xc3": -0.1, "a": -3.0, "bytes:\\xff": -9.0, "": -10.0}
    chat = Form.new(TOKENIZER, NAME, chat=True, logprobs=True).whole([choice], {})["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in chat] == [[0xC3], [0xA9]]


def test_offsets_count_whole_characters(engine):
    """Of a split character's two tokens both stand where it begins."""

    class Drawn:
        vocab_size, max_length = 257, 96

        def submit(self, requests):
            for token in ("aéb").encode():
                requests[0][1](Token(token, -1.0))
            requests[0][1](Finished("length"))
            return [None]

    async def collected() -> list[int]:
        generation = Generation(Drawn(), TOKENIZER, [Request([65], 4)], [], continues=True)
        return [offset async for _, piece in generation.pieces() for offset in piece.offsets]

    assert asyncio.run(collected()) == [0, 1, 1, 2]


def test_an_answer_ends_at_any_of_the_models_ends(address, client, monkeypatch):
    whole = complete(MODEL, [TOKENIZER.encode("hello")], max_new_tokens=16)[0].tokens
    monkeypatch.setattr(TOKENIZER, "stop_ids", (256, whole[4]))
    answer = client.completions.create(model=NAME, prompt="hello", temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    assert TOKENIZER.encode(answer.choices[0].text) == whole[: whole.index(whole[4])]


@pytest.mark.parametrize("name", ["text_prompt", "chat_prompt"])
def test_a_prompt_that_takes_long_to_read_keeps_nobody_waiting(address, client, monkeypatch, name):
    read, go_on = threading.Event(), threading.Event()

    def slowly(tokenizer, prompt):
        read.set()
        assert go_on.wait(60)
        return [65]

    monkeypatch.setattr(serve_app, name, slowly)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        if name == "text_prompt":
            asked = pool.submit(client.completions.create, model=NAME, prompt="x", max_tokens=2)
        else:
            messages = [{"role": "user", "content": "x"}]
            asked = pool.submit(client.chat.completions.create, model=NAME, messages=messages, max_tokens=2)
        try:
            assert read.wait(60)
            assert json.loads(get(address, "/health"))["status"] == "ok"
        finally:
            go_on.set()
        assert asked.result().usage.completion_tokens == 2


def test_requests_at_once_get_what_they_get_alone(client):
    def ask(number: int) -> str:
        answer = client.completions.create(
            model=NAME, prompt="x" * (1 + 5 * number), max_tokens=8 + 3 * number, temperature=number % 2, seed=number
        )
        return answer.choices[0].text

    alone = [ask(number) for number in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == alone


def test_models_health_and_metrics(client, address):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "dmattn"
    assert json.loads(get(address, "/health"))["status"] == "ok"
    client.completions.create(model=NAME, prompt="abc", max_tokens=3)
    metrics = get(address, "/metrics")
    for line in (
        'dmattn_requests_total{route="/v1/completions",status="200"}',
        "dmattn_generated_tokens_total",
        "dmattn_prompt_tokens_total",
        "dmattn_requests_running 0.0",
        "dmattn_first_token_seconds_count",
    ):
        assert line in metrics


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0, got -1"),
        ({"top_p": 2}, "top_p: Input should be less than or equal to 1, got 2"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1, got 0"),
        ({"max_tokens": 500}, "a request may have 96 tokens, got 5 in the prompt and 500 to generate"),
        ({"prompt": "x" * 95}, "a request may have 96 tokens, got 95"),
        ({"prompt": [300]}, "prompt must hold token ids in 0 … 256, got 300"),
        ({"prompt": []}, "prompt is empty"),
        ({"stop": ""}, "String should have at least 1 character"),
        ({"frequency_penalty": 1}, "frequency_penalty: Input should be 0, got 1"),
        ({"extra_body": {"colour": "red"}}, "colour is not supported by this server"),
        ({"n": 17}, "n: Input should be less than or equal to 16"),
        ({"logprobs": 21}, "logprobs: Input should be less than or equal to 20"),
    ],
)
def test_bad_input_is_400_with_a_reason(client, changes, message):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**({"model": NAME, "prompt": "hello"} | changes))
    assert message in refused.value.body["message"]
    assert refused.value.body["type"] == "invalid_request_error"


def test_unknown_models_routes_methods_and_bodies(client, address):
    with pytest.raises(openai.NotFoundError, match="no model 'other' here: the one there is, is 'tiny'"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("other")
    assert 'route="/v1/models/{name:path}",status="404"' in get(address, "/metrics")
    assert 'route="/v1/models/other"' not in get(address, "/metrics")
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model=NAME, messages=[])
    with pytest.raises(openai.BadRequestError, match="role"):
        client.chat.completions.create(model=NAME, messages=[{"role": "robot", "content": "x"}])

    def status(method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> int:
        connection = http.client.HTTPConnection(address)
        connection.request(method, path, body, {"Content-Type": kind})
        answer = connection.getresponse()
        assert json.loads(answer.read())["error"]["message"]
        connection.close()
        return answer.status

    assert status("GET", "/v1/nothing") == 404
    assert status("GET", "/v1/completions") == 405
    assert status("POST", "/v1/completions", b"{") == 400
    assert status("POST", "/v1/completions", b"\xff\xfe") == 400
    assert status("POST", "/v1/completions", b"[1]") == 400
    assert status("POST", "/v1/completions", b"[" * 100_000) == 400
    assert status("POST", "/v1/completions", b"{}", "text/plain") == 415
    assert status("POST", "/v1/completions", b" " * (serve_app.MAX_BODY_BYTES + 1)) == 413


def test_too_many_at_once_are_429(client, engine, monkeypatch):
    decode = engine._slots.decode

    def slowly(*args):
        time.sleep(0.05)
        return decode(*args)

    monkeypatch.setattr(engine._slots, "decode", slowly)
    tickets = engine.submit([(Request([1], 90), lambda event: None)] * 7)
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(model=NAME, prompt=["x"] * 7)
    assert refused.value.body["code"] == "too_many_requests"
    assert refused.value.response.headers["retry-after"] == "1"
    for ticket in tickets:
        engine.cancel(ticket)
    until(lambda: engine.running == engine.waiting == 0)
    # What could never be taken is not to be tried again.
    with pytest.raises(openai.BadRequestError, match=r"at most 7 requests .* in one call, got 8"):
        client.completions.create(model=NAME, prompt=["x"] * 4, n=2)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot(address, engine, stream, monkeypatch):
    decode = engine._slots.decode

    def slowly(*args):
        time.sleep(0.05)
        return decode(*args)

    monkeypatch.setattr(engine._slots, "decode", slowly)
    connection = http.client.HTTPConnection(address)
    body = {"model": NAME, "prompt": "x", "max_tokens": 90, "n": 3, "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    until(lambda: engine.running == 3)
    before = engine.generated_tokens
    connection.sock.close() if not stream else connection.close()
    until(lambda: engine.running == 0)
    assert engine.generated_tokens - before < 3 * 80
