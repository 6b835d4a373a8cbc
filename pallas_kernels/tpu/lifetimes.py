"""The walk back over epochs that tells each key, by position, when it dies.

The walk forward knows a key's end only in the epoch of its death, at the slot it has there. Going back, every slot asks
the one that its key has in the next epoch; a key knows its end in the epoch that it enters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32

from pallas_kernels.tpu.choosing import ROWS, Walk
from pallas_kernels.tpu.config import LANES, compiler_params, interpret_mode
from pallas_kernels.tpu.routing import HERE, close_up, from_bytes, lanes, spread, take, to_bytes
from pallas_kernels.tpu.vmem import lifetimes_bytes


def walk_back(
    walk: Walk, *, epoch_size: int, before: int, first: int, length: int
) -> tuple[Int32[Array, "R N"], Int32[Array, "R N"]]:
    """For every position: the end of its key's life as far as gates decide it, 0 where no query sees it; and its slot
    in the first list of epoch `first` or later that holds it, C where none does.

    before: positions in front of position 0.
    """
    row_count, epochs, capacity = walk.key.shape
    carried = capacity - epoch_size

    def body(
        key_ref, next_ref, dead_ref, came_ref, end_out, slot_out, end, slot, asked_end, asked_slot, totals, *single
    ):
        asks, end_of, slot_of = single
        epoch = epochs - 1 - pl.program_id(1)

        @pl.when(pl.program_id(1) == 0)
        def _start():
            end[...], slot[...] = jnp.zeros_like(end), jnp.zeros_like(slot)

        came = came_ref[...]
        arrived = close_up(jnp.where(came > 0, came - HERE, 0), (end[...], slot[...]))
        asked_end[:, :carried], asked_slot[:, :carried] = arrived
        entered = key_ref[:, carried:] < length
        totals[...] = jnp.broadcast_to(jnp.sum(entered.astype(jnp.int32), axis=1, keepdims=True), totals.shape)

        def ask(number, _):
            row = pl.ds(number, 1)
            count = jnp.max(totals[row, :])
            asks[...] = next_ref[row, carried:]
            planes = to_bytes(end[row, :], slot[row, :])

            def entering(tile, _):
                here = pl.ds(pl.multiple_of(tile * LANES, LANES), LANES)
                end_of[:, here], slot_of[:, here] = from_bytes(take(planes, asks[:, here]))

            lax.fori_loop(0, lax.div(count + LANES - 1, LANES), entering, None)
            asked_end[row, carried:], asked_slot[row, carried:] = end_of[...], slot_of[...]

        lax.fori_loop(0, ROWS, ask, None)

        lives = next_ref[...] < capacity
        ends = jnp.where(lives, asked_end[...], dead_ref[...])
        slots = jnp.where(lives, asked_slot[...], capacity)
        slots = jnp.where(epoch >= first, lanes((ROWS, capacity)), slots)
        end[...], slot[...] = ends[:, :carried], slots[:, :carried]
        position = lanes((ROWS, epoch_size))
        distance = key_ref[:, carried:] - (epoch * epoch_size - before) - position
        own = (ends[:, carried:], slots[:, carried:])
        marked, (ends, slots) = spread(jnp.where(entered, distance, 0), entered, own)
        end_out[...] = jnp.where(marked > 0, ends, 0)
        slot_out[...] = jnp.where(marked > 0, slots, capacity)

    def of_epoch(width):
        return pl.BlockSpec((ROWS, width), lambda g, e: (g, epochs - 1 - e))

    flat = [array.reshape(row_count, -1) for array in walk]
    return pl.pallas_call(
        body,
        grid=(row_count // ROWS, epochs),
        in_specs=[*[of_epoch(capacity)] * 3, of_epoch(carried)],
        out_specs=[of_epoch(epoch_size)] * 2,
        out_shape=[jax.ShapeDtypeStruct((row_count, epochs * epoch_size), jnp.int32)] * 2,
        scratch_shapes=[
            *[pltpu.VMEM((ROWS, carried), jnp.int32)] * 2,
            *[pltpu.VMEM((ROWS, capacity), jnp.int32)] * 2,
            pltpu.VMEM((ROWS, LANES), jnp.int32),
            *[pltpu.VMEM((1, epoch_size), jnp.int32)] * 3,
        ],
        compiler_params=compiler_params("parallel", "arbitrary", needed=lifetimes_bytes(carried, epoch_size)),
        interpret=interpret_mode(),
        name="lifetimes",
    )(*flat)
