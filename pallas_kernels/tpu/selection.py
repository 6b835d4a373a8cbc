"""`contract.Select` by the TPU kernels: gates in, lifetimes and lists out, with no scatter and no gather of scalars."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.contract import BlockSizes, EpochLists, Intervals, document_ends
from pallas_kernels.tpu.choosing import NEVER, ROWS, walk_forward
from pallas_kernels.tpu.config import LANES, walk_fits
from pallas_kernels.tpu.lifetimes import walk_back

MAX_WINDOW, MAX_EPOCH = 32768, 2048
"""Eight rows of so many keys, and what is said of each, stay in VMEM; a position in an epoch has 11 bits."""


def select(
    gate: Float[Array, "B K S"],
    windows: tuple[int, ...],
    start: Int32[Array, "B S"] | None,
    end: Int32[Array, "B S"] | None,
    *,
    queries: int,
    blocks: BlockSizes,
) -> Intervals | None:
    """`contract.Select` for gates of up to 32 bits and windows up to MAX_WINDOW."""
    batch, heads, length = gate.shape
    start, end = document_ends(start, end, batch, length)
    position = jnp.arange(length, dtype=jnp.int32)
    starts = jnp.broadcast_to(position, gate.shape)
    listed = max(windows) + blocks.epoch < length
    if min(windows) >= length:
        whole = jnp.maximum(jnp.broadcast_to(end[:, None], gate.shape), position)
        return Intervals(starts, jnp.where(jnp.isneginf(gate), position, whole), starts_at_key=True)
    windows = tuple(min(window, length) for window in windows)
    unit = blocks.granule if listed else 2 * LANES
    carried = -(-max(windows) // unit) * unit
    # Without lists epochs are the walk's own.
    size, offset = blocks.epoch if listed else min(blocks.epoch, MAX_EPOCH), length - queries
    if gate.dtype == jnp.float64 or carried > MAX_WINDOW or size > MAX_EPOCH or not walk_fits(carried, size):
        return None
    # Whole epochs on either side of the first query.
    first = -(-offset // size)
    before = first * size - offset
    epochs = first - (-queries // size)
    after = epochs * size - before - length
    rows = batch * heads
    spare = -rows % ROWS

    def by_row(array, fill: int):
        array = jnp.broadcast_to(array, gate.shape).reshape(rows, length)
        return jnp.pad(array, [(0, spare), (before, after)], constant_values=fill)

    order = by_row(ordered(gate), NEVER)
    starts_by_row, ends_by_row = by_row(start[:, None], 0), by_row(end[:, None], 0)
    window = jnp.broadcast_to(jnp.asarray(windows, jnp.int32), (batch, heads)).reshape(rows)
    window = jnp.pad(window, (0, spare), constant_values=1)
    begins = jnp.arange(epochs, dtype=jnp.int32) * size - before
    document = jnp.maximum(starts_by_row.reshape(-1, epochs, size) - begins[:, None], 0).reshape(order.shape)

    def of_next(array, fill: int):
        """The value at the position after each epoch."""
        return jnp.pad(array[:, size::size], [(0, 0), (0, 1)], constant_values=fill)

    follows = jnp.maximum(of_next(starts_by_row, 0) - begins, 0)
    follows = jnp.where(of_next(ends_by_row, 0) > begins + size, follows, -1)
    limits = jnp.stack([of_next(order, NEVER), follows, jnp.broadcast_to(window[:, None], follows.shape)], axis=-1)
    limits = jnp.pad(limits, [(0, 0), (0, 0), (0, LANES - 3)])
    walk = walk_forward(order, document, limits, window, epoch_size=size, carried=carried, before=before, length=length)
    dies, entry_slot = walk_back(walk, epoch_size=size, before=before, first=first, length=length)

    def by_head(array):
        return array[:rows, before : before + length].reshape(gate.shape)

    expiry = jnp.maximum(jnp.minimum(by_head(dies), end[:, None]), position)
    if not listed:
        return Intervals(starts, expiry, starts_at_key=True)
    capacity = -(-(carried + size) // blocks.granule) * blocks.granule
    missing = capacity - carried - size

    def by_epoch(array, fill: int):
        array = array[:rows, first:].reshape(batch, heads, -1, carried + size)
        return jnp.pad(array, [(0, 0), (0, 0), (0, 0), (0, missing)], constant_values=fill)

    def known(slot):
        return jnp.where(slot < carried + size, slot, capacity)

    lists = EpochLists(
        index=by_epoch(walk.key, length),
        next_slot=known(by_epoch(walk.next_slot, capacity)),
        entry_slot=known(by_head(entry_slot)),
        epoch_size=size,
        carried=carried,
    )
    return Intervals(starts, expiry, lists, starts_at_key=True)


def ordered(gate: Float[Array, "*n"]) -> Int32[Array, "*n"]:
    """Integers of the gates' order: −0 equals 0, NaN is above all, −inf is NEVER."""
    gate = jnp.where(gate == 0, 0, gate.astype(jnp.float32))
    bits = lax.bitcast_convert_type(gate, jnp.int32)
    bits = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return jnp.where(jnp.isnan(gate), (1 << 31) - 1, jnp.where(jnp.isneginf(gate), NEVER, bits))
