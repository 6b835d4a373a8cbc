"""The tokenizer inside a GGUF file, as one of the tokenizers library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.normalizers
import tokenizers.pre_tokenizers

from dmattn_jax.io.errors import CheckpointFormatError
from dmattn_jax.io.gguf_file import GgufFile
from dmattn_jax.io.json_fields import Fields
from dmattn_jax.io.tokenizers import FileTokenizer

KEY = "tokenizer.ggml."
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Token types: what merges make, special tokens, and plain text that is never cut."""

ENDS = ("eos", "eot", "eom")
"""The ends of a text, of a turn and of a message."""

SPACE = "▁"
LONGEST_PIECE = 256
"""Letters of a SentencePiece token up to which it is cut in two: real ones have at most 16."""

SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
"""`pre` kinds that take digits one by one before GPT-2's own rule."""

PATTERNS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""How text is cut before merging, by `pre` kind."""


def read_gguf_tokenizer(path: Path) -> FileTokenizer:
    """The tokenizer and chat template of the file: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`).

    Raises: CheckpointFormatError where there is no such tokenizer, or it contradicts itself; names the key.
    """
    file = GgufFile(path)
    fields = Fields(file.metadata, str(path))
    kind = fields.text(f"{KEY}model")
    if kind not in BACKENDS:
        raise CheckpointFormatError(
            f"{path}: {KEY}model must be one of {', '.join(BACKENDS)}, got {kind!r:.80}: "
            "use the tokenizer.json of the model from which the file was made"
        )
    tokens = _texts(fields, f"{KEY}tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise CheckpointFormatError(f"{path}: {KEY}tokens has {len(tokens) - len(vocabulary)} tokens twice")
    rows = file.shape("token_embd.weight")[0] if "token_embd.weight" in file.names() else len(tokens)
    if len(tokens) > rows:
        raise CheckpointFormatError(f"{path}: {KEY}tokens has {len(tokens)} tokens, token_embd.weight {rows} rows")
    try:
        backend = BACKENDS[kind](fields, vocabulary)
    except CheckpointFormatError:
        raise
    except Exception as error:  # the library raises Exception itself, nothing narrower
        raise CheckpointFormatError(f"{path}: {KEY}merges is not a list of merges: {error}") from None
    _add_special_tokens(backend, tokens, fields)
    named = {
        role: tokens[index]
        for role, index in (("bos_token", _special_id(fields, "bos", tokens)), ("eos_token", _eos(fields, tokens)))
        if index is not None
    }
    try:
        return FileTokenizer(
            backend.to_str(),
            named,
            fields.text("tokenizer.chat_template", None),
            more_stop_ids=[index for role in ENDS if (index := _special_id(fields, role, tokens)) is not None],
            # What the format's own readers do where the file does not say.
            adds_bos=fields.flag(f"{KEY}add_bos_token", kind == "llama" or fields.text(f"{KEY}pre", "") == "llama-bpe"),
        )
    except ValueError as error:
        raise CheckpointFormatError(f"{path}: {error}") from None


def _byte_level(fields: Fields, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    # Llama 3 takes a whole word that is a token as it is, whether merges lead to it or not.
    whole = fields.text(f"{KEY}pre", "default") == "llama-bpe"
    model = tokenizers.models.BPE(vocab=vocabulary, merges=_merges(fields, vocabulary), ignore_merges=whole)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer(fields)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Fields, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """SentencePiece joins the pair whose joint token has the highest score: merges in falling order of score."""
    scores = fields.get(f"{KEY}scores", np.ndarray)
    if len(scores) != len(vocabulary):
        raise CheckpointFormatError(
            f"{fields.source}: {KEY}scores must have one entry for each of {len(vocabulary)} tokens, got {len(scores)}"
        )
    kinds = fields.get(f"{KEY}token_type", np.ndarray, None)
    plain = kinds is None or len(kinds) != len(vocabulary)
    merges = []
    for token, index in vocabulary.items():
        if not plain and kinds[index] != NORMAL:
            continue
        for cut in range(1, min(len(token), LONGEST_PIECE)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-float(scores[index]), vocabulary[left], vocabulary[right], left, right))
    unknown = _special_id(fields, "unknown", list(vocabulary))
    model = tokenizers.models.BPE(
        vocab=vocabulary,
        merges=[(left, right) for *_, left, right in sorted(merges)],
        unk_token=None if unknown is None else list(vocabulary)[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    space = fields.flag(f"{KEY}add_space_prefix", True)
    # A space before every text, also before one that begins with a space: so none is lost on the way back.
    replaced = tokenizers.normalizers.Replace(" ", SPACE)
    prepended = [tokenizers.normalizers.Prepend(SPACE), replaced] if space else [replaced]
    backend.normalizer = tokenizers.normalizers.Sequence(prepended)
    decoders = tokenizers.decoders
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space else steps)
    return backend


BACKENDS = {"gpt2": _byte_level, "llama": _sentencepiece}
"""By `tokenizer.ggml.model`."""


def _texts(fields: Fields, name: str) -> list[str]:
    texts = fields.get(name, list)
    if not texts or not isinstance(texts[0], str):
        raise CheckpointFormatError(f"{fields.source}: {name} must be a list of strings")
    return texts


def _merges(fields: Fields, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in _texts(fields, f"{KEY}merges"):
        left, space, right = merge.partition(" ")
        if not space or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise CheckpointFormatError(
                f"{fields.source}: {KEY}merges must join two tokens to a third, got {merge!r:.200}"
            )
        merges.append((left, right))
    return merges


def _pre_tokenizer(fields: Fields) -> Any:
    pre = tokenizers.pre_tokenizers
    kind = fields.text(f"{KEY}pre", "default")
    space = fields.flag(f"{KEY}add_space_prefix", False)
    if kind in SINGLE_DIGITS:
        return pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=space)])
    if kind in PATTERNS:
        split = pre.Split(tokenizers.Regex(PATTERNS[kind]), "isolated")
        return pre.Sequence([split, pre.ByteLevel(add_prefix_space=space, use_regex=False)])
    if kind == "gpt-2":
        return pre.ByteLevel(add_prefix_space=space)
    known = ", ".join((*SINGLE_DIGITS, *PATTERNS, "gpt-2"))
    raise CheckpointFormatError(
        f"{fields.source}: {KEY}pre must be one of {known}, got {kind!r:.80}: "
        "use the tokenizer.json of the model from which the file was made"
    )


def _add_special_tokens(backend: tokenizers.Tokenizer, tokens: list[str], fields: Fields) -> None:
    kinds = fields.get(f"{KEY}token_type", np.ndarray, None)
    if kinds is None:
        return
    if len(kinds) != len(tokens):
        raise CheckpointFormatError(
            f"{fields.source}: {KEY}token_type must have one entry for each of {len(tokens)} tokens, got {len(kinds)}"
        )
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        chosen = [
            tokenizers.AddedToken(tokens[index], special=special, normalized=False)
            for index in np.flatnonzero(kinds == kind)
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(chosen)


def _special_id(fields: Fields, role: str, tokens: list[str]) -> int | None:
    name = f"{KEY}{role}_token_id"
    index = fields.get(name, int, None)
    if index is not None and not 0 <= index < len(tokens):
        raise CheckpointFormatError(f"{fields.source}: {name} must be below {len(tokens)}, got {index}")
    return index


def _eos(fields: Fields, tokens: list[str]) -> int | None:
    """The token that ends an answer, where the file tells it apart from the one that ends a text."""
    index = _special_id(fields, "eot", tokens)
    return _special_id(fields, "eos", tokens) if index is None else index
