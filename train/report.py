"""What a run shows besides numbers: samples, pictures, and the summary at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from dmattn_jax.generation import generate
from dmattn_jax.io.tokenizers import Tokenizer
from dmattn_jax.models.config import DogeConfig
from train.config import TrainConfig
from train.evaluate import Evaluation
from train.metrics_file import read_metrics
from train.monitor import say
from train.parameters import Skeleton
from train.plots import plot_loss, plot_masks
from train.run_directory import RunDirectory

PICTURE_TOKENS = 512
# Colder than this, small models fall into runs of one token.
SAMPLE_TEMPERATURE, SAMPLE_TOP_P = 0.8, 0.95


def sample(
    skeleton: Skeleton, params: Mapping[str, jax.Array], tokenizer: Tokenizer, config: TrainConfig, step: int
) -> str:
    """A continuation of `log.sample_prompt`. The same step of the same run gives the same text."""
    prompt = tokenizer.encode(config.log.sample_prompt)
    if not prompt:
        eos = tokenizer.eos_id
        prompt = [0 if eos is None else eos]
    (ids,) = generate(
        skeleton.merge(params),
        [prompt],
        max_new_tokens=config.log.sample_tokens,
        temperature=SAMPLE_TEMPERATURE,
        top_p=SAMPLE_TOP_P,
        stop_tokens=tokenizer.stop_ids,
        seed=config.seed + step,
    )
    return tokenizer.decode(ids)


def windows_of(config: DogeConfig) -> tuple[int, ...]:
    """One window per kv head."""
    return (config.window,) * config.num_kv_heads if isinstance(config.window, int) else config.window


ExpiryFunction = Callable[[Mapping[str, jax.Array], np.ndarray, np.ndarray], np.ndarray]


def make_expiry_function(skeleton: Skeleton) -> ExpiryFunction:
    """(params, tokens [S], segment_ids [S]) -> lifetimes of every key in every layer and kv head, int32 [L, S, K].

    Compiled once for each length of text.
    """

    @jax.jit
    def compute(params: Mapping[str, jax.Array], tokens: jax.Array, segments: jax.Array) -> jax.Array:
        return skeleton.merge(params).lifetimes(tokens, segments)[:, 0]

    return lambda params, tokens, segments: np.asarray(compute(params, tokens[None], segments[None]))


def draw(
    expiry_function: ExpiryFunction,
    params: Mapping[str, jax.Array],
    config: TrainConfig,
    directory: RunDirectory,
    batch: Mapping[str, np.ndarray],
    step: int,
) -> None:
    """plots/loss.png, and plots/masks.png where the attention has masks to learn; batch: some validation text."""
    plot_loss(directory.metrics, directory.plots / "loss.png", f"{config.name} · loss")
    if config.model.attention != "dma":
        return
    # the row with the longest single text among the first positions shows the most
    heads = batch["segment_ids"][:, :PICTURE_TOKENS]
    row = int(np.argmax((heads == 1).sum(axis=1)))
    tokens, segments = batch["tokens"][row, :PICTURE_TOKENS], heads[row]
    plot_masks(
        expiry_function(params, tokens, segments),
        windows_of(config.model),
        segments,
        directory.plots / "masks.png",
        f"{config.name} · step {step:,} · the keys that each head lets its queries see",
    )


def summarize(config: TrainConfig, directory: RunDirectory, last: Evaluation | None, session_seconds: float) -> None:
    """Where the run began and ended, where its files are, and what to do with it."""
    path: Path = directory.path
    validation = [float(r["validation_loss"]) for r in read_metrics(directory.metrics) if r["validation_loss"]]
    seconds = float(read_metrics(directory.metrics)[-1]["seconds"] or 0)
    lines = ["", f"finished {path}"]
    if validation:
        lines.append(f"  validation loss  {validation[0]:.4f} -> {validation[-1]:.4f}")
    if last is not None:
        lines.append(f"  perplexity       {last.perplexity:.4g}")
        lines.append(f"  bits per byte    {last.bits_per_byte:.4f}")
    lines += [
        f"  time             {_clock(seconds)} of training steps, {_clock(session_seconds)} in all by this command",
        f"  pictures         {directory.plots / 'loss.png'}, {directory.plots / 'masks.png'}"
        if config.model.attention == "dma"
        else f"  picture          {directory.plots / 'loss.png'}",
        f"  numbers          {directory.metrics}; tensorboard --logdir {directory.events}",
        f"  samples          {directory.samples}",
        "next:",
        f"  dmattn generate {path} --prompt {_in_a_shell(config.log.sample_prompt)}",
        f"  dmattn eval {path} --text FILE_OR_DIRECTORY",
    ]
    say("\n".join(lines))


def _in_a_shell(text: str) -> str:
    """A quoted argument on one line: $'…' is how a shell reads the escapes of a text of several lines."""
    return f"${text!r}" if "\n" in text else repr(text)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
