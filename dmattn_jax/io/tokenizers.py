"""Text to token ids and back: plain bytes, or any `tokenizer.json` of the tokenizers library.

Both sides are lossless for documents: text that happens to spell a special token is encoded as ordinary text, so
no document ends early and nobody's input can forge an end of document.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers
from jaxtyping import Int32
from tqdm import tqdm

from dmattn_jax.io.chat_template import ChatTemplate

END_OF_DOCUMENT = "<|endoftext|>"
"""The one special token that `train_tokenizer` makes; its id is 0."""

EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "<|eot_id|>")
BOS_NAMES = ("<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>", "<|bos|>", "[BOS]")

BYTE_VALUES = 256
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
"""How SentencePiece spells a byte that is of no token."""


class Tokenizer(Protocol):
    """What the rest of the project needs of a tokenizer.

    vocab_size: one more than the largest id. bos_id, eos_id: the ids that begin and end a document, or None.
    stop_ids: those that end what a model writes, eos_id first; instruction models have several.
    fingerprint: differs between tokenizers that encode differently; token caches are keyed by it.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """The ids of `text`, with no begin or end token added. `parse_special` reads special tokens spelled in the
        text as such, for prompts that a chat template wrote."""
        ...

    def encode_documents(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " T"]]:
        """`encode` of many texts at once, as int32 arrays."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Special tokens have no text; bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_bytes(self, index: int) -> bytes:
        """What one token adds to a text, in UTF-8: perhaps half a character; nothing where it has no text."""
        ...


class ByteTokenizer:
    """UTF-8 bytes: ids 0..255 are the bytes, 256 ends a document. Nothing to train and nothing to download."""

    vocab_size: int = BYTE_VALUES + 1
    bos_id: int | None = None
    eos_id: int | None = BYTE_VALUES
    stop_ids: tuple[int, ...] = (BYTE_VALUES,)
    fingerprint: str = "bytes"

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """The UTF-8 bytes of `text`. The one special token has no spelling, so `parse_special` changes nothing."""
        return list(_well_formed(text).encode())

    def encode_documents(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " T"]]:
        return [np.frombuffer(_well_formed(text).encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids of 256 and above (the end of a document, the padding of a vocabulary) have no text.

        Raises ValueError for a negative id.
        """
        values = [int(value) for value in ids]
        if values and min(values) < 0:
            raise ValueError(f"ids must be >= 0, got {min(values)}")
        return bytes(value for value in values if value < BYTE_VALUES).decode(errors="replace")

    def token_bytes(self, index: int) -> bytes:
        return bytes([index]) if index < BYTE_VALUES else b""

    def as_file(self) -> FileTokenizer:
        """The same ids from a `tokenizer.json`: byte-level BPE without a merge."""
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=_byte_letters(), merges=[]))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens([END_OF_DOCUMENT])
        return FileTokenizer(backend.to_str())


