"""Forward pass on Hopper: a producer warpgroup streams key tiles by TMA, two consumer warpgroups attend.

A piece of work is one query head and 128 queries. What it visits are runs of key tiles (`tiles.query_runs`):
those that every one of its queries sees whole, then those whose keys may have ended, then those whose keys may begin
later; the consumers' part is in `softmax`.

With a window a piece is only some ten key tiles long, so there is one program a multiprocessor, which takes pieces in
turn: the producer loads the next one's queries and keys while the last one's outputs are still being written. Where
shared memory holds the queries of one piece only (head size 256), the next one's first keys come before its queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.gpu.masks import BIAS, of_keys, visible
from pallas_kernels.gpu.pipeline import Pieces, produce
from pallas_kernels.gpu.scratch import HALF_TILE, PassSizes, Scratch, warp_specialized
from pallas_kernels.gpu.softmax import Slots, attend_tiles, normalised
from pallas_kernels.gpu.tiles import BLOCK_Q, Rows, check_key_tile, visits_of_queries
from pallas_kernels.powers_of_two import LOG2E

HALF = BLOCK_Q // 2


@dataclass(frozen=True, kw_only=True)
class ForwardSizes(PassSizes):
    """Tiles of block_k keys; query_buffers: pieces whose queries are in shared memory."""

    block_k: int = 128
    query_buffers: int = 2

    def check(self) -> None:
        check_key_tile(self.block_k)
        if self.query_buffers > 2:
            raise ValueError(f"query_buffers must be 1 or 2, got {self.query_buffers}")

    def scratch(self, dtype: DTypeLike) -> Scratch:
        keys = plgpu.SMEM((self.stages, self.block_k, self.head_dim), dtype, transforms=HALF_TILE)
        buffers = 2 * self.query_buffers
        return Scratch(
            (
                plgpu.SMEM((buffers, HALF, self.head_dim), dtype, transforms=HALF_TILE),
                keys,
                keys,
                plgpu.SMEM((self.stages, 3, self.block_k), jnp.float32),
                plgpu.SMEM((2, 2, HALF), jnp.float32),
            ),
            (
                *(plgpu.Barrier(num_barriers=self.stages) for _ in range(3)),
                *(plgpu.Barrier(num_arrivals=2, num_barriers=self.stages) for _ in range(3)),
                plgpu.Barrier(num_barriers=buffers),
                plgpu.Barrier(num_barriers=buffers),
                plgpu.Barrier(num_arrivals=2),
            ),
        )


def attend(
    query: Float[Array, "B T H D"],
    rows: Rows,
    runs: Int32[Array, "B K 3 _"],
    *,
    scale: float,
    sizes: ForwardSizes,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"], Float[Array, "B H T"]]:
    """out, and the softmax's shift (in base 2) and total. T is a multiple of BLOCK_Q, D is sizes.head_dim."""
    batch, queries, heads, _ = query.shape
    group = heads // rows.key.shape[2]
    block_k, stages, buffers = sizes.block_k, sizes.stages, sizes.query_buffers
    dtype = query.dtype
    tiles, tiles_per_epoch = queries // BLOCK_Q, rows.epoch_size // BLOCK_Q
    pieces = Pieces(batch, heads, tiles)
    factor = scale * LOG2E

    def body(q_ref, k_ref, v_ref, meta_ref, runs_ref, out_ref, shift_ref, total_ref, *, scratch):
        (q_smem, k_smem, v_smem, meta_smem, stat_smem), barriers = scratch
        k_full, v_full, meta_full, k_free, v_free, meta_free, q_full, q_free, turn = barriers
        slots = Slots(k_smem, v_smem, k_full, v_full, meta_full, k_free, v_free, meta_free, turn)
        program, thread = lax.axis_index("program"), lax.axis_index("thread")

        def runs_of(item, head, tile):
            kv_head = lax.div(head, jnp.int32(group))
            numbers = (runs_ref[item, kv_head, n, tile] for n in range(3))
            return [kv_head, *visits_of_queries(rows, block_k, numbers)]

        def consume(piece, done, item, head, tile):
            _, whole, carried, _, count = runs_of(item, head, tile)
            begun = rows.begun_tiles(block_k, whole, carried, count)
            buffer = 2 * lax.rem(piece, jnp.int32(buffers)) + thread
            q_tile = q_smem.at[buffer]
            first = tile * BLOCK_Q + thread * HALF
            plgpu.barrier_wait(q_full.at[buffer])
            within = lax.rem(tile, jnp.int32(tiles_per_epoch)) * BLOCK_Q + thread * HALF

            def slot_of(number):
                return lax.rem(done + number, jnp.int32(stages))

            def biased(scores, slot):
                return scores * factor + of_keys(meta_smem.at[slot], BIAS, scores.shape, axis=1)

            def masked(scores, slot, begun):
                scores = biased(scores, slot)
                sees = visible(meta_smem.at[slot], scores.shape, within, axis=1, begun=begun)
                return jnp.where(sees, scores, -jnp.inf)

            runs = ((whole, biased), (begun, partial(masked, begun=True)), (count, partial(masked, begun=False)))
            weighted, shift, total = attend_tiles(q_tile, slots, slot_of, runs, thread)
            weighted = normalised(weighted, total)
            q_tile[...] = weighted.astype(dtype)
            stat_smem.at[thread, 0][...] = shift
            stat_smem.at[thread, 1][...] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, out_ref.at[item, pl.ds(first, HALF), head])
            plgpu.copy_smem_to_gmem(stat_smem.at[thread, 0], shift_ref.at[item, head, pl.ds(first, HALF)])
            plgpu.copy_smem_to_gmem(stat_smem.at[thread, 1], total_ref.at[item, head, pl.ds(first, HALF)])
            # Before the outputs' memory takes other queries it need only have been read.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_free.at[buffer])
            return count

        def load(piece, done, item, head, tile):
            kv_head, _, carried, skipped, count = runs_of(item, head, tile)
            base = lax.div(tile, jnp.int32(tiles_per_epoch)) * rows.capacity

            def copies(step):
                at = pl.ds(base + jnp.where(step < carried, step, step + skipped) * block_k, block_k)
                return (
                    (k_ref.at[item, at, kv_head], k_smem, slots.key_full, slots.key_free),
                    (meta_ref.at[item, kv_head, :, at], meta_smem, slots.meta_full, slots.meta_free),
                    (v_ref.at[item, at, kv_head], v_smem, slots.value_full, slots.value_free),
                )

            early = jnp.minimum(count, stages) if buffers == 1 else 0
            if buffers == 1:
                produce(0, early, copies, done)
            for part in range(2):
                buffer = 2 * lax.rem(piece, jnp.int32(buffers)) + part

                @pl.when(piece >= buffers)
                def _until_free(buffer=buffer):
                    plgpu.barrier_wait(q_free.at[buffer])

                own = q_ref.at[item, pl.ds(tile * BLOCK_Q + part * HALF, HALF), head]
                plgpu.copy_gmem_to_smem(own, q_smem.at[buffer], q_full.at[buffer])
            produce(early, count, copies, done)
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

    stat = jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)
    return warp_specialized(
        "attention_forward",
        body,
        sizes.scratch(dtype),
        out_type=[jax.ShapeDtypeStruct(query.shape, dtype), stat, stat],
        grid=(pieces.programs,),
        grid_names=("program",),
    )(query, rows.key, rows.value, rows.meta, runs)
