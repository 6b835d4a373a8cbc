"""GGUF files: every type of tensor, the configuration, the tokenizer, and a real model."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from gguf_files import TEMPLATE, random_tensors, smollm2_path, write_gguf

from dmattn_jax.chat import text_prompt
from dmattn_jax.generation import generate
from dmattn_jax.io import CheckpointFormatError, load_pretrained, load_pretrained_tokenizer
from dmattn_jax.io.gguf_file import READABLE, GgufFile, Quantization
from dmattn_jax.nn import FactorsRope, LinearRope, Llama3Rope, YarnRope
from dmattn_jax.text_stream import TextStream, continuation

gguf = pytest.importorskip("gguf")

SMALL = {"hidden": 32, "wide": 64, "heads": 4, "kv_heads": 2, "head_dim": 8}


def quantised(tensor: np.ndarray, kind: Quantization) -> np.ndarray:
    """Blocks of a type: the package's own, or for those that it only reads, random bits with sensible scales."""
    try:
        return gguf.quants.quantize(tensor, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        random = np.random.default_rng(tensor.size)
        blocks = random.integers(0, 256, (*tensor.shape[:-1], tensor.shape[-1] // block, size), np.uint8)
        # the half-precision scales of a K block are its first bytes or its last
        scale = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
        first = {Quantization.Q4_K: [0, 2], Quantization.Q5_K: [0, 2], Quantization.Q2_K: [80, 82]}
        for at in first.get(kind, [size - 2]):
            blocks[..., at : at + 2] = scale
        return blocks.reshape(*tensor.shape[:-1], -1)


@pytest.mark.parametrize("kind", [kind for kind in READABLE if kind != Quantization.F32], ids=lambda kind: kind.name)
def test_every_type_is_read_by_any_slice(kind, tmp_path):
    tensors = random_tensors(layers=1)
    blocks = {name: quantised(t, kind) if t.ndim == 2 else t for name, t in tensors.items()}
    kinds = {name: kind for name, t in tensors.items() if t.ndim == 2}
    file = GgufFile(write_gguf(tmp_path / "model.gguf", blocks, kinds, layers=1))
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_down.weight", "token_embd.weight"):
        expected = gguf.quants.dequantize(blocks[name], kind)
        assert np.isfinite(expected).all()
        assert file.shape(name) == expected.shape == tensors[name].shape
        if kind.name in ("F16", "BF16", "Q8_0"):
            np.testing.assert_allclose(expected, tensors[name], atol=4e-3)
        for index in ((slice(None), slice(None)), (slice(2, 7), slice(None)), (slice(1, 3), slice(5, 77))):
            np.testing.assert_array_equal(file.read(name, index), expected[index])


def test_reader_agrees_with_the_packages_own(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_tensors(**SMALL), **SMALL)
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for name, value in fields.items():
        np.testing.assert_array_equal(ours.metadata[name], value)
    assert list(ours.names()) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(ours.read(tensor.name, (slice(None),) * tensor.data.ndim), tensor.data)


def test_rope_factors_and_scalings(tmp_path):
    tensors = random_tensors(**SMALL)

    def scaling(extra=None, changed=None):
        path = write_gguf(tmp_path / "model.gguf", tensors | (extra or {}), changed=changed, **SMALL)
        return load_pretrained(path).config.rope_scaling

    assert scaling() is None
    assert scaling(changed={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}) == LinearRope(4.0)
    frequency = 1000.0 ** (-np.arange(4) / 4)
    known = Llama3Rope(32.0, 1.0, 4.0, 8192)
    # at these frequencies none is divided by the whole factor, which the file must show
    assert isinstance(scaling({"rope_freqs.weight": np.full(4, 3, np.float32)}), FactorsRope)
    slow = 1e6 ** (-np.arange(4) / 4)
    factors = np.asarray(slow / known.scale(jnp.asarray(slow), 1000.0), np.float32)
    assert scaling({"rope_freqs.weight": factors}, {"llama.rope.freq_base": 1e6}) == known
    assert frequency[0] == 1
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 32}
    changed = {f"llama.rope.scaling.{name}": value for name, value in yarn.items()}
    assert scaling(changed=changed) == YarnRope(4.0, 32)
    changed["llama.rope.scaling.attn_factor"] = 0.5
    assert scaling(changed=changed).magnitude == pytest.approx(0.5 * (1 + 0.1 * np.log(4)))
    with pytest.raises(CheckpointFormatError, match=r"rope.scaling.type must be none, linear or yarn, got 'longrope'"):
        scaling(changed={"llama.rope.scaling.type": "longrope"})


def test_qwen3(tmp_path):
    """Heads are stored as they are used; queries and keys are normed."""
    tensors = random_tensors(**SMALL)
    norms = {f"blk.{i}.attn_{one}_norm.weight": np.arange(1, 9, dtype=np.float32) + i for i in range(2) for one in "qk"}
    path = write_gguf(tmp_path / "model.gguf", tensors | norms, architecture="qwen3", **SMALL)
    model = load_pretrained(path)
    assert model.config.qk_norm
    query = tensors["blk.1.attn_q.weight"].reshape(4, 8, 32)
    np.testing.assert_array_equal(model.blocks.attention.query[1], query.transpose(2, 0, 1))
    np.testing.assert_array_equal(model.blocks.attention.key_norm.weight[1], norms["blk.1.attn_k_norm.weight"])
    bare = write_gguf(tmp_path / "bare.gguf", tensors, architecture="qwen3", **SMALL)
    with pytest.raises(CheckpointFormatError, match=r"tensor blk.0.attn_q_norm.weight of shape \[8\] is missing"):
        load_pretrained(bare)


def test_tokenizer_and_chat_template(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_tensors(**SMALL), **SMALL)
    tokenizer = load_pretrained_tokenizer(path, vocab_size=13)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 0)
    ids = tokenizer.encode("ab b<|end|>")
    assert ids[:3] == [2, 3, 8]
    assert 0 not in ids
    assert tokenizer.decode([2, 3, 8, 0]) == "ab b"
    assert tokenizer.chat_template.source == TEMPLATE
    assert tokenizer.encode_chat([{"role": "user", "content": "a b"}]) == [1, 2, 8, 0]
    answers = write_gguf(
        tmp_path / "chat.gguf", random_tensors(**SMALL), changed={"tokenizer.ggml.eot_token_id": 1}, **SMALL
    )
    assert load_pretrained_tokenizer(answers).eos_id == 1
    assert load_pretrained_tokenizer(answers).stop_ids == (1, 0)
    assert tokenizer.stop_ids == (0,)
    # Llama 3's kind of cutting, and what the file says of itself.
    assert text_prompt(tokenizer, "a") == [1, 2]
    silent = write_gguf(
        tmp_path / "silent.gguf", random_tensors(**SMALL), changed={"tokenizer.ggml.add_bos_token": False}, **SMALL
    )
    assert text_prompt(load_pretrained_tokenizer(silent), "a") == [2]
    with pytest.raises(CheckpointFormatError, match=r"id 12, and the model's vocabulary has 9 rows"):
        load_pretrained_tokenizer(path, vocab_size=9)


def test_sentencepiece_by_scores_is_the_bpe_that_made_them(tmp_path):
    """Scores in the order of merging, as SentencePiece trains them, give back the merges."""
    text = (Path(__file__).parent / "test_gguf.py").read_text().replace("ö", "")
    reference = tokenizers.Tokenizer(tokenizers.models.BPE())
    reference.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, show_progress=False)
    reference.train_from_iterator([text], trainer)
    learned = [token for token, _ in sorted(reference.get_vocab().items(), key=lambda item: item[1])]
    learned = [token for token in learned if token != "\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    changed = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(learned))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(learned)],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    shape = SMALL | {"vocabulary": len(tokens)}
    tokenizer = load_pretrained_tokenizer(
        write_gguf(tmp_path / "model.gguf", random_tensors(**shape), changed=changed, **shape)
    )
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for line in [line for line in text.splitlines() if line.strip()]:
        words = line.strip()
        assert [tokens[index] for index in tokenizer.encode(words)] == reference.encode(words).tokens
        assert tokenizer.decode(tokenizer.encode(line)) == line
    # what is in no token goes by bytes
    assert [tokens[index] for index in tokenizer.encode("\nö")][-3:] == ["<0x0A>", "<0xC3>", "<0xB6>"]
    assert tokenizer.decode(tokenizer.encode("a\n東京 🦜")) == "a\n東京 🦜"
    assert tokenizer.encode("<s>a", parse_special=True)[0] == 1
    assert text_prompt(tokenizer, "a")[0] == 1
    for line in ("Hi world", "ö ö", "a 東京  🦜", "  x"):
        ids = tokenizer.encode(line)
        assert b"".join(map(tokenizer.token_bytes, ids)) == f" {line}".encode()
        for cut in range(1, len(ids) + 1):
            stream = TextStream(tokenizer, after=ids[:cut])
            told = "".join([*map(stream.push, ids[cut:]), stream.finish()])
            # The prompt's last character may be in pieces, of which the text is the whole.
            prompt = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
            assert prompt + told == line or cut == len(ids)
            assert told == continuation(tokenizer, ids[:cut], ids[cut:])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model must be one of gpt2, llama, got 'bert'"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores is missing"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.5]}, "scores must have one entry for each of"),
        ({"tokenizer.ggml.pre": "who-knows"}, "tokenizer.ggml.pre must be one of .* got 'who-knows'"),
        ({"tokenizer.ggml.merges": ["a q"]}, "merges must join two tokens to a third, got 'a q'"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type must have one entry for each of 13 tokens, got 1"),
        ({"tokenizer.ggml.eos_token_id": 13}, "eos_token_id must be below 13, got 13"),
        ({"tokenizer.ggml.tokens": ["a"] * 13}, "tokens has 12 tokens twice"),
        ({"tokenizer.ggml.tokens": [f"{i}" for i in range(14)]}, "tokens has 14 tokens, token_embd.weight 13 rows"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens must be of type list"),
        ({"tokenizer.chat_template": "{% if %}"}, "chat_template is not a Jinja template"),
    ],
)
def test_tokenizers_that_contradict_themselves(changed, message, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_tensors(**SMALL), changed=changed, **SMALL)
    with pytest.raises(CheckpointFormatError, match=message):
        load_pretrained_tokenizer(path)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france():
    smollm2 = smollm2_path()
    model = load_pretrained(smollm2)
    tokenizer = load_pretrained_tokenizer(smollm2, model.config.vocab_size)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    [answer] = generate(model, [prompt], max_new_tokens=16, stop_tokens=(tokenizer.eos_id,))
    assert "Paris" in tokenizer.decode(answer)
