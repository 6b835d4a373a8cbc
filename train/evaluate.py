"""The loss of a model on held-out text: nats per token, perplexity, bits per byte."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from train.mesh import global_batch


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy in nats over `tokens` predicted tokens, and the bytes of text that such a token stands for."""

    loss: float
    tokens: int
    bytes_per_token: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2) / self.bytes_per_token

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.4g}, {self.bits_per_byte:.4f} bits per byte"


def evaluate(
    eval_step: Any,
    params: Mapping[str, jax.Array],
    batches: Iterable[Mapping[str, np.ndarray]],
    bytes_per_token: float,
    mesh: Mesh,
    limit: int | None = None,
) -> Evaluation:
    """Evaluates `eval_step` (train/step.py) on at most `limit` batches; each token weighs the same."""
    total, count = 0.0, 0.0
    for batch in itertools.islice(batches, limit):
        nats, tokens = eval_step(params, global_batch(batch, mesh))
        total, count = total + float(nats), count + float(tokens)
    return Evaluation(total / count if count else math.nan, int(count), bytes_per_token)
