"""dq on Hopper: the forward's walk once more, with the weights recomputed from the normalizer.

Per tile: weights P = exp2(S − shift)/total, dP = dO·Vᵀ, dS = P ∘ (dP − Σ dO·O), dQ += dS·K.

Σ dO·O is made of outputs rounded to half precision, and that is the largest error of dbias. Since the weights of a
query sum to 1, a row of dS sums to 0 but for this error: so the walk knows it, and the key gradients, which come after,
can be given the sum without it. Knowing it takes a twelfth of the backward pass, so only float16 asks for it, whose
users ask for digits.
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
from pallas_kernels.gpu.pipeline import load_vector, produce
from pallas_kernels.gpu.scratch import HALF_TILE, PassSizes, Scratch, warp_specialized
from pallas_kernels.gpu.tiles import BLOCK_Q, Rows, check_key_tile, visits_of_queries
from pallas_kernels.gpu.tree import split
from pallas_kernels.powers_of_two import LOG2E

HALF = BLOCK_Q // 2


def knows_lack(dtype: DTypeLike) -> bool:
    """Whether `query_gradient` tells what Σ dout·out lacks."""
    return jnp.dtype(dtype) == jnp.float16


@dataclass(frozen=True, kw_only=True)
class QueryGradientSizes(PassSizes):
    """Tiles of block_k keys. Values are needed for a shorter time than keys and may have fewer steps in flight:
    value_stages."""

    block_k: int = 128
    value_stages: int = 2

    def check(self) -> None:
        check_key_tile(self.block_k)

    @property
    def loads_statistics(self) -> bool:
        """Whether queries' statistics go to registers directly: wide heads leave them no room in shared memory."""
        return self.head_dim > 128

    def scratch(self, dtype: DTypeLike) -> Scratch:
        own = plgpu.SMEM((2, HALF, self.head_dim), dtype, transforms=HALF_TILE)
        stages = (self.stages, self.value_stages, self.value_stages)
        return Scratch(
            (
                own,
                own,
                *(() if self.loads_statistics else (plgpu.SMEM((2, 3, HALF), jnp.float32),)),
                plgpu.SMEM((self.stages, self.block_k, self.head_dim), dtype, transforms=HALF_TILE),
                plgpu.SMEM((self.value_stages, self.block_k, self.head_dim), dtype, transforms=HALF_TILE),
                plgpu.SMEM((self.value_stages, 3, self.block_k), jnp.float32),
                *((plgpu.SMEM((2, HALF), jnp.float32),) if knows_lack(dtype) else ()),
            ),
            (
                plgpu.Barrier(num_barriers=4 if self.loads_statistics else 6),
                *(plgpu.Barrier(num_barriers=n) for n in stages),
                *(plgpu.Barrier(num_arrivals=2, num_barriers=n) for n in stages),
            ),
        )


