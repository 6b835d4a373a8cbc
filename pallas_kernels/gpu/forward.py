"""Forward pass on Hopper: a producer warpgroup streams key tiles by TMA, two consumer warpgroups attend.

A piece of work is one query head and `block_q` queries. What it visits are runs of key tiles (`tiles.query_runs`):
those that every one of its queries sees whole, then those that need the interval compare. The two consumers take
half of the queries each and alternate on the matrix unit: while one multiplies, the other does its softmax (the
schedule of FlashAttention-3, arXiv 2407.08608).

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
from pallas_kernels.gpu.tiles import LOG2E, Rows

# Where nothing has been seen yet: finite, so that differences of it are 0 and not NaN.
NOTHING = -1e30


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
        k_full, v_full, meta_full, q_full, k_free, v_free, meta_free, q_free, turn = barriers
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
            by_row = plgpu.Layout.WGMMA.reduce(1)
            by_column = plgpu.Layout.WGMMA.reduce(0)
            shift = plgpu.layout_cast(jnp.full((half,), NOTHING, jnp.float32), by_row)
            total = plgpu.layout_cast(jnp.full((half,), 0, jnp.float32), by_row)
            weighted = plgpu.layout_cast(jnp.full((half, dim), 0, jnp.float32), plgpu.Layout.WGMMA)
            within = lax.rem(tile, jnp.int32(tiles_per_epoch)) * block_q + thread * half

            def take_turn():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def slot_of(number):
                return lax.rem(done + number, jnp.int32(stages))

            @pl.when(count > 0)
            def _first_keys():
                plgpu.barrier_wait(k_full.at[slot_of(0)])

            pl.when(thread == 1)(take_turn)

            def step(number, carry, masked):
                weighted, shift, total = carry
                slot = slot_of(number)

                def scores_of(acc):
                    plgpu.wgmma(acc, q_tile, k_smem.at[slot].transpose((1, 0)))
                    take_turn()
                    return acc[...]

                scores = pl.run_scoped(scores_of, plgpu.ACC((half, block_k), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                plgpu.barrier_wait(meta_full.at[slot])
                bias = load_vector(meta_smem.at[slot, 0], by_column)
                scores = scores * factor + lax.broadcast_in_dim(bias, scores.shape, [1])
                if masked:
                    start = load_vector(meta_smem.at[slot, 1], by_column)
                    end = load_vector(meta_smem.at[slot, 2], by_column)
                    position = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
                    position = (position + within).astype(jnp.float32)
                    sees = (lax.broadcast_in_dim(start, scores.shape, [1]) <= position) & (
                        position < lax.broadcast_in_dim(end, scores.shape, [1])
                    )
                    scores = jnp.where(sees, scores, -jnp.inf)
                plgpu.barrier_arrive(meta_free.at[slot])
                new = jnp.maximum(shift, scores.max(axis=1))
                rescale = jnp.exp2(shift - new)
                weights = jnp.exp2(scores - lax.broadcast_in_dim(new, scores.shape, [0]))
                weighted = weighted * lax.broadcast_in_dim(rescale, weighted.shape, [0])
                total = total * rescale + weights.sum(axis=1)
                low = weights.astype(dtype)
                weighted, total, new, low = lax.optimization_barrier((weighted, total, new, low))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_wait(turn)

                def add_values(acc):
                    plgpu.wgmma(acc, low, v_smem.at[slot])
                    following = number + 1

                    @pl.when(following < count)
                    def _next_keys():
                        plgpu.barrier_wait(k_full.at[slot_of(following)])

                weighted = pl.run_state(add_values)(plgpu.ACC.init(weighted))
                plgpu.barrier_arrive(v_free.at[slot])
                return weighted, new, total

            carry = (weighted, shift, total)
            carry = lax.fori_loop(0, whole, lambda n, c: step(n, c, False), carry)
            weighted, shift, total = lax.fori_loop(whole, count, lambda n, c: step(n, c, True), carry)
            pl.when(thread == 0)(take_turn)

            divisor = jnp.where(total == 0.0, 1.0, total)
            weighted = weighted / lax.broadcast_in_dim(divisor, weighted.shape, [0])
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
                    (k_ref.at[item, at, kv_head], k_smem, k_full, k_free),
                    (meta_ref.at[item, kv_head, :, at], meta_smem, meta_full, meta_free),
                    (v_ref.at[item, at, kv_head], v_smem, v_full, v_free),
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
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=4),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
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
