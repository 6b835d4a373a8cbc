"""What the kernels have in common: pieces of work in turn, and how the producer warpgroup fills shared memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.device import multiprocessors

# Until JAX 0.11 `load` wants an index; in 0.11 it can, and warns of it.
_index = inspect.signature(plgpu.load).parameters.get("idx")
_INDEX = ((),) if _index is not None and _index.default is inspect.Parameter.empty else ()


def load_as(ref: Any, layout: Any, *, optimized: bool = True) -> Any:
    """What a reference holds, in registers of a layout."""
    return plgpu.load(ref, *_INDEX, layout=layout, optimized=optimized)


def load_vector(ref: Any, layout: Any) -> Any:
    """A vector in a reduced matrix layout, each element to the threads that hold its row or column."""
    return load_as(ref, layout, optimized=False)


def store_rows(ref: Any, value: Any) -> None:
    """Writes registers to global memory as they are spread over threads, though that is not whole cache lines."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        # Before JAX 0.12 no plain write asks for whole lines.
        ref[...] = value


class Pieces(NamedTuple):
    """Pieces of work, a query head and a tile of queries each, that one program a multiprocessor takes in turn."""

    batch: int
    heads: int
    tiles: int

    @property
    def programs(self) -> int:
        return min(self.batch * self.heads * self.tiles, multiprocessors())

    def for_each(self, program: Any, visit: Callable[..., Any]) -> None:
        """visit(number among the program's pieces, key tiles of the earlier ones, item of the batch, head, tile) ->
        its key tiles. Heads that share keys come together, the last tiles first, and programs take every second round
        backwards: without lists the last tiles are the longest, and who began a round ends the next one."""
        count, last = self.batch * self.heads * self.tiles, self.programs - 1

        def run(number, done):
            turn = jnp.where(lax.rem(number, jnp.int32(2)) == 0, program, last - program)
            number_of_all, heads = turn + number * self.programs, jnp.int32(self.heads)
            rest, head = lax.div(number_of_all, heads), lax.rem(number_of_all, heads)
            batch = jnp.int32(self.batch)
            return done + visit(number, done, lax.rem(rest, batch), head, self.tiles - 1 - lax.div(rest, batch))

        rounds, left = divmod(count, self.programs)
        turn = last - program if rounds % 2 else program
        lax.fori_loop(0, rounds + (turn < left).astype(jnp.int32), run, jnp.int32(0))


def produce(
    first: Any, count: Any, copies: Callable[[Any], Sequence[tuple[Any, Any, Any, Any]]], done: Any = 0
) -> None:
    """Stream steps first … count − 1 through slots; a slot is written again once its consumers have freed it.

    copies(step): (source in global memory, shared memory [stages, …], its barriers of arrival, its barriers of
    release) of everything that a step brings. done: steps that went through the same slots before.

    Memory from which consumers load registers may be released once a product of what was loaded has ended, not before:
    an arrival at a barrier does not wait for the warp's loads, and while products of another warpgroup keep shared
    memory busy, TMA can overwrite what is still to be read. (Seen in a quarter of all runs at head size 256.)
    """

    @pl.loop(first, count)
    def _(number):
        for source, target, ready, free in copies(number):
            stages = target.shape[0]
            slot = lax.rem(done + number, jnp.int32(stages))

            @pl.when(done + number >= stages)
            def _(free=free, slot=slot):
                plgpu.barrier_wait(free.at[slot])

            plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])