def query_gradient(
    query: Float[Array, "B T H D"],
    dout: Float[Array, "B T H D"],
    stats: Float[Array, "B H 3 T"],
    rows: Rows,
    runs: Int32[Array, "B K 3 _"],
    *,
    scale: float,
    sizes: QueryGradientSizes,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"] | None]:
    """dq, and what Σ dout·out lacks, or None where that is not known (`knows_lack`).

    stats: the softmax's shift in base 2, 1/total, and Σ dout·out of every query.
    """
    batch, queries, heads, dim = query.shape
    group = heads // rows.key.shape[2]
    block_k = sizes.block_k
    dtype = query.dtype
    tiles, tiles_per_epoch = queries // BLOCK_Q, rows.epoch_size // BLOCK_Q
    factor = scale * LOG2E

    def body(q_ref, do_ref, stats_ref, k_ref, v_ref, meta_ref, runs_ref, dq_ref, *lack_ref, scratch):
        buffers, barriers = scratch
        q_smem, do_smem, *stats_smem = buffers[: 2 if sizes.loads_statistics else 3]
        k_smem, v_smem, meta_smem, *lack_smem = buffers[2 + len(stats_smem) :]
        own, k_full, v_full, meta_full, k_free, v_free, meta_free = barriers
        # Heads that share keys together, and the long last tiles first. One axis: CUDA allows no other 65,536 programs.
        rest, head = split(lax.axis_index("program"), heads)
        number, item = split(rest, batch)
        tile = tiles - 1 - number
        thread = lax.axis_index("thread")
        kv_head = lax.div(head, jnp.int32(group))
        base = lax.div(tile, jnp.int32(tiles_per_epoch)) * rows.capacity
        numbers = (runs_ref[item, kv_head, n, tile] for n in range(3))
        whole, carried, skipped, count = visits_of_queries(rows, block_k, numbers)
        begun = rows.begun_tiles(block_k, whole, carried, count)

        @pl.when(thread < 2)
        def _consume():
            plgpu.set_max_registers(232, action="increase")
            first = tile * BLOCK_Q + thread * HALF
            q_tile, do_tile = q_smem.at[thread], do_smem.at[thread]
            at = pl.ds(first, HALF)
            plgpu.copy_gmem_to_smem(q_ref.at[item, at, head], q_tile, own.at[thread])
            plgpu.copy_gmem_to_smem(do_ref.at[item, at, head], do_tile, own.at[2 + thread])
            for each in stats_smem:
                plgpu.copy_gmem_to_smem(stats_ref.at[item, head, :, at], each.at[thread], own.at[4 + thread])
            for n in range(2 + len(stats_smem)):
                plgpu.barrier_wait(own.at[2 * n + thread])
            by_row = plgpu.Layout.WGMMA.reduce(1)
            shift, inverse, delta = (
                load_vector(stats_smem[0].at[thread, n] if stats_smem else stats_ref.at[item, head, n, at], by_row)
                for n in range(3)
            )
            within = lax.rem(tile, jnp.int32(tiles_per_epoch)) * BLOCK_Q + thread * HALF
            dquery = plgpu.layout_cast(jnp.full((HALF, dim), 0, jnp.float32), plgpu.Layout.WGMMA)

            def own_half(ref, number):
                """A consumer's half of the tile. Of wide heads its place depends, as far as the compiler knows, on the
                step: else it computes the descriptors of all products before the loop, and keeps them in 64 registers.
                """
                return ref.at[thread + lax.shift_right_logical(number, 30) if dim > 128 else thread]

            def step(number, dquery, look):
                slot, value_slot = (lax.rem(number, jnp.int32(n)) for n in (sizes.stages, sizes.value_stages))
                plgpu.barrier_wait(k_full.at[slot])

                def multiply(left, right):
                    def run(acc):
                        plgpu.wgmma(acc, left, right.transpose((1, 0)))
                        return acc[...]

                    return pl.run_scoped(run, plgpu.ACC((HALF, block_k), jnp.float32))

                scores = multiply(own_half(q_smem, number), k_smem.at[slot])
                shape = scores.shape
                plgpu.barrier_wait(meta_full.at[value_slot])
                meta = meta_smem.at[value_slot]
                scores = scores * factor + of_keys(meta, BIAS, shape, axis=1)
                scores = scores - lax.broadcast_in_dim(shift, shape, [0])
                if look is not None:
                    scores = jnp.where(look(meta, shape, within), scores, -jnp.inf)
                weights = jnp.exp2(scores) * lax.broadcast_in_dim(inverse, shape, [0])
                plgpu.barrier_wait(v_full.at[value_slot])
                dweights = multiply(own_half(do_smem, number), v_smem.at[value_slot])
                plgpu.barrier_arrive(v_free.at[value_slot])
                dscores = weights * (dweights - lax.broadcast_in_dim(delta, shape, [0]))
                low = dscores.astype(dtype)

                def add(acc):
                    plgpu.wgmma(acc, low, k_smem.at[slot])
                    for each in lack:
                        # While the product runs.
                        each[...] = load_vector(each, by_row) + dscores.sum(axis=1)

                dquery = pl.run_state(add)(plgpu.ACC.init(dquery))
                # Only now the meta data have certainly been read (`pipeline.produce`).
                plgpu.barrier_arrive(meta_free.at[value_slot])
                plgpu.barrier_arrive(k_free.at[slot])
                return dquery

            lack = [each.at[thread] for each in lack_smem]
            for each in lack:
                each[...] = plgpu.layout_cast(jnp.full((HALF,), 0, jnp.float32), by_row)
            ended, late = (partial(visible, axis=1, begun=known) for known in (True, False))
            for begin, end, look in ((0, whole, None), (whole, begun, ended), (begun, count, late)):
                dquery = lax.fori_loop(begin, end, lambda n, c, look=look: step(n, c, look), dquery)
            q_tile[...] = (dquery * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[item, at, head])
            for each, there in zip(lack, lack_ref, strict=True):
                plgpu.copy_smem_to_gmem(each, there.at[item, head, at])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(thread == 2)
        def _produce():
            plgpu.set_max_registers(40, action="decrease")

            def copies(number):
                at = pl.ds(base + jnp.where(number < carried, number, number + skipped) * block_k, block_k)
                return (
                    (k_ref.at[item, at, kv_head], k_smem, k_full, k_free),
                    (v_ref.at[item, at, kv_head], v_smem, v_full, v_free),
                    (meta_ref.at[item, kv_head, :, at], meta_smem, meta_full, meta_free),
                )

            produce(0, count, copies)

    each_query = jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)
    dquery, *lack = warp_specialized(
        "attention_query_gradient",
        body,
        sizes.scratch(dtype),
        out_type=[jax.ShapeDtypeStruct(query.shape, dtype), *([each_query] if knows_lack(dtype) else [])],
        grid=(tiles * batch * heads,),
        grid_names=("program",),
    )(query, dout, stats, rows.key, rows.value, rows.meta, runs)
    return dquery, *(lack or [None])
