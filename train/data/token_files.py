"""Corpora that come tokenised: a flat array of ids in an `.npy` file, used where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Integer

from dmattn_jax.io.tokenizers import Tokenizer
from train.data.sources import DataError

PART = 1 << 24
"""Ids looked at at once."""


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The memory-mapped ids of a file and where its documents lie. empty: documents of nothing but their end."""

    ids: Integer[np.ndarray, " N"]
    start: Int64[np.ndarray, " documents"]
    length: Int64[np.ndarray, " documents"]
    empty: int


def open_token_file(path: Path, tokenizer: Tokenizer) -> TokenFile:
    """Map an `.npy` file and find its documents: each ends with the tokenizer's eos_id, the last one need not.

    Nothing in the file is executed. Raises DataError for anything but a flat array of ids below the vocab_size.
    """
    if tokenizer.eos_id is None:
        raise DataError(
            f"{path} needs a tokenizer with an end-of-document token, which says where documents end; this one has none"
        )
    try:
        ids = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is not an array file of numpy: {error}") from None
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{path} must hold a flat array of integers, got shape {ids.shape} of {ids.dtype}")
    stops = []
    for begin in range(0, len(ids), PART):
        part = ids[begin : begin + PART]
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= tokenizer.vocab_size:
            raise DataError(
                f"{path} must hold ids from 0 to {tokenizer.vocab_size - 1} (the tokenizer's vocab_size is "
                f"{tokenizer.vocab_size}), got {low if low < 0 else high}: name the tokenizer that made the file"
            )
        stops.append(np.flatnonzero(part == tokenizer.eos_id).astype(np.int64) + begin + 1)
    if len(ids) and ids[-1] != tokenizer.eos_id:
        stops.append(np.array([len(ids)], np.int64))
    stop = np.concatenate(stops) if stops else np.zeros(0, np.int64)
    start = np.concatenate([np.zeros(1, np.int64), stop])[:-1]
    has_text = (stop - start > 1) | (ids[start] != tokenizer.eos_id)
    return TokenFile(ids, start[has_text], (stop - start)[has_text], int((~has_text).sum()))
