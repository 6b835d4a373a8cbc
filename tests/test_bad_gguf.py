"""GGUF files that are damaged, hostile or of another kind: one typed error that names file and tensor."""

from __future__ import annotations

import struct
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from gguf_files import random_tensors, write_gguf
from refusals import refuse, refused_or_fine

from dmattn_jax.io import load_pretrained_tokenizer

pytest.importorskip("gguf")

GGUF_SHAPE = {"hidden": 32, "wide": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "layers": 1}


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(path, random_tensors(**GGUF_SHAPE), **GGUF_SHAPE).read_bytes()


def header(keys: int, tensors: int, rest: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not a GGUF file: 0 bytes"),
        (b"GGML" + bytes(100), "does not begin with GGUF"),
        (header(0, 0, bytes(99), version=9), "got version 9"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(99), "little-endian, got version 50331648"),
        (header(2**60, 0, bytes(99)), f"{2**60} metadata entries in"),
        (header(0, 2**60, bytes(99)), f"{2**60} tensors in"),
        (header(1, 0, struct.pack("<Q", 2**60) + bytes(99)), "a metadata key needs"),
        (header(1, 0, text(b"\xff\xff") + bytes(99)), "a metadata key is not UTF-8"),
        (header(1, 0, text(b"k") + struct.pack("<I", 99) + bytes(99)), "the key 'k' has a value of type 99"),
        # what has the reader of the package loop for ever
        (header(1, 0, text(b"k") + struct.pack("<IIQ", 9, 4, 2**60)), f"{2**60} k in"),
        (header(1, 0, text(b"k") + struct.pack("<IIQ", 9, 8, 2**60)), f"{2**60} k in"),
        (header(1, 0, text(b"k") + struct.pack("<IIQQ", 9, 8, 1, 2**60)), "string 0 of 1 of k does not fit"),
        (header(1, 0, text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(99)), "an array of type 9"),
        (header(2, 0, (text(b"k") + struct.pack("<II", 4, 1)) * 2), "the key 'k' is there twice"),
        (header(0, 1, tensor(b"t", [1] * 5) + bytes(99)), "tensor 't' must have 1 to 4 dimensions, got 5"),
        (header(0, 1, tensor(b"t", [2**40, 2**40]) + bytes(99)), "tensor 't' of shape"),
        (header(0, 1, tensor(b"t", [0]) + bytes(99)), "tensor 't' must have rows"),
        (header(0, 1, tensor(b"t", [33], kind=2) + bytes(99)), "a multiple of 32 numbers for Q4_0"),
        (header(0, 1, tensor(b"t", [4], kind=24) + bytes(99)), "tensor 't' has type I8; those that are read are"),
        (header(0, 1, tensor(b"t", [4], kind=777) + bytes(99)), "tensor 't' has type 777"),
        (header(0, 1, tensor(b"t", [4], offset=3) + bytes(99)), "begins at 3, which 32 does not divide"),
        (header(0, 1, tensor(b"t", [4], offset=2**60) + bytes(99)), "truncated"),
        (header(0, 2, tensor(b"t", [9]) + tensor(b"u", [9], offset=32) + bytes(200)), "tensor 'u' overlaps tensor 't'"),
        (header(0, 2, tensor(b"t", [9]) * 2 + bytes(200)), "tensor 't' is there twice"),
        (
            header(1, 0, text(b"general.alignment") + struct.pack("<II", 4, 0) + bytes(99)),
            "general.alignment must be a power of two, got 0",
        ),
        (header(0, 0, bytes(99)), "general.architecture is missing"),
    ],
)
def test_garbage_gguf(content, named, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refuse(path, named)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"general.architecture": "gpt2"}, "general.architecture must be llama or qwen3, got 'gpt2'"),
        ({"llama.expert_count": 8}, "llama.expert_count must be 0"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 2**31 - 1}, "tensor blk.1.attn_norm.weight of shape [32] is missing"),
        ({"llama.attention.head_count": 3}, "llama.rope.dimension_count must be the head size 10, got 8"),
        ({"llama.attention.head_count_kv": 3}, "num_heads must be a multiple"),
        ({"llama.attention.head_count": "four"}, "llama.attention.head_count must be of type int"),
        ({"llama.attention.value_length": 16}, "llama.attention.value_length must be the head size 8, got 16"),
        ({"llama.feed_forward_length": 64}, "tensor blk.0.ffn_gate.weight must have shape [64, 32]"),
        ({"llama.rope.freq_base": float("inf")}, "llama.rope.freq_base must be finite"),
    ],
)
def test_gguf_metadata(changed, named, tmp_path):
    architecture = changed.pop("general.architecture", None)
    path = write_gguf(tmp_path / "model.gguf", random_tensors(**GGUF_SHAPE), changed=changed, **GGUF_SHAPE)
    if architecture:
        path.write_bytes(path.read_bytes().replace(text(b"llama"), text(architecture.encode()), 1) + bytes(32))
    refuse(path, named)


@hypothesis.settings(max_examples=300, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(data=st.data())
def test_fuzzed_gguf_headers(gguf_bytes, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    content = bytearray(gguf_bytes)
    end = content.index(b"blk.0.ffn_down.weight")
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, end - 1), st.integers(0, 255)), min_size=1)):
        content[at] = byte
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    path = folder / "model.gguf"
    path.write_bytes(content[:cut])
    refused_or_fine(_open_gguf, path)
    refused_or_fine(load_pretrained_tokenizer, path)


def _open_gguf(path: Path) -> None:
    """All of loading but the making of a model, which would compile for every shape."""
    from dmattn_jax.io.gguf_model import open_gguf_model
    from dmattn_jax.io.tensor_map import check_tensors, read_parameter

    _, specs, file, ignored = open_gguf_model(path, "float32")
    check_tensors(specs, file, ignored)
    for spec in specs:
        read_parameter(spec, file, (slice(None),) * (len(spec.sizes[:3]) + bool(spec.layers)), np.float32)
