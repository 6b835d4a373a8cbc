"""Elementwise programs with reads at computed places, each as one GPU kernel.

A search in a sorted list is a dozen reads, each at a place that the one before decides. XLA cuts such a chain into a
kernel for every second read; here all of it runs in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jax.typing import DTypeLike
from jaxtyping import Array, Int32, Num

Read = Callable[..., Num[Array, "*n"]]
"""The entries of an array at places known to be inside: one array of places for each of its axes."""

CHUNK = 512
"""Elements of a program: four for each thread of a warpgroup, whose reads overlap."""


def gathered(
    body: Callable[[Sequence[Read], Int32[Array, " n"]], Sequence[Num[Array, " n"]]],
    operands: Sequence[Num[Array, "..."]],  # noqa: UP037
    count: int,
    dtypes: Sequence[DTypeLike],
) -> tuple[Num[Array, " count"], ...]:
    """out[o][n] = body(reads, n)[o] for n = 0 … count − 1, where reads[i](at) are entries of operands[i], flattened.

    body: elementwise arithmetic and reads only. One kernel on a CUDA GPU; the same by XLA elsewhere.
    """
    flat = [operand.reshape(-1) for operand in operands]

    def portable(*arrays):
        return tuple(body([entries_of(array) for array in arrays], jnp.arange(count, dtype=jnp.int32)))

    def kernel(*arrays):
        padded = -(-count // CHUNK) * CHUNK

        def program(*refs):
            sources, targets = refs[: len(arrays)], refs[len(arrays) :]
            first = lax.axis_index("chunk") * CHUNK
            # Past the end the last element again, so that every read is inside.
            place = jnp.minimum(iota((CHUNK,), 0) + first, count - 1)
            for target, result in zip(targets, body([partial(read, s) for s in sources], place), strict=True):
                target[pl.ds(first, CHUNK)] = result

        out = plgpu.kernel(
            program,
            out_type=[jax.ShapeDtypeStruct((padded,), dtype) for dtype in dtypes],
            grid=(padded // CHUNK,),
            grid_names=("chunk",),
        )(*arrays)
        return tuple(array[:count] for array in out)

    return lax.platform_dependent(*flat, cuda=kernel, default=portable)


def entries_of(array: Num[Array, "..."]) -> Read:  # noqa: UP037
    """Reads of an array outside of kernels."""
    return lambda *places: array.at[places].get(mode="promise_in_bounds")


def iota(shape: tuple[int, ...], axis: int) -> Int32[Array, "*n"]:
    """Inside a kernel: the place of each element along an axis, in the layout that `read` takes."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WG_STRIDED(shape, vec_size=1))


def read(source: Any, *places: Int32[Array, "*n"]) -> Num[Array, "*n"]:
    """Inside a kernel: the entries of an array in global memory, each thread its own."""
    shape = places[0].shape
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *([layout] * len(places))),
        return_type=plgpu.ShapeDtypeStruct(shape, source.dtype, layout=layout),
    )
    def load(_, memory, *places):
        element = ir.VectorType.get((1,), ir.MemRefType(memory.type).element_type)
        registers = np.empty_like(places[0].registers)
        for number in np.ndindex(registers.shape):
            indices = [
                arith.index_cast(
                    ir.IndexType.get(),
                    vector.extract(place.registers[number], dynamic_position=[], static_position=[0]),
                )
                for place in places
            ]
            registers[number] = vector.load(element, memory, indices)
        signed = True if jnp.issubdtype(source.dtype, jnp.integer) else None
        return mgpu.FragmentedArray(_registers=registers, _layout=places[0].layout, _is_signed=signed)

    return load(source, *places)
