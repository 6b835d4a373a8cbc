"""Folders written and read again: every kind of model, every type, any number of shards, any mesh."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_run import environment

from dmattn_jax.dam import apply_masks, windows_and_sinks
from dmattn_jax.io import load_pretrained, load_pretrained_tokenizer, save_pretrained, train_tokenizer
from dmattn_jax.models import DogeConfig, DogeForCausalLM, LlamaConfig, LlamaForCausalLM
from dmattn_jax.nn import FactorsRope, LinearRope, Llama3Rope, YarnRope

DOGE = DogeConfig(
    vocab_size=61,
    hidden_size=22,
    intermediate_size=37,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    window=7,
    dtype="float32",
    balance_loss_weight=0.25,
    rope_theta=500.0,
)
LLAMA = LlamaConfig(
    vocab_size=61,
    hidden_size=22,
    intermediate_size=37,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    dtype="float32",
)
CONFIGS = {
    "doge": DOGE,
    "experts": replace(DOGE, num_experts=25, num_experts_per_token=3, tie_embeddings=False),
    "windows": replace(DOGE, window=(7, 3)),
    "linear-gate": replace(DOGE, gate_activation="linear"),
    "swa": replace(DOGE, attention="swa"),
    "mha": replace(DOGE, attention="mha"),
    "llama": replace(LLAMA, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 16)),
    "llama-bias": replace(LLAMA, attention_bias=True, rope_scaling=LinearRope(2.0), tie_embeddings=False),
    "llama-mlp-bias": replace(LLAMA, mlp_bias=True, rope_scaling=YarnRope(4.0, 32, attention_factor=1.25)),
    "qwen3": replace(LLAMA, qk_norm=True, max_position_embeddings=99, rope_scaling=YarnRope(4.0, 32, 16.0, 2.0)),
}


def make(config, seed=0):
    """A model in which every parameter is random, made without compiling its initialisation."""
    family = DogeForCausalLM if isinstance(config, DogeConfig) else LlamaForCausalLM
    graph, state = jax.eval_shape(lambda: nnx.split(family(config, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(seed)

    def fill(leaf):
        return jnp.asarray(random.normal(size=leaf.shape), leaf.dtype)

    return nnx.merge(graph, jax.tree.map(fill, state))


def parameters(model) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat}


def assert_equal(one, other):
    one, other = parameters(one), parameters(other)
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read(name, tmp_path):
    model = make(CONFIGS[name])
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.config == model.config
    assert_equal(again, model)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("shard_bytes", [1, 9000, 10**9])
def test_shards_of_any_size_and_stale_files_gone(shard_bytes, tmp_path):
    save_pretrained(make(CONFIGS["experts"], seed=1), tmp_path, shard_bytes=5000)
    (tmp_path / "notes.txt").write_text("kept")
    model = make(DOGE)
    save_pretrained(model, tmp_path, shard_bytes=shard_bytes)
    assert_equal(load_pretrained(tmp_path), model)
    shards = list(tmp_path.glob("*.safetensors"))
    assert (len(shards) == 1) == (shard_bytes == 10**9)
    assert (tmp_path / "notes.txt").exists()
    if len(shards) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * DOGE.num_parameters()
        assert set(index["weight_map"].values()) == {path.name for path in shards}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types_on_load(dtype, tmp_path):
    model = make(LLAMA)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, dtype=dtype)
    assert loaded.config == replace(LLAMA, dtype=dtype, param_dtype=dtype)
    for name, array in parameters(model).items():
        np.testing.assert_array_equal(parameters(loaded)[name], array.astype(jnp.dtype(dtype)), err_msg=name)
    save_pretrained(loaded, tmp_path / "again")
    assert_equal(load_pretrained(tmp_path / "again"), loaded)


def test_a_tied_file_may_repeat_its_table(tmp_path):
    from safetensors.numpy import load_file, save_file

    model = make(LLAMA)
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_equal(load_pretrained(tmp_path), model)


def test_a_tokenizer_goes_with_the_model(tmp_path):
    tokenizer = train_tokenizer(["some text, some more text"] * 3, 270, tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"has id 26\d, and the model's vocabulary has 61 rows"):
        save_pretrained(make(DOGE), tmp_path / "small", tokenizer=tokenizer)
    save_pretrained(make(replace(DOGE, vocab_size=272)), tmp_path / "model", tokenizer=tokenizer)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"] == 0
    (tmp_path / "model" / "chat_template.jinja").write_text("of another tokenizer")
    save_pretrained(make(replace(DOGE, vocab_size=272)), tmp_path / "model", tokenizer=tokenizer)
    again = load_pretrained_tokenizer(tmp_path / "model", vocab_size=272)
    assert again.chat_template is None
    assert again.fingerprint == tokenizer.fingerprint
    assert load_pretrained(tmp_path / "model").config.vocab_size == 272


def test_errors_of_saving(tmp_path):
    factors = replace(LLAMA, rope_scaling=FactorsRope((1.0,) * 5))
    with pytest.raises(ValueError, match="rope_scaling must be None, LinearRope, Llama3Rope, YarnRope to be written"):
        save_pretrained(make(factors), tmp_path / "x")
    with pytest.raises(ValueError, match="mlp_bias must be False with qk_norm"):
        save_pretrained(make(replace(LLAMA, qk_norm=True, mlp_bias=True)), tmp_path / "x")
    with pytest.raises(ValueError, match="model must be a DogeForCausalLM or a LlamaForCausalLM, got Linear"):
        save_pretrained(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path / "x")
    with pytest.raises(ValueError, match="attention must be one of dma, swa, mha, got 'nsa'"):
        save_pretrained(make(replace(DOGE, attention="nsa")), tmp_path / "x")
    with pytest.raises(ValueError, match="must have its layers stacked: save the decoder from which unrolled"):
        save_pretrained(make(LLAMA).unrolled(), tmp_path / "x")
    masked = apply_masks(make(LLAMA), windows_and_sinks(LLAMA.num_layers, LLAMA.num_heads, 2, 1))
    with pytest.raises(ValueError, match=r"what a config.json cannot say: blocks.attention.columns, .*; masks are"):
        save_pretrained(masked, tmp_path / "x")
    with pytest.raises(ValueError, match="shard_bytes must be >= 1, got 0"):
        save_pretrained(make(LLAMA), tmp_path / "x", shard_bytes=0)
    assert not (tmp_path / "x" / "config.json").exists()


@pytest.mark.parametrize("config", [DOGE, LLAMA])
def test_dynamic_rotary_positions_are_said_to_be_exact_up_to_a_length(config, tmp_path):
    save_pretrained(make(config), tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    del content["rope_parameters"]
    content["rope_scaling"] = {"rope_type": "dynamic", "factor": 4.0}
    path.write_text(json.dumps(content))
    length = content["max_position_embeddings"] if config is LLAMA else 2048
    with pytest.warns(UserWarning, match=f"exact up to {length} tokens only"):
        assert load_pretrained(tmp_path).config == config


ON_MESHES = """
import sys
from pathlib import Path
import jax, numpy as np
from flax import nnx
from jax.sharding import AxisType
from dmattn_jax.io import load_pretrained, save_pretrained
from dmattn_jax.io.pretrained import read_config
from dmattn_jax.io.safetensors_files import SafetensorsFolder

