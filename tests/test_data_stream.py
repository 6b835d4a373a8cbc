"""A Hugging Face `datasets` stream: a stand-in with the calls of that package, so that nothing is downloaded."""

import itertools
import json
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dmattn_jax.io import ByteTokenizer
from train.config import DataConfig
from train.data import DataError, Datasets, make_datasets, make_evaluation, training_texts
from train.data.stream import is_held_out
from train.errors import MissingExtraError, UserError

T = 13
TEXTS = [f"text é {number:04}" for number in range(60)]  # each fills a row with its end


class Stream:
    """`datasets.IterableDataset`, as far as it is used: a state counts only for the epoch it was taken in."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows
        self._epoch = 0
        self._place = 0
        self._start: dict[str, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"place": self._place, "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._start = dict(state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        resumed = self._start is not None and self._start["epoch"] == self._epoch
        self._place = self._start["place"] if resumed and self._start else 0
        while self._place < len(self._rows):
            self._place += 1
            yield self._rows[self._place - 1]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The rows of `hf:owner/corpus`, to be changed by a test."""
    found: list[dict[str, Any]] = [{"text": text} for text in TEXTS]
    module = ModuleType("datasets")

    def load_dataset(name: str, configuration: str | None, *, split: str, streaming: bool) -> Stream:
        if (name, configuration) not in (("owner/corpus", None), ("owner/corpus", "english")):
            raise FileNotFoundError(f"Dataset {name!r} does not exist")
        assert split == "train"
        assert streaming
        return Stream(found)

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("train.data.batches.WINDOW_TOKENS", 7 * T)
    monkeypatch.setattr("train.data.loader.VALIDATION_TOKENS", 4 * T)
    return found


def make(
    batch_size: int = 6, index: int = 0, count: int = 1, length: int = T, seed: int = 0, **fields: Any
) -> Datasets:
    config = DataConfig(**{"source": "hf:owner/corpus", "validation_fraction": 0.2, **fields})
    return make_datasets(
        config,
        ByteTokenizer(),
        sequence_length=length,
        batch_size=batch_size,
        seed=seed,
        process_index=index,
        process_count=count,
    )


def take(datasets: Datasets, batches: int) -> list[np.ndarray]:
    """Tokens, targets and segments of each batch, stacked."""
    found = [next(datasets.train) for _ in range(batches)]
    return [np.stack([batch["tokens"], batch["targets"], batch["segment_ids"]]) for batch in found]


def texts_of(batches: list[np.ndarray]) -> list[str]:
    return [ByteTokenizer().decode(row) for batch in batches for row in batch[0]]


def trained_texts() -> list[str]:
    return [text for text in TEXTS if not is_held_out(text, 0.2)]


@pytest.mark.usefixtures("rows")
def test_every_document_once_an_epoch_in_shuffled_windows() -> None:
    expected = trained_texts()
    datasets = make(1)
    first = texts_of(take(datasets, len(expected)))
    second = texts_of(take(datasets, len(expected)))
    assert first != expected
    assert first != second
    # Windows of 7 rows reach over the end of an epoch; three epochs hold all but a window's worth evenly.
    both = first + second + texts_of(take(datasets, 7))
    assert set(both) == set(expected)
    assert {both.count(text) for text in expected} <= {1, 2, 3}
    for begin in range(0, len(both) - 7, 7):
        endless = expected * 3
        assert sorted(both[begin : begin + 7]) == sorted(endless[begin : begin + 7])
    assert datasets.train_tokens is None


