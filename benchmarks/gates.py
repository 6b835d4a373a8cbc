"""Gates to measure attention with: δ of every key and kv head, made up or from a trained model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from train.data import training_texts
from train.errors import ConfigError
from train.run_files import load_trained

Gate = Literal["random", "rising", "walk", "trained"]
MADE_UP: tuple[Gate, ...] = ("random", "rising", "walk")


def make_gates(kind: str, length: int, heads: int, checkpoint: Path | None, batch: int = 1) -> Float[Array, "B S K"]:
    """float32. rising: later keys tend to be higher, so nearly all leave early. walk: neighbours are alike. trained: of
    the run in `checkpoint`, reading its own corpus; head after head and layer after layer, as many as asked for.

    Raises: ValueError on a kind without a name, or a trained one without a run; UserError where the run cannot be
    loaded, or its corpus is too short.
    """
    noise = jax.random.normal(jax.random.split(jax.random.key(length), 5)[3], (batch, length, heads), jnp.float32)
    match kind:
        case "random":
            return noise
        case "rising":
            return noise + 8 * jnp.arange(length)[None, :, None] / length
        case "walk":
            return 0.02 * jnp.cumsum(noise, axis=1)
        case "trained" if checkpoint is not None:
            return _trained(checkpoint, length, heads, batch)
    raise ValueError(f"gates must be {', '.join(MADE_UP)}, or 'trained' with --checkpoint, got {kind!r}")


def _trained(checkpoint: Path, length: int, heads: int, batch: int) -> Float[Array, "B S K"]:
    run = load_trained(checkpoint, best=False)
    tokens: list[int] = []
    for text in training_texts(run.config.data):
        tokens += run.tokenizer.encode(text)
        if len(tokens) >= length:
            break
    if len(tokens) < length:
        raise ConfigError(f"the corpus of {checkpoint} has {len(tokens)} tokens, and {length} are wanted")
    gates = np.asarray(jax.jit(run.model().gates)(jnp.asarray([tokens[:length]], jnp.int32)))
    every = np.moveaxis(gates, 3, 1).reshape(-1, length)
    taken = np.stack(list(itertools.islice(itertools.cycle(every), batch * heads)))
    return jnp.asarray(taken.reshape(batch, heads, length).swapaxes(1, 2))
