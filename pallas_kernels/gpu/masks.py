"""Which queries see which keys of a tile, in the registers of a product of both."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.pipeline import load_vector

BIAS, START, END = range(3)
"""Rows of what a tile holds of its keys, `tiles.Rows.meta`."""


def of_keys(meta: Any, row: int, shape: tuple[int, ...], *, axis: int) -> Any:
    """A row of the keys' meta data, along their axis of a product of that shape."""
    return lax.broadcast_in_dim(load_vector(meta.at[row], plgpu.Layout.WGMMA.reduce(1 - axis)), shape, [axis])


def visible(meta: Any, shape: tuple[int, ...], first_query: Any, *, axis: int, begun: bool) -> Any:
    """Who sees whom. axis: the keys'. begun: whether all keys begin at the first query or before, so that only their
    ends are compared."""
    position = plgpu.broadcasted_iota(jnp.int32, shape, 1 - axis, layout=plgpu.Layout.WGMMA)
    position = (position + first_query).astype(jnp.float32)
    sees = position < of_keys(meta, END, shape, axis=axis)
    return sees if begun else sees & (of_keys(meta, START, shape, axis=axis) <= position)
