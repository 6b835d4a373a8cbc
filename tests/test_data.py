"""Sources, what is held out of them, and what is said when they cannot be used."""

import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from dmattn_jax.io import ByteTokenizer, FileTokenizer, Tokenizer, train_tokenizer
from train.config import DataConfig
from train.data import DataError, Datasets, HeldOut, make_datasets, make_evaluation, training_texts
from train.data.corpus import package_files, stdlib_files
from train.data.sources import find_files

T = 29
TEXTS = [f"document {number}, naïve: " + "lorem ipsum " * (number % 5) for number in range(20)]


@pytest.fixture(autouse=True)
def _no_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make(source: object, tokenizer: Tokenizer | None = None, **fields: Any) -> Datasets:
    config = DataConfig(source=str(source), **{"validation_fraction": 0.2, **fields})
    return make_datasets(config, tokenizer or ByteTokenizer(), sequence_length=T, batch_size=2, seed=0)


def evaluate(source: object, tokenizer: Tokenizer | None = None, **fields: Any) -> HeldOut:
    config = DataConfig(source=str(source), **fields)
    return make_evaluation(config, tokenizer or ByteTokenizer(), sequence_length=4096, batch_size=2)


def documents_in(held_out: HeldOut) -> list[str]:
    """Sorted; only for sources that fit one row, where no document is cut."""
    assert len(held_out.batches) == 1
    found = []
    for batch in held_out.batches:
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                found.append(ByteTokenizer().decode(tokens[segments == segment]))
    return sorted(found)


# Every kind of source


def write_directory(folder: Path) -> Path:
    for number, text in enumerate(TEXTS):
        path = folder / "corpus" / f"part {number % 3}" / f"{number}{['.txt', '.md', '.py', ''][number % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder / "corpus"


def write_glob(folder: Path) -> str:
    write_directory(folder)
    return str(folder / "corpus" / "**" / "*")


def write_jsonl(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"id": n, "text": text}) for n, text in enumerate(TEXTS)) + "\n\n")
    return path


def write_parquet(folder: Path) -> Path:
    path = folder / "rows.parquet"
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), path)
    return path


def write_tokens(folder: Path) -> Path:
    path = folder / "tokens.npy"
    np.save(path, np.concatenate([[*text.encode(), 256] for text in TEXTS]).astype(np.uint16))
    return path


def write_mixed(folder: Path) -> Path:
    """Five documents in each format, in one directory."""
    mixed = folder / "mixed"
    mixed.mkdir()
    for number, text in enumerate(TEXTS[:5]):
        (mixed / f"{number}.txt").write_bytes(text.encode())
    (mixed / "b.JSONL").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[5:10]))
    pq.write_table(pa.table({"text": pa.array(TEXTS[10:15], pa.large_string())}), mixed / "c.parquet")
    np.save(mixed / "a.npy", np.concatenate([[*text.encode(), 256] for text in TEXTS[15:]]).astype(np.int32))
    return mixed


WRITERS = [write_directory, write_glob, write_jsonl, write_parquet, write_tokens, write_mixed]


@pytest.mark.parametrize("write", WRITERS)
def test_every_source_gives_its_documents(tmp_path: Path, write: Any) -> None:
    source = write(tmp_path)
    held_out = evaluate(source)
    total = sum(len(text.encode()) + 1 for text in TEXTS)
    assert held_out.tokens == total
    assert held_out.bytes_per_token == pytest.approx(1.0)
    assert documents_in(held_out) == sorted(TEXTS)
    assert f"{len(TEXTS)} documents" in held_out.description
    datasets = make(source)
    assert datasets.train_tokens is not None
    assert 0 < datasets.train_tokens < total
    assert next(datasets.train)["tokens"].shape == (2, T)


@pytest.mark.parametrize("write", [w for w in WRITERS if w not in (write_tokens, write_mixed)])
def test_the_training_texts_are_the_documents_that_are_not_held_out(tmp_path: Path, write: Any) -> None:
    source = write(tmp_path)
    texts = list(training_texts(DataConfig(source=str(source), validation_fraction=0.2)))
    assert len(texts) == 16
    assert set(texts) < set(TEXTS)
    assert make(source).train_tokens == sum(len(text.encode()) + 1 for text in texts)


