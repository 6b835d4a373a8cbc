"""What a run left behind, opened again: its configuration, a checkpoint's parameters, its tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from dmattn_jax.io.errors import CheckpointFormatError, HubError
from dmattn_jax.io.pretrained import load_pretrained
from dmattn_jax.io.tokenizer_files import load_pretrained_tokenizer, load_tokenizer
from dmattn_jax.io.tokenizers import FileTokenizer, Tokenizer
from dmattn_jax.models.decoder import CausalDecoder
from dmattn_jax.models.doge import DogeForCausalLM
from train import config_json
from train.checkpoint import best_step, newest_intact, restore_parameters, steps_in
from train.config import TrainConfig
from train.errors import CheckpointError, ConfigError, RunDirectoryError
from train.parameters import Skeleton, make_skeleton
from train.run_directory import TOKENIZER


def open_tokenizer(spec: str) -> Tokenizer:
    """`load_tokenizer` for a run. Raises ConfigError in one line."""
    try:
        tokenizer = load_tokenizer(spec)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if isinstance(tokenizer, FileTokenizer):
        tokenizer.adds_bos = False  # no document in training begins with it
    return tokenizer


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model as a checkpoint has it. step: of the checkpoint; name: how to speak of it."""

    config: TrainConfig
    skeleton: Skeleton
    params: dict[str, jax.Array]
    tokenizer: Tokenizer
    step: int
    path: Path

    def model(self) -> DogeForCausalLM:
        return self.skeleton.merge(self.params)


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model to talk with, from wherever it is. name: how to speak of it. path: of the checkpoint or the files."""

    model: CausalDecoder
    tokenizer: Tokenizer
    name: str
    path: Path


def open_model(path: Path, *, best: bool) -> OpenedModel:
    """The model of a run (`load_trained`), of a .gguf file, of a Hugging Face folder, or of `hf:OWNER/NAME` on the hub.

    A .gguf file, which names no type to compute in, is computed in bfloat16 on an accelerator and float32 on a CPU.
    Raises UserError where there is none, or it cannot be read.
    """
    hub = str(path).startswith("hf:")
    folder = (path / "config.json").is_file() and not (path / "checkpoints").is_dir()
    if not (hub or folder or path.suffix == ".gguf"):
        trained = load_trained(path, best=best)
        return OpenedModel(trained.model(), trained.tokenizer, trained.config.name, trained.path)
    source = str(path).removeprefix("hf:")
    try:
        half = path.suffix == ".gguf" and jax.default_backend() != "cpu"
        model = load_pretrained(source, "bfloat16" if half else None)
        return OpenedModel(model, load_pretrained_tokenizer(source, model.config.vocab_size), path.stem, path)
    except (CheckpointFormatError, HubError, FileNotFoundError, ModuleNotFoundError) as error:
        raise CheckpointError(" ".join(str(error).split())) from error


def load_trained(path: Path, *, best: bool) -> TrainedModel:
    """The model of a run's folder (its newest whole checkpoint, or its best), or of one `checkpoints/<step>` folder.

    Raises UserError when there is no run, no whole checkpoint, or the checkpoint is of another architecture.
    """
    if not path.is_dir():
        if path.suffix == ".gguf" or str(path).startswith("hf:"):
            raise RunDirectoryError(f"{path} is not a run: {config_json.ONLY_A_RUN}")
        raise RunDirectoryError(f"no run at {path}: name a run's folder, such as runs/quickstart")
    single = path.name.isdecimal() and path.parent.name == "checkpoints"
    run = path.parent.parent if single else path
    config = config_json.load(run / "config.json")
    directory = run / "checkpoints"
    if single:
        step: int | None = int(path.name)
    elif best:
        step = best_step(directory)
    else:
        step = newest_intact(directory, print)
    if step is None:
        what = "no checkpoint has a validation loss" if steps_in(directory) else "no checkpoint is there yet"
        raise CheckpointError(f"{run} cannot be loaded: {what}; train it first")
    skeleton = make_skeleton(config.model)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here) for name, leaf in skeleton.shapes.items()
    }
    own = run / TOKENIZER
    tokenizer = open_tokenizer(str(own) if own.is_file() else config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise CheckpointError(
            f"{config.data.tokenizer} has {tokenizer.vocab_size} tokens and the model of {run} has "
            f"{config.model.vocab_size}: it is not the tokenizer of its training"
        )
    params = restore_parameters(directory, step, shapes)
    return TrainedModel(config, skeleton, params, tokenizer, step, directory / str(step))
