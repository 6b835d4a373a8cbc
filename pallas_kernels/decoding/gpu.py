"""One step of decoding on Hopper as one kernel: evict, insert, attend.

The slots of a row and kv head are cut into parts, so that few rows fill the GPU too. Every part finds for itself which
slot the new key takes, from all of the head's gates and positions, which are small; it attends to its own keys, in
tiles of 128 that TMA brings two at a time, and the part that owns the slot puts the new key into its tile and into the
cache, in place. The query's heads of one kv head are rows of one warpgroup product, the other rows are zeros: the step
waits for memory, not for products. What the parts found is put together by XLA.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.decoding.contract import EMPTY, Implementation, Slots
from pallas_kernels.gpu.device import multiprocessors, unavailable
from pallas_kernels.gpu.pipeline import load_as, load_vector
from pallas_kernels.gpu.scratch import HALF_TILE, SINGLE_TILE
from pallas_kernels.gpu.softmax import UNSEEN
from pallas_kernels.order import TAKEN, order_of, sortable
from pallas_kernels.powers_of_two import LOG2E, base_2

ROWS = 64
"""Rows of a warpgroup's product: query heads of one kv head, at most."""
TILE = 128
"""Slots of a tile."""
PIECE = 2048
"""Slots whose gates are compared at once."""
HEAD_SIZES = (64, 128)
NEVER = jnp.iinfo(jnp.int32).max
"""Above every position and every slot."""


