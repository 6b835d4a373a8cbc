"""Backward pass, written by hand: epochs from the last to the first, no scatter anywhere.

With list layouts a key stands in several epochs. Going backwards, the gradient of every slot starts from what
the same key collected in the epoch after (`next_slot`, a gather), and a key's sum is complete at the epoch
in which it entered, where it is read out by position (`entry_slot`, a gather). The order of the sum is fixed by
the layout, so it is the same on every run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.contract import BlockSizes, Intervals, Normalizer
from pallas_kernels.xla.rows import Epoch, key_blocks, take_slots
from pallas_kernels.xla.tiles import accumulation_dtype, logits, matmul, pad_queries


def backward(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    bias: Float[Array, "B S K"],
    intervals: Intervals,
    out: Float[Array, "B T H D"],
    normalizer: Normalizer,
    dout: Float[Array, "B T H D"],
    *,
    scale: float,
    blocks: BlockSizes,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K D"], Float[Array, "B S K"]]:
    """`contract.Backward`: weights recomputed from the normalizer, ds = p ∘ (dp − Σ dout·out)."""
    batch, queries, heads, dim = query.shape
    keys, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    size = blocks.epoch
    dtype = accumulation_dtype(query.dtype)
    walk = key_blocks(key, value, bias, intervals, blocks)
    lists = intervals.lists
    offset = keys - queries
    inputs = tuple(pad_queries(array, size) for array in (query, out, dout, *normalizer))
    count = inputs[0].shape[1] // size

    def query_tile(number):
        """The epoch's query, dout [B, t, K, G, D], and shift, 1/total, Σ dout·out [B, K, G, t, 1]."""
        q, o, do, shift, total = (
            jax.lax.dynamic_slice_in_dim(array, number * size, size, axis=1).reshape(
                batch, size, kv_heads, group, *array.shape[3:]
            )
            for array in inputs
        )
        delta = jnp.sum(do.astype(dtype) * o.astype(dtype), axis=-1)
        inverse = 1 / jnp.where(total == 0, 1, total)
        shift, inverse, delta = (jnp.moveaxis(array, 1, 3)[..., None] for array in (shift, inverse, delta))
        return q, do, shift, inverse, delta

    def epoch_step(carry, number):
        dquery, slots, gradients = carry
        epoch = Epoch(number, offset + number * size, size)
        q, do, shift, inverse, delta = query_tile(number)
        if lists is not None:
            following = jax.lax.dynamic_index_in_dim(lists.next_slot, number, axis=2, keepdims=False)
            slots = tuple(take_slots(array, following) for array in slots)

        def visit(block, state):
            dq, slots = state
            rows = walk.rows(epoch, block)
            scores, visible = logits(q, rows, epoch, scale, dtype)
            weights = jnp.where(visible, jnp.exp(scores - shift) * inverse, 0)
            dweights = matmul("btkgd,bkcd->bkgtc", do, rows.value, dtype)
            # A weight that rounds to 1 leaves nothing for the others: its exact ds is below rounding, and 0 here.
            settled = ~visible | (weights == 1)
            dscores = jnp.where(settled, 0, weights * (dweights - delta))
            low = dscores.astype(query.dtype)
            dq = dq + scale * matmul("bkgtc,bkcd->bkgtd", low, rows.key, dtype)
            own = (
                scale * matmul("bkgtc,btkgd->bkcd", low, q, dtype),
                matmul("bkgtc,btkgd->bkcd", weights.astype(value.dtype), do, dtype),
                dscores.sum((2, 3)),
            )
            first = walk.first_slot(block)
            slots = tuple(_add_slice(array, part, first) for array, part in zip(slots, own, strict=True))
            return dq, slots

        def step(block, state):
            return jax.lax.cond(walk.visited(epoch, block), visit, lambda _, same: same, block, state)

        dq, slots = jax.lax.fori_loop(
            0, walk.count, step, (jnp.zeros((batch, kv_heads, group, size, dim), dtype), slots)
        )
        dq = jnp.moveaxis(dq, 3, 1).reshape(batch, size, heads, dim).astype(query.dtype)
        dquery = jax.lax.dynamic_update_slice_in_dim(dquery, dq, number * size, axis=1)
        if lists is not None:
            gradients = _read_out(gradients, slots, lists.entry_slot, epoch.first, size)
        return (dquery, slots, gradients), None

    slots = (
        jnp.zeros((batch, kv_heads, walk.capacity, dim), dtype),
        jnp.zeros((batch, kv_heads, walk.capacity, dim), dtype),
        jnp.zeros((batch, kv_heads, walk.capacity), dtype),
    )
    # Rows past S belong to the padded queries of the last epoch.
    length = offset + count * size
    gradients = None
    if lists is not None:
        gradients = tuple(jnp.zeros((batch, length, *array.shape[2:]), array.dtype) for array in (key, value, bias))
        missing = jnp.full((batch, kv_heads, length - keys), walk.capacity, jnp.int32)
        lists = _with_entry_slot(lists, jnp.concatenate([lists.entry_slot, missing], axis=-1))
    start = (jnp.zeros_like(inputs[0]), slots, gradients)
    (dquery, slots, gradients), _ = jax.lax.scan(epoch_step, start, jnp.arange(count, dtype=jnp.int32), reverse=True)
    if gradients is None:
        gradients = tuple(
            jnp.moveaxis(array, 1, 2).astype(like.dtype) for array, like in zip(slots, (key, value, bias), strict=True)
        )
    elif offset and lists is not None:
        gradients = _read_out(gradients, slots, lists.entry_slot, 0, offset)
    dkey, dvalue, dbias = (array[:, :keys] for array in gradients)
    return dquery[:, :queries], dkey, dvalue, dbias


def _with_entry_slot(lists, entry_slot):
    return type(lists)(lists.index, lists.next_slot, entry_slot, lists.epoch_size, lists.carried)


def _add_slice(array: Array, part: Array, first) -> Array:
    """array[:, :, first:first + c] += part, in place where XLA can."""
    present = jax.lax.dynamic_slice_in_dim(array, first, part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(array, present + part, first, axis=2)


def _read_out(gradients, slots, entry_slot, first, size: int):
    """Write the finished sums of keys [first, first + size) into the gradient arrays [B, S, K, …]."""
    slot = jax.lax.dynamic_slice_in_dim(entry_slot, first, size, axis=2)
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(
            whole, jnp.moveaxis(take_slots(part, slot), 1, 2).astype(whole.dtype), first, axis=1
        )
        for whole, part in zip(gradients, slots, strict=True)
    )
