"""Tokens of a corpus too large for memory: kept on disk, taken from there the next time, never trusted when damaged."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dmattn_jax.io import ByteTokenizer
from train.data import token_cache
from train.data.sources import find_files
from train.data.tokens import TokenStore, tokenize_files


class CountingTokenizer(ByteTokenizer):
    def __init__(self) -> None:
        self.documents = 0

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        self.documents += len(texts)
        return super().encode_documents(texts)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "dmattn" / "tokens"


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """23 files, tokenised 2 or so at a time, of which the first 100 tokens are held in memory."""
    monkeypatch.setattr(token_cache, "MEMORY_TOKENS", 100)
    monkeypatch.setattr("train.data.tokens.BATCH_CHARACTERS", 61)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(23):
        (folder / f"{number:02}.txt").write_text(f"file {number} " * (number % 7))
    (folder / "binary").write_bytes(b"\0")
    return folder


def tokenize(corpus: Path) -> tuple[TokenStore, int]:
    """The store, and how many documents had to be tokenised for it."""
    tokenizer = CountingTokenizer()
    return tokenize_files(find_files(str(corpus)), tokenizer, "text"), tokenizer.documents


def assert_whole(store: TokenStore, corpus: Path) -> None:
    texts = [path.read_text() for path in sorted(corpus.glob("*.txt"))]
    assert [bytes(store.tokens(number)[:-1].tolist()).decode() for number in range(len(store))] == [
        text for text in texts if text
    ]
    assert all(store.tokens(number)[-1] == 256 for number in range(len(store)))
    assert [store.files[index] for index in store.file] == [
        path.name for path in sorted(corpus.glob("*.txt")) if path.read_text()
    ]
    assert (store.text_bytes + 1 == store.length).all()
    assert store.empty == sum(not text for text in texts)
    assert store.not_text == 1


def test_small_corpora_stay_in_memory(corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "MEMORY_TOKENS", 1 << 20)
    store, _ = tokenize(corpus)
    assert_whole(store, corpus)
    assert not cache.exists()


def test_large_corpora_are_tokenised_once(corpus: Path, cache: Path) -> None:
    store, documents = tokenize(corpus)
    assert documents == len(store) == 19
    assert isinstance(store.arrays[0], np.memmap)
    assert store.arrays[0].dtype == np.uint16
    assert_whole(store, corpus)
    again, documents = tokenize(corpus)
    assert documents == 0
    assert_whole(again, corpus)
    [folder] = cache.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["documents.npz", "tokens.bin"]


def test_changed_files_are_tokenised_again(corpus: Path, cache: Path) -> None:
    tokenize(corpus)
    (corpus / "03.txt").write_text("changed")
    store, documents = tokenize(corpus)
    assert documents == len(store)
    assert_whole(store, corpus)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npz"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "deleted", "garbage"])
def test_a_damaged_cache_is_noticed_and_made_again(
    corpus: Path, cache: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    first, _ = tokenize(corpus)
    del first
    [folder] = cache.iterdir()
    path = folder / name
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[: len(content) // 2 + 1])
        case "emptied":
            path.write_bytes(b"")
        case "deleted":
            path.unlink()
        case "garbage":
            path.write_bytes(b"garbage")
    with caplog.at_level(logging.WARNING, "train.data"):
        store, documents = tokenize(corpus)
    assert documents == len(store)
    assert_whole(store, corpus)
    [message] = caplog.messages
    assert f"the token cache {folder} is damaged" in message
    assert tokenize(corpus)[1] == 0


def test_an_interrupted_run_leaves_nothing(corpus: Path, cache: Path) -> None:
    (corpus / "99.jsonl").write_text("not JSON")
    with pytest.raises(Exception, match=r"99\.jsonl, line 1: not JSON"):
        tokenize(corpus)
    assert list(cache.iterdir()) == []


def test_two_processes_may_write_at_once(corpus: Path, cache: Path) -> None:
    """The slower one finds the cache there when it wants to name its own."""

    class SlowTokenizer(CountingTokenizer):
        def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
            if not self.documents:
                tokenize(corpus)
            return super().encode_documents(texts)

    tokenizer = SlowTokenizer()
    store = tokenize_files(find_files(str(corpus)), tokenizer, "text")
    assert tokenizer.documents == 19
    assert_whole(store, corpus)
    assert len(list(cache.iterdir())) == 1
