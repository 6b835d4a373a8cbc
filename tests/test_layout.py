"""Epoch lists against the definition: who is alive where, in which order, and the way back."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import GATES, make_gate, make_segments

from dmattn_jax import layout
from dmattn_jax.documents import document_bounds
from dmattn_jax.layout import lay_out
from dmattn_jax.selection import Choice, choose_keys
from pallas_kernels import BlockSizes

epoch_lists = jax.jit(layout.epoch_lists, static_argnames=("queries", "window", "epoch_size"))
LENGTH, WINDOW, EPOCH = 53, 7, 5


@partial(jax.jit, static_argnums=1)
def choose(gates, window, ids):
    documents = document_bounds(ids, gates.shape[0], gates.shape[1])
    return choose_keys(jnp.moveaxis(gates, 2, 1), (window,) * gates.shape[2], documents, causal=True)


def choice_of(gate, segments, window=WINDOW):
    rng = np.random.default_rng(len(gate) + 10 * len(segments))
    gates = jnp.asarray(make_gate(gate, rng, 2, LENGTH, 3))
    ids = make_segments(segments, rng, 2, LENGTH)
    return choose(gates, window, None if ids is None else jnp.asarray(ids))


@pytest.mark.parametrize("queries", [LENGTH, 29, 5, 1])
@pytest.mark.parametrize("segments", ["none", "inside"])
@pytest.mark.parametrize("gate", GATES)
def test_lists(gate, segments, queries):
    choice = choice_of(gate, segments)
    lists = jax.tree.map(np.asarray, epoch_lists(choice, queries=queries, window=WINDOW, epoch_size=EPOCH))
    offset = LENGTH - queries
    epochs, capacity = -(-queries // EPOCH), WINDOW + EPOCH
    assert lists.index.shape == (2, 3, epochs, capacity)
    expiry, priority = np.asarray(choice.expiry), np.asarray(choice.priority)
    for b, k, e in np.ndindex(2, 3, epochs):
        begin, end = offset + e * EPOCH, offset + (e + 1) * EPOCH
        life = expiry[b, k]
        alive = [j for j in range(LENGTH) if j < end and life[j] > max(j, begin)]
        carried = sorted((j for j in alive if j < begin), key=lambda j: (-life[j], -priority[b, k, j]))
        entering = [j for j in alive if j >= begin]
        expected = np.full(capacity, LENGTH)
        expected[: len(carried)] = carried
        expected[WINDOW : WINDOW + len(entering)] = entering
        row = lists.index[b, k, e]
        np.testing.assert_array_equal(row, expected)
        for slot, j in enumerate(row):
            follows = lists.next_slot[b, k, e, slot]
            if j < LENGTH and life[j] > end and e + 1 < epochs:
                assert lists.index[b, k, e + 1, follows] == j
            else:
                assert follows == capacity
    for b, k, j in np.ndindex(2, 3, LENGTH):
        holding = [e for e in range(epochs) if j in lists.index[b, k, e]]
        slot = lists.entry_slot[b, k, j]
        if holding:
            assert lists.index[b, k, holding[0], slot] == j
            assert holding[0] == (max(j, offset) - offset) // EPOCH
        else:
            assert slot == capacity


@pytest.mark.parametrize("window", [1, 16, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 52))])
@pytest.mark.parametrize("epoch", [1, 3, 64])
def test_every_window_and_epoch_fits(window, epoch):
    """The lists hold all pairs at the extremes: nothing is cut off where every slot is taken."""
    choice = choice_of("tied", "none", window)
    lists = epoch_lists(choice, queries=LENGTH, window=window, epoch_size=epoch)
    held = np.asarray((lists.index < LENGTH).sum((2, 3)))
    first, last = np.arange(LENGTH) // epoch, (np.asarray(choice.expiry) - 1) // epoch
    np.testing.assert_array_equal(held, (last - first + 1).sum(-1))


def test_a_window_as_long_as_the_row_needs_no_lists():
    choice = choice_of("random", "none")
    blocks = BlockSizes(epoch=EPOCH)
    assert lay_out(choice, queries=LENGTH, window=LENGTH, blocks=blocks).lists is None
    assert lay_out(choice, queries=LENGTH, window=WINDOW, blocks=blocks).lists is not None


def test_memory_is_linear():
    def temporary(length):
        shape = jax.ShapeDtypeStruct((1, 2, length), jnp.int32)
        build = jax.jit(lambda choice: epoch_lists(choice, queries=length, window=256, epoch_size=256))
        return build.lower(Choice(shape, shape)).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(16_384), temporary(65_536)
    assert large < 4.5 * small
    assert large < 64 * 65_536 * 2 * 4


def test_most_blocks_need_no_mask():
    """What the order is for: of the blocks visited on a random gate, most are visible to every query whole."""
    window = epoch = 256
    length, block = 8192, 32
    gates = jnp.asarray(make_gate("random", np.random.default_rng(0), 1, length, 1))
    choice = choose(gates, window, None)
    lists = epoch_lists(choice, queries=length, window=window, epoch_size=epoch)
    index = np.asarray(lists.index)[0, 0]
    start = np.append(np.arange(length), length)
    end = np.append(np.asarray(choice.expiry)[0, 0], 0)
    visited = full = 0
    for e, rows in enumerate(index):
        begin = e * epoch
        for q in range(begin, begin + epoch, block):
            for slots in rows.reshape(-1, block):
                overlap = (start[slots] < q + block) & (end[slots] > q)
                visited += overlap.any()
                full += ((start[slots] <= q) & (end[slots] >= q + block)).all()
    assert full > 0.6 * visited


@pytest.mark.parametrize("cut", [6, 21, 37, 52])
def test_the_order_tells_nothing_of_the_future(cut):
    """Lists of the epochs before a change of the gates are the same, slot by slot, up to keys not there yet."""
    rng = np.random.default_rng(8)
    gates = make_gate("random", rng, 2, LENGTH, 3)
    changed = np.where(np.arange(LENGTH)[None, :, None] < cut, gates, 5 + gates[:, ::-1])
    left, right = (
        np.asarray(
            epoch_lists(choose(jnp.asarray(g), WINDOW, None), queries=LENGTH, window=WINDOW, epoch_size=EPOCH).index
        )
        for g in (gates, changed)
    )
    past = cut // EPOCH
    np.testing.assert_array_equal(left[:, :, :past], right[:, :, :past])
    np.testing.assert_array_equal(left[:, :, past, :WINDOW], right[:, :, past, :WINDOW])
