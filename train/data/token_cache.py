"""Where tokenised text is kept: in memory while it is small, in a cache file on disk beyond that."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import tempfile
import zipfile
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Integer

from dmattn_jax.io.tokenizers import Tokenizer
from train.data.sources import DataError, SourceFile
from train.user_cache import user_cache

logger = logging.getLogger(__name__)

MEMORY_TOKENS = 1 << 25
"""Text of more tokens than these goes to the cache on disk (64 MiB of uint16): it takes long to tokenise again."""

CACHE_VERSION = "1"


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The ids of all documents of text, one after another, with the length, file and UTF-8 bytes of each."""

    ids: Integer[np.ndarray, " N"]
    length: Int64[np.ndarray, " documents"]
    file: Int64[np.ndarray, " documents"]
    text_bytes: Int64[np.ndarray, " documents"]
    not_text: int
    empty: int


def cache_folder(files: Sequence[SourceFile], text_field: str, tokenizer: Tokenizer) -> Path:
    """Where these files' tokens would lie: another file, size, time, field or tokenizer is another folder."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (CACHE_VERSION, text_field, tokenizer.fingerprint):
        digest.update(part.encode() + b"\0")
    for file in files:
        status = file.path.stat()
        digest.update(os.fsencode(file.path.resolve()) + b"\0")
        digest.update(f"{status.st_size} {status.st_mtime_ns}\0".encode())
    return user_cache("tokens") / digest.hexdigest()


class TokenWriter:
    """Takes documents and holds their ids, in memory up to MEMORY_TOKENS, then in a file that becomes `cache`.

    not_text, empty: counts of what the caller left out, kept beside the tokens.
    """

    def __init__(self, vocab_size: int, eos_id: int | None, cache: Path) -> None:
        self._dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self._end = np.array([] if eos_id is None else [eos_id], self._dtype)
        self._cache = cache
        self._chunks: list[np.ndarray] = []
        self._tokens = 0
        # Arrays of machine integers: a corpus can have tens of millions of documents.
        self._length, self._file, self._text_bytes = array("q"), array("q"), array("q")
        self._folder: Path | None = None
        self._stream: io.BufferedWriter | None = None
        self.not_text = 0
        self.empty = 0

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, files: Sequence[int], texts: Sequence[str], ids: Sequence[np.ndarray]) -> None:
        """Documents as the index of their file, their text, and the ids of it."""
        parts: list[np.ndarray] = [np.zeros(0, self._dtype)]
        for file, text, document in zip(files, texts, ids, strict=True):
            parts += [document.astype(self._dtype), self._end]
            self._length.append(len(document) + len(self._end))
            self._file.append(file)
            self._text_bytes.append(len(text.encode(errors="replace")))
        # One array a call: millions of small ones would outweigh the tokens.
        self._chunks.append(np.concatenate(parts))
        self._tokens += len(self._chunks[-1])
        if self._tokens > MEMORY_TOKENS:
            self._to_disk()

    def _to_disk(self) -> None:
        if self._stream is None:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(dir=self._cache.parent, prefix="writing-"))
            self._stream = (self._folder / "tokens.bin").open("wb")
            logger.info("more than %d tokens: keeping them in %s", MEMORY_TOKENS, self._cache)
        for chunk in self._chunks:
            self._stream.write(chunk.data)
        self._chunks.clear()

    def finish(self) -> TokenTable:
        documents = np.array([self._length, self._file, self._text_bytes], np.int64)
        if self._stream is None or self._folder is None:
            ids = np.concatenate([np.zeros(0, self._dtype), *self._chunks])
            length, file, text_bytes = documents
            return TokenTable(ids, length, file, text_bytes, self.not_text, self.empty)
        self._to_disk()
        self._stream.close()
        facts = np.array([self._dtype.itemsize, self.not_text, self.empty], np.int64)
        np.savez(self._folder / "documents.npz", facts=facts, documents=documents)
        try:
            # The name appears with its whole content. Another process may have been faster: its copy is as good.
            self._folder.rename(self._cache)
        except OSError:
            if not self._cache.is_dir():
                raise
        table = read_cache(self._cache)
        if table is None:
            raise DataError(f"the token cache {self._cache} cannot be read back: is the disk full?")
        return table


def read_cache(cache: Path) -> TokenTable | None:
    """The memory-mapped table in `cache`. None where there is none; a damaged one is deleted, with a warning."""
    if not cache.is_dir():
        return None
    try:
        with (cache / "documents.npz").open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            length, file, text_bytes = stored["documents"]
            itemsize, not_text, empty = (int(fact) for fact in stored["facts"])
        ids = np.memmap(cache / "tokens.bin", np.dtype(f"u{itemsize}"), "r")
        if len(ids) != int(length.sum()):
            raise ValueError(f"{len(ids)} tokens, not {int(length.sum())}")
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("the token cache %s is damaged (%s): tokenising again", cache, error)
        shutil.rmtree(cache)
        return None
    return TokenTable(ids, length, file, text_bytes, not_text, empty)
