"""Packing and batches: nothing lost, nothing twice, exact resumption whatever the count of processes."""

import json
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dmattn_jax.io import ByteTokenizer
from train.config import DataConfig
from train.data import DataError, Datasets, make_datasets, training_texts
from train.data.packing import EndlessRows, FixedRows, Row, fill_row
from train.data.tokens import TokenStore

T = 13


def make_store(lengths: list[int]) -> TokenStore:
    """Documents whose ids are all different: token x is followed by x + 1 unless its document ends."""
    length = np.array(lengths, np.int64)
    return TokenStore(
        arrays=(np.arange(1, length.sum() + 1, dtype=np.uint32),),
        array=np.zeros_like(length),
        start=np.cumsum(length) - length,
        length=length,
        file=np.zeros_like(length),
        text_bytes=length,
        files=("ids",),
        not_text=0,
        empty=0,
    )


def every_document(store: TokenStore) -> np.ndarray:
    return np.arange(len(store), dtype=np.int64)


def check_row(row: Row, store: TokenStore, length: int) -> None:
    """The rules of targets and segments, for the documents of `make_store`."""
    tokens, targets, segments = row["tokens"], row["targets"], row["segment_ids"]
    for array in (tokens, targets, segments):
        assert array.shape == (length,)
        assert array.dtype == np.int32
    placed = int((segments > 0).sum())
    assert (segments[:placed] > 0).all()
    assert not tokens[placed:].any()
    assert (targets[placed:] == -1).all()
    if not placed:
        return
    assert segments[0] == 1
    assert np.isin(np.diff(segments[:placed]), (0, 1)).all()
    last = np.cumsum(store.length)
    document = np.searchsorted(last, tokens[:placed])
    ends = tokens[:placed] == last[document]
    np.testing.assert_array_equal(targets[:placed], np.where(ends, -1, tokens[:placed] + 1))
    # A segment is one run of one document; a new one begins exactly where the run breaks.
    same = np.diff(tokens[:placed]) == 1
    same &= ~ends[:-1]
    np.testing.assert_array_equal(np.diff(segments[:placed]) == 0, same)


LENGTHS = st.lists(st.integers(0, 37), min_size=1, max_size=17).filter(lambda lengths: sum(lengths) > 0)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(LENGTHS, st.integers(1, 19), st.integers(0, 5))
def test_training_rows_hold_every_token_once_an_epoch(lengths: list[int], length: int, seed: int) -> None:
    store = make_store(lengths)
    total = sum(lengths)
    hypothesis.assume(total >= length)
    rows = EndlessRows(store, every_document(store), length, (seed,))
    assert rows.epoch_tokens == total
    # `length` epochs are `total` rows with nothing left over.
    seen = [rows[number] for number in range(total)]
    for row in seen:
        check_row(row, store, length)
        assert (row["segment_ids"] > 0).all()
    tokens = np.concatenate([row["tokens"] for row in seen])
    np.testing.assert_array_equal(np.bincount(tokens, minlength=total + 1)[1:], np.full(total, length))
    targets = np.concatenate([row["targets"] for row in seen])
    firsts = store.start[store.length > 0] + 1
    expected = np.full(total + 1, length)
    expected[firsts] = expected[0] = 0
    np.testing.assert_array_equal(np.bincount(targets[targets >= 0], minlength=total + 1), expected)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(LENGTHS, st.integers(1, 19), st.integers(1, 5))
def test_every_epoch_has_all_tokens_before_the_next_begins(lengths: list[int], length: int, epochs: int) -> None:
    store = make_store(lengths)
    total = sum(lengths)
    hypothesis.assume(total >= length)
    rows = EndlessRows(store, every_document(store), length, (0,))
    numbers = range(rows.first_row(epochs))
    assert [rows.epoch_of(number) for number in (numbers[-1], numbers[-1] + 1)] == [epochs - 1, epochs]
    counts = np.bincount(np.concatenate([rows[number]["tokens"] for number in numbers]), minlength=total + 1)[1:]
    assert (counts >= epochs).all()
    assert counts.sum() - epochs * total < length


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(LENGTHS, st.integers(1, 19))
def test_held_out_rows_hold_every_token_once_with_padding_at_the_end(lengths: list[int], length: int) -> None:
    store = make_store(lengths)
    rows = FixedRows(store, every_document(store), length)
    assert rows.rows == -(-sum(lengths) // length)
    seen = [rows[number] for number in range(rows.rows + 2)]
    for row in seen:
        check_row(row, store, length)
    for row in seen[: rows.rows - 1]:
        assert (row["segment_ids"] > 0).all()
    for row in seen[rows.rows :]:
        assert not row["segment_ids"].any()
    placed = np.concatenate([row["tokens"][row["segment_ids"] > 0] for row in seen])
    np.testing.assert_array_equal(np.sort(placed), np.arange(1, sum(lengths) + 1))


def test_a_row_by_hand() -> None:
    """A document's end, a whole document, and the beginning of one that goes on in another row."""
    pieces = [(np.array([5, 6, 256]), 3), (np.array([7, 256]), 2), (np.array([8, 9, 10]), 2)]
    row = fill_row(pieces, 11)
    assert row["tokens"].tolist() == [5, 6, 256, 7, 256, 8, 9, 0, 0, 0, 0]
    assert row["targets"].tolist() == [6, 256, -1, 256, -1, 9, 10, -1, -1, -1, -1]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 3, 3, 0, 0, 0, 0]


