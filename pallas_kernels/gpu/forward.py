"""Forward pass on Hopper: a producer warpgroup streams key tiles by TMA, two consumer warpgroups attend.

A piece of work is one query head and `block_q` queries. What it visits are runs of key tiles (`tiles.query_runs`):
those that every one of its queries sees whole, then those that need the interval compare; the consumers' part is in
`softmax`.

With a window a piece is only some ten key tiles long, so there is one program a multiprocessor, which takes pieces in
turn: the producer loads the next one's queries and keys while the last one's outputs are still being written.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.gpu.config import HopperBlockSizes, multiprocessors
from pallas_kernels.gpu.pipeline import HALF_TILE, load_vector, produce
from pallas_kernels.gpu.softmax import Slots, attend_tiles, normalised
from pallas_kernels.gpu.tiles import LOG2E, Rows


def attend(
    query: Float[Array, "B T H D"],
    rows: Rows,
    runs: Int32[Array, "B K 4 tiles"],
    *,
    scale: float,
    sizes: HopperBlockSizes,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"], Float[Array, "B H T"]]:
    """out, and the softmax's shift (in base 2) and total. T is a multiple of block_q, D of 64."""
    batch, queries, heads, dim = query.shape
    group = heads // rows.key.shape[2]
    block_q, block_k, stages = sizes.block_q, sizes.block_k, sizes.stages
    half = block_q // 2
    dtype = query.dtype
    tiles, tiles_per_epoch = queries // block_q, rows.epoch_size // block_q
    pieces = batch * tiles * heads
    programs = min(pieces, multiprocessors())
    factor = scale * LOG2E

    def piece_of(number):
        """(item of the batch, head, tile): heads that share keys together, the short first tiles last."""
        number, head = lax.div(number, jnp.int32(heads)), lax.rem(number, jnp.int32(heads))
        return lax.rem(number, jnp.int32(batch)), head, tiles - 1 - lax.div(number, jnp.int32(batch))

    def body(q_ref, k_ref, v_ref, meta_ref, runs_ref, out_ref, shift_ref, total_ref, *, scratch):
        (q_smem, k_smem, v_smem, meta_smem, stat_smem), barriers = scratch
        k_full, v_full, meta_full, k_free, v_free, meta_free, q_full, q_free, turn = barriers
        slots = Slots(k_smem, v_smem, k_full, v_full, meta_full, k_free, v_free, meta_free, turn)
        program, thread = lax.axis_index("program"), lax.axis_index("thread")

        def for_each_piece(visit):
            """visit(number among this program's pieces, key tiles of the earlier ones, piece) -> its key tiles."""

            def run(number, done):
                item, head, tile = piece_of(program + number * programs)
                return done + visit(number, done, item, head, tile)

            lax.fori_loop(0, lax.div(pieces - program + programs - 1, jnp.int32(programs)), run, jnp.int32(0))

        def runs_of(item, head, tile):
            kv_head = lax.div(head, jnp.int32(group))
            return [kv_head, *(runs_ref[item, kv_head, n, tile] for n in range(4))]

        def consume(piece, done, item, head, tile):
            _, whole, _, _, count = runs_of(item, head, tile)
            buffer = 2 * lax.rem(piece, jnp.int32(2)) + thread
            q_tile = q_smem.at[buffer]
            first = tile * block_q + thread * half
            plgpu.barrier_wait(q_full.at[buffer])
            by_column = plgpu.Layout.WGMMA.reduce(0)
            within = lax.rem(tile, jnp.int32(tiles_per_epoch)) * block_q + thread * half

            def slot_of(number):
                return lax.rem(done + number, jnp.int32(stages))

            def biased(scores, slot):
                bias = load_vector(meta_smem.at[slot, 0], by_column)
                return scores * factor + lax.broadcast_in_dim(bias, scores.shape, [1])

            def masked(scores, slot):
                scores = biased(scores, slot)
                start = load_vector(meta_smem.at[slot, 1], by_column)
                end = load_vector(meta_smem.at[slot, 2], by_column)
                position = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
                position = (position + within).astype(jnp.float32)
                sees = (lax.broadcast_in_dim(start, scores.shape, [1]) <= position) & (
                    position < lax.broadcast_in_dim(end, scores.shape, [1])
                )
                return jnp.where(sees, scores, -jnp.inf)

            runs = ((whole, biased), (count, masked))
            weighted, shift, total = attend_tiles(q_tile, slots, slot_of, runs, thread)
            weighted = normalised(weighted, total)
            q_tile[...] = weighted.astype(dtype)
            stat_smem.at[thread, 0][...] = shift
            stat_smem.at[thread, 1][...] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, out_ref.at[item, pl.ds(first, half), head])
            plgpu.copy_smem_to_gmem(stat_smem.at[thread, 0], shift_ref.at[item, head, pl.ds(first, half)])
            plgpu.copy_smem_to_gmem(stat_smem.at[thread, 1], total_ref.at[item, head, pl.ds(first, half)])
            # Before the outputs' memory takes other queries it need only have been read.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_free.at[buffer])
            return count

        def load(piece, done, item, head, tile):
            kv_head, _, carried, skipped, count = runs_of(item, head, tile)
            base = lax.div(tile, jnp.int32(tiles_per_epoch)) * rows.capacity
            for part in range(2):
                buffer = 2 * lax.rem(piece, jnp.int32(2)) + part

                @pl.when(piece >= 2)
                def _until_free(buffer=buffer):
                    plgpu.barrier_wait(q_free.at[buffer])

                own = q_ref.at[item, pl.ds(tile * block_q + part * half, half), head]
                plgpu.copy_gmem_to_smem(own, q_smem.at[buffer], q_full.at[buffer])

            def copies(step):
                at = pl.ds(base + jnp.where(step < carried, step, step + skipped) * block_k, block_k)
                return (
                    (k_ref.at[item, at, kv_head], k_smem, slots.key_full, slots.key_free),
                    (meta_ref.at[item, kv_head, :, at], meta_smem, slots.meta_full, slots.meta_free),
                    (v_ref.at[item, at, kv_head], v_smem, slots.value_full, slots.value_free),
                )

            produce(count, stages, copies, done)
            return count

        @pl.when(thread < 2)
        def _consumers():
            plgpu.set_max_registers(232, action="increase")
            for_each_piece(consume)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(thread == 2)
        def _producer():
            plgpu.set_max_registers(40, action="decrease")
            for_each_piece(load)

    def entry(*refs):
        pl.run_scoped(
            lambda *scratch: body(*refs, scratch=scratch),
            (
                plgpu.SMEM((4, half, dim), dtype, transforms=HALF_TILE),
                plgpu.SMEM((stages, block_k, dim), dtype, transforms=HALF_TILE),
                plgpu.SMEM((stages, block_k, dim), dtype, transforms=HALF_TILE),
                plgpu.SMEM((stages, 3, block_k), jnp.float32),
                plgpu.SMEM((2, 2, half), jnp.float32),
            ),
            (
                *(plgpu.Barrier(num_barriers=stages) for _ in range(3)),
                *(plgpu.Barrier(num_arrivals=2, num_barriers=stages) for _ in range(3)),
                plgpu.Barrier(num_barriers=4),
                plgpu.Barrier(num_barriers=4),
                plgpu.Barrier(num_arrivals=2),
            ),
            collective_axes="thread",
        )

    stat = jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)
    return plgpu.kernel(
        entry,
        out_type=[jax.ShapeDtypeStruct(query.shape, dtype), stat, stat],
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="thread",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(query, rows.key, rows.value, rows.meta, runs)
