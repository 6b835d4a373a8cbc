"""Rows from a Hugging Face `datasets` stream: read as it comes, never held whole, resumable where it was.

The stream's documents come in its own order and are packed end to end; rows are shuffled in windows. Which documents
are held out is a hash of their text, so that every process and every epoch agrees, and a copy of a held-out document
is held out too.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from tqdm import tqdm

from dmattn_jax.io.tokenizers import Tokenizer
from train.config import DataConfig
from train.data.packing import Row, fill_row
from train.data.sources import DataError, field_text
from train.errors import MissingExtraError

PREFIX = "hf:"

WINDOW_TOKENS = 1 << 20
"""Rows are shuffled among those of so many tokens: what fits in memory easily and is soon read again on resuming."""

VALIDATION_TOKENS = 1 << 18
"""Tokens held for validation, which must be found in the stream before training starts."""

VALIDATION_DOCUMENTS = 1 << 20
"""Documents of the stream looked at, at most, to find them."""


def open_stream(config: DataConfig) -> Any:
    """The `train` split of `hf:NAME` or `hf:NAME:CONFIGURATION` as an iterable dataset.

    Raises MissingExtraError without the package `datasets`, DataError where it cannot open the name.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise MissingExtraError(
            f"source {config.source!r} needs the package `datasets`: pip install 'dmattn-jax[hf]'"
        ) from None
    name, _, configuration = config.source.removeprefix(PREFIX).partition(":")
    if not name:
        raise DataError(f"source must be hf:NAME or hf:NAME:CONFIGURATION, got {config.source!r}")
    try:
        return datasets.load_dataset(name, configuration or None, split="train", streaming=True)
    except (ValueError, OSError) as error:
        raise DataError(f"source {config.source!r} cannot be opened: {error}") from error


def is_held_out(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def stream_texts(config: DataConfig) -> Iterator[str]:
    """The texts of one pass over the stream that are trained on."""
    for row in open_stream(config):
        text = field_text(row, config.text_field, config.source)
        if text and not is_held_out(text, config.validation_fraction):
            yield text


def stream_validation(config: DataConfig, tokenizer: Tokenizer, at_least: int) -> tuple[list[np.ndarray], list[int]]:
    """The first held-out documents of the stream, with `at_least` tokens together: ids and UTF-8 bytes of each.

    Fewer where the stream ends before. Raises DataError where it has none at all.
    """
    documents: list[np.ndarray] = []
    text_bytes: list[int] = []
    tokens = 0
    with tqdm(total=at_least, desc="validation text", unit=" tokens", unit_scale=True, delay=1.0, disable=None) as bar:
        for seen, row in enumerate(open_stream(config)):
            if tokens >= at_least or seen >= VALIDATION_DOCUMENTS:
                break
            text = field_text(row, config.text_field, config.source)
            if text and is_held_out(text, config.validation_fraction):
                documents.append(document_ids(text, tokenizer))
                text_bytes.append(len(text.encode(errors="replace")))
                tokens += len(documents[-1])
                bar.update(len(documents[-1]))
    if not documents:
        raise DataError(
            f"source {config.source!r} has no document to hold out with "
            f"validation_fraction={config.validation_fraction}: raise it"
        )
    return documents, text_bytes


def document_ids(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of one document, int32, with its end."""
    ids = tokenizer.encode_documents([text])[0]
    return ids if tokenizer.eos_id is None else np.append(ids, np.int32(tokenizer.eos_id))


class StreamRows(grain.IterDataset[Row]):
    """The training rows of a stream, epoch after epoch, every row full."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, sequence_length: int) -> None:
        super().__init__()
        self._config = config
        self._tokenizer = tokenizer
        self._sequence_length = sequence_length

    def __iter__(self) -> StreamRowsIterator:
        config, tokenizer = self._config, self._tokenizer

        def ids_of(row: dict[str, object]) -> np.ndarray | None:
            text = field_text(row, config.text_field, config.source)
            if not text or is_held_out(text, config.validation_fraction):
                return None
            return document_ids(text, tokenizer)

        return StreamRowsIterator(open_stream(config), ids_of, self._sequence_length, config.source)


class StreamRowsIterator(grain.DatasetIterator[Row]):
    """Packs documents into rows. Its state is the stream's own state before the document it is in, and how much of
    that document is used: a few numbers, not a buffer."""

    def __init__(
        self, stream: Any, ids_of: Callable[[dict[str, object]], np.ndarray | None], sequence_length: int, source: str
    ) -> None:
        """stream: an iterable dataset of `datasets`. ids_of: from a row to its ids, or None to pass over it."""
        super().__init__()
        self._stream = stream
        self._ids_of = ids_of
        self._sequence_length = sequence_length
        self._source = source
        self._begin(0)

    def _begin(self, epoch: int, state: dict[str, Any] | None = None) -> None:
        self._epoch = epoch
        self._stream.set_epoch(epoch)
        if state is not None:
            self._stream.load_state_dict(state)
        self._rows = iter(self._stream)
        self._ids = np.zeros(0, np.int32)
        self._used = 0
        self._before: dict[str, Any] | None = None

    def _next_document(self) -> None:
        """Go to the next document that is trained on, into the next epoch where this one ends."""
        passes = 0
        while passes < 2:
            before = self._stream.state_dict()
            row = next(self._rows, None)
            if row is None:
                self._begin(self._epoch + 1)
                passes += 1
                continue
            ids = self._ids_of(row)
            if ids is not None:
                self._ids, self._used, self._before = ids, 0, before
                return
        raise DataError(f"source {self._source!r} leaves no document to train on: lower validation_fraction")

    def __next__(self) -> Row:
        pieces = []
        room = self._sequence_length
        while room:
            if self._used == len(self._ids):
                self._next_document()
            ids = self._ids[self._used :]
            taken = min(len(ids), room)
            pieces.append((ids, taken))
            self._used += taken
            room -= taken
        return fill_row(pieces, self._sequence_length)

    def get_state(self) -> dict[str, Any]:
        inside = self._used < len(self._ids)
        stream = self._before if inside else self._stream.state_dict()
        return {"epoch": self._epoch, "stream": stream, "used": self._used if inside else 0}

    def set_state(self, state: dict[str, Any]) -> None:
        self._begin(state["epoch"], state["stream"])
        if state["used"]:
            self._next_document()
            self._used = state["used"]
