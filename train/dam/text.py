"""Text for calibration and evaluation as token ids, in whole documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dmattn_jax.io.tokenizers import Tokenizer
from train.config import DataConfig
from train.data.loader import source_files
from train.data.tokens import tokenize_files
from train.errors import ConfigError


def read_documents(sources: tuple[str, ...], tokenizer: Tokenizer, text_field: str) -> list[np.ndarray]:
    """Every document of all sources, as token ids. Raises DataError where there is none."""
    documents = []
    for source in sources:
        store = tokenize_files(source_files(DataConfig(source=source)), tokenizer, text_field)
        documents += [np.asarray(store.tokens(number), np.int32) for number in range(len(store))]
    return documents


def text_name(source: str) -> str:
    """How a source is called in tables: its last part."""
    return Path(source).name or source


def take_rows(documents: list[np.ndarray], length: int, rows: int) -> list[np.ndarray]:
    """At most `rows` rows of exactly `length` tokens, spread over the documents: each gives its n-th row in turn.

    Raises: ConfigError where no document is that long.
    """
    cut = [
        [document[at : at + length] for at in range(0, len(document) - length + 1, length)] for document in documents
    ]
    deepest = max((len(pieces) for pieces in cut), default=0)
    taken = [pieces[turn] for turn in range(deepest) for pieces in cut if turn < len(pieces)][:rows]
    if not taken:
        longest = max((len(document) for document in documents), default=0)
        raise ConfigError(f"no document has {length} tokens, the longest has {longest}: give longer text")
    return taken
