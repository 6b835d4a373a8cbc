"""`dmattn export`: a run's checkpoint as a Hugging Face folder. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from train.errors import ConfigError, RunDirectoryError

if TYPE_CHECKING:
    from dmattn_jax.models.doge import DogeForCausalLM
    from train.run_files import TrainedModel


def export(
    run: tyro.conf.Positional[Path],
    output: tyro.conf.Positional[Path],
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    best: bool = False,
    shard_gigabytes: float = 5.0,
) -> int:
    """Write a trained model as a Hugging Face folder: config.json, safetensors and its tokenizer.

    A model with dynamic-mask attention is written as transformers' Doge, which reads it; what transformers cannot
    compute (other attentions, a linear gate) is written under a name that only this library reads.

    Example: dmattn export runs/quickstart quickstart-hf --dtype bfloat16

    Args:
        run: A run's folder, or one of its checkpoints (runs/NAME/checkpoints/STEP).
        output: The folder to write. Files of an earlier model in it are replaced.
        dtype: Type of the numbers in the files; the default is that of the training's parameters.
        best: Take the checkpoint of the lowest validation loss instead of the newest.
        shard_gigabytes: Largest size of one file.
    """
    from dmattn_jax.io import ByteTokenizer, FileTokenizer, save_pretrained
    from train.run_files import load_trained

    trained = load_trained(run, best=best)
    tokenizer = trained.tokenizer
    files = tokenizer.as_file() if isinstance(tokenizer, ByteTokenizer) else tokenizer
    assert isinstance(files, FileTokenizer)  # there is no third kind
    try:
        save_pretrained(_cast(trained, dtype), output, tokenizer=files, shard_bytes=int(shard_gigabytes * 1e9))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise RunDirectoryError(f"cannot write in {output}: {error.strerror or error}") from error
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    print(f"{output}: step {trained.step} of {trained.path.parent.parent}, {size / 1e6:,.1f} MB")
    return 0


def _cast(trained: TrainedModel, dtype: Literal["float32", "bfloat16", "float16"] | None) -> DogeForCausalLM:
    """The model with parameters of this type."""
    import dataclasses

    from train.parameters import make_skeleton

    if dtype is None:
        return trained.model()
    config = dataclasses.replace(trained.config.model, dtype=dtype, param_dtype=dtype)
    return make_skeleton(config).merge({name: array.astype(dtype) for name, array in trained.params.items()})
