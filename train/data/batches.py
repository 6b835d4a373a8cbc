"""Rows to batches: which process has which rows, and iterators whose state resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np
from grain.experimental import WindowShuffleIterDataset
from jaxtyping import Int32

from dmattn_jax.io.tokenizers import Tokenizer
from train.config import DataConfig
from train.data.packing import EndlessRows
from train.data.sources import DataError
from train.data.stream import WINDOW_TOKENS, StreamRows

Batch = dict[str, Int32[np.ndarray, "B T"]]
"""`tokens`, `targets` (next token of the same document, −1 where none) and `segment_ids` (1, 2, …; 0: padding)."""

ENDLESS = 1 << 62
PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
"""Batches made ahead by a thread: a row is a copy of a few slices, so one thread keeps up with any device."""


@dataclass(frozen=True)
class Share:
    """This process's part: rows `index·batch_size …` of every global batch of `count·batch_size` rows."""

    batch_size: int
    index: int
    count: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"batch_size must be >= 1, got {self.batch_size}")
        if not 0 <= self.index < self.count:
            raise DataError(f"process_index must be in 0 … {self.count - 1}, got {self.index}")

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.count

    def row(self, number: int) -> int:
        """The global number of this process's row `number`."""
        batch, place = divmod(number, self.batch_size)
        return batch * self.global_batch + self.index * self.batch_size + place


class TrainIterator(Protocol):
    """Batches without end. A state is JSON, a few numbers, and independent of the count of processes and of the
    batch size: the rows that follow it are the same rows in the same order."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises DataError for a state of other data, another sequence length or seed."""
        ...

    def close(self) -> None:
        """Stop the thread that reads ahead."""
        ...


class RowIterator:
    """Training batches of numbered rows, read ahead by grain. The state is the number of rows taken by all."""

    def __init__(self, rows: EndlessRows, share: Share, identity: dict[str, Any]) -> None:
        """identity: what a state must agree with to be one of this iterator's."""
        self._rows = rows
        self._share = share
        self._identity = identity
        self._open(0)

    def _open(self, first: int) -> None:
        self._first = first
        rows = grain.MapDataset.range(ENDLESS).map(lambda number: self._rows[first + self._share.row(number)])
        self._batches = iter(rows.batch(self._share.batch_size).to_iter_dataset(PREFETCH))

    def __iter__(self) -> RowIterator:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        taken = self._batches.get_state()["next_index"] * self._share.global_batch
        return {"rows": self._first + taken, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        _check_state(state, self._identity)
        self._batches.close()
        self._open(int(state["rows"]))

    def close(self) -> None:
        self._batches.close()


class StreamIterator:
    """Training batches of a stream. Every process reads all of it and takes its rows: the only split that stays
    exact when the count of processes changes."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, sequence_length: int, share: Share, seed: int) -> None:
        self._identity = {
            "corpus": f"{config.source} {config.text_field} {config.validation_fraction} {tokenizer.fingerprint}",
            "sequence_length": sequence_length,
            "seed": [seed, config.shuffle_seed],
        }
        self._share = share
        rows = StreamRows(config, tokenizer, sequence_length)
        window = max(WINDOW_TOKENS // sequence_length, 1)
        # The shuffle adds the window's number to its seed, in 32 bits.
        window_seed = int(np.random.SeedSequence([seed, config.shuffle_seed]).generate_state(1)[0]) >> 1
        shuffled = WindowShuffleIterDataset(rows, window_size=window, seed=window_seed)
        self._rows = iter(shuffled)

    def __iter__(self) -> StreamIterator:
        return self

    def __next__(self) -> Batch:
        rows = [next(self._rows) for _ in range(self._share.global_batch)]
        first = self._share.row(0)
        own = rows[first : first + self._share.batch_size]
        return {name: np.stack([row[name] for row in own]) for name in own[0]}

    def get_state(self) -> dict[str, Any]:
        return {"rows": self._rows.get_state(), **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        _check_state(state, self._identity)
        self._rows.set_state(state["rows"])

    def close(self) -> None:
        self._rows.close()


def _check_state(state: dict[str, Any], identity: dict[str, Any]) -> None:
    for name, value in identity.items():
        if state.get(name) != value:
            what = "the text or its tokenizer" if name == "corpus" else name
            raise DataError(
                f"the data are not those of the checkpoint: {what} was {state.get(name)!r} and is {value!r}; "
                "restore it, or start a new run"
            )
