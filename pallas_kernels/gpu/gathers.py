"""Elementwise programs with reads at computed places, each as one GPU kernel.

A search in a sorted list is a dozen reads, each at a place that the one before decides. XLA cuts such a chain into a
kernel for every second read; here all of it runs in registers.
"""

from __future__ import annotations

import math
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

WARPGROUP = 128
"""Threads of a program."""
CHUNK = 4 * WARPGROUP
"""Elements of a program: four for each thread, whose reads overlap."""

PARAMETERS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
"""Every operation names its layout here; inferring them takes most of a second for each kernel."""

Stage = Callable[[Sequence[Read], Sequence[Read], Int32[Array, " n"]], Sequence[Num[Array, " n"]]]
"""(reads of the operands, reads of what the stage before made, n) -> entries n of what this one makes."""


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
        def program(*refs):
            sources, targets = refs[: len(arrays)], refs[len(arrays) :]
            first = lax.axis_index("program") * CHUNK
            # Past the end the last element again, so that every read is inside.
            place = jnp.minimum(iota((CHUNK,), 0) + first, count - 1)
            for target, result in zip(targets, body([partial(read, s) for s in sources], place), strict=True):
                target[pl.ds(first, CHUNK)] = result

        return _launch(program, arrays, count, CHUNK, dtypes)

    return lax.platform_dependent(*flat, cuda=kernel, default=portable)


def gathered_lines(
    body: Callable[[Sequence[Read], Int32[Array, " n"]], Sequence[Num[Array, " n"]]],
    operands: Sequence[Num[Array, "..."]],  # noqa: UP037
    lines: int,
    length: int,
    parts: int,
    dtype: DTypeLike,
) -> Num[Array, "lines parts length"]:
    """`gathered` for count = lines · length, whose `parts` results, of one dtype, stand together: out[line, o, n] is
    result o of element n of the line.

    Raises: ValueError unless length is a multiple of a warpgroup's threads.
    """
    chunk = math.gcd(CHUNK, length)
    if chunk % WARPGROUP:
        raise ValueError(f"length must be a multiple of {WARPGROUP}, got {length}")
    flat = [operand.reshape(-1) for operand in operands]
    chunks = length // chunk

    def portable(*arrays):
        results = body([entries_of(array) for array in arrays], jnp.arange(lines * length, dtype=jnp.int32))
        return jnp.stack([result.reshape(lines, length) for result in results], axis=1)

    def kernel(*arrays):
        def program(*refs):
            sources, target = refs[: len(arrays)], refs[len(arrays)]
            number = lax.axis_index("program")
            line, within = lax.div(number, jnp.int32(chunks)), lax.rem(number, jnp.int32(chunks))
            results = body([partial(read, s) for s in sources], iota((chunk,), 0) + number * chunk)
            for part, result in enumerate(results):
                target[pl.ds((line * parts + part) * length + within * chunk, chunk)] = result

        whole = jax.ShapeDtypeStruct((lines * parts * length,), dtype)
        out = launch("gathers", program, arrays, lines * chunks, whole)
        return out.reshape(lines, parts, length)

    return lax.platform_dependent(*flat, cuda=kernel, default=portable)


