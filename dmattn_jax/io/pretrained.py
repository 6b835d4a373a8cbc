"""Models from files and back: Hugging Face folders with safetensors, hub ids, and GGUF files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from dmattn_jax.io import doge_format, llama_format
from dmattn_jax.io.decoder_tensors import UNEMBEDDING
from dmattn_jax.io.errors import CheckpointFormatError
from dmattn_jax.io.hub import local_path
from dmattn_jax.io.json_fields import Fields, read_json
from dmattn_jax.io.safetensors_files import PICKLES, SafetensorsFolder
from dmattn_jax.io.safetensors_writer import SHARD_BYTES, write_tensors
from dmattn_jax.io.tensor_map import TensorSource, TensorSpec, check_tensors, read_parameter, written_tensors
from dmattn_jax.io.tokenizers import FileTokenizer
from dmattn_jax.models.config import DogeConfig
from dmattn_jax.models.decoder import CausalDecoder
from dmattn_jax.models.doge import DogeForCausalLM
from dmattn_jax.models.llama import LlamaForCausalLM
from dmattn_jax.models.llama_config import LlamaConfig
from dmattn_jax.partitioning import parameter_sharding

DTYPES = ("float32", "bfloat16", "float16")


class Family(NamedTuple):
    """How one kind of model is read and written."""

    model: type[Any]
    config: type[Any]
    read_config: Callable[[Fields, dict[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    specs: Callable[[Any], list[TensorSpec]]


DOGE = Family(
    DogeForCausalLM,
    DogeConfig,
    doge_format.read_doge_config,
    doge_format.write_doge_config,
    doge_format.doge_specs,
)
LLAMA = Family(
    LlamaForCausalLM,
    LlamaConfig,
    llama_format.read_llama_config,
    llama_format.write_llama_config,
    llama_format.llama_specs,
)
FAMILIES = {
    doge_format.STANDARD: DOGE,
    doge_format.EXTENDED: DOGE,
    llama_format.LLAMA: LLAMA,
    llama_format.QWEN3: LLAMA,
}
"""By the `model_type` of a config.json."""


def load_pretrained(
    path: str | os.PathLike[str], dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> CausalDecoder:
    """The model in a Hugging Face folder, under a hub id (`owner/name`), or in a .gguf file.

    dtype: of parameters and computation: float32, bfloat16 or float16; None takes what config.json names, and
        float32 for a GGUF file and where nothing is named.
    mesh: a mesh with axes of (data, fsdp, tensor), over which the parameters are split; every device's part alone is
        read for it. None puts all on the default device.

    Doge (dense and CDMoE), Llama, SmolLM2 and Qwen3 are read; safetensors only, never a pickle. Code that comes
    with a model is not run. `doge_format` says in what this library's Doge differs from transformers'.

    Raises: CheckpointFormatError where a file is damaged, of another architecture, or a pickle, naming file and
    tensor; HubError where the hub gives nothing; FileNotFoundError where there is no such path.
    """
    place = local_path(path)
    name = None if dtype is None else _dtype_name(dtype)
    if place.is_dir():
        return _load_folder(place, name, mesh)
    if place.suffix == ".gguf":
        from dmattn_jax.io.gguf_model import open_gguf_model

        config, specs, source, ignored = open_gguf_model(place, name or "float32")
        return _load(LLAMA, config, specs, source, ignored, mesh)
    if place.suffix in PICKLES:
        raise CheckpointFormatError(
            f"{place} may be a pickle, which can run any code when it is opened, so it is not: "
            "convert the model to safetensors where you trust it"
        )
    raise CheckpointFormatError(f"{place} must be a folder with config.json and safetensors, or a .gguf file")


def read_config(folder: Path, dtype: str | None = None) -> tuple[Family, DogeConfig | LlamaConfig]:
    """The model's kind and configuration from a folder's config.json.

    Raises: CheckpointFormatError naming the field.
    """
    path = folder / "config.json"
    fields = Fields(read_json(path), str(path))
    kind = fields.text("model_type")
    if kind not in FAMILIES:
        raise CheckpointFormatError(f"{path}: model_type must be one of {', '.join(FAMILIES)}, got {kind!r:.80}")
    if fields.content.get("quantization_config") is not None:
        raise CheckpointFormatError(f"{path}: quantization_config is not supported: convert the model to bfloat16")
    if dtype is None:
        dtype = fields.text("dtype", fields.text("torch_dtype", "float32"))
        if dtype not in DTYPES:
            raise CheckpointFormatError(f"{path}: dtype must be one of {', '.join(DTYPES)}, got {dtype!r:.80}")
    family = FAMILIES[kind]
    try:
        config = family.read_config(fields, {"dtype": dtype, "param_dtype": dtype})
    except CheckpointFormatError:
        raise
    except ValueError as error:
        raise CheckpointFormatError(f"{path}: {error}") from None
    check_special_ids(fields, config.vocab_size)
    return family, config


def check_special_ids(fields: Fields, vocab_size: int) -> None:
    """Raises: CheckpointFormatError when an id of config.json that begins or ends a text is out of the vocabulary."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = fields.get(name, (int, list), None)
        for one in value if isinstance(value, list) else [value]:
            # −1 is how some files say that there is none
            if one is not None and (not isinstance(one, int) or not -1 <= one < vocab_size):
                raise CheckpointFormatError(
                    f"{fields.source}: {name} must be below vocab_size {vocab_size}, got {one!r:.80}"
                )


