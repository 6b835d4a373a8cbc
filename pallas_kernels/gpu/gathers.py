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
from jaxtyping import Array, Int32

Read = Callable[[Int32[Array, " n"]], Int32[Array, " n"]]
"""The entries of an array at places known to be inside."""

CHUNK = 512
"""Elements of a program: four for each thread of a warpgroup, whose reads overlap."""


def gathered(
    body: Callable[[Sequence[Read], Int32[Array, " n"]], Sequence[Int32[Array, " n"]]],
    operands: Sequence[Int32[Array, "*n"]],
    count: int,
    outputs: int,
) -> tuple[Int32[Array, " count"], ...]:
    """out[o][n] = body(reads, n)[o] for n = 0 … count − 1, where reads[i](at) are entries of operands[i], flattened.

    body: elementwise integer arithmetic and reads only. One kernel on a CUDA GPU; the same by XLA elsewhere.
    """
    flat = [operand.reshape(-1) for operand in operands]

    def portable(*arrays):
        reads = [lambda at, array=array: array.at[at].get(mode="promise_in_bounds") for array in arrays]
        return tuple(body(reads, jnp.arange(count, dtype=jnp.int32)))

    return lax.platform_dependent(*flat, cuda=partial(_kernel, body, count, outputs), default=portable)


def _kernel(body, count: int, outputs: int, *arrays: Int32[Array, " m"]) -> tuple[Int32[Array, " count"], ...]:
    padded = -(-count // CHUNK) * CHUNK
    layout = plgpu.Layout.WG_STRIDED((CHUNK,), vec_size=1)

    def program(*refs):
        sources, targets = refs[: len(arrays)], refs[len(arrays) :]
        first = lax.axis_index("chunk") * CHUNK
        place = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=layout) + first
        # Past the end the last element again, so that every read is inside.
        results = body([partial(_read, source) for source in sources], jnp.minimum(place, count - 1))
        for target, result in zip(targets, results, strict=True):
            target[pl.ds(first, CHUNK)] = result

    out = plgpu.kernel(
        program,
        out_type=[jax.ShapeDtypeStruct((padded,), jnp.int32)] * outputs,
        grid=(padded // CHUNK,),
        grid_names=("chunk",),
    )(*arrays)
    return tuple(array[:count] for array in out)


def _read(source: Any, at: Int32[Array, " n"]) -> Int32[Array, " n"]:
    layout = plgpu.Layout.WG_STRIDED(at.shape, vec_size=1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), layout),
        return_type=plgpu.ShapeDtypeStruct(at.shape, jnp.int32, layout=layout),
    )
    def read(_, memory, places):
        registers = np.empty_like(places.registers)
        for number, register in np.ndenumerate(places.registers):
            place = vector.extract(register, dynamic_position=[], static_position=[0])
            place = arith.index_cast(ir.IndexType.get(), place)
            registers[number] = vector.load(register.type, memory, [place])
        return mgpu.FragmentedArray(_registers=registers, _layout=places.layout, _is_signed=places.is_signed)

    return read(source, at)
