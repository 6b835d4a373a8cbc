"""What a consumer warpgroup of the forward kernels does: its queries' softmax over tiles of keys, as they arrive.

The two consumers take half of a piece's queries each and alternate on the matrix unit: while one multiplies, the other
does its softmax (the schedule of FlashAttention-3, arXiv 2407.08608).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Where nothing has been seen yet: finite, so that differences of it are 0 and not NaN, and below all logits.
UNSEEN = -3e38


class Slots(NamedTuple):
    """Tiles of keys and values in flight [stages, block_k, D], the barriers of their arrival and release, and the one
    on which the two consumers take turns."""

    key: Any
    value: Any
    key_full: Any
    value_full: Any
    meta_full: Any
    key_free: Any
    value_free: Any
    meta_free: Any
    turn: Any


def attend_tiles(
    q_tile: Any,
    slots: Slots,
    slot_of: Callable[[Any], Any],
    runs: Sequence[tuple[Any, Callable[[Any, Any], Any]]],
    thread: Any,
) -> tuple[Any, Any, Any]:
    """Σ weights · values, the softmax's shift (in base 2) and total, of queries [half, D] in shared memory.

    slot_of(number of a tile) -> its slot. runs: of each kind of tile, the number that its last one is below, rising,
    and logits(scores, slot) -> logits in base 2, which reads what came with the tile. thread: 0 or 1.
    """
    half, dim = q_tile.shape
    block_k = slots.key.shape[1]
    dtype = q_tile.dtype
    count = runs[-1][0]
    by_row = plgpu.Layout.WGMMA.reduce(1)
    shift = plgpu.layout_cast(jnp.full((half,), UNSEEN, jnp.float32), by_row)
    total = plgpu.layout_cast(jnp.full((half,), 0, jnp.float32), by_row)
    weighted = plgpu.layout_cast(jnp.full((half, dim), 0, jnp.float32), plgpu.Layout.WGMMA)

    def take_turn():
        plgpu.barrier_arrive(slots.turn)
        plgpu.barrier_wait(slots.turn)

    @pl.when(count > 0)
    def _first_keys():
        plgpu.barrier_wait(slots.key_full.at[slot_of(0)])

    pl.when(thread == 1)(take_turn)

    def step(number, carry, logits):
        weighted, shift, total = carry
        slot = slot_of(number)

        def scores_of(acc):
            plgpu.wgmma(acc, q_tile, slots.key.at[slot].transpose((1, 0)))
            take_turn()
            return acc[...]

        scores = pl.run_scoped(scores_of, plgpu.ACC((half, block_k), jnp.float32))
        plgpu.barrier_arrive(slots.key_free.at[slot])
        plgpu.barrier_wait(slots.meta_full.at[slot])
        scores = logits(scores, slot)
        new = jnp.maximum(shift, scores.max(axis=1))
        rescale = jnp.exp2(shift - new)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new, scores.shape, [0]))
        weighted = weighted * lax.broadcast_in_dim(rescale, weighted.shape, [0])
        total = total * rescale + weights.sum(axis=1)
        low = weights.astype(dtype)
        weighted, total, new, low = lax.optimization_barrier((weighted, total, new, low))
        plgpu.barrier_arrive(slots.turn)
        plgpu.barrier_wait(slots.value_full.at[slot])
        plgpu.barrier_wait(slots.turn)

        def add_values(acc):
            plgpu.wgmma(acc, low, slots.value.at[slot])
            following = number + 1

            @pl.when(following < count)
            def _next_keys():
                plgpu.barrier_wait(slots.key_full.at[slot_of(following)])

        weighted = pl.run_state(add_values)(plgpu.ACC.init(weighted))
        # What the weights were made of has certainly been read now, and not before (`pipeline.produce`).
        plgpu.barrier_arrive(slots.meta_free.at[slot])
        plgpu.barrier_arrive(slots.value_free.at[slot])
        return weighted, new, total

    carry, first = (weighted, shift, total), 0
    for end, logits in runs:
        carry = lax.fori_loop(first, end, lambda n, c, logits=logits: step(n, c, logits), carry)
        first = end
    pl.when(thread == 0)(take_turn)
    return carry


def normalised(weighted: Any, total: Any) -> Any:
    """The output [half, D]; 0 for a query that has seen nothing."""
    divisor = jnp.where(total == 0.0, 1.0, total)
    return weighted / lax.broadcast_in_dim(divisor, weighted.shape, [0])