def parameters(model):
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}

sizes = []
read = SafetensorsFolder.read
def counted(self, name, index):
    part = read(self, name, index)
    sizes.append((name, part.size))
    return part
SafetensorsFolder.read = counted

family, config = read_config(Path(sys.argv[1]))
specs = family.specs(config)
whole = parameters(load_pretrained(sys.argv[1]))
total = sum(size for _, size in sizes)
assert total == sum(array.size for array in whole.values())
for shape in ((1, 4, 2), (2, 2, 2), (8, 1, 1)):
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    sizes.clear()
    model = load_pretrained(sys.argv[1], mesh=mesh)
    split = parameters(model)
    for name, array in split.items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)
    query = split["blocks.attention.query"]
    layers, hidden, heads, head_dim = query.shape
    assert query.addressable_shards[0].data.shape == (layers, hidden // shape[1], heads // shape[2], head_dim)
    # No read, of any tensor, is anything but one device's part of one layer, and no part is read more often than held.
    for spec in specs:
        array = split[spec.parameter]
        part = array.addressable_shards[0].data.size // max(spec.layers, 1)
        for name in spec.tensors():
            own = [size for read, size in sizes if read == name]
            assert set(own) == {part}, (name, own, part)
            assert len(own) <= 8
    with jax.set_mesh(mesh):
        logits = nnx.jit(lambda model, tokens: model(tokens))(model, np.arange(16).reshape(8, 2) % 5)
    assert np.isfinite(logits).all()
    save_pretrained(model, sys.argv[2])
    for name, array in parameters(load_pretrained(sys.argv[2])).items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["experts", "llama"])
def test_every_device_reads_its_own_part(kind, tmp_path):
    divisible = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40}
    save_pretrained(make(replace(CONFIGS[kind], **divisible)), tmp_path / "model")
    child = subprocess.run(
        [sys.executable, "-c", ON_MESHES, str(tmp_path / "model"), str(tmp_path / "again")],
        env=environment(8),
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
