"""How far masks take a frozen model from its dense self: perplexity, KL and top-1 agreement on held-out text."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from dmattn_jax.models.decoder import CausalDecoder
from train.dam.rivals import Rival

POSITIONS = 64
"""Positions whose logits over the vocabulary exist together, of each of two models."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One model on rows of one length and one text. kl: KL(dense ‖ model) in nats per token. agreement: share of
    positions with the dense model's likeliest token. density: visible over causal pairs, mean of layers and heads."""

    name: str
    length: int
    rows: int
    loss: float
    perplexity: float
    kl: float
    agreement: float
    density: float
    text: str = ""


def compare(
    model: CausalDecoder,
    rows: Sequence[np.ndarray],
    rivals: Mapping[str, Rival],
    *,
    text: str = "",
    batch_size: int = 1,
    progress: bool = False,
) -> list[Comparison]:
    """The dense model and each rival on rows [length], batch_size at a time. Every token but the first is
    predicted; at no time are there logits of more than POSITIONS positions of a row."""
    length = len(rows[0])
    dense, others = nnx.split(model), {name: nnx.split(rival.model) for name, rival in rivals.items()}
    sums = {name: np.zeros(3) for name in ("dense", *others)}
    size = min(batch_size, len(rows))
    # Filled up with nothing that counts, so that the last batch compiles nothing new.
    counted = np.arange(-(-len(rows) // size) * size) < len(rows)
    filled = [*rows, *[rows[0]] * (len(counted) - len(rows))]
    total = len(filled) // size * (1 + len(others))
    with tqdm(total=total, desc=f"{text} {length}".strip(), unit="batch", disable=not progress) as bar:
        for first in range(0, len(filled), size):
            tokens = jnp.asarray(np.stack(filled[first : first + size]))
            counts = jnp.asarray(counted[first : first + size])
            truth = _hidden(*dense, tokens)
            for name, split in (("dense", dense), *others.items()):
                hidden = truth if name == "dense" else _hidden(*split, tokens)
                sums[name] += np.asarray(_differences(*dense, truth, hidden, tokens, counts), np.float64)
                bar.update()
    out = []
    for name, (nats, kl, agree) in sums.items():
        count = len(rows) * (length - 1)
        density = 1.0 if name == "dense" else rivals[name].density
        loss = nats / count
        perplexity = math.exp(loss) if loss < 700 else math.inf
        out.append(Comparison(name, length, len(rows), loss, perplexity, kl / count, agree / count, density, text))
    return out


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graph: Any, state: Any, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).hidden(tokens)[0]


@functools.partial(jax.jit, static_argnums=0)
def _differences(
    graph: Any, state: Any, truth: jax.Array, hidden: jax.Array, tokens: jax.Array, counted: jax.Array
) -> jax.Array:
    """Σ over predicted positions of counted rows of cross-entropy, KL(truth ‖ hidden), and equal likeliest tokens."""
    model = nnx.merge(graph, state)
    missing = -(tokens.shape[1] - 1) % POSITIONS

    def cut(array: jax.Array) -> jax.Array:
        array = jnp.pad(array, ((0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)))
        return jnp.moveaxis(array.reshape(array.shape[0], -1, POSITIONS, *array.shape[2:]), 1, 0)

    def one(parts: tuple[jax.Array, ...]) -> jax.Array:
        truth, hidden, target, counted = parts
        expected, got = (jax.nn.log_softmax(model.logits(states)) for states in (truth, hidden))
        nats = -jnp.take_along_axis(got, target[..., None], axis=-1)[..., 0]
        kl = (jnp.exp(expected) * (expected - got)).sum(-1)
        agree = jnp.argmax(expected, -1) == jnp.argmax(got, -1)
        return jnp.stack([jnp.where(counted, part, 0).sum() for part in (nats, kl, agree)])

    predicted = jnp.broadcast_to(counted[:, None], (tokens.shape[0], tokens.shape[1] - 1))
    parts = (truth[:, :-1], hidden[:, :-1], tokens[:, 1:], predicted)
    return jax.lax.map(one, tuple(map(cut, parts))).sum(0)


def table(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as Markdown."""
    lines = [
        "| text | length | attention | density | perplexity | KL from dense, nats | top-1 agreement |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in comparisons:
        name = c.name.replace("_", " ")
        lines.append(
            f"| {c.text} | {c.length:,} | {name} | {c.density:.1%} | {c.perplexity:.2f} | {c.kl:.3f} | "
            f"{c.agreement:.1%} |"
        )
    return "\n".join(lines)
