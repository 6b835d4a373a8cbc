"""Tokens times weights, and the dtype that weights are held in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Model = TypeVar("Model")


def linear(x: Float[Array, "B ... M"], weight: Float[Array, "M ..."], axes: int = 1) -> Float[Array, "B ..."]:
    """x · weight over the last `axes` axes of x and the first of weight, in x's dtype.

    A single token in half precision is multiplied as two. XLA makes no matrix product of one row: it rounds every
    term to half precision and, on a GPU, writes all of them to memory before it adds them.
    """
    rows = math.prod(x.shape[: x.ndim - axes])
    if rows != 1 or jnp.finfo(x.dtype).bits > 16:
        return jnp.tensordot(x, weight, axes)
    return jnp.tensordot(jnp.concatenate([x, jnp.zeros_like(x)]), weight, axes)[:1]


def in_compute_dtype(model: Model) -> Model:
    """The model with its matrices in the dtype that their layers compute in, for what reads them again and again.

    The bits of every result stay, since layers convert matrices before anything else; what has its dtype already is
    shared. A layer names these parameters in `matrices`; norms and gates, which compute in float32, are not among them.
    """
    graph, state = nnx.split(model)
    # Variables of its own, with the same arrays.
    converted: Any = nnx.merge(graph, jax.tree.map(lambda array: array, state))
    modules: Iterable[tuple[Any, Any]] = nnx.iter_modules(converted)
    for _, module in modules:
        for name in getattr(module, "matrices", ()):
            matrix = getattr(module, name, None)
            if matrix is not None:
                matrix.set_value(matrix[...].astype(module.dtype))
    return converted
