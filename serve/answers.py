"""Answers as OpenAI's API has them: whole objects, and the chunks of a stream."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dmattn_jax.io.tokenizers import Tokenizer
from serve.engine import Token

LEAST_LOGPROB = -9999.0
"""For a probability of 0: JSON has no infinity."""

Json = dict[str, Any]


@dataclass
class Choice:
    """What one choice has so far, or in one chunk. offsets: characters of the choice before each of the tokens."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True)
class Form:
    """How one request is answered: chat or text, whole or streamed, with log-probabilities or without."""

    tokenizer: Tokenizer
    model: str
    chat: bool
    logprobs: bool
    id: str = ""
    created: int = 0

    @staticmethod
    def new(tokenizer: Tokenizer, model: str, *, chat: bool, logprobs: bool) -> Form:
        name = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        return Form(tokenizer, model, chat, logprobs, name, int(time.time()))

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        return self._object([self._whole_choice(i, choice) for i, choice in enumerate(choices)]) | {"usage": usage}

    def first_chunk(self, index: int) -> Json | None:
        """What begins a choice in a stream: in chat, whose turn it is."""
        if not self.chat:
            return None
        delta = {"role": "assistant", "content": ""}
        return self._object([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}], chunk=True)

    def chunk(self, index: int, piece: Choice) -> Json:
        entry = {"index": index, "logprobs": self._logprobs(piece), "finish_reason": piece.finish_reason}
        entry |= {"delta": {"content": piece.text} if piece.text else {}} if self.chat else {"text": piece.text}
        return self._object([entry], chunk=True)

    def usage_chunk(self, usage: Json) -> Json:
        return self._object([], chunk=True) | {"usage": usage}

    def _object(self, choices: list[Json], *, chunk: bool = False) -> Json:
        kind = "text_completion" if not self.chat else "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _whole_choice(self, index: int, choice: Choice) -> Json:
        entry: Json = {"index": index, "logprobs": self._logprobs(choice), "finish_reason": choice.finish_reason}
        if self.chat:
            return entry | {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return entry | {"text": choice.text}

    def _logprobs(self, choice: Choice) -> Json | None:
        if not self.logprobs:
            return None
        if self.chat:
            return {"content": [self._chat_entry(token) for token in choice.tokens], "refusal": None}
        return {
            "tokens": [self._word(token.token) for token in choice.tokens],
            "token_logprobs": [_finite(token.logprob) for token in choice.tokens],
            "top_logprobs": [self._by_word(token) for token in choice.tokens],
            "text_offset": choice.offsets,
        }

    def _by_word(self, token: Token) -> dict[str, float]:
        """The likeliest tokens, of those that are written alike the first."""
        found: dict[str, float] = {}
        for index, logprob in token.top:
            found.setdefault(self._word(index), _finite(logprob))
        return found

    def _chat_entry(self, token: Token) -> Json:
        top = [self._described(i, logprob) for i, logprob in token.top]
        return self._described(token.token, token.logprob) | {"top_logprobs": top}

    def _described(self, token: int, logprob: float) -> Json:
        return {
            "token": self._word(token),
            "logprob": _finite(logprob),
            "bytes": list(self.tokenizer.token_bytes(token)),
        }

    def _word(self, token: int) -> str:
        """A token's text; of a piece of a character its bytes, as OpenAI writes them."""
        own = self.tokenizer.token_bytes(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB
