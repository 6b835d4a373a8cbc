"""GGUF files give the logits and tokens that transformers' own loader gives."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf_files import random_tensors, smollm2_path, write_gguf

from dmattn_jax.io import load_pretrained, load_pretrained_tokenizer, save_pretrained

torch = pytest.importorskip("torch", reason="compares with PyTorch, which is installed on Python 3.11 only")
transformers = pytest.importorskip("transformers", reason="compares with transformers, installed on Python 3.11 only")
pytest.importorskip("gguf")

SMALL = {"hidden": 32, "wide": 64, "heads": 4, "kv_heads": 2, "head_dim": 8}
IDS = np.random.default_rng(0).integers(0, 13, (2, 11))


@nnx.jit
def logits_of(model, tokens):
    return model(tokens)


@pytest.mark.slow
def test_small_file_gives_the_logits_of_transformers_and_converts(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_tensors(**SMALL), **SMALL)
    model = load_pretrained(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype="float32").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(logits_of(model, jnp.asarray(IDS)), expected, rtol=1e-4, atol=1e-4)
    save_pretrained(model, tmp_path / "folder", tokenizer=load_pretrained_tokenizer(path))
    again = load_pretrained(tmp_path / "folder")
    np.testing.assert_array_equal(logits_of(again, jnp.asarray(IDS)), logits_of(model, jnp.asarray(IDS)))
    converted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        np.testing.assert_allclose(converted(torch.tensor(IDS)).logits, expected, rtol=1e-4, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    messages = [{"role": "user", "content": "a b"}]
    assert tokenizer.apply_chat_template(messages)["input_ids"] == [1, 2, 8, 0]


@pytest.mark.slow
def test_qwen3_gives_the_logits_of_transformers(tmp_path):
    shape = SMALL | {"head_dim": 128}  # of all released ones: their loader takes no other
    random = np.random.default_rng(7)
    norms = {
        f"blk.{layer}.attn_{one}_norm.weight": random.uniform(0.5, 2, 128).astype(np.float32)
        for layer in range(2)
        for one in "qk"
    }
    path = write_gguf(tmp_path / "model.gguf", random_tensors(**shape) | norms, architecture="qwen3", **shape)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype="float32").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(logits_of(load_pretrained(path), jnp.asarray(IDS)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_smollm2_gives_the_logits_and_tokens_of_transformers():
    smollm2 = smollm2_path()
    folder, name = str(smollm2.parent), smollm2.name
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer = load_pretrained_tokenizer(smollm2)
    texts = ["Hello, world! 12345 it's\n\n\tx=3.14", "naïve café – 東京 🦜", "  two spaces", Path(__file__).read_text()]
    for text in texts:
        assert tokenizer.encode(text, parse_special=True) == theirs(text, add_special_tokens=False)["input_ids"]
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    ids = tokenizer.encode_chat(messages)
    assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype="float32").eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits.numpy()
    actual = np.asarray(logits_of(load_pretrained(smollm2), jnp.asarray([ids])))
    assert np.abs(actual - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)) < 1e-4
