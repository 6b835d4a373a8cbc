"""OpenAI's routes over an engine, as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from dmattn_jax.chat import chat_prompt, text_prompt
from dmattn_jax.io.tokenizers import Tokenizer
from serve import engine as batching
from serve.answers import Choice, Form, Json, usage
from serve.engine import Engine
from serve.errors import ApiError
from serve.generation import Generation
from serve.metrics import Metrics
from serve.schemas import ChatBody, CompletionBody, parse

MAX_BODY_BYTES = 8 * 2**20
COMPLETION_TOKENS = 16
"""max_tokens of /v1/completions where it is not given, as OpenAI has it."""


def create_app(engine: Engine, tokenizer: Tokenizer, name: str) -> Starlette:
    """The application; it starts the engine and closes it. name: of the model, as requests must give it."""
    server = _Server(engine, tokenizer, name)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(engine.start)
        try:
            yield
        finally:
            await asyncio.to_thread(engine.close)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        server.metrics.requests.labels(paths[request.scope["endpoint"]], error.status).inc()
        return error.response()

    async def not_there(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def broken(request: Request, error: Exception) -> Response:
        return ApiError(500, f"{type(error).__name__}: see the server's log", code="internal_error").response()

    routes = [
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.one_model),
        Route("/health", server.health),
        Route("/metrics", server.show_metrics),
    ]
    # Counted by route, not by address: everybody could make new ones.
    paths = {route.endpoint: route.path for route in routes}
    return Starlette(
        routes=routes,
        exception_handlers={ApiError: refused, HTTPException: not_there, ClientDisconnect: gone, Exception: broken},
        lifespan=lifespan,
    )


class _Server:
    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str) -> None:
        self.engine, self.tokenizer, self.name = engine, tokenizer, name
        self.metrics = Metrics(engine)
        self._created = int(time.time())

    async def health(self, request: Request) -> Response:
        if self.engine.failure:
            return ApiError(503, self.engine.failure, code="engine_failed").response()
        return JSONResponse({"status": "ok", "running": self.engine.running, "waiting": self.engine.waiting})

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> Response:
        body = parse(CompletionBody, await _read_body(request))
        self._check_model(body.model)
        # Long texts take seconds, and templates as long as they like: other requests go on meanwhile.
        prompts = await asyncio.to_thread(lambda: [self._tokens(prompt) for prompt in _prompts(body.prompt)])
        limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        form = Form.new(self.tokenizer, self.name, chat=False, logprobs=body.logprobs is not None)
        return await self._answer(request, body, prompts, limit, form, body.logprobs or 0)

    async def chat(self, request: Request) -> Response:
        body = parse(ChatBody, await _read_body(request))
        self._check_model(body.model)
        try:
            messages = [message.plain() for message in body.messages]
            prompt = await asyncio.to_thread(chat_prompt, self.tokenizer, messages)
        except ValueError as error:  # a template may refuse an order of roles
            raise ApiError(400, str(error), param="messages", code="invalid_value") from None
        # Without a limit of its own an answer may take what the prompt leaves.
        limit = body.max_completion_tokens or body.max_tokens or max(1, self.engine.max_length - len(prompt))
        form = Form.new(self.tokenizer, self.name, chat=True, logprobs=body.logprobs)
        return await self._answer(request, body, [prompt], limit, form, body.top_logprobs)

    async def _answer(
        self,
        request: Request,
        body: CompletionBody | ChatBody,
        prompts: Sequence[list[int]],
        limit: int,
        form: Form,
        top: int,
    ) -> Response:
        sampling = body.sampling()
        # The copies of one prompt draw as the rows of a batch of it do.
        requests = [
            batching.Request(prompt, limit, sampling, row, self.tokenizer.stop_ids, top)
            for prompt in prompts
            for row in range(body.n)
        ]
        began = time.monotonic()
        prompt_tokens = sum(map(len, prompts))
        generation = Generation(self.engine, self.tokenizer, requests, body.stops, continues=not form.chat)
        pieces = self._timed(generation, began)
        if body.stream:
            self.metrics.requests.labels(request.url.path, 200).inc()
            events = _events(pieces, form, len(requests), prompt_tokens, body.stream_options.include_usage)
            return _EventStream(events, generation)
        choices = await _collect(request, generation, pieces, len(requests))
        self.metrics.requests.labels(request.url.path, 200).inc()
        generated = sum(len(choice.tokens) for choice in choices)
        return JSONResponse(form.whole(choices, usage(prompt_tokens, generated)))

    async def _timed(self, generation: Generation, began: float) -> AsyncIterator[tuple[int, Choice]]:
        first = True
        async for piece in generation.pieces():
            if first:
                self.metrics.first_token.observe(time.monotonic() - began)
                first = False
            yield piece
        self.metrics.duration.observe(time.monotonic() - began)

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        return text_prompt(self.tokenizer, prompt) if isinstance(prompt, str) else prompt

    def _check_model(self, name: str) -> None:
        if name != self.name:
            reason = f"no model {name!r} here: the one there is, is {self.name!r}"
            raise ApiError(404, reason, param="model", code="model_not_found")

    def _model(self) -> Json:
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "dmattn",
            "max_model_len": self.engine.max_length,
        }


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """One or several prompts, as a list."""
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)


async def _read_body(request: Request) -> bytes:
    """Raises: ApiError 415 and 413."""
    # A web page of another origin cannot send this type without asking first.
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send JSON, with the header Content-Type: application/json", code="unsupported_media_type")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
    return bytes(body)


async def _collect(
    request: Request, generation: Generation, pieces: AsyncIterator[tuple[int, Choice]], count: int
) -> list[Choice]:
    """All choices, whole. Raises: ClientDisconnect as soon as the client has gone."""
    choices = [Choice() for _ in range(count)]

    async def gather() -> None:
        async for index, piece in pieces:
            choices[index].text += piece.text
            choices[index].tokens += piece.tokens
            choices[index].offsets += piece.offsets
            choices[index].finish_reason = piece.finish_reason

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(gather()), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        tasks[0].result()
    finally:
        generation.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return choices


class _EventStream(StreamingResponse):
    """Server-sent events that free their slots at the end, also where the client goes before the first of them."""

    def __init__(self, events: AsyncIterator[str], generation: Generation) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


async def _events(
    pieces: AsyncIterator[tuple[int, Choice]],
    form: Form,
    count: int,
    prompt_tokens: int,
    with_usage: bool,
) -> AsyncIterator[str]:
    generated = 0
    try:
        for index in range(count):
            if begin := form.first_chunk(index):
                yield _event(begin)
        async for index, piece in pieces:
            generated += len(piece.tokens)
            if piece.text or piece.finish_reason or (form.logprobs and piece.tokens):
                yield _event(form.chunk(index, piece))
        if with_usage:
            yield _event(form.usage_chunk(usage(prompt_tokens, generated)))
        yield "data: [DONE]\n\n"
    except ApiError as error:  # the status has been sent: the error is an event
        yield _event(error.body())


def _event(value: Json) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
