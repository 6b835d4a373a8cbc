"""Model files that are damaged, hostile or of another kind: one typed error that names file and tensor, nothing run."""

from __future__ import annotations

import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from flax import nnx
from refusals import refuse, refused_or_fine
from safetensors.numpy import load_file, save_file

from dmattn_jax.io import (
    CheckpointFormatError,
    FileTokenizer,
    HubError,
    load_pretrained,
    load_pretrained_tokenizer,
    load_tokenizer,
    save_pretrained,
)
from dmattn_jax.io.pretrained import read_config
from dmattn_jax.io.safetensors_files import SafetensorsFolder
from dmattn_jax.models import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=13,
    hidden_size=12,
    intermediate_size=10,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=4,
    dtype="float32",
)
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, bytes]:
    """The files of a whole folder, in two shards."""
    folder = tmp_path_factory.mktemp("good")
    save_pretrained(LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0)), folder, shard_bytes=6000)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(files) == 4
    return files


@pytest.fixture
def folder(good, tmp_path) -> Path:
    for name, content in good.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.fixture
def single(folder) -> Path:
    """The folder with all tensors in one file."""
    tensors = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors")
    return folder


def split(content: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# safetensors


def test_whole_files_load(folder):
    assert load_pretrained(folder).config.num_layers == 2


@pytest.mark.parametrize("kept", [0, 3, 8, 100, 2000, -1, -4000])
def test_truncated(single, kept):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    message = refuse(single, "model.safetensors", "truncated")
    if kept < 0:
        assert "tensor 'model." in message


def corrupt(change):
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        header, data = split(path.read_bytes())
        path.write_bytes(joined(*change(header, data)))

    return apply


def overlap(header, data):
    header[QUERY]["data_offsets"] = header["model.norm.weight"]["data_offsets"]
    header[QUERY]["shape"] = header["model.norm.weight"]["shape"]
    return header, data


def with_entry(**changed):
    def change(header, data):
        header[QUERY] |= changed
        return header, data

    return corrupt(change)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (corrupt(overlap), "overlaps tensor"),
        (with_entry(shape=[11, 12]), "of shape [11, 12] and type F32 must have 528 bytes, got 576"),
        (with_entry(shape=[2**62, 2**62]), "must have"),
        (with_entry(shape=[-1]), "has the shape [-1]"),
        (with_entry(shape="12"), "has the shape"),
        (with_entry(dtype=None), "has the dtype None"),
        (with_entry(dtype="F99"), "F99"),
        (with_entry(data_offsets=[5]), "has the data_offsets [5]"),
        (with_entry(data_offsets=[9, 1]), "which are no range"),
        (with_entry(data_offsets=[0, 2**60]), f"ends at byte {2**60}"),
        (corrupt(lambda header, data: (b"[" * 100_000, data)), "not JSON"),
        (corrupt(lambda header, data: (b"[]", data)), "must be a JSON object"),
    ],
)
def test_headers_that_contradict_themselves(single, damage, named):
    damage(single)
    message = refuse(single, "model.safetensors", named)
    assert QUERY in message or "header" in message or "F99" in message


def rewrite(single: Path, **changed: np.ndarray | None) -> None:
    path = single / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changed.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        (np.zeros((12, 11), np.float32), "must have shape [12, 12] by the configuration, got [12, 11]"),
        (np.zeros((12, 12, 1), np.float32), "got [12, 12, 1]"),
        (np.zeros((12, 12), np.int64), "must be one of F64, F32, F16, BF16, got I64"),
        (np.zeros((12, 12), np.uint8), "got U8"),
        (None, "is missing"),
    ],
)
def test_tensors_of_another_shape_or_type(single, tensor, named):
    rewrite(single, **{QUERY: tensor})
    refuse(single, f"tensor {QUERY}", named)


def test_tensors_of_another_architecture(single):
    rewrite(single, **{"model.layers.1.self_attn.q_proj.bias": np.zeros(12, np.float32)})
    refuse(single, "tensor model.layers.1.self_attn.q_proj.bias has no place in a model of this configuration")


# An index


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", ".safetensors", "x.bin", 7, None],
)
def test_an_index_that_reaches_out_of_its_folder(folder, file):
    (folder.parent / "model.safetensors").write_bytes(b"")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][QUERY] = file
    path.write_text(json.dumps(index))
    refuse(folder, path.name, f"the file of tensor {QUERY} must be the name of a .safetensors file in this folder")