def test_text_field_names_the_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"body": text, "text": "no"}) for text in TEXTS))
    assert evaluate(path, text_field="body").tokens == sum(len(text.encode()) + 1 for text in TEXTS)


def test_a_large_vocabulary_and_a_tokenizer_without_end_tokens(tmp_path: Path) -> None:
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: 70_000 + index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({**vocabulary, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = FileTokenizer(backend.to_str())
    assert tokenizer.eos_id is None
    held_out = evaluate(write_directory(tmp_path), tokenizer)
    assert held_out.tokens == sum(len(text.split()) for text in TEXTS)
    assert max(batch["tokens"].max() for batch in held_out.batches) == 70_000 + len(words) - 1
    assert "no end-of-document token" in held_out.description


def test_byte_order_marks_and_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert documents_in(evaluate(tmp_path / "a.txt")) == ["one\r\ntwo"]


def test_lone_surrogates_in_jsonl_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud800y"}')
    held_out = evaluate(tmp_path / "a.jsonl")
    assert documents_in(held_out) == ["x?y"]
    assert held_out.bytes_per_token == 1.0


def test_what_is_not_text_or_empty_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_directory(tmp_path)
    for name, content in {
        "latin.txt": b"caf\xe9",
        "image.png": b"\x89PNG\0",
        "utf16.txt": "abc".encode("utf-16-le"),
        "empty.txt": b"",
        ".hidden": b"hidden",
        "__pycache__/a.txt": b"cached",
        ".git/config": b"hidden",
    }.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    with caplog.at_level(logging.INFO, "train.data"):
        description = make(source).description
    assert "24 files, 20 documents" in description
    assert "left out 3 files that are not UTF-8 text and 1 empty documents" in description
    assert "held out 4 of 20 files" in description
    assert caplog.messages == [description]


# The default corpus


def test_stdlib_is_this_python_and_the_same_every_time() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    files = stdlib_files()
    names = [file.name for file in files]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    for file in files:
        assert file.path == root / file.name
        assert file.path.suffix == ".py"
        assert not {"site-packages", "dist-packages", "__pycache__"} & set(file.path.parts[len(root.parts) :])
    command = "from train.data.corpus import stdlib_files; print(*(file.name for file in stdlib_files()), sep='\\n')"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    again = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True, env=environment)
    assert again.stdout.splitlines() == names


def test_stdlib_works_where_parts_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path(sysconfig.get_path("stdlib"))
    fake = tmp_path / "python3"
    shutil.copytree(real / "json", fake / "json")
    shutil.copytree(real / "json", fake / "site-packages" / "json")
    (fake / "bad.py").write_bytes(b"# \xe9")
    (fake / "data.txt").write_bytes(b"not source")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(fake))
    datasets = make("stdlib")
    count = len(list((real / "json").glob("*.py")))
    assert f"stdlib: {count + 1} files, {count} documents" in datasets.description
    assert "left out 1 files that are not UTF-8 text" in datasets.description
    shutil.rmtree(fake)
    with pytest.raises(DataError, match=r"source 'stdlib' needs the \.py files of Python's standard library"):
        make("stdlib")


