"""Documents laid end to end and cut into rows of one length.

A row [T] holds pieces of documents, each its own segment 1, 2, …; a document longer than its place goes on in
another row. The target of a token is the next token of its document, also where that one lies in the next row, and
−1 after the document's last token: so every token but the first of a document is predicted exactly once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int32, Int64, Integer

from train.data.tokens import TokenStore

NO_TARGET = -1
SHUFFLE_ROUNDS = 4

Row = dict[str, Int32[np.ndarray, " T"]]
"""`tokens`, `targets` (−1: none) and `segment_ids` (0: padding), each int32."""


def fill_row(pieces: Iterable[tuple[Integer[np.ndarray, " N"], int]], sequence_length: int) -> Row:
    """One row of pieces `(ids, count)`: the first `count` ids go into the row. Where the document goes on after
    them, `ids` has at least one more, which is the last one's target. What the pieces leave is padding."""
    tokens = np.zeros(sequence_length, np.int32)
    targets = np.full(sequence_length, NO_TARGET, np.int32)
    segment_ids = np.zeros(sequence_length, np.int32)
    place = segment = 0
    for ids, count in pieces:
        if not count:
            continue
        segment += 1
        following = ids[1 : count + 1]
        tokens[place : place + count] = ids[:count]
        targets[place : place + len(following)] = following
        segment_ids[place : place + count] = segment
        place += count
    return {"tokens": tokens, "targets": targets, "segment_ids": segment_ids}


class Line:
    """Documents of a store in one order, laid end to end."""

    def __init__(self, store: TokenStore, documents: Int64[np.ndarray, " D"]) -> None:
        self._store = store
        self._documents = documents
        self._ends = np.cumsum(store.length[documents])
        self.tokens = int(self._ends[-1]) if len(documents) else 0

    def pieces(self, position: int, count: int) -> list[tuple[Integer[np.ndarray, " N"], int]]:
        """The pieces for `fill_row` from `position` on: `count` tokens, or fewer where the line ends."""
        found = []
        count = min(count, self.tokens - position)
        # Documents without tokens share their end with the one before, and "right" steps over them.
        place = int(np.searchsorted(self._ends, position, side="right"))
        while count > 0:
            ids = self._store.tokens(self._documents[place])
            ids = ids[len(ids) - (int(self._ends[place]) - position) :]
            taken = min(len(ids), count)
            found.append((ids, taken))
            position += taken
            count -= taken
            place += 1
        return found


@dataclass(frozen=True)
class Epoch:
    """One pass over the documents: their order, and the seed of the order of its rows."""

    line: Line
    row_seed: int


class EndlessRows:
    """Row 0, 1, 2, … of training without end, each a pure function of (documents, seed, number).

    Every epoch lays all documents end to end in its own random order, and epochs follow one another with no gap, so
    that every row is full; the row across a boundary begins with the last tokens of one epoch and goes on with the
    first of the next. The rows that begin in an epoch come in a random order too, so that a batch is not one file.
    """

    def __init__(
        self, store: TokenStore, documents: Int64[np.ndarray, " D"], sequence_length: int, seed: tuple[int, ...]
    ) -> None:
        """documents: which of the store; together they must have at least `sequence_length` tokens."""
        self._store = store
        self._documents = documents
        self._sequence_length = sequence_length
        self._seed = seed
        self.epoch_tokens = int(store.length[documents].sum())
        if self.epoch_tokens < sequence_length:
            raise ValueError(f"documents must have >= {sequence_length} tokens, got {self.epoch_tokens}")
        # A row needs its epoch and maybe the next one; prefetching may be one ahead of that.
        self._epoch = functools.lru_cache(maxsize=3)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> Epoch:
        # Raw Philox words and sorting them are the same in every version of numpy, which its permutations are not.
        bits = np.random.Philox(np.random.SeedSequence([*self._seed, epoch]))
        row_seed = int(bits.random_raw() >> np.uint64(32))
        order = np.argsort(bits.random_raw(len(self._documents)), kind="stable")
        return Epoch(Line(self._store, self._documents[order]), row_seed)

    def first_row(self, epoch: int) -> int:
        """The number of the first row that begins in `epoch`."""
        return -(-epoch * self.epoch_tokens // self._sequence_length)

    def epoch_of(self, row: int) -> int:
        return row * self._sequence_length // self.epoch_tokens

    def __getitem__(self, row: int) -> Row:
        epoch = self.epoch_of(row)
        first, after = self.first_row(epoch), self.first_row(epoch + 1)
        current = self._epoch(epoch)
        place = first + index_shuffle(
            row - first, max_index=after - first - 1, seed=current.row_seed, rounds=SHUFFLE_ROUNDS
        )
        position = place * self._sequence_length - epoch * self.epoch_tokens
        pieces = current.line.pieces(position, self._sequence_length)
        missing = position + self._sequence_length - self.epoch_tokens
        if missing > 0:
            pieces += self._epoch(epoch + 1).line.pieces(0, missing)
        return fill_row(pieces, self._sequence_length)


class FixedRows:
    """The rows of a held-out set: every token once, always in the same order, padding only in the last row.

    All full rows are shuffled once by a fixed seed, so that the first few are a fair sample of the whole. Numbers
    past the last row give rows of padding alone.
    """

    def __init__(self, store: TokenStore, documents: Int64[np.ndarray, " D"], sequence_length: int) -> None:
        self._line = Line(store, documents)
        self._sequence_length = sequence_length
        self._full = self._line.tokens // sequence_length
        self.rows = -(-self._line.tokens // sequence_length)

    def __getitem__(self, row: int) -> Row:
        if row < self._full:
            row = index_shuffle(row, max_index=self._full - 1, seed=0, rounds=SHUFFLE_ROUNDS)
        pieces = self._line.pieces(row * self._sequence_length, self._sequence_length) if row < self.rows else []
        return fill_row(pieces, self._sequence_length)