def test_missing_shards_and_tensors(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = sorted(set(index["weight_map"].values()))
    wrong = next(name for name, file in index["weight_map"].items() if file == first)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {wrong: second}}))
    refuse(folder, f"tensor {wrong} is not in {second}")
    path.write_text(json.dumps(index))
    (folder / second).unlink()
    refuse(folder, f"the shard {second} of tensor", "is missing")
    path.write_text('{"weight_map": []}')
    refuse(folder, "weight_map must be an object")


# Pickles


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickles_are_never_opened(single, name):
    (single / "model.safetensors").rename(single / "other.safetensors")
    mark = single / "executed"
    (single / name).write_bytes(pickle.dumps(Bomb(mark)))
    refuse(single, name, "may be a pickle", "convert the model to safetensors")
    refuse(single / name, "may be a pickle")
    # by another name it is no better
    (single / "model.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    refuse(single, "model.safetensors")
    (single / "model.gguf").write_bytes(pickle.dumps(Bomb(mark)))
    refuse(single / "model.gguf")
    assert not mark.exists()


def test_code_beside_a_model_is_not_run(single):
    config = json.loads((single / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_bomb.Model"}
    (single / "config.json").write_text(json.dumps(config))
    (single / "modeling_bomb.py").write_text("raise SystemExit('executed')")
    assert load_pretrained(single).config.num_layers == 2


# config.json


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of doge, dmattn_doge, llama, qwen3, got 'gpt2'"),
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": ["llama"]}, "model_type must be of type str"),
        ({"hidden_size": "12"}, "hidden_size must be of type int, got '12'"),
        ({"hidden_size": True}, "hidden_size must be of type int"),
        ({"hidden_size": 10**30}, "hidden_size must be below 2^31"),
        ({"hidden_size": -12}, "hidden_size must be >= 1, got -12"),
        ({"vocab_size": 2**31 - 1}, "tensor model.embed_tokens.weight must have shape"),
        ({"num_hidden_layers": 2**31 - 1}, "tensor model.layers.2.input_layernorm.weight of shape [12] is missing"),
        ({"num_attention_heads": 0}, "num_heads must be >= 1"),
        ({"num_key_value_heads": 2}, "num_heads must be a multiple of num_kv_heads"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite"),
        ({"hidden_act": "gelu"}, "hidden_act must be \"silu\", got 'gelu'"),
        ({"mlp_bias": True}, "tensor model.layers.0.mlp.gate_proj.bias of shape"),
        ({"mlp_bias": 1}, "mlp_bias must be of type bool, got 1"),
        (
            {"use_sliding_window": True, "max_window_layers": 1},
            "use_sliding_window must be false, or max_window_layers",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope_type must be one of default, linear, dynamic, llama3, yarn, got 'longrope'",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor is missing"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "mscale": 1}}, "mscale is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": 1}}, "beta_fast must be > beta_slow"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor must be finite and > 0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention must not be an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1"),
        ({"rope_parameters": None, "rope_scaling": {"type": "su"}}, "got 'su'"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types must all be full_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"eos_token_id": [1, 13]}, "eos_token_id must be below vocab_size 13, got 13"),
        ({"bos_token_id": "x"}, "bos_token_id must be of type int or list"),
    ],
)
def test_configurations(single, changed, named):
    path = single / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    refuse(single, "" if "tensor" in named else "config.json", named)