def test_packages_are_text_and_every_file_once(tmp_path: Path) -> None:
    for name, content in {
        "std/os.py": "import sys",
        "std/site-packages/x.py": "not the standard library",
        "site/copy.py": "import sys",
        "site/b/notes.md": "prose",
        "site/b/__pycache__/c.py": "cached",
        "site/table.csv": "1,2",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    files = package_files({"stdlib": tmp_path / "std", "packages": tmp_path / "site"})
    # In the order of the roots' names, so the copy in a package is the one that stays.
    assert [file.name for file in files] == ["packages/b/notes.md", "packages/copy.py"]
    with pytest.raises(DataError, match="source 'packages' found no text below"):
        package_files({"packages": tmp_path / "std" / "nowhere"})


def test_stdlib_gives_batches() -> None:
    datasets = make("stdlib", validation_fraction=0.05)
    assert datasets.train_tokens is not None
    assert datasets.train_tokens > 5_000_000
    assert datasets.bytes_per_token == 1.0
    batch = next(datasets.train)
    assert (batch["segment_ids"] > 0).all()
    datasets.train.close()


# Held out


def test_whole_files_are_held_out(tmp_path: Path) -> None:
    """Every file is one letter repeated, so a file on both sides shows."""
    for number in range(26):
        (tmp_path / f"{number}.txt").write_text(chr(97 + number) * (50 + number))
    datasets = make(tmp_path)
    held_out = {int(token) for batch in datasets.validation for token in batch["tokens"].ravel()} - {0, 256}
    trained: set[int] = set()
    for _ in range(3 * datasets.train_tokens // (2 * T)):  # type: ignore[operator]
        trained |= {int(token) for token in next(datasets.train)["tokens"].ravel()} - {256}
    assert len(held_out) == 5
    assert not held_out & trained
    assert held_out | trained == set(range(97, 123))


def test_files_of_rows_are_held_out_whole(tmp_path: Path) -> None:
    for number in range(5):
        rows = [json.dumps({"text": chr(97 + number) * 20}) for _ in range(9)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(rows))
    texts = set(training_texts(DataConfig(source=str(tmp_path), validation_fraction=0.2)))
    assert len(texts) == 4
    assert make(tmp_path).train_tokens == 4 * 9 * 21


def test_the_held_out_files_do_not_depend_on_place_or_seed(tmp_path: Path) -> None:
    first = write_directory(tmp_path / "one")
    second = write_directory(tmp_path / "two")
    of_first = list(training_texts(DataConfig(source=str(first), validation_fraction=0.2)))
    of_second = list(training_texts(DataConfig(source=str(second), validation_fraction=0.2, shuffle_seed=5)))
    assert of_first == of_second


def test_the_held_out_share_is_the_asked_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"row {number}"}) for number in range(1000)))
    for fraction, expected in ((0.0001, 999), (0.05, 950), (0.5, 500), (0.9999, 1)):
        assert len(list(training_texts(DataConfig(source=str(path), validation_fraction=fraction)))) == expected


# Bits per byte


def test_bytes_per_token_is_bytes_over_predicted_tokens(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 290, tmp_path / "tokenizer.json")
    source = write_directory(tmp_path)
    held_out = evaluate(source, tokenizer)
    # Of each document all tokens but the first are predicted, the end token too.
    predicted = sum(int((batch["targets"] >= 0).sum()) for batch in held_out.batches)
    assert predicted == sum(len(tokenizer.encode(text)) for text in TEXTS)
    text_bytes = sum(len(text.encode()) for text in TEXTS)
    assert held_out.bytes_per_token == pytest.approx(text_bytes / predicted)
    assert held_out.bytes_per_token > 1.5


def test_bytes_per_token_of_a_tokenised_file(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 290, tmp_path / "tokenizer.json")
    ids = [token for text in TEXTS for token in (*tokenizer.encode(text), tokenizer.eos_id)]
    np.save(tmp_path / "tokens.npy", np.array(ids, np.uint32))
    expected = evaluate(write_directory(tmp_path), tokenizer).bytes_per_token
    assert evaluate(tmp_path / "tokens.npy", tokenizer).bytes_per_token == pytest.approx(expected)


# A tokenised file


def test_documents_of_a_tokenised_file(tmp_path: Path) -> None:
    """Ends at the eos id; empty documents are left out; the last document may lack its end."""
    np.save(tmp_path / "a.npy", np.array([256, 97, 98, 256, 256, 99, 256, 100], np.int64))
    held_out = evaluate(tmp_path / "a.npy")
    [batch] = held_out.batches
    assert batch["tokens"][0, :6].tolist() == [97, 98, 256, 99, 256, 100]
    assert batch["targets"][0, :6].tolist() == [98, 256, -1, 256, -1, -1]
    assert batch["segment_ids"][0, :7].tolist() == [1, 1, 1, 2, 2, 3, 0]
    assert "2 empty documents" in held_out.description


def test_names_in_a_glob_are_those_in_its_directory(tmp_path: Path) -> None:
    source = write_directory(tmp_path)
    assert [file.name for file in find_files(str(source / "**" / "*"))] == [
        file.name for file in find_files(str(source))
    ]