def parts_of(rows: int, slots: int) -> int:
    """Into how many parts the slots of a row and kv head are cut: two programs a multiprocessor, or a tile each."""
    tiles = slots // TILE
    wanted = min(tiles, -(-2 * multiprocessors() // rows))
    # Whole tiles, as many in each part.
    return next(parts for parts in range(wanted, tiles + 1) if tiles % parts == 0)


def step(query, key, value, gate, position, slots: Slots, *, windows, scale):
    """`contract.Step`."""
    batch, heads, dim = query.shape
    kv_heads, held = slots.gate.shape[1:]
    group = heads // kv_heads
    kept_rows = -(-group // 8) * 8
    parts = parts_of(batch * kv_heads, held)
    tiles = held // TILE // parts
    factor = scale * LOG2E
    dtype = slots.keys.dtype
    grouped = jnp.pad(query.reshape(batch, kv_heads, group, dim), ((0, 0), (0, 0), (0, ROWS - group), (0, 0)))
    gate = gate.astype(slots.gate.dtype)
    rank = order_of(gate)
    # One window for all heads is a number of the program.
    limits = [] if len(set(windows)) == 1 else [jnp.asarray(windows, jnp.int32)]
    pieces = [(at, min(PIECE, held - at)) for at in range(0, held, PIECE)]

    def body(refs, scratch):
        q_ref, key_ref, value_ref, gate_new, rank_new, place_new, *limit = refs[: 6 + len(limits)]
        gate_ref, place_ref, keys, values, out_ref, stat_ref, gate_out, place_out = refs[6 + len(limits) :]
        q_smem, k_smem, v_smem, fresh_smem, out_smem, stat_smem, arrived, once = scratch
        part, head, row = (lax.axis_index(name) for name in ("part", "head", "row"))
        first = part * (tiles * TILE)

        def fetch(tile):
            at = pl.ds(first + tile * TILE, TILE)
            buffer = lax.rem(tile, jnp.int32(2))
            plgpu.copy_gmem_to_smem(keys.at[row, head, at], k_smem.at[buffer], arrived.at[2 * buffer])
            plgpu.copy_gmem_to_smem(values.at[row, head, at], v_smem.at[buffer], arrived.at[2 * buffer + 1])

        plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_smem, once.at[0])
        for n, fresh in enumerate((key_ref, value_ref)):
            plgpu.copy_gmem_to_smem(fresh.at[row, head], fresh_smem.at[n], once.at[1 + n])
        for tile in range(min(2, tiles)):
            fetch(jnp.int32(tile))

        def line(source, at, size):
            return load_as(source.at[row, head, pl.ds(at, size)], plgpu.Layout.WG_STRIDED((size,), vec_size=1))

        def index(at, size):
            layout = plgpu.Layout.WG_STRIDED((size,), vec_size=1)
            return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout) + at

        def ranks(at, size):
            usable = index(at, size) < (limit[0][head] if limit else windows[0])
            return jnp.where(usable, sortable(line(gate_ref, at, size)), TAKEN)

        def least_of(found):
            least = jnp.int32(NEVER)
            for at, size in pieces:
                least = jnp.minimum(least, found(at, size).min())
            return least

        least = least_of(ranks)
        oldest = least_of(lambda at, size: jnp.where(ranks(at, size) == least, line(place_ref, at, size), NEVER))
        slot = least_of(
            lambda at, size: jnp.where(
                (ranks(at, size) == least) & (line(place_ref, at, size) == oldest), index(at, size), NEVER
            )
        )
        slot = jnp.where(rank_new[row, head] >= least, slot, -1)
        gate_here, place_here = gate_new[row, head], place_new[row]
        for n in range(3):
            plgpu.barrier_wait(once.at[n])
        by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

        def insert(tile, smem, which):
            """The new row in the tile that holds its slot."""
            old = load_as(smem, plgpu.Layout.WGMMA)
            new = load_vector(fresh_smem.at[which], by_column)
            own = plgpu.broadcasted_iota(jnp.int32, old.shape, 0, layout=plgpu.Layout.WGMMA)
            here = own + (first + tile * TILE) == slot
            smem[...] = jnp.where(here, lax.broadcast_in_dim(new, old.shape, [1]), old)

        def visit(tile, carry):
            weighted, shift, total = carry
            at = first + tile * TILE
            buffer = lax.rem(tile, jnp.int32(2))
            for n in range(2):
                plgpu.barrier_wait(arrived.at[2 * buffer + n])

            @pl.when((slot >= at) & (slot < at + TILE))
            def _insert():
                insert(tile, k_smem.at[buffer], 0)
                insert(tile, v_smem.at[buffer], 1)
                plgpu.commit_smem()

            # The head's gates and positions after the step.
            place, own = line(place_ref, at, TILE), index(at, TILE)
            gate_out[row, head, pl.ds(at, TILE)] = jnp.where(own == slot, gate_here, line(gate_ref, at, TILE))
            place_out[row, head, pl.ds(at, TILE)] = jnp.where(own == slot, place_here, place)

            def multiply(acc):
                plgpu.wgmma(acc, q_smem, k_smem.at[buffer].transpose((1, 0)))
                return acc[...]

            scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, TILE), jnp.float32))
            shape = scores.shape
            gates = base_2(load_vector(gate_ref.at[row, head, pl.ds(at, TILE)], by_column))
            bias = lax.broadcast_in_dim(gates, shape, [1])
            place = lax.broadcast_in_dim(load_vector(place_ref.at[row, head, pl.ds(at, TILE)], by_column), shape, [1])
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + at
            bias = jnp.where(column == slot, base_2(gate_here), bias)
            place = jnp.where(column == slot, place_here, place)
            scores = jnp.where(place != EMPTY, scores * factor + bias, -jnp.inf)
            new = jnp.maximum(shift, scores.max(axis=1))
            rescale = jnp.exp2(shift - new)
            weights = jnp.exp2(scores - lax.broadcast_in_dim(new, shape, [0]))
            weighted = weighted * lax.broadcast_in_dim(rescale, weighted.shape, [0])
            total = total * rescale + weights.sum(axis=1)
            low = weights.astype(dtype)

            def add(acc):
                plgpu.wgmma(acc, low, v_smem.at[buffer])

            weighted = pl.run_state(add)(plgpu.ACC.init(weighted))

            @pl.when(tile + 2 < tiles)
            def _next():
                # All four warps have read the tile.
                plgpu.commit_smem()
                fetch(tile + 2)

            return weighted, new, total

        carry = (
            plgpu.layout_cast(jnp.full((ROWS, dim), 0, jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.full((ROWS,), UNSEEN, jnp.float32), by_row),
            plgpu.layout_cast(jnp.full((ROWS,), 0, jnp.float32), by_row),
        )
        weighted, shift, total = lax.fori_loop(0, tiles, visit, carry)
        out_smem[...] = weighted
        stat_smem.at[0][...] = shift
        stat_smem.at[1][...] = total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, kept_rows)], out_ref.at[row, head, part])
        plgpu.copy_smem_to_gmem(stat_smem, stat_ref.at[row, head, part])

        @pl.when((slot >= first) & (slot < first + tiles * TILE))
        def _keep():
            plgpu.copy_smem_to_gmem(fresh_smem.at[0], keys.at[row, head, slot])
            plgpu.copy_smem_to_gmem(fresh_smem.at[1], values.at[row, head, slot])

        plgpu.wait_smem_to_gmem(0)

    scratch = (
        plgpu.SMEM((ROWS, dim), dtype, transforms=HALF_TILE),
        plgpu.SMEM((2, TILE, dim), dtype, transforms=HALF_TILE),
        plgpu.SMEM((2, TILE, dim), dtype, transforms=HALF_TILE),
        plgpu.SMEM((2, dim), dtype),
        plgpu.SMEM((ROWS, dim), jnp.float32, transforms=SINGLE_TILE),
        plgpu.SMEM((2, ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=4),
        plgpu.Barrier(num_barriers=3),
    )

    def entry(*refs):
        pl.run_scoped(lambda *allocated: body(refs, allocated), *scratch)

    # XLA takes slices (of a model's cache, say), and the places where results go in turn, into one fusion with the
    # kernel; inside of it nothing knows that the kernel changes an operand in place, and it would read keys that nobody
    # has written. Behind these barriers none of its arrays is a slice.
    operands = (grouped, key.astype(dtype), value.astype(dtype), gate, rank, position, *limits)
    operands, slots = jax.lax.optimization_barrier((operands, slots))
    keys, values = jax.new_ref(slots.keys), jax.new_ref(slots.values)
    out, stats, gate_after, place_after = run(
        entry,
        [
            jax.ShapeDtypeStruct((batch, kv_heads, parts, kept_rows, dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, parts, 2, ROWS), jnp.float32),
            jax.ShapeDtypeStruct(slots.gate.shape, jnp.float32),
            jax.ShapeDtypeStruct(slots.position.shape, jnp.int32),
        ],
        {"part": parts, "head": kv_heads, "row": batch},
    )(*operands, slots.gate, slots.position, keys, values)
    kept = Slots(jax.freeze(keys), jax.freeze(values), gate_after, place_after)
    out, stats, after = jax.lax.optimization_barrier((out, stats, kept))
    shift, total = stats[:, :, :, 0, :group], stats[:, :, :, 1, :group]
    share = jnp.exp2(shift - shift.max(axis=2, keepdims=True))
    total = (share * total).sum(axis=2)
    weighted = (share[..., None] * out[:, :, :, :group]).sum(axis=2)
    result = weighted / jnp.where(total == 0, 1, total)[..., None]
    return result.reshape(batch, heads, dim).astype(query.dtype), after


def run(body: Any, out_type: Any, grid: dict[str, int]) -> Any:
    """The kernel. Arguments that are references are changed in place, which `plgpu.kernel` does not promise."""
    mesh = plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid))
    parameters = plgpu.CompilerParams(approx_math=True)
    return pl.kernel(body, out_type=out_type, mesh=mesh, compiler_params=parameters, name="decode_step")


