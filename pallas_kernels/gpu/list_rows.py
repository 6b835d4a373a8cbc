"""Keys and values of all lists, copied row by row, and which of them are not finite: one kernel.

XLA's gather writes every slot, and knows nothing of slots that stay empty: of a random gate's lists, two fifths.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.gpu.gathers import WARPGROUP, iota, launch, read
from pallas_kernels.gpu.tree import split

WIDTH = 8
"""Numbers that a thread copies at once: 16 bytes."""
VECTORS = 8 * WARPGROUP
"""So many at once a program and array: eight for each thread, whose reads overlap."""
PART = 64
"""What head sizes are multiples of, so that the threads of a row, or of each of its parts, are neighbours in a warp."""
LARGEST = 2.0**100
"""Keys and values of this size count as not finite: their products may be infinite, and 0, the weight of a hidden pair,
times infinity is NaN."""
SLOTS = VECTORS * WIDTH // PART
"""What slots are multiples of, so that every program is full."""


def listed_rows(
    key: Float[Array, "B S K D"], value: Float[Array, "B S K D"], index: Int32[Array, "B K R"], granule: int
) -> tuple[Float[Array, "B R K D"], Float[Array, "B R K D"], Int32[Array, "B R K"]]:
    """Rows index of keys and values, with 0 where `is_number` does not hold, and what is not 0 if a row had such.

    index >= S: an empty slot, whose row is 0. On a GPU nothing is written where `granule` slots are empty from the
    first on, so there rows are whatever was in memory; no kernel visits them. Half precision, D a multiple of PART.
    """
    if key.shape[3] % PART or index.shape[2] % granule or granule % SLOTS:
        raise ValueError(
            f"head sizes must be multiples of {PART}, slots of the granule and that of {SLOTS}; "
            f"got {key.shape[3]}, {index.shape[2]} and {granule}"
        )
    if index.size * key.shape[3] // WIDTH > jnp.iinfo(jnp.int32).max:
        # More vectors than threads can count.
        return _portable(key, value, index)
    kernel = functools.partial(_kernel, granule=granule)
    return lax.platform_dependent(key, value, index, cuda=kernel, default=_portable)


def is_number(array: Float[Array, "*n"]) -> Bool[Array, "*n"]:
    """Whether numbers of keys and values are finite, and below LARGEST."""
    return jnp.abs(array) < LARGEST if float(jnp.finfo(array.dtype).max) > LARGEST else jnp.isfinite(array)


def _portable(key, value, index):
    length = key.shape[1]
    own = jnp.moveaxis(index, 1, 2)[..., None]
    rows = [jnp.take_along_axis(array, jnp.minimum(own, length - 1), axis=1) for array in (key, value)]
    sound = [is_number(array) for array in rows]
    rows = [jnp.where((own < length) & there, array, 0) for array, there in zip(rows, sound, strict=True)]
    broken = ~(sound[0] & sound[1]).all(-1)
    return *rows, ((own[..., 0] < length) & broken).astype(jnp.int32)


def _kernel(key, value, index, *, granule: int):
    batch, length, heads, dim = key.shape
    slots = index.shape[2]
    per_row = dim // WIDTH
    # Neighbours of one warp that all copy the same row.
    team = math.gcd(per_row, 32)
    total = batch * slots * heads * per_row

    def program(key_ref, value_ref, index_ref, key_out, value_out, marks_out):
        vector_number = iota((VECTORS,), 0) + lax.axis_index("program") * VECTORS
        target, within = split(vector_number, per_row)
        rest, head = split(target, heads)
        item, slot = split(rest, slots)
        line = (item * heads + head) * slots
        own, first = read(index_ref, line + slot), read(index_ref, line + slot - lax.rem(slot, jnp.int32(granule)))
        source = (item * length + jnp.minimum(own, length - 1)) * heads + head
        arrays = (key_ref, value_ref), (key_out, value_out)
        places = source, target, within * WIDTH, lax.div(vector_number, jnp.int32(team))
        conditions = (own < length).astype(jnp.int32), (first < length).astype(jnp.int32)
        _copy(*arrays, marks_out, *places, *conditions, team=team)

    rows = jax.ShapeDtypeStruct((batch * slots * heads, dim), key.dtype)
    out_type = [rows, rows, jax.ShapeDtypeStruct((total // team,), jnp.int32)]
    operands = (key.reshape(-1, dim), value.reshape(-1, dim), index.reshape(-1))
    *copied, marks = launch("list_rows", program, operands, total // VECTORS, out_type)
    copied = [array.reshape(batch, slots, heads, dim) for array in copied]
    if per_row > team:
        marks = (marks.reshape(-1, per_row // team) != 0).any(-1).astype(jnp.int32)
    return *copied, marks.reshape(batch, slots, heads)


def _copy(sources: Any, targets: Any, marks: Any, *places: Any, team: int) -> None:
    """Each thread copies its vectors of both arrays from rows to rows, and marks those that are not all finite.

    places: rows to read and to write, column, place of the mark, whether the slot holds a key, whether to write.
    """
    layout = plgpu.Layout.WG_STRIDED(places[0].shape, vec_size=1)
    half = sources[0].dtype
    # Exponents from that of LARGEST on reach the sign when what is missing is added: 2^100 has 227 of 255 in bfloat16,
    # and of float16 only what is not finite has all bits set.
    exponent, missing = (0x7F80, (256 - 227) << 7) if half == jnp.bfloat16 else (0x7C00, 0x0400)

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 5, *[layout] * len(places)))
    def copy(_, key, value, key_out, value_out, marks, *places):
        word = ir.IntegerType.get_signless(32)
        words = ir.VectorType.get((WIDTH // 2,), word)
        numbers = ir.VectorType.get((WIDTH,), ir.MemRefType(key.type).element_type)

        def splat(pattern: int):
            number = pattern - (1 << 32) if pattern >> 31 else pattern
            return vector.broadcast(words, mgpu_utils.c(number, word))

        def both(pattern: int):
            return splat(pattern << 16 | pattern)

        def at(number, which):
            return vector.extract(places[which].registers[number], dynamic_position=[], static_position=[0])

        def to_index(scalar):
            return arith.index_cast(ir.IndexType.get(), scalar)

        def is_set(scalar):
            return arith.cmpi(arith.CmpIPredicate.ne, scalar, mgpu_utils.c(0, word))

        def clean(array, filled):
            """The words of a vector with zeros for what is not finite, and which halves those were, in sign bits."""
            array = arith.select(filled, vector.bitcast(words, array), splat(0))
            over = arith.andi(arith.addi(arith.andi(array, both(exponent)), both(missing)), both(0x8000))
            broken = arith.muli(arith.shrui(over, splat(15)), splat(0xFFFF))
            return arith.andi(array, arith.xori(broken, splat(0xFFFFFFFF))), over

        numbering = list(np.ndindex(places[0].registers.shape))
        loaded = []
        for number in numbering:
            row, column = (to_index(at(number, which)) for which in (0, 2))
            loaded.append([vector.load(numbers, array, [row, column]) for array in (key, value)])
        for number, pair in zip(numbering, loaded, strict=True):
            (key_words, key_over), (value_words, value_over) = (clean(array, is_set(at(number, 4))) for array in pair)
            over = arith.ori(key_over, value_over)
            mark = mgpu_utils.c(0, word)
            for lane in range(WIDTH // 2):
                mark = arith.ori(mark, vector.extract(over, dynamic_position=[], static_position=[lane]))
            for bit in range(team.bit_length() - 1):
                mark = arith.ori(mark, mgpu_utils.shfl_bfly(mark, 1 << bit))
            with mgpu_utils.when(is_set(at(number, 5))):
                place = [to_index(at(number, which)) for which in (1, 2)]
                vector.store(vector.bitcast(numbers, key_words), key_out, place)
                vector.store(vector.bitcast(numbers, value_words), value_out, place)
                marked = vector.broadcast(ir.VectorType.get((1,), word), mark)
                vector.store(marked, marks, [to_index(at(number, 3))])

    copy(*sources, *targets, marks, *places)
