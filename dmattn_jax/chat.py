"""Conversations as prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dmattn_jax.io.tokenizers import Tokenizer


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens after which the assistant's turn begins. messages: {"role", "content"}, oldest first.

    A tokenizer with a chat template writes them by it, special tokens included (`FileTokenizer.encode_chat`).
    Without one the contents follow each other, a line each: a model that has seen no roles continues a text.
    Nothing at all begins a document.
    """
    if getattr(tokenizer, "chat_template", None) is not None:
        tokens = tokenizer.encode_chat([dict(message) for message in messages])  # type: ignore[attr-defined]
        return tokens or document_start(tokenizer)
    return text_prompt(tokenizer, "".join(message["content"] + "\n" for message in messages))


def text_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text to continue, behind what the model expects before one; no text begins a document."""
    if getattr(tokenizer, "adds_bos", False):
        assert tokenizer.bos_id is not None
        return [tokenizer.bos_id, *tokenizer.encode(text)]
    return tokenizer.encode(text) or document_start(tokenizer)


def document_start(tokenizer: Tokenizer) -> list[int]:
    """The prompt that begins a text with nothing: what stands before a document in training."""
    for token in (tokenizer.bos_id, tokenizer.eos_id):
        if token is not None:
            return [token]
    return [0]
