"""dk, dv and dbias on Hopper, per row of the lists: each program keeps one tile of keys and walks its queries.

The products are the transposes of the forward's, so that keys are rows: Sᵀ = K·Qᵀ, dPᵀ = V·dOᵀ, dV += Pᵀ·dO,
dK += dSᵀ·Q. The heads of a group are walked one after the other, so their sum needs no other program; where that makes
too few programs to keep all multiprocessors at work, parts of a group have programs of their own, and XLA adds them up.
How the two consumers share a tile is in `key_consumers`.
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

from pallas_kernels.gpu.device import multiprocessors
from pallas_kernels.gpu.key_consumers import Part, Program, Steps, Streams, consume_halves, consume_products
from pallas_kernels.gpu.pipeline import produce
from pallas_kernels.gpu.scratch import HALF_TILE, SINGLE_TILE, PassSizes, Scratch, warp_specialized
from pallas_kernels.gpu.tiles import Rows, visits_of_keys
from pallas_kernels.gpu.tree import split


@dataclass(frozen=True, kw_only=True)
class KeyGradientSizes(PassSizes):
    """Tiles of block_q queries; those of keys follow from the head size."""

    block_q: int = 64

    def check(self) -> None:
        if self.block_q not in ((64,) if self.by_product else (64, 128)):
            raise ValueError(f"block_q must be 64, or 128 up to head size 128, got {self.block_q}")

    @property
    def by_product(self) -> bool:
        """Whether the consumers share the products of 64 keys: registers hold dk and dv of 64 wide rows, not of 128."""
        return self.head_dim > 128

    @property
    def block_k(self) -> int:
        return 64 if self.by_product else 128

    def scratch(self, dtype: DTypeLike, out: DTypeLike = jnp.float32) -> Scratch:
        """out: of the gradients. Only whole ones leave in half precision, which are no larger than what is counted."""
        lead = () if self.by_product else (2,)
        keys = plgpu.SMEM((*lead, 64, self.head_dim), dtype, transforms=HALF_TILE)
        queries = plgpu.SMEM((self.stages, self.block_q, self.head_dim), dtype, transforms=HALF_TILE)
        # What leaves through it: whole gradients, or 64 columns at a time after weights on their way.
        passage = (64, self.block_q) if self.by_product else (2, 64, self.head_dim)
        return Scratch(
            (
                keys,
                keys,
                plgpu.SMEM((*lead, 3, 64), jnp.float32),
                queries,
                queries,
                plgpu.SMEM((self.stages, 3, self.block_q), jnp.float32),
                plgpu.SMEM(passage, out, transforms=SINGLE_TILE if jnp.dtype(out) == jnp.float32 else HALF_TILE),
                plgpu.SMEM((*lead, 64), jnp.float32),
            ),
            (
                plgpu.Barrier(num_barriers=6),
                *(plgpu.Barrier(num_barriers=self.stages) for _ in range(3)),
                *(plgpu.Barrier(num_arrivals=2, num_barriers=self.stages) for _ in range(3)),
            ),
        )


def parts_of(programs: int, group: int, *, equal: bool) -> int:
    """Into how many equal parts the heads of a group are cut: as many as keep multiprocessors at work, or one.

    equal: whether the programs are of one length. Where they are not, two for each multiprocessor end sooner than one
    that is as long as the longest.
    """
    most = max(multiprocessors() * (1 if equal else 2) // programs, 1)
    return max(parts for parts in range(1, group + 1) if group % parts == 0 and parts <= most)


def key_gradients(
    query: Float[Array, "B T H D"],
    dout: Float[Array, "B T H D"],
    stats: Float[Array, "B H 3 T"],
    rows: Rows,
    walks: Int32[Array, "B K 4 _"],
    *,
    scale: float,
    sizes: KeyGradientSizes,
) -> tuple[tuple[Float[Array, "B R K _"], ...], Float[Array, "B K R"]]:
    """(dk, dv) of every row, and dbias; stats as in `query_gradient`.

    Of lists, whose rows are yet to be added up, dk and dv are one array, side by side. float32, but where nothing is
    added to them any more and registers have room for the rounding: those are of the query's dtype.
    """
    batch, _, heads, dim = query.shape
    length, kv_heads = rows.key.shape[1:3]
    block_q, block_k = sizes.block_q, sizes.block_k
    tiles_per_epoch = rows.capacity // block_k
    listed = rows.carried > 0
    # Without lists the first tiles of keys are visited by most queries, the last by few.
    parts = parts_of(length // block_k * batch * kv_heads, heads // kv_heads, equal=listed)
    group = heads // kv_heads // parts
    consume = consume_products if sizes.by_product else consume_halves
    # Rows of lists are added up over epochs, and parts of a group with each other.
    final = not listed and parts == 1 and not sizes.by_product
    out = query.dtype if final else jnp.float32
    width = 2 * dim if listed else dim

    def body(q_ref, do_ref, stats_ref, k_ref, v_ref, meta_ref, walks_ref, dbias_ref, *targets, scratch):
        (k_smem, v_smem, meta_smem, q_smem, do_smem, stats_smem, out_smem, bias_smem), barriers = scratch
        own, q_full, do_full, stats_full, q_free, do_free, stats_free = barriers
        # The first tiles, which most queries see, begin first. One axis: CUDA allows no other 65,536 programs.
        rest, line = split(lax.axis_index("program"), kv_heads * parts)
        tile, item = split(rest, batch)
        kv_head = lax.div(line, jnp.int32(parts))
        thread = lax.axis_index("thread")
        epoch_first = lax.div(tile, jnp.int32(tiles_per_epoch)) * rows.epoch_size
        numbers = (walks_ref[item, kv_head, n, tile] for n in range(4))
        first_tile, lead, whole, count = visits_of_keys(rows, block_q, numbers)
        # First the query tiles that see the keys whole, of all heads, last those that have queries before the keys.
        walk, steps = [], jnp.int32(0)
        for tiles_before, tiles in ((lead, whole), (lead + whole, count - lead - whole), (0, lead)):

            def place(number, tiles_before=tiles_before, tiles=tiles, begin=steps):
                """(head of the part, query tile of the epoch) of a step."""
                index = number - begin
                return lax.div(index, tiles), first_tile + tiles_before + lax.rem(index, tiles)

            steps += group * tiles
            walk.append((steps, place))

        def first_query(place, number):
            return place(number)[1] * block_q

        def target(at, columns):
            array, first = divmod(columns.start, width)
            return targets[array].at[item, at, line, pl.ds(first, columns.size)]

        program = Program(
            keys=lambda at: (
                k_ref.at[item, at, kv_head],
                v_ref.at[item, at, kv_head],
                meta_ref.at[item, kv_head, :, at],
            ),
            gradients=target,
            bias_gradient=lambda at: dbias_ref.at[item, line, at],
            first=tile * block_k,
            tiles=(k_smem, v_smem, meta_smem),
            loaded=own,
            passage=out_smem,
            bias=bias_smem,
            streams=Streams(q_smem, do_smem, stats_smem, q_full, do_full, stats_full, q_free, do_free, stats_free),
            steps=Steps(*(Part(end, partial(first_query, place)) for end, place in walk)),
        )

        # Of lists, tiles that nobody sees hold no keys, and nobody reads their gradients.
        needed = steps > 0 if listed else True

        @pl.when((thread < 2) & needed)
        def _consume():
            consume(program, thread, scale)

        @pl.when((thread == 2) & needed)
        def _produce():
            plgpu.set_max_registers(24, action="decrease")

            first = 0
            for end, place in walk:

                def copies(number, place=place):
                    member, query_tile = place(number)
                    head = line * group + member
                    at = pl.ds(epoch_first + query_tile * block_q, block_q)
                    return (
                        (q_ref.at[item, at, head], q_smem, q_full, q_free),
                        (stats_ref.at[item, head, :, at], stats_smem, stats_full, stats_free),
                        (do_ref.at[item, at, head], do_smem, do_full, do_free),
                    )

                produce(first, end, copies)
                first = end

    bias_gradient, *gradients = warp_specialized(
        "attention_key_gradients",
        body,
        sizes.scratch(query.dtype, out),
        out_type=[
            jax.ShapeDtypeStruct((batch, kv_heads * parts, length), jnp.float32),
            *[jax.ShapeDtypeStruct((batch, length, kv_heads * parts, width), out)] * (2 * dim // width),
        ],
        grid=(length // block_k * batch * kv_heads * parts,),
        grid_names=("program",),
    )(query, dout, stats, rows.key, rows.value, rows.meta, walks)
    if parts > 1:
        gradients = [array.reshape(batch, length, kv_heads, parts, width).sum(3) for array in gradients]
        bias_gradient = bias_gradient.reshape(batch, kv_heads, parts, length).sum(2)
    return tuple(gradients), bias_gradient
