"""Text out of tokens that come one by one: whole characters only, and never past a stop string."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from dmattn_jax.io.tokenizers import Tokenizer

UNFINISHED = "\ufffd"
"""What a tokenizer makes of bytes that are not yet, or never, a character."""


CONTEXT = 16
"""Tokens before a text that are decoded with it: more than any character has."""


class TextStream:
    """Tokens in, text out. The pieces joined are the decoded tokens, up to the first stop string.

    Text that may still become a stop string, or whose last character is not complete, is held back until it is
    certain. after: the tokens that the text continues, of which some tokenizers must know: at the beginning of a text
    they drop a space. stopped: whether a stop string came; nothing comes after it.

    Raises: ValueError on an empty stop string, and on one that is not in a sequence.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = (), after: Sequence[int] = ()) -> None:
        if isinstance(stop_strings, str):
            raise ValueError(f"stop_strings must be a sequence of texts, got one: ({stop_strings!r},)")
        if any(not stop for stop in stop_strings):
            raise ValueError("stop_strings must not be empty strings, got '': leave it out")
        self._tokenizer = tokenizer
        self._stops = tuple(stop_strings)
        self._tokens = [int(token) for token in after[-CONTEXT:]]
        # Tokens before `_context` are done with; those up to `_read` are decoded again as context of what follows.
        self._context, self._read = 0, len(self._tokens)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token makes certain, often one word, sometimes nothing."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        return self._release(self._decoded(final=False), final=False)

    def finish(self) -> str:
        """What was held back and is certain now that no token follows."""
        return "" if self.stopped else self._release(self._decoded(final=True), final=True)

    def _decoded(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._tokens[self._context : self._read])
        now = self._tokenizer.decode(self._tokens[self._context :])
        if now.endswith(UNFINISHED) and not final:
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return _added(before, now)

    def _release(self, piece: str, *, final: bool) -> str:
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def continuation(tokenizer: Tokenizer, after: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of `tokens` where they stand after others."""
    after = after[-CONTEXT:]
    return _added(tokenizer.decode(after), tokenizer.decode([*after, *tokens]))


def _added(before: str, now: str) -> str:
    """What has come, the last character of before among it where that was not whole."""
    alike = (old == new for old, new in zip(before, now, strict=False))
    return now[sum(itertools.takewhile(bool, alike)) :]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
