"""The walk over epochs that chooses keys: which of them an epoch's list carries, in which order, and when each dies.

Eight rows (batch item and kv head) at a time, an epoch a step. Between steps the kernel keeps the keys alive at the
epoch's first query, in falling order of (gate, position): the carried part of the epoch's list. Of the keys of the
epoch only those matter that are above the last of them; those are moved together first. Then each is compared with
every key kept: how many stand above a key is its place in the next list, and the entering key that makes them `window`
ends its life. Running counts over entering keys are products with a triangle of ones.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.tpu.config import LANES, compiler_params, interpret_mode
from pallas_kernels.tpu.routing import close_up, count_before, from_bytes, lanes, place, spread, to_bytes
from pallas_kernels.tpu.tiles import NN, NT, columns, fold_lanes, parts, product
from pallas_kernels.tpu.vmem import choosing_bytes

ROWS = 8
"""Rows of one step: the sublanes of a register."""

NEVER = -(1 << 31)
"""Order of a key that no query sees, and of a place that holds none: below every gate."""
_ABOVE_ALL = (1 << 31) - 1

_LATE = 4095
"""Beyond every position of an epoch."""


class Walk(NamedTuple):
    """What the walk tells of each slot of each epoch's list, W carried and E entering ones.

    key: its position, or `length`. next_slot: its slot in the next epoch's list; W + E where it is in none.
    dead: the first position, of the epoch or right after it, that no longer sees it, where it is not in the next list.
    came: for each slot carried into the *next* epoch, HERE + how many slots its key moved down; 0 where it entered.
    """

    key: Int32[Array, "R E C"]
    next_slot: Int32[Array, "R E C"]
    dead: Int32[Array, "R E C"]
    came: Int32[Array, "R E W"]


class Row(NamedTuple):
    """One row of the slots of an epoch: those carried, in order, then its keys that may ever be seen, by position.

    order: gates as integers, NEVER in empty slots. place: position in the epoch + 4,096 times the start of its
    document, both counted from the epoch's start; 0 for carried keys. room: how many more keys above it a key can bear.
    death: the first position of the epoch that no longer sees the key, else _LATE. moved: slot in the next list.
    """

    order: Int32[Array, "1 C"]
    place: Int32[Array, "1 C"]
    room: Float[Array, "1 C"]
    death: Float[Array, "1 C"]
    moved: Int32[Array, "1 C"]


def compared_at_once(carried: int) -> int:
    """Carried slots of one step of a comparison."""
    return 512 if carried % 512 == 0 else 256


def compare_row(row: Row, count, budget, carried: int) -> None:
    """Set `room` and `death` against the `count` keys of the epoch. budget: the row's window."""
    wide = compared_at_once(carried)
    below = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
    lane = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
    until = (lane <= below).astype(jnp.bfloat16)
    ones = jnp.ones((ROWS, LANES), jnp.bfloat16)

    def entering(tile, highest):
        """highest: the most of all slots before this tile."""
        at = pl.multiple_of(carried + tile * LANES, LANES)
        here = pl.ds(at, LANES)
        own, own_document = row.order[:, here], row.place[:, here] >> 12
        first_document = own_document[:, 0:1]
        when = row.place[:, here] & _LATE
        number = lax.broadcasted_iota(jnp.int32, own.shape, 1)
        # Gates that rise or are all equal: each key is above every slot before it, and the positions have no gap.
        in_turn = (number == 0) | ((own >= pltpu.roll(own, 1, axis=1)) & (own_document == first_document))
        in_turn &= (own >= highest) & (when == when[:, 0:1] + number)
        steady = (jnp.min(jnp.where(in_turn, 1, 0)) > 0) & (budget >= LANES)

        @pl.when(steady)
        def _steady():
            def passed(first, width):
                """All of the tile are above: the one that ends a life is known by its number."""
                slots = pl.ds(pl.multiple_of(first, LANES), width)
                bears = row.room[:, slots]
                killed = jnp.maximum(bears, 1.0) + (when[:, 0:1] - 1).astype(jnp.float32)
                killed = jnp.where(bears <= LANES, killed, float(_LATE))
                row.death[:, slots] = jnp.minimum(row.death[:, slots], killed)
                row.room[:, slots] = bears - LANES

            lax.fori_loop(0, carried // wide, lambda a, _: passed(a * wide, wide), None)
            lax.fori_loop(0, tile, lambda a, _: passed(carried + a * LANES, LANES), None)
            row.room[:, here] = (budget - (LANES - 1) + number).astype(jnp.float32)

        @pl.when(~steady)
        def _compared():
            compare(tile, at, here, own, own_document)

        return jnp.maximum(highest, jnp.max(own))

    def compare(tile, at, here, own, own_document):
        first_document = own_document[:, 0:1]
        column, packed = columns(own), columns(row.place[:, here])
        documents, when = packed >> 12, (packed & _LATE).astype(jnp.float32)
        # Keys of a later document are above all of an earlier one, whose keys are cut off at its end anyway.
        above = jnp.where(documents > first_document, _ABOVE_ALL, column)

        def settle(slots, beaten, bears, deaths: bool):
            """beaten: where an entering key, by row, is above a slot's."""
            beaten = beaten.astype(jnp.bfloat16)
            if not deaths:
                row.room[:, slots] = bears - product(ones, beaten, NN)[0:1]
                return
            counts = product(until, beaten, NN)
            killed = jnp.where(counts >= bears, jnp.tile(when, (1, slots.size // LANES)), float(_LATE))
            row.death[:, slots] = jnp.minimum(row.death[:, slots], killed.min(axis=0, keepdims=True))
            row.room[:, slots] = bears - counts[LANES - 1 :]

        def against(first, width, sums, deaths=True):
            slots = pl.ds(pl.multiple_of(first, LANES), width)
            theirs = jnp.where(row.place[:, slots] >> 12 < first_document, NEVER, row.order[:, slots])
            beaten = jnp.tile(above, (1, width // LANES)) >= theirs
            settle(slots, beaten, row.room[:, slots], deaths)
            return sums + fold_lanes(beaten.astype(jnp.float32))

        sums = jnp.zeros((LANES, LANES), jnp.float32)
        # Slots so far up that the keys up to this tile end none of their lives.
        entered = jnp.minimum(count, (tile + 1) * LANES)
        safe = jnp.clip(lax.div(budget - entered, wide), 0, carried // wide)
        sums = lax.fori_loop(0, safe, lambda a, s: against(a * wide, wide, s, False), sums)
        sums = lax.fori_loop(safe, carried // wide, lambda a, s: against(a * wide, wide, s), sums)
        sums = lax.fori_loop(0, tile, lambda a, s: against(carried + a * LANES, LANES, s), sums)
        later = below > lane
        higher = (documents > own_document) | (column >= own)
        sums = sums - jnp.where(later & ~higher, 1.0, 0.0)
        high, low = parts(sums, False)
        beats = (product(ones, high, NT) + product(ones, low, NT))[0:1]
        bears = budget.astype(jnp.float32) - (at - beats)
        settle(here, later & higher, bears, True)

    # Kept keys stand in falling order.
    lax.fori_loop(0, lax.div(count + LANES - 1, LANES), entering, jnp.max(row.order[:, :LANES]))


def entered_row(row: Row, count, carried: int) -> tuple[Int32[Array, "1 W"], Int32[Array, "1 W"]]:
    """By slot of the next list: the order and 1 + the position of the key of this epoch that goes there; 0 for none."""

    def entering(tile, found):
        here = pl.ds(pl.multiple_of(carried + tile * LANES, LANES), LANES)
        planes = to_bytes(row.order[:, here], (row.place[:, here] & _LATE) + 1)
        return found + place(planes, row.moved[:, here], carried)

    nothing = jnp.zeros((ROWS, carried), jnp.float32)
    return from_bytes(lax.fori_loop(0, lax.div(count + LANES - 1, LANES), entering, nothing))


def walk_forward(
    order: Int32[Array, "R N"],
    document: Int32[Array, "R N"],
    limits: Int32[Array, "R epochs 128"],
    windows: Int32[Array, " R"],
    *,
    epoch_size: int,
    carried: int,
    before: int,
    length: int,
) -> Walk:
    """R is a multiple of ROWS, N of epoch_size, which is at most 2,048.

    order: gates as integers of the same order, NEVER for keys that nobody sees. document: where a position's document
    starts, counted from its epoch's start, at least 0. limits: of the position after each epoch, its order and its
    document counted from the epoch's start (−1 where no query there can see anything earlier), then the row's window.
    before: positions in front of position 0.
    """
    row_count, padded = order.shape
    epochs = padded // epoch_size
    capacity = carried + epoch_size

    def body(windows_ref, order_ref, document_ref, limits_ref, key_out, next_out, dead_out, came_out, *scratch):
        kept, kept_key, order_of, place_of, room_of, death_of, totals, moved_of, *single = scratch
        row = Row(*single)
        group, epoch = pl.program_id(0), pl.program_id(1)
        first = epoch * epoch_size - before

        @pl.when(epoch == 0)
        def _start():
            kept[...] = jnp.full_like(kept, NEVER)
            kept_key[...] = jnp.full_like(kept_key, length)

        limit = limits_ref[...]
        next_order, next_document, window = limit[:, 0:1], limit[:, 1:2], limit[:, 2:3]
        position, slot = lanes((ROWS, epoch_size)), lanes((ROWS, carried))
        own, own_document = order_ref[...], document_ref[...]
        last, last_but_one = (
            jnp.max(jnp.where(slot == window - rank, kept[...], NEVER), axis=1, keepdims=True) for rank in (1, 2)
        )
        # Where the epoch's first key has sent one away already, the last of those above is itself or the one before.
        least = jnp.maximum(last, jnp.minimum(last_but_one, own[:, 0:1]))
        enters = (own > NEVER) & ((own_document > 0) | (own >= least))
        earlier, total = count_before(enters)
        own, where = close_up(jnp.where(enters, position - earlier, 0), (own, position | (own_document << 12)))
        filled = position < total
        own, where = jnp.where(filled, own, NEVER), jnp.where(filled, where, _LATE)

        order_of[:, :carried], order_of[:, carried:] = kept[...], own
        place_of[:, :carried], place_of[:, carried:] = jnp.zeros_like(slot), where
        # How many more keys above it a key can bear.
        room_of[:, :carried] = (window - slot).astype(jnp.float32)
        death_of[...] = jnp.full_like(death_of, _LATE)
        totals[...] = jnp.broadcast_to(total, totals.shape)

        def compare(number, _):
            # Rows are indexed whole, lanes by tile: not both at once.
            for of_row, of_rows in zip(row[:4], (order_of, place_of, room_of, death_of), strict=True):
                of_row[...] = of_rows[pl.ds(number, 1), :]
            compare_row(row, jnp.max(totals[pl.ds(number, 1), :]), windows_ref[group * ROWS + number], carried)
            room_of[pl.ds(number, 1), :], death_of[pl.ds(number, 1), :] = row.room[...], row.death[...]

        lax.fori_loop(0, ROWS, compare, None)

        above = window - room_of[...].astype(jnp.int32)
        present = order_of[...] > NEVER
        beaten = jnp.where(next_order >= order_of[...], 1, 0)
        lives = present & (place_of[...] >> 12 == next_document) & (above + beaten < window)
        place_next = jnp.where(lives, above, capacity)
        moved_of[...] = place_next
        dead = jnp.minimum(death_of[...].astype(jnp.int32), epoch_size) + first

        when = place_of[:, carried:] & _LATE
        seen = present[:, carried:] & (death_of[:, carried:].astype(jnp.int32) > when)
        earlier, total = count_before(seen)
        key = when + first
        listed = close_up(jnp.where(seen, position - earlier, 0), (place_next[:, carried:], dead[:, carried:], key))
        filled = position < total
        empty = (capacity, 0, length)
        outs = (next_out, dead_out, key_out)
        for out, old, new, fill in zip(outs, (place_next, dead, kept_key[...]), listed, empty, strict=True):
            out[:, :carried] = old[:, :carried]
            out[:, carried:] = jnp.where(filled, new, fill)

        stays = lives[:, :carried]
        distance = jnp.where(stays, place_next[:, :carried] - slot, 0)
        came, (new_order, new_key) = spread(distance, stays, (kept[...], kept_key[...]))
        came_out[...] = came
        kept[...] = jnp.where(came > 0, new_order, NEVER)
        kept_key[...] = jnp.where(came > 0, new_key, length)

        def let_in(number, _):
            here = pl.ds(number, 1)
            row.order[...], row.place[...], row.moved[...] = order_of[here, :], place_of[here, :], moved_of[here, :]
            entered, key = entered_row(row, jnp.max(totals[here, :]), carried)
            kept[here, :] = jnp.where(key > 0, entered, kept[here, :])
            kept_key[here, :] = jnp.where(key > 0, key - 1 + first, kept_key[here, :])

        lax.fori_loop(0, ROWS, let_in, None)

    def of_epoch(width):
        return pl.BlockSpec((ROWS, width), lambda g, e: (g, e))

    def out(width):
        return jax.ShapeDtypeStruct((row_count, epochs * width), jnp.int32)

    kinds = (jnp.int32, jnp.int32, jnp.float32, jnp.float32, jnp.int32)
    found = pl.pallas_call(
        body,
        grid=(row_count // ROWS, epochs),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            of_epoch(epoch_size),
            of_epoch(epoch_size),
            of_epoch(LANES),
        ],
        out_specs=[*[of_epoch(capacity)] * 3, of_epoch(carried)],
        out_shape=[*[out(capacity)] * 3, out(carried)],
        scratch_shapes=[
            *[pltpu.VMEM((ROWS, carried), jnp.int32)] * 2,
            *[pltpu.VMEM((ROWS, capacity), dtype) for dtype in kinds[:4]],
            pltpu.VMEM((ROWS, LANES), jnp.int32),
            pltpu.VMEM((ROWS, capacity), jnp.int32),
            *[pltpu.VMEM((1, capacity), dtype) for dtype in kinds],
        ],
        compiler_params=compiler_params("parallel", "arbitrary", needed=choosing_bytes(carried, epoch_size)),
        interpret=interpret_mode(),
        name="choose_keys",
    )(windows, order, document, limits.reshape(row_count, -1))
    return Walk(*(array.reshape(row_count, epochs, -1) for array in found))
