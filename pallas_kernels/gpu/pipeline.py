"""What the three kernels have in common: how tiles lie in shared memory, and how the producer warpgroup fills it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

HALF_TILE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
"""Transforms of half-precision tiles, as TMA writes and warpgroup products read them."""

# Until JAX 0.11 `load` takes an index.
_INDEX = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()


def load_vector(ref: Any, layout: Any) -> Any:
    """A vector of shared memory in a reduced matrix layout, each element to the threads that hold its column."""
    return plgpu.load(ref, *_INDEX, layout=layout, optimized=False)


def produce(
    count: Any, stages: int, copies: Callable[[Any], Sequence[tuple[Any, Any, Any, Any]]], done: Any = 0
) -> None:
    """Stream `count` steps through `stages` slots; a slot is written again once its consumers have freed it.

    copies(step): (source in global memory, shared memory [stages, …], its barriers of arrival, its barriers of
    release) of everything that a step brings. done: steps that went through the same slots before.
    """

    @pl.loop(0, count)
    def _(number):
        slot = lax.rem(done + number, jnp.int32(stages))
        for source, target, ready, free in copies(number):

            @pl.when(done + number >= stages)
            def _(free=free):
                plgpu.barrier_wait(free.at[slot])

            plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])
