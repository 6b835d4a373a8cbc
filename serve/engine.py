"""Continuous batching: requests wait, are read chunk by chunk, decode together, and leave when they end."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from dmattn_jax.decoding import Decoder, Rows, check_prompt
from dmattn_jax.sampling import Sampling
from serve.slots import Slots


class BusyError(Exception):
    """Too many requests wait already."""


class TooLongError(ValueError):
    """Prompt and new tokens together exceed what a slot holds."""


class EngineStoppedError(Exception):
    """The engine was closed, or failed and takes nothing more."""


@dataclass(frozen=True)
class Request:
    """One continuation. row: the number by which it draws, as a row of `generate`; top_logprobs: how many it wants."""

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    row: int = 0
    stop_tokens: tuple[int, ...] = ()
    top_logprobs: int = 0


@dataclass(frozen=True)
class Token:
    """A new token of a request. top: the likeliest tokens and their log-probabilities, where wanted."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of a request. error: why it failed, with reason "error"."""

    reason: Literal["stop", "length", "error"]
    error: str = ""


Listener = Callable[[Token | Finished], None]


@dataclass(eq=False)
class Ticket:
    """A request on its way. Cancel it with `Engine.cancel`."""

    request: Request
    prompt: np.ndarray
    listener: Listener
    produced: int = 0
    cancelled: bool = False


