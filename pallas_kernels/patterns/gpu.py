"""Pattern attention on Hopper: the forward kernel's schedule over tiles that patterns decide.

A producer warpgroup streams tiles of keys by TMA, two consumer warpgroups attend (`gpu.softmax`). A piece of work is
one query head and 128 queries. Masks of tiles come as words of bits, four for each query, that lie in the registers of
the threads that hold its row (`slabs`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from pallas_kernels.gpu import config
from pallas_kernels.gpu.device import unavailable
from pallas_kernels.gpu.passes import pad_heads
from pallas_kernels.gpu.pipeline import Pieces, load_vector
from pallas_kernels.gpu.scratch import HALF_TILE, Scratch, warp_specialized
from pallas_kernels.gpu.softmax import Slots, attend_tiles, normalised
from pallas_kernels.patterns.contract import Implementation, Kept, Patterns
from pallas_kernels.patterns.slabs import HALF, NEVER, TILE, WORDS, Visits, biases, visits
from pallas_kernels.patterns.whole_rows import isolate_non_finite, whole_rows
from pallas_kernels.powers_of_two import LOG2E

STAGES = 2
"""Tiles of keys in flight."""
MAX_HEAD_SIZE = 128
"""A mask is of 128 keys, and shared memory does not hold as many of wider heads."""


def of_one_document(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    patterns: Patterns,
    token: Bool[Array, "B T"],
    scale: float,
) -> Float[Array, "B T H D"]:
    """Rows that hold one document each, from their first position on; token: False where there is none."""
    queries, heads, dim = query.shape[1:]
    length = -(-queries // TILE) * TILE

    def whole(array: Array, fill: float = 0) -> Array:
        missing = [(0, 0), (0, length - queries)] + [(0, 0)] * (array.ndim - 2)
        return jnp.pad(array, missing, constant_values=fill)

    key, value, bias = isolate_non_finite(key, value, token)
    size = config.native_head_size(dim)
    key, value = (pad_heads(whole(array), size) for array in (key, value))
    seen = visits(patterns, length)
    meta = biases(patterns, seen, jnp.moveaxis(whole(bias, -jnp.inf), 1, 2))
    kv_head = jnp.arange(heads)[:, None] // (heads // key.shape[2])
    row = jnp.where(seen.columns == NEVER, 0, seen.columns)
    far_key, far_value = (array[:, row, kv_head] for array in (key, value))
    out = _attend(pad_heads(whole(query), size), key, value, far_key, far_value, meta, seen, scale)
    return jnp.where(token[..., None, None], out[:, :queries, :, :dim], 0)


def _attend(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    far_key: Float[Array, "B H V D"],
    far_value: Float[Array, "B H V D"],
    meta: Float[Array, "B H 2 R"],
    seen: Visits,
    scale: float,
) -> Float[Array, "B T H D"]:
    batch, queries, heads, dim = query.shape
    group = heads // key.shape[2]
    dtype, tiles, near = query.dtype, queries // TILE, seen.near
    pieces = Pieces(batch, heads, tiles)
    factor = scale * LOG2E

    def body(
        q_ref, k_ref, v_ref, far_k_ref, far_v_ref, meta_ref, masks_ref, back_ref, runs_ref, out_ref, *, scratch
    ):  # fmt: skip
        (q_smem, k_smem, v_smem, meta_smem, mask_smem), barriers = scratch
        k_full, v_full, meta_full, k_free, v_free, meta_free, q_full, q_free, turn = barriers
        slots = Slots(k_smem, v_smem, k_full, v_full, meta_full, k_free, v_free, meta_free, turn)
        program, thread = lax.axis_index("program"), lax.axis_index("thread")

        def consume(piece, done, item, head, tile):
            whole, _, _, masked, count = (runs_ref[head, n, tile] for n in range(5))
            buffer = 2 * lax.rem(piece, jnp.int32(2)) + thread
            q_tile = q_smem.at[buffer]
            first = tile * TILE + thread * HALF
            plgpu.barrier_wait(q_full.at[buffer])
            by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

            def slot_of(number):
                return lax.rem(done + number, jnp.int32(STAGES))

            def biased(scores, slot):
                bias = load_vector(meta_smem.at[slot, 0], by_column)
                return scores * factor + lax.broadcast_in_dim(bias, scores.shape, [1])

            def of_bits(scores, slot):
                shape = scores.shape
                column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
                words = [load_vector(mask_smem.at[slot, thread, m], by_row) for m in range(WORDS)]
                word = lax.broadcast_in_dim(words[-1], shape, [0])
                for m in range(WORDS - 2, -1, -1):
                    word = jnp.where(column < 32 * (m + 1), lax.broadcast_in_dim(words[m], shape, [0]), word)
                bit = lax.shift_right_logical(word, column & 31) & 1
                return jnp.where(bit == 1, biased(scores, slot), -jnp.inf)

            def of_columns(scores, slot):
                scores = biased(scores, slot)
                start = load_vector(meta_smem.at[slot, 1], by_column)
                position = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
                position = (position + first).astype(jnp.float32)
                return jnp.where(lax.broadcast_in_dim(start, scores.shape, [1]) <= position, scores, -jnp.inf)

            runs = ((whole, biased), (masked, of_bits), (count, of_columns))
            weighted, _, total = attend_tiles(q_tile, slots, slot_of, runs, thread)
            q_tile[...] = normalised(weighted, total).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, out_ref.at[item, pl.ds(first, HALF), head])
            # Before the outputs' memory takes other queries it need only have been read.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_free.at[buffer])
            return count

        def load(piece, done, item, head, tile):
            _, fulls, hole, masked, count = (runs_ref[head, n, tile] for n in range(5))
            kv_head = lax.div(head, jnp.int32(group))
            for part in range(2):
                buffer = 2 * lax.rem(piece, jnp.int32(2)) + part

                @pl.when(piece >= 2)
                def _until_free(buffer=buffer):
                    plgpu.barrier_wait(q_free.at[buffer])

                own = q_ref.at[item, pl.ds(tile * TILE + part * HALF, HALF), head]
                plgpu.copy_gmem_to_smem(own, q_smem.at[buffer], q_full.at[buffer])

            def bring(number, keys, values, where, mask):
                """One tile: its keys, what is added to their logits, its mask (any, where none is read), its values."""
                slot = lax.rem(done + number, jnp.int32(STAGES))
                for copies, ready, free in (
                    (((keys, k_smem),), slots.key_full, slots.key_free),
                    (
                        (
                            (meta_ref.at[item, head, :, pl.ds(where, TILE)], meta_smem),
                            (masks_ref.at[head, mask], mask_smem),
                        ),
                        slots.meta_full,
                        slots.meta_free,
                    ),
                    (((values, v_smem),), slots.value_full, slots.value_free),
                ):

                    @pl.when(done + number >= STAGES)
                    def _until_free(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    for source, target in copies:
                        plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

            @pl.loop(0, masked)
            def _tiles(number):
                place = jnp.where(number < fulls, number, number + hole)
                back = back_ref[head, jnp.minimum(place, back_ref.shape[1] - 1)]
                number_of_keys = jnp.where(tile < near, number, tile - back)
                mask = jnp.where(tile < near, tile * near + number, near * near + back)
                where = jnp.where(tile < near, number, near + number_of_keys) * TILE
                at = pl.ds(number_of_keys * TILE, TILE)
                bring(number, k_ref.at[item, at, kv_head], v_ref.at[item, at, kv_head], where, mask)

            @pl.loop(masked, count)
            def _columns(number):
                place = (number - masked) * TILE
                at = pl.ds(place, TILE)
                where = near * TILE + queries + place
                bring(number, far_k_ref.at[item, head, at], far_v_ref.at[item, head, at], where, jnp.int32(0))

            return count

        @pl.when(thread < 2)
        def _consumers():
            plgpu.set_max_registers(232, action="increase")
            pieces.for_each(program, consume)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(thread == 2)
        def _producer():
            plgpu.set_max_registers(40, action="decrease")
            pieces.for_each(program, load)

    return warp_specialized(
        "pattern_attention",
        body,
        _scratch(dim, dtype),
        out_type=jax.ShapeDtypeStruct(query.shape, dtype),
        grid=(pieces.programs,),
        grid_names=("program",),
    )(query, key, value, far_key, far_value, meta, seen.masks, seen.back, seen.runs)


def _scratch(dim: int, dtype: DTypeLike) -> Scratch:
    keys = plgpu.SMEM((STAGES, TILE, dim), dtype, transforms=HALF_TILE)
    return Scratch(
        (
            plgpu.SMEM((4, HALF, dim), dtype, transforms=HALF_TILE),
            keys,
            keys,
            plgpu.SMEM((STAGES, 2, TILE), jnp.float32),
            plgpu.SMEM((STAGES, 2, WORDS, HALF), jnp.int32),
        ),
        (
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            *(plgpu.Barrier(num_arrivals=2, num_barriers=STAGES) for _ in range(3)),
            plgpu.Barrier(num_barriers=4),
            plgpu.Barrier(num_barriers=4),
            plgpu.Barrier(num_arrivals=2),
        ),
    )


def unsupported(query: Array, key: Array, kept: Kept | None) -> str | None:
    """None for whole sequences in half precision; else what is out of range."""
    if kept is not None or query.shape[1] != key.shape[1]:
        return "it attends within whole sequences, not to a cache"
    if query.shape[3] > MAX_HEAD_SIZE:
        return f"it takes head sizes up to {MAX_HEAD_SIZE}, not {query.shape[3]}"
    return config.unsupported(query.dtype, query.shape[3])


MOSAIC_GPU = Implementation("mosaic_gpu", whole_rows(of_one_document), unavailable, unsupported)
