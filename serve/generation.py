"""One HTTP request's way through the engine: its choices' tokens, from the engine's thread, as pieces of text."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Callable, Sequence

from dmattn_jax.io.tokenizers import Tokenizer
from dmattn_jax.text_stream import TextStream
from serve.answers import Choice
from serve.engine import BusyError, Engine, EngineStoppedError, Finished, Request, Token, TooLongError
from serve.errors import ApiError


class Generation:
    """The choices of one HTTP request. Close it, whatever happens: that frees their slots."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        stops: Sequence[str],
        *,
        continues: bool,
    ) -> None:
        """continues: whether the text goes on from the prompt; an answer in a chat begins one of its own.

        Raises: ApiError when the engine refuses them.
        """
        self._engine, self._tokenizer = engine, tokenizer
        self._streams = [TextStream(tokenizer, stops, request.prompt if continues else ()) for request in requests]
        self._queue: asyncio.Queue[tuple[int, Token | Finished]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listener(index: int) -> Callable[[Token | Finished], None]:
            def tell(event: Token | Finished) -> None:
                # Once the server's loop is closed nobody listens.
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

            return tell

        try:
            self._tickets = engine.submit([(request, listener(index)) for index, request in enumerate(requests)])
        except BusyError as error:
            raise ApiError(429, str(error), code="too_many_requests") from None
        except EngineStoppedError as error:
            raise ApiError(503, str(error), code="engine_stopped") from None
        except TooLongError as error:
            raise ApiError(400, str(error), code="context_length_exceeded") from None
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt", code="invalid_value") from None

    async def pieces(self) -> AsyncIterator[tuple[int, Choice]]:
        """(choice, what is new of it) until all have ended; the last piece of a choice has its finish reason.

        Raises: ApiError 500 when the engine fails.
        """
        open_choices = set(range(len(self._streams)))
        # Characters so far, of which the last may be in pieces.
        characters = [codecs.getincrementaldecoder("utf-8")("replace") for _ in self._streams]
        offsets = [0] * len(self._streams)
        while open_choices:
            index, event = await self._queue.get()
            if index not in open_choices:
                continue
            stream = self._streams[index]
            if isinstance(event, Finished):
                if event.reason == "error":
                    raise ApiError(500, event.error, code="engine_failed")
                open_choices.remove(index)
                yield index, Choice(stream.finish(), finish_reason=event.reason)
                continue
            text = stream.push(event.token)
            if stream.stopped:
                open_choices.remove(index)
                self._engine.cancel(self._tickets[index])
            yield index, Choice(text, [event], [offsets[index]], "stop" if stream.stopped else None)
            offsets[index] += len(characters[index].decode(self._tokenizer.token_bytes(event.token)))

    def close(self) -> None:
        for ticket in self._tickets:
            self._engine.cancel(ticket)
