"""Held-out documents as a fixed set of batches, and what turns a loss on them into bits per byte."""

from __future__ import annotations

from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import Int64

from dmattn_jax.io.tokenizers import Tokenizer
from train.data.batches import Batch, Share
from train.data.packing import FixedRows
from train.data.sources import DataError
from train.data.tokens import TokenStore

DECODED_TOKENS = 1 << 20
"""Tokens decoded, at most, to learn the bytes a token of a tokenised corpus has."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A fixed set of text for evaluation. batches: iterable any number of times, in the same order, `len()` known.

    bytes_per_token: UTF-8 bytes of the text for each token that is predicted, so that mean cross-entropy in nats
    ÷ ln 2 ÷ bytes_per_token is bits per byte. description: one line on what was found.
    """

    batches: grain.MapDataset[Batch]
    tokens: int
    bytes_per_token: float
    description: str


def hold_out(
    store: TokenStore,
    documents: Int64[np.ndarray, " D"],
    tokenizer: Tokenizer,
    sequence_length: int,
    share: Share,
    description: str,
) -> HeldOut:
    rows = FixedRows(store, documents, sequence_length)
    count = -(-rows.rows // share.global_batch)
    numbers = grain.MapDataset.range(count * share.batch_size)
    batches = numbers.map(lambda number: rows[share.row(number)]).batch(share.batch_size)
    tokens = int(store.length[documents].sum())
    return HeldOut(batches, tokens, _bytes_per_token(store, documents, tokenizer), description)


def _bytes_per_token(store: TokenStore, documents: Int64[np.ndarray, " D"], tokenizer: Tokenizer) -> float:
    text_bytes = predicted = 0
    decoded = 0
    for document in documents:
        known = int(store.text_bytes[document])
        if known < 0:
            # Ids without text: decoded, but not more of them than an estimate needs.
            if decoded >= DECODED_TOKENS:
                continue
            ids = store.tokens(document).tolist()
            decoded += len(ids)
            known = len(tokenizer.decode(ids).encode())
        text_bytes += known
        predicted += max(int(store.length[document]) - 1, 0)
    if not predicted:
        raise DataError("the held-out text has no token to predict: give more text")
    return text_bytes / predicted