def test_too_few_tokens_for_a_row_are_refused() -> None:
    store = make_store([5, 7])
    with pytest.raises(ValueError, match="documents must have >= 13 tokens, got 12"):
        EndlessRows(store, every_document(store), T, (0,))


# From files to batches


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    words = np.random.default_rng(0)
    for number in range(23):
        text = f"file {number}: " + "".join(words.choice(list("abcé \n"), words.integers(1, 71)))
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    return DataConfig(source=str(tmp_path), validation_fraction=0.2)


def make(config: DataConfig, batch_size: int = 6, index: int = 0, count: int = 1, **changes: Any) -> Datasets:
    arguments: dict[str, Any] = {"sequence_length": T, "seed": 0, **changes}
    return make_datasets(
        config, ByteTokenizer(), batch_size=batch_size, process_index=index, process_count=count, **arguments
    )


def take(datasets: Datasets, batches: int) -> list[dict[str, np.ndarray]]:
    return [next(datasets.train) for _ in range(batches)]


def assert_same(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys() == {"tokens", "targets", "segment_ids"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def rows_of(batches: list[dict[str, np.ndarray]]) -> list[bytes]:
    return [row.tobytes() for batch in batches for row in batch["tokens"]]


def documents_of(batches: list[dict[str, np.ndarray]]) -> list[str]:
    """Whole documents, where every one fits a row."""
    found = []
    for batch in batches:
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                found.append(bytes(tokens[segments == segment][:-1].tolist()).decode())
    return found


def epoch_batches(datasets: Datasets, batch_size: int = 6) -> int:
    """Batches that reach into the second epoch."""
    assert datasets.train_tokens is not None
    return -(-datasets.train_tokens // (T * batch_size)) + 1


def test_batches_are_int32_of_the_asked_shape(config: DataConfig) -> None:
    datasets = make(config)
    [batch] = take(datasets, 1)
    for array in (batch["tokens"], batch["targets"], batch["segment_ids"], *next(iter(datasets.validation)).values()):
        assert array.shape == (6, T)
        assert array.dtype == np.int32


def test_seed_and_epoch_decide_the_order(config: DataConfig) -> None:
    first = make(config)
    count = epoch_batches(first)
    batches = take(first, 2 * count)
    assert_same(batches, take(make(config), 2 * count))
    for other in (make(config, seed=1), make(DataConfig(**{**vars(config), "shuffle_seed": 1}))):
        assert rows_of(take(other, 2)) != rows_of(batches[:2])
    assert rows_of(batches[:2]) != rows_of(batches[count : count + 2])


@pytest.mark.parametrize("where", ["start", "middle", "last batch of an epoch", "second epoch"])
def test_a_state_resumes_bitwise(config: DataConfig, where: str) -> None:
    datasets = make(config)
    count = epoch_batches(datasets)
    before = {"start": 0, "middle": 3, "last batch of an epoch": count - 2, "second epoch": count + 2}[where]
    take(datasets, before)
    state = json.loads(json.dumps(datasets.train.get_state()))
    expected = take(datasets, 2 * count)
    resumed = make(config)
    take(resumed, 1)
    resumed.train.set_state(state)
    assert resumed.train.get_state() == state
    assert_same(take(resumed, 2 * count), expected)
    # Going back in the same iterator, past batches read ahead.
    datasets.train.set_state(state)
    assert_same(take(datasets, 3), expected[:3])


def test_states_do_not_depend_on_reading_ahead(config: DataConfig) -> None:
    datasets = make(config)
    assert datasets.train.get_state()["rows"] == 0
    for number in range(1, 5):
        next(datasets.train)
        assert datasets.train.get_state()["rows"] == 6 * number


@pytest.mark.parametrize("count", [2, 3, 6])
def test_processes_divide_every_global_batch(config: DataConfig, count: int) -> None:
    expected = take(make(config), 29)
    parts = [take(make(config, 6 // count, index, count), 29) for index in range(count)]
    joined = [
        {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        for batches in zip(*parts, strict=True)
    ]
    assert_same(joined, expected)


def test_processes_divide_the_validation_batches(config: DataConfig) -> None:
    expected = list(make(config).validation)
    parts = [list(make(config, 2, index, 3).validation) for index in range(3)]
    joined = [
        {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        for batches in zip(*parts, strict=True)
    ]
    assert_same(joined, expected)


def test_changed_process_counts_neither_skip_nor_repeat(config: DataConfig) -> None:
    """Three epochs with a restart in another layout after every few batches, against one uninterrupted run."""
    reference = make(config)
    total = 3 * epoch_batches(reference)
    expected = rows_of(take(reference, total))
    layouts = [(1, 6), (2, 3), (3, 2), (6, 1), (1, 4), (2, 5), (1, 1)]
    state: dict[str, Any] | None = None
    seen: list[bytes] = []
    turn = 0
    while len(seen) < len(expected):
        count, batch_size = layouts[turn % len(layouts)]
        turn += 1
        processes = [make(config, batch_size, index, count) for index in range(count)]
        for process in processes:
            if state is not None:
                process.train.set_state(state)
        for _ in range(5):
            for process in processes:
                seen += rows_of(take(process, 1))
        states = [process.train.get_state() for process in processes]
        assert all(other == states[0] for other in states)
        state = json.loads(json.dumps(states[0]))
        for process in processes:
            process.train.close()
    assert seen[: len(expected)] == expected


def test_an_epoch_of_batches_is_the_documents(tmp_path: Path) -> None:
    """All documents, of one length that fits a row: their texts come back from the batches, each once an epoch."""
    texts = [f"text é {number:04}" for number in range(40)]
    for number, text in enumerate(texts):
        assert len(text.encode()) == T - 1
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    datasets = make(DataConfig(source=str(tmp_path), validation_fraction=0.1), 4)
    first, second = documents_of(take(datasets, 9)), documents_of(take(datasets, 9))
    held_out = documents_of(list(datasets.validation))
    assert len(held_out) == 4
    assert sorted(first + held_out) == sorted(second + held_out) == sorted(texts)
    assert first != second


def test_validation_is_the_same_every_time(config: DataConfig) -> None:
    datasets = make(config)
    first = list(datasets.validation)
    assert len(first) == len(datasets.validation) > 1
    assert_same(list(datasets.validation), first)
    assert_same(list(make(config, seed=7).validation), first)
    padding = np.concatenate([batch["segment_ids"] == 0 for batch in first])
    assert not padding[:-6].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 17}, "sequence_length was 13 and is 17"),
        ({"seed": 5}, r"seed was \[0, 0\] and is \[5, 0\]"),
    ],
)
def test_a_state_of_another_run_is_refused(config: DataConfig, change: dict[str, int], message: str) -> None:
    state = make(config).train.get_state()
    with pytest.raises(DataError, match=message):
        make(config, **change).train.set_state(state)


@pytest.mark.parametrize("edit", ["longer", "removed", "added", "renamed"])
def test_a_state_of_changed_text_is_refused(config: DataConfig, edit: str) -> None:
    state = make(config).train.get_state()
    texts = set(training_texts(config))
    trained = next(path for path in sorted(Path(config.source).iterdir()) if path.read_bytes().decode() in texts)
    match edit:
        case "longer":
            trained.write_bytes(trained.read_bytes() + b"!")
        case "removed":
            trained.unlink()
        case "added":
            (Path(config.source) / "new.txt").write_text("new")
        case "renamed":
            trained.rename(trained.with_name("renamed.txt"))
    with pytest.raises(DataError, match=r"the text or its tokenizer was .* restore it, or start a new run"):
        make(config).train.set_state(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"sequence_length": 0}, "sequence_length must be >= 1, got 0"),
        ({"index": 2, "count": 2}, "process_index must be in 0 … 1, got 2"),
        ({"sequence_length": 4099}, r"less than one row of sequence_length=4099: give more text or a shorter"),
    ],
)
def test_impossible_numbers_are_refused(config: DataConfig, change: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(config, **change)
