"""Tokenizers: bytes, files of the tokenizers library, and training one."""

import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from dmattn_jax.chat import text_prompt
from dmattn_jax.io import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from train.run_files import open_tokenizer

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "the cat sat on the mat, the cat sat on the hat",
    "naïve café – 東京 🦜 \u0000 \ufffd\r\n\ttab",
] * 7

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def trained_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "new folder" / "tokenizer.json"
    train_tokenizer(TEXTS, 307, path)
    return path


@pytest.fixture(scope="module")
def trained(trained_path: Path) -> Tokenizer:
    return load_tokenizer(str(trained_path))


def small_tokenizer(added: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(added)
    return backend


# Bytes


def test_bytes_are_the_default_and_ids_are_the_utf8_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (257, 256, None)
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]


@hypothesis.given(ANY_TEXT)
def test_bytes_round_trip_any_unicode(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    [document] = tokenizer.encode_documents([text])
    assert document.dtype == np.int32
    assert document.tolist() == tokenizer.encode(text)


@hypothesis.given(st.lists(st.integers(0, 400)))
def test_bytes_decode_any_ids(ids: list[int]) -> None:
    """Half a character becomes U+FFFD; the end of a document and padding of the vocabulary have no text."""
    assert ByteTokenizer().decode(ids) == bytes(i for i in ids if i < 256).decode(errors="replace")


@hypothesis.given(ANY_TEXT)
def test_bytes_as_a_file_are_the_same_ids(text: str) -> None:
    tokenizer, file = ByteTokenizer(), ByteTokenizer().as_file()
    assert file.encode(text) == tokenizer.encode(text)
    assert file.decode([*tokenizer.encode(text), 256]) == text
    assert (file.vocab_size, file.eos_id, file.bos_id) == (257, 256, None)


@hypothesis.given(ANY_TEXT)
def test_bytes_of_tokens_are_the_text(trained: Tokenizer, text: str) -> None:
    for tokenizer in (ByteTokenizer(), ByteTokenizer().as_file(), trained):
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


@pytest.mark.parametrize(
    "decoder",
    [
        tokenizers.decoders.Metaspace(),
        tokenizers.decoders.Sequence([tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback()]),
        tokenizers.decoders.WordPiece(prefix="##"),
        None,
    ],
)
def test_bytes_of_tokens_of_any_decoder(decoder: tokenizers.decoders.Decoder | None) -> None:
    vocabulary = {"▁a": 0, "##b": 1, "<0xC3>": 2, "<0xA9>": 3, "c": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="c"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["</s>"])
    backend.add_tokens(["<tool>"])
    of = FileTokenizer(backend.to_str()).token_bytes
    kind = type(decoder).__name__
    assert of(0) == (" a" if kind in ("Metaspace", "Sequence") else "▁a").encode()
    assert [of(2), of(3)] == ([b"\xc3", b"\xa9"] if kind == "Sequence" else [b"<0xC3>", b"<0xA9>"])
    assert [of(index) for index in (4, 5, 6, 7)] == [b"c", b"", b"<tool>", b""]


# Trained


@hypothesis.given(ANY_TEXT)
def test_trained_tokenizer_round_trips_any_unicode(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text
    [document] = trained.encode_documents([text])
    assert document.dtype == np.int32
    assert document.tolist() == trained.encode(text)


@hypothesis.given(st.text())
def test_lone_surrogates_become_question_marks(trained: Tokenizer, text: str) -> None:
    expected = text.encode(errors="replace").decode()
    for tokenizer in (ByteTokenizer(), trained):
        assert tokenizer.decode(tokenizer.encode(text)) == expected
        assert tokenizer.encode_documents([text])[0].tolist() == tokenizer.encode(expected)


def test_trained_tokenizer_has_the_asked_size_and_compresses(trained: Tokenizer) -> None:
    assert trained.vocab_size == 307
    assert trained.eos_id == 0
    assert trained.bos_id is None
    assert len(trained.encode(TEXTS[1])) < 0.7 * len(TEXTS[1])


def test_training_returns_what_loading_gives_and_is_deterministic(trained_path: Path, tmp_path: Path) -> None:
    again = train_tokenizer(iter(TEXTS), 307, tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == trained_path.read_bytes()
    loaded = load_tokenizer(trained_path)
    assert again.fingerprint == loaded.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_training_reads_files(trained_path: Path, tmp_path: Path) -> None:
    paths = []
    for number, text in enumerate(TEXTS):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_bytes(text.encode())
    assert (
        train_tokenizer(paths, 307, tmp_path / "tokenizer.json").fingerprint == load_tokenizer(trained_path).fingerprint
    )


def test_training_shows_progress_when_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(TEXTS, 263, tmp_path / "quiet.json")
    assert capfd.readouterr() == ("", "")
    train_tokenizer(TEXTS, 263, tmp_path / "shown.json", progress=True)
    assert f"reading text: {len(TEXTS)} documents" in capfd.readouterr().err


def test_training_errors_name_the_fix_and_leave_no_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match=r"vocab_size must be >= 257 .* got 256"):
        train_tokenizer(TEXTS, 256, path)
    with pytest.raises(ValueError, match="texts must hold some text"):
        train_tokenizer([], 307, path)
    with pytest.raises(ValueError, match="path must be a file to write, got the folder"):
        train_tokenizer(TEXTS, 307, tmp_path)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"must be UTF-8 files, got .*binary\.txt"):
        train_tokenizer([binary], 307, path)
    assert not path.exists()


# Special tokens


def test_text_that_spells_a_special_token_is_ordinary_text(trained: Tokenizer) -> None:
    text = "a<|endoftext|>b"
    assert trained.eos_id not in trained.encode(text)
    assert trained.eos_id not in trained.encode_documents([text])[0]
    assert trained.decode(trained.encode(text)) == text


def test_a_prompt_may_spell_special_tokens(trained: Tokenizer) -> None:
    ids = trained.encode("a<|endoftext|>b", parse_special=True)
    assert ids == [*trained.encode("a"), trained.eos_id, *trained.encode("b")]
    assert trained.decode(ids) == "ab"
    assert trained.eos_id not in trained.encode("a<|endoftext|>b")


@pytest.mark.parametrize("name", ["</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]"])
def test_eos_is_found_among_the_added_tokens(tmp_path: Path, name: str) -> None:
    path = tmp_path / "tokenizer.json"
    small_tokenizer(["<other>", "<s>", name]).save(str(path))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (4, 5, 6)
    assert tokenizer.encode("a b") == [0, 1]


def test_without_a_known_name_there_is_no_eos(tmp_path: Path) -> None:
    small_tokenizer(["<other>"]).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.eos_id is None
    assert tokenizer.bos_id is None


@pytest.mark.parametrize("named", ["<|turn|>", {"content": "<|turn|>", "lstrip": False}])
def test_tokenizer_config_decides_which_token_is_eos(tmp_path: Path, named: object) -> None:
    small_tokenizer(["</s>", "<|turn|>"]).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).eos_id == 3
    plain = load_tokenizer(tmp_path).fingerprint
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named, "bos_token": None}))
    assert load_tokenizer(tmp_path).eos_id == 4
    assert load_tokenizer(tmp_path).fingerprint != plain


