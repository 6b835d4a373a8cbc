"""The corpus as token ids: which documents there are, and where the ids of each lie."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Integer
from tqdm import tqdm

from dmattn_jax.io.tokenizers import Tokenizer
from train.data.sources import DataError, NotTextError, SourceFile, read_documents
from train.data.token_cache import TokenTable, TokenWriter, cache_folder, read_cache
from train.data.token_files import TokenFile, open_token_file

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 1 << 22
"""Text tokenised at once."""


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Documents as token ids, each with the end-of-document token where the tokenizer has one.

    arrays: flat arrays of ids, in memory or memory-mapped. Of document i: `array[i]` says which, `start[i]` and
    `length[i]` where in it, `file[i]` the index in `files` it came from, `text_bytes[i]` its UTF-8 bytes (−1 for
    ids that came without text). files: the names of all files. not_text, empty: what was left out, counted.
    """

    arrays: tuple[Integer[np.ndarray, " N"], ...]
    array: Int64[np.ndarray, " documents"]
    start: Int64[np.ndarray, " documents"]
    length: Int64[np.ndarray, " documents"]
    file: Int64[np.ndarray, " documents"]
    text_bytes: Int64[np.ndarray, " documents"]
    files: tuple[str, ...]
    not_text: int
    empty: int

    def __len__(self) -> int:
        return len(self.length)

    def tokens(self, document: int) -> Integer[np.ndarray, " T"]:
        """The ids of one document, its end included: a view."""
        start = self.start[document]
        return self.arrays[self.array[document]][start : start + self.length[document]]


def tokenize_files(files: Sequence[SourceFile], tokenizer: Tokenizer, text_field: str) -> TokenStore:
    """Read and tokenise `files`, once: what is too large for memory stays in a cache on disk for the next run.

    A bar shows on a terminal when it takes long. Empty documents are left out; so are files that are not text,
    unless there is only one. Raises DataError for damaged files, and where no document is left.
    """
    cache = cache_folder(files, text_field, tokenizer)
    table = read_cache(cache)
    if table is None:
        table = _tokenize(files, tokenizer, text_field, cache)
    else:
        logger.info("tokens taken from the cache %s", cache)
    token_files = {
        index: open_token_file(file.path, tokenizer) for index, file in enumerate(files) if file.format == "npy"
    }
    store = _join(table, token_files, tuple(file.name for file in files))
    if not len(store):
        raise DataError(
            f"no text in {len(files)} files ({store.not_text} are not UTF-8 text, {store.empty} documents are empty); "
            f"the first is {files[0].path}"
        )
    return store


def _tokenize(files: Sequence[SourceFile], tokenizer: Tokenizer, text_field: str, cache: Path) -> TokenTable:
    sizes = {index: file.size for index, file in enumerate(files) if file.format != "npy"}
    texts: list[str] = []
    origins: list[int] = []
    characters = 0
    with (
        TokenWriter(tokenizer.vocab_size, tokenizer.eos_id, cache) as writer,
        tqdm(total=sum(sizes.values()), desc="tokenising", unit="B", unit_scale=True, delay=1.0, disable=None) as bar,
    ):
        for index, size in sizes.items():
            try:
                for text in read_documents(files[index], text_field):
                    if not text:
                        writer.empty += 1
                        continue
                    texts.append(text)
                    origins.append(index)
                    characters += len(text)
                    if characters >= BATCH_CHARACTERS:
                        writer.add(origins, texts, tokenizer.encode_documents(texts))
                        # Rows of a compressed file can hold more text than the file has bytes.
                        step = min(characters, size)
                        bar.update(step)
                        size -= step
                        texts, origins, characters = [], [], 0
            except NotTextError:
                if len(files) == 1:
                    raise
                writer.not_text += 1
            bar.update(size)
        writer.add(origins, texts, tokenizer.encode_documents(texts))
        return writer.finish()


def _join(table: TokenTable, token_files: dict[int, TokenFile], files: tuple[str, ...]) -> TokenStore:
    """One store of the tokenised text and the `.npy` files, which are used where they lie."""
    count = len(table.length)
    array = [np.zeros(count, np.int64)]
    start = [np.cumsum(table.length) - table.length]
    length, file, text_bytes = [table.length], [table.file], [table.text_bytes]
    for number, (index, tokens) in enumerate(token_files.items(), start=1):
        documents = len(tokens.length)
        array.append(np.full(documents, number, np.int64))
        start.append(tokens.start)
        length.append(tokens.length)
        file.append(np.full(documents, index, np.int64))
        text_bytes.append(np.full(documents, -1, np.int64))
    return TokenStore(
        arrays=(table.ids, *(tokens.ids for tokens in token_files.values())),
        array=np.concatenate(array),
        start=np.concatenate(start),
        length=np.concatenate(length),
        file=np.concatenate(file),
        text_bytes=np.concatenate(text_bytes),
        files=files,
        not_text=table.not_text,
        empty=table.empty + sum(tokens.empty for tokens in token_files.values()),
    )