def test_doge_configurations_with_what_is_not_supported(single):
    doge = {"model_type": "doge", "num_key_value_heads": 1}
    path = single / "config.json"
    before = json.loads(path.read_text()) | doge
    for changed, named in (
        ({"attention_bias": True}, "attention_bias must be false"),
        ({"sliding_window": 5}, "sliding_window beside the dynamic mask"),
        ({"is_moe": True, "num_experts": 5}, "num_experts must be 0 or a square number, got 5"),
        ({"keep_window_size": 0}, "window must be >= 1, got 0"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type must be one of default, dynamic, got"),
        ({"model_type": "dmattn_doge", "attention": "all", "gate_activation": "exp"}, "attention must be one of"),
        ({"model_type": "dmattn_doge", "attention": "nsa", "gate_activation": "exp"}, "attention must be one of"),
        ({"model_type": "dmattn_doge", "attention": "dma", "gate_activation": "exp", "windows": ["5"]}, "window"),
        ({}, "tensor model.layers.0.self_attn.q_norm.weight of shape [4] is missing"),
    ):
        path.write_text(json.dumps(before | changed))
        refuse(single, named)


def test_folders_without_a_model(tmp_path):
    refuse(tmp_path, "config.json is missing")
    (tmp_path / "config.json").write_text("{")
    refuse(tmp_path, "config.json is not JSON")
    (tmp_path / "config.json").write_text("[" * 100_000)
    refuse(tmp_path, "config.json is not JSON")
    (tmp_path / "config.json").write_text("[]")
    refuse(tmp_path, "must hold a JSON object")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    refuse(tmp_path, "config.json is not JSON")
    (tmp_path / "notes.txt").write_text("")
    refuse(tmp_path / "notes.txt", "must be a folder with config.json and safetensors, or a .gguf file")
    with pytest.raises(FileNotFoundError, match=r"give a folder, a \.gguf file, or a hub id"):
        load_pretrained(tmp_path / "nowhere")


def test_the_hub_out_of_reach_is_one_clear_error(monkeypatch, tmp_path):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no\nnetwork")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(HubError, match=r"^owner/name is no local path, and the hub did not give it \(no network\)"):
        load_pretrained("owner/name")
    with pytest.raises(FileNotFoundError):
        load_pretrained("../owner")


def test_bad_dtypes(single):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got int8"):
        load_pretrained(single, dtype="int8")


# Tokenizers


def test_tokenizers_that_do_not_fit(tmp_path):
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.add_special_tokens(["<eos>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_pretrained_tokenizer(tmp_path, vocab_size=3).eos_id == 2
    with pytest.raises(CheckpointFormatError, match=r"token '<eos>' has id 2, and the model's vocabulary has 2 rows"):
        load_pretrained_tokenizer(tmp_path, vocab_size=2)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(CheckpointFormatError, match="eos_token '<end>' is not in its own vocabulary"):
        load_pretrained_tokenizer(tmp_path, vocab_size=3)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{% if %}"}')
    with pytest.raises(ValueError, match="chat_template is not a Jinja template"):
        load_tokenizer(tmp_path)
    model = LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0))
    model.config = replace(CONFIG, vocab_size=2)
    with pytest.raises(ValueError, match="model's vocabulary has 2 rows"):
        save_pretrained(model, tmp_path / "out", tokenizer=FileTokenizer(backend.to_str()))


# Fuzzing

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "yarn", "dynamic", "default", "dma"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["factor", "rope_type", "x"]), inner),
    max_leaves=4,
)
FIELDS = (
    "model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters",
    "rope_scaling", "rope_theta", "layer_types", "use_sliding_window", "max_window_layers", "mlp_bias", "vocab_size",
    "keep_window_size", "windows", "is_moe", "num_experts", "attention", "gate_activation", "eos_token_id", "dtype",
)  # fmt: skip


@hypothesis.settings(max_examples=200, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    kind=st.sampled_from(["llama", "qwen3", "doge", "dmattn_doge"]),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=4),
)
@pytest.mark.filterwarnings("ignore:.*dynamic rotary positions")
def test_fuzzed_configurations(good, tmp_path_factory, kind, changes):
    folder = tmp_path_factory.mktemp("fuzz")
    before = json.loads(good["config.json"]) | {"model_type": kind, "attention": "dma", "gate_activation": "exp"}
    (folder / "config.json").write_text(json.dumps(before | changes))
    refused_or_fine(read_config, folder)


def _open_safetensors(folder: Path) -> None:
    source = SafetensorsFolder(folder)
    for name in source.names():
        source.check_type(name)
        part = source.read(name, (slice(None),) * len(source.shape(name)))
        assert part.shape == source.shape(name)


@hypothesis.settings(max_examples=300, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(data=st.data())
def test_fuzzed_safetensors_headers(good, tmp_path_factory, data):
    """Any change of header bytes is refused with the one error, or changes nothing that is read wrongly."""
    folder = tmp_path_factory.mktemp("fuzz")
    name = next(name for name in sorted(good) if name.startswith("model-"))
    content = bytearray(good[name])
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, header_end - 1), st.integers(0, 255)), min_size=1)):
        content[at] = byte
    (folder / "model.safetensors").write_bytes(content)
    refused_or_fine(_open_safetensors, folder)