def staged(
    stages: Sequence[Stage],
    operands: Sequence[Num[Array, "..."]],  # noqa: UP037
    count: int,
    span: int,
    dtypes: Sequence[DTypeLike],
    written: Sequence[int],
) -> list[tuple[Num[Array, " count"], ...]]:
    """Stages that each read what the one before made, at places of the same span: one kernel on a CUDA GPU, in which
    what stages make stays in shared memory. Returns what the stages in `written` made, for n = 0 … count − 1.

    count: a multiple of span; elements n and m share a span where n // span == m // span. dtypes: of what each makes.
    """
    if count % span:
        raise ValueError(f"count must be a multiple of span ({span}), got {count}")
    flat = [operand.reshape(-1) for operand in operands]
    # Short spans share a program, so that every thread has elements.
    wide = span * (-(-CHUNK // span))

    def portable(*arrays):
        reads = [entries_of(array) for array in arrays]
        made: list[Sequence[Num[Array, " n"]]] = []
        for stage in stages:
            held = [entries_of(array) for array in made[-1]] if made else []
            made.append(stage(reads, held, jnp.arange(count, dtype=jnp.int32)))
        return tuple(array for number in written for array in made[number])

    def kernel(*arrays):
        many = len(dtypes)

        def program(*refs):
            sources, refs = refs[: len(arrays)], refs[len(arrays) :]
            targets, buffers = refs[: many * len(written)], refs[many * len(written) :]
            begin = lax.axis_index("program") * wide

            def near(buffer):
                return lambda place: read(buffer, place - begin)

            for number, stage in enumerate(stages):
                # Two sets of buffers in turn: what a stage reads, the next one but one overwrites.
                now, before = (buffers[side * many :][:many] for side in (number % 2, 1 - number % 2))
                outputs = targets[many * written.index(number) :][:many] if number in written else ()

                def one_chunk(chunk, _, stage=stage, now=now, before=before, outputs=outputs, number=number):
                    first = chunk * CHUNK
                    # Past the end the last element again, so that every read is inside.
                    place = jnp.minimum(iota((CHUNK,), 0) + (begin + first), count - 1)
                    made = stage(
                        [partial(read, s) for s in sources], [near(b) for b in before] if number else [], place
                    )
                    for buffer, result in zip(now, made, strict=True):
                        buffer[pl.ds(first, CHUNK)] = result
                    for target, result in zip(outputs, made if outputs else (), strict=True):
                        target[pl.ds(begin + first, CHUNK)] = result

                lax.fori_loop(0, wide // CHUNK, one_chunk, None)
                # All four warps have written before any of them reads.
                plgpu.commit_smem()

        buffers = [plgpu.SMEM((wide,), dtype) for _ in range(2) for dtype in dtypes]
        return _launch(program, arrays, count, wide, [dtype for _ in written for dtype in dtypes], buffers)

    made = lax.platform_dependent(*flat, cuda=kernel, default=portable)
    return [tuple(made[index * len(dtypes) :][: len(dtypes)]) for index in range(len(written))]


def launch(name: str, program: Any, arrays: Any, programs: int, out_type: Any, buffers: Any = ()) -> Any:
    """Runs program(*arrays, *outputs, *buffers) in so many programs of a warpgroup each, whose axis is "program".

    name: what profilers show. buffers: each program's own.
    """
    program.__name__ = name
    return plgpu.kernel(
        program,
        out_type=out_type,
        scratch_types=buffers,
        grid=(programs,),
        grid_names=("program",),
        compiler_params=PARAMETERS,
    )(*arrays)


def _launch(program, arrays, count: int, size: int, dtypes, buffers=()) -> tuple[Num[Array, " count"], ...]:
    """One program for every `size` elements of `count`, the last one padded."""
    programs = -(-count // size)
    out = launch(
        "gathers",
        program,
        arrays,
        programs,
        [jax.ShapeDtypeStruct((programs * size,), dtype) for dtype in dtypes],
        buffers,
    )
    return tuple(array[:count] for array in out)


def entries_of(array: Num[Array, "..."]) -> Read:  # noqa: UP037
    """Reads of an array outside of kernels."""
    return lambda *places: array.at[places].get(mode="promise_in_bounds")


def iota(shape: tuple[int, ...], axis: int) -> Int32[Array, "*n"]:
    """Inside a kernel: the place of each element along an axis, in the layout that `read` takes."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WG_STRIDED(shape, vec_size=1))


def read(source: Any, *places: Int32[Array, "*n"]) -> Num[Array, "*n"]:
    """Inside a kernel: the entries of an array in global or shared memory, each thread its own."""
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
            registers[number] = vector.load(element, memory, _indices(places, number))
        signed = True if jnp.issubdtype(source.dtype, jnp.integer) else None
        return mgpu.FragmentedArray(_registers=registers, _layout=places[0].layout, _is_signed=signed)

    return load(source, *places)


def write(target: Any, values: Num[Array, "*n"], *places: Int32[Array, "*n"]) -> None:
    """Inside a kernel: puts each thread's own values to places of an array that no other thread gives another value."""
    layout = plgpu.Layout.WG_STRIDED(values.shape, vec_size=1)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *([layout] * (1 + len(places)))))
    def store(_, memory, values, *places):
        for number in np.ndindex(values.registers.shape):
            vector.store(values.registers[number], memory, _indices(places, number))

    store(target, values, *places)


def _indices(places: Sequence[mgpu.FragmentedArray], number: tuple[int, ...]) -> list[Any]:
    """One register of each axis's places, as indices of a memory reference."""
    taken = (vector.extract(p.registers[number], dynamic_position=[], static_position=[0]) for p in places)
    return [arith.index_cast(ir.IndexType.get(), place) for place in taken]