def unsupported(query: Array, slots: Slots) -> str | None:
    """None for half precision, head sizes 64 and 128, and slots in whole tiles; else what is out of range."""
    if query.dtype != slots.keys.dtype or not _suits(query.shape[2], query.dtype):
        return (
            f"it takes bfloat16 or float16 and head sizes {' and '.join(map(str, HEAD_SIZES))}, "
            f"not {query.dtype} with {slots.keys.dtype} and {query.shape[2]}"
        )
    if slots.gate.shape[2] % TILE:
        return f"it takes slots in multiples of {TILE}, not {slots.gate.shape[2]}"
    if query.shape[1] // slots.gate.shape[1] > ROWS:
        return f"it takes up to {ROWS} query heads for a kv head, not {query.shape[1] // slots.gate.shape[1]}"
    return None


def granule(head_dim: int, dtype: DTypeLike) -> int:
    """`contract.Implementation.granule`: slots come in tiles."""
    return TILE if _suits(head_dim, dtype) else 1


def _suits(head_dim: int, dtype: DTypeLike) -> bool:
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_dim in HEAD_SIZES


def limits() -> list[str]:
    """`contract.Implementation.limits`."""
    sizes = " and ".join(map(str, HEAD_SIZES))
    return [f"steps of decoding in float32 or float64, or of head sizes other than {sizes}, run on: xla"]


MOSAIC_GPU = Implementation("mosaic_gpu", step, unavailable, unsupported, granule, limits)
