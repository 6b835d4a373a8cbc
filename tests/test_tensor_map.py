"""A part of a parameter, read from a file, is that part of the whole parameter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gguf_files import random_tensors, write_gguf

from dmattn_jax.io.doge_format import doge_specs
from dmattn_jax.io.llama_format import llama_specs
from dmattn_jax.io.tensor_map import TensorSpec, read_parameter, written_tensors
from dmattn_jax.models import DogeConfig, LlamaConfig

SHAPE = {
    "vocab_size": 14,
    "hidden_size": 22,
    "intermediate_size": 26,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 10,
    "tie_embeddings": False,
}
SPECS = {
    "doge": doge_specs(DogeConfig(**SHAPE)),
    "experts": doge_specs(DogeConfig(**SHAPE, num_experts=16, num_experts_per_token=3)),
    "llama": llama_specs(LlamaConfig(**SHAPE, attention_bias=True, qk_norm=True)),
}


class Arrays:
    """Tensors in memory that count what is read of them."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors
        self.elements = 0

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = self.tensors[name][index]
        self.elements += part.size
        return part


def parts(spec: TensorSpec, shape: tuple[int, ...]):
    """The halves of every axis that a mesh may split: all but the layers, and the last where it joins another."""
    joined = {axis for group in spec.axes for axis in group[1:]}
    for axis in range(len(shape)):
        if axis - bool(spec.layers) in joined or shape[axis] % 2:
            continue
        for half in (slice(0, shape[axis] // 2), slice(shape[axis] // 2, shape[axis])):
            yield (*[slice(None)] * axis, half, *[slice(None)] * (len(shape) - axis - 1))


@pytest.mark.parametrize("family", SPECS)
def test_any_part_of_a_written_parameter(family):
    random = np.random.default_rng(0)
    specs = SPECS[family]
    model = {}
    for spec in specs:
        shape = ((spec.layers,) if spec.layers else ()) + spec.sizes
        model[spec.parameter] = random.normal(size=shape).astype(np.float32)
    tensors = list(written_tensors(specs, model))
    assert len({name for name, _ in tensors}) == len(tensors)
    source = Arrays(dict(tensors))
    for spec in specs:
        whole = model[spec.parameter]
        everything = (slice(None),) * whole.ndim
        np.testing.assert_array_equal(read_parameter(spec, source, everything, np.float32), whole)
        for index in parts(spec, whole.shape):
            source.elements = 0
            part = read_parameter(spec, source, index, np.float16)
            np.testing.assert_array_equal(part, whole[index].astype(np.float16), err_msg=f"{spec.parameter} {index}")
            assert source.elements == part.size, "more of the file was read than the part"


def test_any_part_of_a_gguf_parameter(tmp_path):
    gguf_model = pytest.importorskip("dmattn_jax.io.gguf_model", reason="needs the package gguf")
    shape = {"hidden": 32, "wide": 64, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocabulary": 14}
    path = write_gguf(
        tmp_path / "model.gguf", random_tensors(**shape), changed={"tokenizer.ggml.tokens": None}, **shape
    )
    config, specs, file, _ = gguf_model.open_gguf_model(path, "float32")
    query = next(spec for spec in specs if spec.parameter == "blocks.attention.query")
    rows = file.read("blk.0.attn_q.weight", (slice(None), slice(None)))
    expected = rows.reshape(4, 4, 2, 32)  # head, pair, half
    whole = read_parameter(query, file, (slice(None),) * 4, np.float32)
    assert whole.shape == (config.num_layers, 32, 4, 8)
    np.testing.assert_array_equal(whole[0, :, 3, 1 * 4 + 2], expected[3, 2, 1])
    for spec in specs:
        axes = (len(spec.sizes) if len(spec.sizes) < 4 else 3) + bool(spec.layers)
        whole = read_parameter(spec, file, (slice(None),) * axes, np.float32)
        for index in parts(spec, whole.shape):
            np.testing.assert_array_equal(read_parameter(spec, file, index, np.float32), whole[index])


def test_an_axis_that_a_file_joins_is_not_split():
    spec = TensorSpec("query", "q_proj", (4, 2, 6), ((1, 2), (0,)))
    with pytest.raises(ValueError, match="query is split along an axis that q_proj joins with another"):
        read_parameter(spec, Arrays({}), (slice(None), slice(None), slice(0, 3)), np.float32)
    assert replace(spec, layers=2).file_shape == (12, 4)