class Engine:
    """Slots, the requests in them and before them. `submit` and `cancel` may be called from any thread; `step` from
    one at a time: the thread that `start` begins, or the caller's own."""

    def __init__(
        self, model: Decoder, *, slots: int = 8, max_length: int = 4096, prefill_chunk: int = 256, max_waiting: int = 64
    ) -> None:
        """slots: requests decoded together. max_length: tokens of a request, prompt included. prefill_chunk: prompt
        tokens read between two decode steps. max_waiting: requests that may wait for a slot.

        Raises: ValueError on a number below 1, and a max_length below 2: one token to read and one to generate.
        """
        sizes = {"slots": slots, "max_length": max_length, "prefill_chunk": prefill_chunk, "max_waiting": max_waiting}
        for name, value in sizes.items():
            least = 2 if name == "max_length" else 1
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        self.model, self.max_length, self.max_waiting = model, max_length, max_waiting
        self.prompt_tokens = self.generated_tokens = 0
        self.failure = ""
        self._slots = Slots(model, slots, max_length, min(prefill_chunk, max_length))
        self._active: list[Ticket | None] = [None] * slots
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._reading: tuple[Ticket, Rows | None, int] | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> int:
        """Requests in slots, or being read."""
        return sum(ticket is not None for ticket in self._active) + (self._reading is not None)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, requests: Sequence[tuple[Request, Listener]]) -> list[Ticket]:
        """Enqueue all of the requests or none. Listeners are called from the engine's thread.

        Raises: ValueError on a prompt that is empty or out of the vocabulary, and on more requests than an idle engine
        takes; TooLongError, BusyError, EngineStoppedError.
        """
        most = self.max_waiting + len(self._active)
        if len(requests) > most:
            raise ValueError(f"at most {most} requests (prompts times n) can come in one call, got {len(requests)}")
        tickets = []
        for number, (request, listener) in enumerate(requests):
            prompt = check_prompt(self.model, request.prompt, f"prompt {number}" if len(requests) > 1 else "prompt")
            if request.max_new_tokens < 1:
                raise ValueError(f"max_tokens must be >= 1, got {request.max_new_tokens}")
            if len(prompt) + request.max_new_tokens > self.max_length:
                raise TooLongError(
                    f"a request may have {self.max_length} tokens, got {len(prompt)} in the prompt and "
                    f"{request.max_new_tokens} to generate: shorten either"
                )
            tickets.append(Ticket(request, prompt, listener))
        with self._changed:
            if self._closing or self.failure:
                raise EngineStoppedError(self.failure or "the server is shutting down")
            # What can start at once does not wait.
            room = self.max_waiting + max(0, self._active.count(None) - (self._reading is not None))
            if len(self._waiting) + len(tickets) > room:
                raise BusyError(
                    f"{self.running} requests are running and {len(self._waiting)} waiting, of at most "
                    f"{self.max_waiting}: try again later"
                )
            self._waiting.extend(tickets)
            self._changed.notify_all()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """End a request without another word to its listener; its slot is free at the next step."""
        with self._changed:
            ticket.cancelled = True
            self._changed.notify_all()

    def step(self) -> bool:
        """Read one chunk of the oldest waiting prompt, and decode one token of every active request.

        Returns whether there was anything to do.
        """
        with self._changed:
            self._drop_cancelled()
            if self._reading is None and self._waiting and None in self._active:
                self._reading = (self._waiting.popleft(), None, 0)
        work = self._reading is not None
        if self._reading is not None:
            self._read(*self._reading)
        if any(self._active):
            self._decode()
            work = True
        return work

    def start(self) -> None:
        """Compile everything, then step in a thread until `close`."""
        self.submit([(Request([0], 1), lambda event: None)])
        while self.step():
            pass
        self.prompt_tokens = self.generated_tokens = 0
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread after its step; requests that have not ended fail."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._fail_all("the server is shutting down")

    def _loop(self) -> None:
        while not self._closing:
            try:
                worked = self.step()
            except Exception as error:  # whatever the device raises must reach the requests, or they wait for ever
                self.failure = f"the engine failed: {type(error).__name__}: {error}"
                self._fail_all(self.failure)
                raise
            if not worked:
                with self._changed:
                    if not (self._closing or self._waiting):
                        self._changed.wait()

    def _drop_cancelled(self) -> None:
        self._waiting = collections.deque(ticket for ticket in self._waiting if not ticket.cancelled)
        self._active = [None if ticket is None or ticket.cancelled else ticket for ticket in self._active]
        if self._reading is not None and self._reading[0].cancelled:
            self._reading = None

    def _read(self, ticket: Ticket, row: Rows | None, start: int) -> None:
        row, end = self._slots.read(row, ticket.prompt, start)
        self.prompt_tokens += end - start
        if end < len(ticket.prompt):
            self._reading = (ticket, row, end)
            return
        slot = self._active.index(None)
        self._slots.enter(row, slot, ticket.request.sampling, ticket.request.row)
        self._active[slot] = ticket
        self._reading = None

    def _decode(self) -> None:
        active = np.array([ticket is not None for ticket in self._active])
        wanted = any(ticket.request.top_logprobs for ticket in self._active if ticket is not None)
        drawn = self._slots.decode(active, wanted)
        for slot, ticket in enumerate(self._active):
            if ticket is None:
                continue
            request, token = ticket.request, int(drawn.token[slot])
            if token in request.stop_tokens:
                self._end(slot, Finished("stop"))
                continue
            self.generated_tokens += 1
            ticket.produced += 1
            count = request.top_logprobs
            top = zip(drawn.top_tokens[slot, :count].tolist(), drawn.top_logprobs[slot, :count].tolist(), strict=True)
            self._tell(ticket, Token(token, float(drawn.logprob[slot]), tuple(top)))
            if ticket.produced == request.max_new_tokens:
                self._end(slot, Finished("length"))

    def _end(self, slot: int, finished: Finished) -> None:
        ticket = self._active[slot]
        self._active[slot] = None
        if ticket is not None:
            self._tell(ticket, finished)

    def _tell(self, ticket: Ticket, event: Token | Finished) -> None:
        if not ticket.cancelled:
            ticket.listener(event)

    def _fail_all(self, reason: str) -> None:
        with self._changed:
            tickets = [*self._waiting, *filter(None, self._active), *([self._reading[0]] if self._reading else [])]
            self._waiting.clear()
            self._active = [None] * len(self._active)
            self._reading = None
        for ticket in tickets:
            self._tell(ticket, Finished("error", reason))
