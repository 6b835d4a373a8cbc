"""dk, dv and dbias on Hopper, per row of the lists: each program keeps one tile of keys and walks its queries.

The products are the transposes of the forward's, so that keys are rows: Sᵀ = K·Qᵀ, dPᵀ = V·dOᵀ, dV += Pᵀ·dO,
dK += dSᵀ·Q. The heads of a group are walked one after the other, so their sum needs no other program.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.gpu.config import HopperBlockSizes
from pallas_kernels.gpu.pipeline import HALF_TILE, load_vector, produce
from pallas_kernels.gpu.tiles import LOG2E, Rows


def key_gradients(
    query: Float[Array, "B T H D"],
    dout: Float[Array, "B T H D"],
    stats: Float[Array, "B H 3 T"],
    rows: Rows,
    walks: Int32[Array, "B K 4 tiles"],
    *,
    scale: float,
    sizes: HopperBlockSizes,
) -> tuple[Float[Array, "B R K 2D"], Float[Array, "B K R"]]:
    """dk and dv of every row side by side, and dbias, all float32; stats as in `query_gradient`."""
    batch, _, heads, dim = query.shape
    length, kv_heads = rows.key.shape[1:3]
    group = heads // kv_heads
    block_q, block_k, stages = sizes.key_block_q, sizes.block_k, sizes.stages
    half = block_k // 2
    dtype = query.dtype
    tiles_per_epoch = rows.capacity // block_k
    factor = scale * LOG2E

    def body(q_ref, do_ref, stats_ref, k_ref, v_ref, meta_ref, walks_ref, dkv_ref, dbias_ref, *, scratch):
        (k_smem, v_smem, meta_smem, q_smem, do_smem, stats_smem, out_smem, bias_smem), barriers = scratch
        own, q_full, do_full, stats_full, q_free, do_free, stats_free = barriers
        # The last axis of the grid runs fastest: the first tiles, which most queries see, begin first.
        tile, item, kv_head = lax.axis_index("tile"), lax.axis_index("batch"), lax.axis_index("head")
        thread = lax.axis_index("thread")
        epoch_first = lax.div(tile, jnp.int32(tiles_per_epoch)) * rows.epoch_size
        first_tile, lead, whole, count = (walks_ref[item, kv_head, n, tile] for n in range(4))
        whole_steps, steps = group * whole, group * count

        def place(number):
            """(head of the group, query tile of the epoch) of a step: tiles seen whole by all heads first."""
            early = number < whole_steps
            index = jnp.where(early, number, number - whole_steps)
            each = jnp.maximum(jnp.where(early, whole, count - whole), 1)
            within = lax.rem(index, each)
            within = within + jnp.where(early, lead, jnp.where(within < lead, 0, whole))
            return lax.div(index, each), first_tile + within

        @pl.when(thread < 2)
        def _consume():
            plgpu.set_max_registers(240, action="increase")
            at = pl.ds(tile * block_k + thread * half, half)
            k_tile, v_tile, meta_tile = k_smem.at[thread], v_smem.at[thread], meta_smem.at[thread]
            plgpu.copy_gmem_to_smem(k_ref.at[item, at, kv_head], k_tile, own.at[thread])
            plgpu.copy_gmem_to_smem(v_ref.at[item, at, kv_head], v_tile, own.at[2 + thread])
            plgpu.copy_gmem_to_smem(meta_ref.at[item, kv_head, :, at], meta_tile, own.at[4 + thread])
            for n in range(3):
                plgpu.barrier_wait(own.at[2 * n + thread])
            by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
            bias = load_vector(meta_tile.at[0], by_row)

            def zeros(*shape):
                return plgpu.layout_cast(jnp.full(shape, 0, jnp.float32), plgpu.Layout.WGMMA)

            def step(number, carry, masked):
                dkey, dvalue, dbias = carry
                slot = lax.rem(number, jnp.int32(stages))
                plgpu.barrier_wait(q_full.at[slot])

                def multiply(acc):
                    plgpu.wgmma(acc, k_tile, q_smem.at[slot].transpose((1, 0)))
                    return acc[...]

                scores = pl.run_scoped(multiply, plgpu.ACC((half, block_q), jnp.float32))
                shape = scores.shape
                plgpu.barrier_wait(stats_full.at[slot])
                shift, inverse, delta = (load_vector(stats_smem.at[slot, n], by_column) for n in range(3))
                scores = scores * factor + lax.broadcast_in_dim(bias, shape, [0])
                scores = scores - lax.broadcast_in_dim(shift, shape, [1])
                if masked:
                    _, query_tile = place(number)
                    start, end = (load_vector(meta_tile.at[n], by_row) for n in (1, 2))
                    position = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
                    position = (position + query_tile * block_q).astype(jnp.float32)
                    sees = (lax.broadcast_in_dim(start, shape, [0]) <= position) & (
                        position < lax.broadcast_in_dim(end, shape, [0])
                    )
                weights = jnp.exp2(scores) * lax.broadcast_in_dim(inverse, shape, [1])
                if masked:
                    # Last of all, so that a query whose normalizer is NaN reaches only the keys it sees.
                    weights = jnp.where(sees, weights, 0.0)
                plgpu.barrier_wait(do_full.at[slot])
                low = weights.astype(dtype)

                def both(refs):
                    value_acc, weight_acc = refs
                    plgpu.wgmma(value_acc, low, do_smem.at[slot])
                    plgpu.wgmma(weight_acc, v_tile, do_smem.at[slot].transpose((1, 0)))

                dvalue, dweights = pl.run_state(both)((plgpu.ACC.init(dvalue), plgpu.ACC.init(zeros(*shape))))
                plgpu.barrier_arrive(do_free.at[slot])
                dscores = weights * (dweights - lax.broadcast_in_dim(delta, shape, [1]))
                if masked:
                    dscores = jnp.where(sees, dscores, 0.0)
                plgpu.barrier_arrive(stats_free.at[slot])
                dbias = dbias + dscores.sum(axis=1)
                low = dscores.astype(dtype)

                def add(acc):
                    plgpu.wgmma(acc, low, q_smem.at[slot])

                dkey = pl.run_state(add)(plgpu.ACC.init(dkey))
                plgpu.barrier_arrive(q_free.at[slot])
                return dkey, dvalue, dbias

            carry = (
                zeros(half, dim),
                zeros(half, dim),
                plgpu.layout_cast(jnp.full((half,), 0, jnp.float32), by_row),
            )
            carry = lax.fori_loop(0, whole_steps, lambda n, c: step(n, c, False), carry)
            dkey, dvalue, dbias = lax.fori_loop(whole_steps, steps, lambda n, c: step(n, c, True), carry)
            out_tile = out_smem.at[thread]
            bias_smem.at[thread][...] = dbias
            out_tile[...] = dkey * scale
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile, dkv_ref.at[item, at, kv_head, pl.ds(0, dim)])
            plgpu.copy_smem_to_gmem(bias_smem.at[thread], dbias_ref.at[item, kv_head, at])
            plgpu.wait_smem_to_gmem(0)
            out_tile[...] = dvalue
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile, dkv_ref.at[item, at, kv_head, pl.ds(dim, dim)])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(thread == 2)
        def _produce():
            plgpu.set_max_registers(24, action="decrease")

            def copies(number):
                member, query_tile = place(number)
                head = kv_head * group + member
                at = pl.ds(epoch_first + query_tile * block_q, block_q)
                return (
                    (q_ref.at[item, at, head], q_smem, q_full, q_free),
                    (stats_ref.at[item, head, :, at], stats_smem, stats_full, stats_free),
                    (do_ref.at[item, at, head], do_smem, do_full, do_free),
                )

            produce(steps, stages, copies)

    wide = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))

    def entry(*refs):
        pl.run_scoped(
            lambda *scratch: body(*refs, scratch=scratch),
            (
                plgpu.SMEM((2, half, dim), dtype, transforms=HALF_TILE),
                plgpu.SMEM((2, half, dim), dtype, transforms=HALF_TILE),
                plgpu.SMEM((2, 3, half), jnp.float32),
                plgpu.SMEM((stages, block_q, dim), dtype, transforms=HALF_TILE),
                plgpu.SMEM((stages, block_q, dim), dtype, transforms=HALF_TILE),
                plgpu.SMEM((stages, 3, block_q), jnp.float32),
                plgpu.SMEM((2, half, dim), jnp.float32, transforms=wide),
                plgpu.SMEM((2, half), jnp.float32),
            ),
            (
                plgpu.Barrier(num_barriers=6),
                *(plgpu.Barrier(num_barriers=stages) for _ in range(3)),
                *(plgpu.Barrier(num_arrivals=2, num_barriers=stages) for _ in range(3)),
            ),
            collective_axes="thread",
        )

    return plgpu.kernel(
        entry,
        out_type=[
            jax.ShapeDtypeStruct((batch, length, kv_heads, 2 * dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, length), jnp.float32),
        ],
        grid=(length // block_k, batch, kv_heads),
        grid_names=("tile", "batch", "head"),
        num_threads=3,
        thread_name="thread",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(query, dout, stats, rows.key, rows.value, rows.meta, walks)