def save_pretrained(
    model: CausalDecoder,
    path: str | os.PathLike[str],
    *,
    tokenizer: FileTokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model as a Hugging Face folder: config.json and safetensors, in shards of at most shard_bytes.

    tokenizer: is written beside it (tokenizer.json, tokenizer_config.json), and its ids go into config.json.
    Parameters keep their type. Files of an earlier model in the folder are replaced; config.json comes last, so a
    folder that has one is whole. One process only, which must see all devices of the model.

    Raises: ValueError on a model that is none of this library's, has what a config.json cannot say, or has a smaller
    vocabulary than the tokenizer, and on a folder whose config.json is of something else, a run for example; OSError
    where the folder cannot be written.
    """
    family = next((one for one in (DOGE, LLAMA) if isinstance(model, one.model)), None)
    if family is None:
        raise ValueError(f"model must be a DogeForCausalLM or a LlamaForCausalLM, got {type(model).__name__}")
    content = family.write_config(model.config)
    specs = family.specs(model.config)
    parameters = {_join(where): leaf[...] for where, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    if model.is_unrolled:
        raise ValueError("model must have its layers stacked: save the decoder from which unrolled() made this one")
    more = [_join(where) for where, _ in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Param)))]
    more += sorted(parameters.keys() ^ {spec.parameter for spec in specs})
    if more:
        raise ValueError(
            f"model has what a config.json cannot say: {', '.join(more[:3])}; masks are saved by themselves"
        )
    # both spellings, for transformers before and since version 5
    content |= {"dtype": model.config.param_dtype, "torch_dtype": model.config.param_dtype}
    if tokenizer is not None:
        tokenizer.check_vocabulary(model.config.vocab_size)
        stops = list(tokenizer.stop_ids)
        content |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops if len(stops) > 1 else tokenizer.eos_id}
    folder = Path(path).expanduser()
    if (folder / "config.json").exists() and "model_type" not in read_json(folder / "config.json"):
        raise ValueError(f"path must be a folder for a model: {folder / 'config.json'} is of something else")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    write_tensors(folder, written_tensors(specs, parameters), shard_bytes)
    if tokenizer is not None:
        tokenizer.save(folder)
    fresh = folder / "config.json.new"
    fresh.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    fresh.replace(folder / "config.json")


def _load_folder(folder: Path, dtype: str | None, mesh: Mesh | None) -> CausalDecoder:
    family, config = read_config(folder, dtype)
    source = SafetensorsFolder(folder)
    # Tied files may repeat the table, and old ones keep the rotary frequencies, which the configuration gives.
    ignored = {name for name in source.names() if name.endswith(".rotary_emb.inv_freq")}
    if config.tie_embeddings:
        ignored.add(UNEMBEDDING)
    return _load(family, config, family.specs(config), source, ignored, mesh)


def _load(
    family: Family,
    config: Any,
    specs: list[TensorSpec],
    source: TensorSource,
    ignored: set[str],
    mesh: Mesh | None,
) -> CausalDecoder:
    check_tensors(specs, source, ignored)
    # not nnx.eval_shape: under an active mesh it takes the logical axis names for mesh axes
    graph, state = jax.eval_shape(lambda: nnx.split(family.model(config, rngs=nnx.Rngs(0))))
    by_parameter = {spec.parameter: spec for spec in specs}
    loaded = []
    for path, variable in nnx.to_flat_state(state):
        shape = variable.get_value()
        names = tuple(variable.get_metadata("out_sharding", None) or ())
        sharding: Sharding = SingleDeviceSharding(jax.devices()[0])
        if mesh is not None:
            sharding = parameter_sharding(names, shape.shape, mesh)
        array = _read_sharded(by_parameter[_join(path)], source, shape, sharding)
        loaded.append((path, variable.replace(array)))
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def _read_sharded(spec: TensorSpec, source: TensorSource, shape: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
    def part(index: tuple[slice, ...] | None) -> Any:
        return read_parameter(spec, source, index or (), shape.dtype)

    return jax.make_array_from_callback(shape.shape, sharding, part)


def _dtype_name(dtype: DTypeLike) -> str:
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name}")
    return name


def _join(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)
