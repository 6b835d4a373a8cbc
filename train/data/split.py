"""Which documents are held out for validation: whole files, or whole rows of a single file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from train.data.sources import DataError, SourceFile
from train.data.tokens import TokenStore

ROW_KEY = 0x64617461
"""Fixed: which rows are held out must not depend on the seed of a run."""


@dataclass(frozen=True, eq=False)
class Split:
    """Indices of documents. unit: what was held out whole, `files` or `rows`; held_out of `units` of them."""

    train: Int64[np.ndarray, " documents"]
    validation: Int64[np.ndarray, " documents"]
    unit: str
    held_out: int
    units: int


def split_documents(store: TokenStore, fraction: float, source: str) -> Split:
    """Hold out about `fraction` of the files, at least one and never all; of the rows where there is one file.

    The choice depends on names (or row numbers) alone: not on a seed, nor on where the files lie, nor on the order
    they are found in. Raises DataError where there is nothing to divide.
    """
    if not 0 < fraction < 1:
        raise DataError(f"validation_fraction must be between 0 and 1, both excluded, got {fraction}")
    files = np.unique(store.file)
    if len(files) > 1:
        by_hash = sorted(files, key=lambda index: (_hash(store.files[index]), store.files[index]))
        held = by_hash[: _count(fraction, len(files))]
        rank = np.full(len(store.files), -1, np.int64)
        rank[held] = np.arange(len(held))
        train, validation = np.flatnonzero(rank[store.file] < 0), np.flatnonzero(rank[store.file] >= 0)
        # In the order of the hash as well, so that the first documents are no neighbours.
        validation = validation[np.argsort(rank[store.file[validation]], kind="stable")]
        return Split(train, validation, "files", len(held), len(files))
    if len(store) < 2:
        raise DataError(
            f"source {source!r} is one document, and documents are held out for validation whole: divide it into "
            "several files in a directory, or make it JSONL or Parquet with a document a row"
        )
    keys = np.random.Philox(ROW_KEY).random_raw(len(store))
    order = np.argsort(keys, kind="stable").astype(np.int64)
    count = _count(fraction, len(store))
    return Split(np.sort(order[count:]), order[:count], "rows", count, len(store))


def never_held_out(files: Sequence[SourceFile], fraction: float) -> list[SourceFile]:
    """Of several files with text those that `split_documents` trains on, in an order like its own."""
    by_hash = sorted(files, key=lambda file: (_hash(file.name), file.name))
    return by_hash[_count(fraction, len(files)) :]


def _count(fraction: float, units: int) -> int:
    return min(max(1, round(fraction * units)), units - 1)


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