@pytest.mark.usefixtures("rows")
def test_held_out_documents_are_never_trained_on() -> None:
    datasets = make(2)
    held_out = [ByteTokenizer().decode(row) for batch in datasets.validation for row in batch["tokens"]]
    assert len(held_out) == 4
    assert not set(held_out) & set(trained_texts())
    assert set(held_out) <= set(TEXTS)
    assert datasets.bytes_per_token == 1.0
    assert datasets.description == "hf:owner/corpus: a stream; held out 4 documents (52 tokens)"
    config = DataConfig(source="hf:owner/corpus", validation_fraction=0.2)
    assert list(training_texts(config)) == trained_texts()
    evaluation = make_evaluation(config, ByteTokenizer(), sequence_length=T, batch_size=2)
    assert [batch["tokens"].tolist() for batch in evaluation.batches] == [
        batch["tokens"].tolist() for batch in datasets.validation
    ]


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("length", [5, 13, 29])
def test_a_state_resumes_bitwise_at_every_place(length: int) -> None:
    """Rows shorter and longer than documents, inside and across windows and epochs."""
    reference = make(2, length=length)
    states, expected = [], []
    for _ in range(90):
        states.append(json.dumps(reference.train.get_state()))
        expected += take(reference, 1)
    for place in range(0, 80, 7):
        resumed = make(2, length=length)
        take(resumed, place % 2)
        resumed.train.set_state(json.loads(states[place]))
        np.testing.assert_array_equal(take(resumed, 9), expected[place : place + 9])


@pytest.mark.usefixtures("rows")
def test_tokens_and_targets_follow_the_documents() -> None:
    datasets = make(1, length=5)
    tokens, targets, segments = np.concatenate(take(datasets, 200), axis=1)
    assert (segments > 0).all()
    trained = {text: [*text.encode(), 256] for text in trained_texts()}
    pairs = {pair for ids in trained.values() for pair in itertools.pairwise(ids)}
    assert {(int(a), int(b)) for a, b in zip(tokens.ravel(), targets.ravel(), strict=True) if b >= 0} == pairs
    np.testing.assert_array_equal(targets == -1, tokens == 256)


@pytest.mark.usefixtures("rows")
def test_changed_process_counts_neither_skip_nor_repeat() -> None:
    reference = make(6)
    expected = np.concatenate(take(reference, 30), axis=1)
    seen = []
    state: dict[str, Any] | None = None
    for count, batch_size in ((2, 3), (3, 2), (1, 6), (1, 2), (1, 4)):
        processes = [make(batch_size, index, count) for index in range(count)]
        for process in processes:
            if state is not None:
                process.train.set_state(state)
        for _ in range(5):
            seen += [batch for process in processes for batch in take(process, 1)]
        states = [process.train.get_state() for process in processes]
        assert all(other == states[0] for other in states)
        state = json.loads(json.dumps(states[0]))
    joined = np.concatenate(seen, axis=1)
    np.testing.assert_array_equal(joined, expected[:, : joined.shape[1]])


@pytest.mark.usefixtures("rows")
def test_the_seed_decides_the_order() -> None:
    assert texts_of(take(make(), 3)) == texts_of(take(make(), 3))
    assert texts_of(take(make(), 3)) != texts_of(take(make(seed=1), 3))
    with pytest.raises(DataError, match="seed was"):
        make(seed=1).train.set_state(make().train.get_state())
    with pytest.raises(DataError, match="the text or its tokenizer was"):
        make(source="hf:owner/corpus:english").train.set_state(make().train.get_state())


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"needs the package `datasets`: pip install 'dmattn-jax\[hf\]'"):
        make()


def test_streams_that_cannot_be_used(rows: list[dict[str, Any]]) -> None:
    def refused(message: str, **fields: Any) -> None:
        with pytest.raises(UserError, match=message):
            next(make(**fields).train)

    refused(
        "source 'hf:other/corpus' cannot be opened: Dataset 'other/corpus' does not exist", source="hf:other/corpus"
    )
    refused("source must be hf:NAME or hf:NAME:CONFIGURATION", source="hf:")
    refused("validation_fraction must be between 0 and 1", validation_fraction=0.0)
    refused(r"no field text_field='body'; the fields are \['text'\]", text_field="body")
    refused("has no document to hold out with validation_fraction=1e-06: raise it", validation_fraction=1e-6)
    refused("leaves no document to train on: lower validation_fraction", validation_fraction=1 - 1e-12)
    rows[:] = [{"text": ""}, {"text": None}]
    refused("has no document to hold out")