class FileTokenizer:
    """A `tokenizer.json`, with the ids that begin and end a document found among its added tokens.

    A `tokenizer_config.json` in the same folder decides when it names an `eos_token` or `bos_token`; otherwise the
    first name of `EOS_NAMES` and `BOS_NAMES` that the file has.
    """

    def __init__(
        self,
        serialized: str,
        named: dict[str, str] | None = None,
        chat_template: str | None = None,
        *,
        more_stop_ids: Sequence[int] = (),
        adds_bos: bool | None = None,
    ) -> None:
        """serialized: the content of a `tokenizer.json`. named: `{"eos_token": ..., "bos_token": ...}` if known.
        chat_template: the Jinja source that came with the model, if any. more_stop_ids: of `stop_ids`, beside eos_id.
        adds_bos: whether the model expects bos_id before a text to continue; None: what the content's own
        post-processor does.

        Raises ValueError where the content is not a tokenizer, or the template not a template.
        """
        self._serialized = serialized
        try:
            self._backend = tokenizers.Tokenizer.from_str(serialized)
        except Exception as error:  # the library raises Exception itself, nothing narrower
            raise ValueError(f"not a tokenizer.json of the tokenizers library: {error}") from None
        self._backend.encode_special_tokens = True
        self._backend.no_padding()
        self._backend.no_truncation()
        named = named or {}
        ids = {token.content: index for index, token in self._backend.get_added_tokens_decoder().items()}
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        # Ids may have holes, so the count of tokens can be less than what an embedding needs.
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self.eos_id: int | None = _special_id("eos_token", EOS_NAMES, named, ids, vocabulary)
        self.bos_id: int | None = _special_id("bos_token", BOS_NAMES, named, ids, vocabulary)
        ends = () if self.eos_id is None else (self.eos_id,)
        more = (index for index in more_stop_ids if 0 <= index < self.vocab_size)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((*ends, *more)))
        if adds_bos is None:
            adds_bos = self._backend.encode("").ids[:1] == [self.bos_id]
        self.adds_bos: bool = adds_bos and self.bos_id is not None
        self.unknown_names: dict[str, str] = {role: name for role, name in named.items() if name not in vocabulary}
        self.chat_template: ChatTemplate | None = None
        if chat_template is not None:
            self.chat_template = ChatTemplate(
                chat_template, bos_token=self._token(self.bos_id), eos_token=self._token(self.eos_id)
            )
        identity = f"{self.bos_id} {self.eos_id} {self._backend.to_str()}"
        self.fingerprint: str = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    @functools.cached_property
    def _special_backend(self) -> tokenizers.Tokenizer:
        """A second copy, because what becomes of special tokens in the text is a state of the backend."""
        backend = tokenizers.Tokenizer.from_str(self._serialized)
        backend.no_padding()
        backend.no_truncation()
        return backend

    def _token(self, index: int | None) -> str | None:
        return None if index is None else self._backend.id_to_token(index)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError unless a model of this vocabulary has a row for every token, special ones among them."""
        if self.unknown_names:
            role, name = next(iter(self.unknown_names.items()))
            raise ValueError(f"tokenizer's {role} {name!r} is not in its own vocabulary: mend tokenizer_config.json")
        if self.vocab_size > vocab_size:
            largest = self._token(self.vocab_size - 1)
            raise ValueError(
                f"tokenizer's token {largest!r} has id {self.vocab_size - 1}, and the model's vocabulary has "
                f"{vocab_size} rows: they are not of one model"
            )

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, from which transformers and `load_tokenizer` read it."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._token(self.bos_id),
            "eos_token": self._token(self.eos_id),
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self.adds_bos,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template.source
        (folder / "tokenizer.json").write_text(self._serialized, encoding="utf-8")
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        # An earlier tokenizer's template in a file of its own would be read instead.
        (folder / "chat_template.jinja").unlink(missing_ok=True)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The ids of a conversation (see `ChatTemplate.render`). Raises ValueError where there is no template."""
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat_template: put one in its tokenizer_config.json")
        text = self.chat_template.render(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, parse_special=True)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        backend = self._special_backend if parse_special else self._backend
        # As a batch, for which the library lets other threads run: a server's other requests go on meanwhile.
        [encoding] = backend.encode_batch_fast([_well_formed(text)], add_special_tokens=False)
        return list(encoding.ids)

    def encode_documents(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " T"]]:
        encodings = self._backend.encode_batch_fast([_well_formed(text) for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids that the tokenizer does not have (the padding of a vocabulary) have no text.

        Raises ValueError for a negative id.
        """
        values = [int(value) for value in ids]
        if values and min(values) < 0:
            raise ValueError(f"ids must be >= 0, got {min(values)}")
        return str(self._backend.decode(values, skip_special_tokens=True))

    def token_bytes(self, index: int) -> bytes:
        word = self._backend.id_to_token(index)
        if word is None:
            return b""
        if (added := self._added_tokens.get(index)) is not None:
            return b"" if added.special else added.content.encode()
        kinds = {step["type"] for step in self._decoder_steps}
        if "ByteLevel" in kinds:
            letters = _byte_letters()
            return bytes(letters[letter] for letter in word) if letters.keys() >= set(word) else word.encode()
        if "ByteFallback" in kinds and BYTE_TOKEN.fullmatch(word):
            return bytes([int(word[3:5], 16)])
        spaces = [step for step in self._decoder_steps if step["type"] in ("Replace", "Metaspace")]
        if not spaces:
            return self.decode([index]).encode()
        for step in spaces:
            old, new = (step["replacement"], " ") if step["type"] == "Metaspace" else (_replaced(step), step["content"])
            word = word.replace(old, new) if old else word
        return word.encode()

    @functools.cached_property
    def _added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        return dict(self._backend.get_added_tokens_decoder())

    @functools.cached_property
    def _decoder_steps(self) -> list[dict[str, Any]]:
        decoder = json.loads(self._serialized).get("decoder") or {"type": None}
        return list(decoder.get("decoders", [decoder]))


def _replaced(step: Mapping[str, Any]) -> str | None:
    """What a decoder's step replaces, where that is one text and no expression."""
    return step["pattern"].get("String")


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The letter by which byte-level BPE writes each byte: itself where it prints, or the next from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, others = {}, 0x100
    for byte in range(BYTE_VALUES):
        if byte in printing:
            letters[chr(byte)] = byte
        else:
            letters[chr(others)] = byte
            others += 1
    return letters


def _special_id(
    role: str, names: Sequence[str], named: dict[str, str], added: dict[str, int], vocabulary: dict[str, int]
) -> int | None:
    if named.get(role) in vocabulary:
        return vocabulary[named[role]]
    return next((added[name] for name in names if name in added), None)


def _well_formed(text: str) -> str:
    """`text` with lone surrogates (JSON can spell them, UTF-8 cannot) replaced by `?`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def train_tokenizer(
    texts: Iterable[str | Path], vocab_size: int, path: str | os.PathLike[str], *, progress: bool = False
) -> Tokenizer:
    """Train a byte-level BPE tokenizer, write it to `path` as a `tokenizer.json`, and return it.

    texts: documents, or paths of UTF-8 files (one document each), taken one at a time.
    vocab_size: tokens in all: 256 bytes, the end-of-document token, and the merges. Little text gives fewer.
    progress: show a bar over the documents; the merges that follow have the library's own.

    Raises ValueError for a vocab_size below 257, for no text at all, and for a file that is not UTF-8.
    """
    if vocab_size < BYTE_VALUES + 1:
        raise ValueError(
            f"vocab_size must be >= {BYTE_VALUES + 1} (every byte and the end-of-document token), got {vocab_size}"
        )
    target = Path(path).expanduser()
    if target.is_dir():
        raise ValueError(f"path must be a file to write, got the folder {target}: say {target / 'tokenizer.json'}")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    documents = _Documents(texts)
    bar = tqdm(documents, desc="reading text", unit=" documents", disable=not progress)
    backend.train_from_iterator(bar, trainer)
    if not documents.characters:
        raise ValueError("texts must hold some text to train a tokenizer on, got none")
    target.parent.mkdir(parents=True, exist_ok=True)
    # A tokenizer.json is there in full or not at all, whatever interrupts the writing.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        backend.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "tokenizer.json").replace(target)
    return FileTokenizer(backend.to_str())


class _Documents:
    """The texts of strings and files, one at a time, and how many characters they had."""

    def __init__(self, texts: Iterable[str | Path]) -> None:
        self._texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for item in self._texts:
            if isinstance(item, Path):
                try:
                    text = item.read_bytes().decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    raise ValueError(f"texts must be UTF-8 files, got {item}: {error}") from None
            else:
                text = item
            self.characters += len(text)
            yield _well_formed(text)
