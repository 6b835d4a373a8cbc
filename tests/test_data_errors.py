"""What is said when a source cannot be used: one line that names it and the fix."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from dmattn_jax.io import ByteTokenizer, FileTokenizer, Tokenizer
from train.config import DataConfig
from train.data import DataError, Datasets, make_datasets, make_evaluation, training_texts

T = 29
TEXTS = [f"document {number}" for number in range(20)]


@pytest.fixture(autouse=True)
def _no_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make(source: object, tokenizer: Tokenizer | None = None, **fields: Any) -> Datasets:
    config = DataConfig(source=str(source), **fields)
    return make_datasets(config, tokenizer or ByteTokenizer(), sequence_length=T, batch_size=2, seed=0)


def write_jsonl(folder: Path) -> Path:
    return put(folder, "\n".join(json.dumps({"text": text}) for text in TEXTS), "rows.jsonl")


def write_tokens(folder: Path) -> Path:
    return put(folder, np.array([97, 256] * 20), "tokens.npy")


def put(folder: Path, content: bytes | str | np.ndarray, name: str) -> Path:
    path = folder / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("one.txt", "some text", r"is one document, and documents are held out .* divide it into several files"),
        ("one.jsonl", '{"text": "a"}', "is one document"),
        ("one.npy", np.arange(50), "is one document"),
        (
            "two.jsonl",
            '{"text": "a"}\n{"text": "b"}',
            "has 2 tokens to train on, less than one row of sequence_length",
        ),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8 text: .* convert it to UTF-8"),
        ("image.png", b"\x89PNG\0", r"image\.png is not text: it has NUL bytes"),
        ("empty.txt", "", r"no text in 1 files \(0 are not UTF-8 text, 1 documents are empty\)"),
        ("empty.npy", np.zeros(0, np.int32), "no text in 1 files"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a\xff"}', r"a\.jsonl, line 1: not JSON"),
        ("a.jsonl", "[1]", r"a\.jsonl, line 1: must be an object, got list"),
        ("a.jsonl", '{"body": "a", "id": 1}', r"no field text_field='text'; the fields are \['body', 'id'\]"),
        ("a.jsonl", '{"text": 5}', "field 'text' must be a string, got int"),
        ("a.parquet", b"PAR1 garbage", r"a\.parquet is not a whole Parquet file"),
        ("a.npy", b"garbage", r"a\.npy is not an array file of numpy"),
        ("a.npy", b"PK\x03\x04 an archive", r"a\.npy is not an array file of numpy"),
        ("a.npy", np.zeros((3, 5), np.int32), r"must hold a flat array of integers, got shape \(3, 5\) of int32"),
        ("a.npy", np.zeros(3), r"must hold a flat array of integers, got shape \(3,\) of float64"),
        ("a.npy", np.array(["pickle", None]), r"a\.npy is not an array file of numpy"),
        ("a.npy", np.array([0, 257]), r"must hold ids from 0 to 256 .* got 257: name the tokenizer that made the file"),
        ("a.npy", np.array([0, -3, 300]), "got -3"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = put(tmp_path, content, name)
    with pytest.raises(DataError, match=message) as caught:
        make(path)
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["a"]}, r"no column text_field='text'; the columns are \['body'\]"),
        ({"text": [1, 2]}, "column 'text' must hold strings, got int64"),
    ],
)
def test_parquet_columns_that_cannot_be_used(tmp_path: Path, table: dict[str, list[Any]], message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        make(tmp_path / "a.parquet")


def test_truncated_parquet_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    for end in range(1, len(content), 211):
        with pytest.raises(DataError, match="is not a whole Parquet file"):
            make(put(tmp_path, content[:end], "cut.parquet"))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nowhere' is not there: give 'stdlib', 'packages', a file, a directory, a glob"
    ):
        make(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"\*\.txt' matches no file; quote a glob"):
        make(tmp_path / "*.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is a directory without files"):
        make(tmp_path / "empty")
    with pytest.raises(DataError, match="source must be 'stdlib', 'packages', a file"):
        make("")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, math.nan])
def test_validation_fractions_that_leave_nothing(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(DataError, match="validation_fraction must be between 0 and 1"):
        make(write_jsonl(tmp_path), validation_fraction=fraction)


def test_a_tokenised_file_needs_an_end_token(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(DataError, match="needs a tokenizer with an end-of-document token"):
        make(write_tokens(tmp_path), FileTokenizer(backend.to_str()))


def test_a_tokenised_file_has_no_texts_to_train_a_tokenizer_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds token ids: name the text they were made of"):
        list(training_texts(DataConfig(source=str(write_tokens(tmp_path)))))


def test_text_without_a_token_to_predict_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([97]))
    with pytest.raises(DataError, match="has no token to predict"):
        make_evaluation(DataConfig(source=str(tmp_path / "a.npy")), ByteTokenizer(), sequence_length=T, batch_size=2)