def test_an_answer_ends_at_every_id_that_the_model_names(tmp_path: Path) -> None:
    small_tokenizer(["</s>", "<|turn|>", "<|call|>"]).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).stop_ids == (3,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 4}))
    assert load_tokenizer(tmp_path).stop_ids == (3, 4)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3, 99, -1, None, True]}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (3, (3, 5, 4))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not JSON"):
        load_tokenizer(tmp_path)


def test_a_text_to_continue_begins_as_the_model_expects(tmp_path: Path) -> None:
    backend = small_tokenizer(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert text_prompt(load_tokenizer(tmp_path), "a b") == [0, 1]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert text_prompt(load_tokenizer(tmp_path), "a b") == [3, 0, 1]
    assert text_prompt(load_tokenizer(tmp_path), "") == [3]
    # Documents have it only where training puts it, which is nowhere.
    assert load_tokenizer(tmp_path).encode("a b") == [0, 1]
    assert text_prompt(open_tokenizer(str(tmp_path)), "a b") == [0, 1]
    open_tokenizer(str(tmp_path)).save(tmp_path)
    assert text_prompt(load_tokenizer(tmp_path), "a b") == [0, 1]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "</s>"}))
    assert text_prompt(load_tokenizer(tmp_path), "a b") == [4, 0, 1]


def test_vocab_size_covers_ids_with_holes() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 10, "[UNK]": 3}, unk_token="[UNK]"))
    assert FileTokenizer(backend.to_str()).vocab_size == 11


def test_padding_and_truncation_of_the_file_are_not_applied(tmp_path: Path) -> None:
    backend = small_tokenizer(["</s>"])
    backend.enable_truncation(2)
    backend.enable_padding(length=7)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a b a") == [0, 1, 0]
    assert tokenizer.encode("a b a", parse_special=True) == [0, 1, 0]
    assert [ids.tolist() for ids in tokenizer.encode_documents(["a", "b a b"])] == [[0], [1, 0, 1]]


# Errors


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), FileTokenizer(small_tokenizer([]).to_str())], ids=["bytes", "file"]
)
def test_negative_ids_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="ids must be >= 0, got -1"):
        tokenizer.decode([0, -1])
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([4096]) == ""


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must be 'bytes' or the path of a tokenizer\.json.*nowhere\.json"):
        load_tokenizer(str(tmp_path / "nowhere.json"))
    with pytest.raises(FileNotFoundError, match="tokenizer train"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\xff\x00", b"[]", b"{}", b'{"model": {"type": "BPE", "vocab": 3}}']
)
def test_garbage_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(path)


def test_truncated_files_are_refused(trained_path: Path, tmp_path: Path) -> None:
    content = trained_path.read_bytes()
    path = tmp_path / "tokenizer.json"
    for end in range(0, len(content), 997):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match="is not a tokenizer"):
            load_tokenizer(path)


def refusal(path: Path) -> str | None:
    """What is said of a tokenizer file that cannot be used; None for one that encodes."""
    try:
        load_tokenizer(path).encode("def f(x): é")
    except ValueError as error:
        return str(error)
    return None


def test_damaged_files_load_or_are_refused(trained_path: Path, tmp_path: Path) -> None:
    content = trained_path.read_bytes()
    damage = np.random.default_rng(0)
    path = tmp_path / "tokenizer.json"
    refusals = []
    for _ in range(151):
        begin, length = damage.integers(len(content)), damage.integers(1, 31)
        path.write_bytes(content[:begin] + content[begin + length :])
        refusals.append(refusal(path))
    messages = [message for message in refusals if message is not None]
    assert len(messages) > 100
    assert all("tokenizer.json is not a tokenizer.json" in message for message in messages)


def test_garbage_tokenizer_config_is_refused(tmp_path: Path) -> None:
    small_tokenizer(["</s>"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes(b"{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"[1]")
    assert load_tokenizer(tmp_path).eos_id == 3
