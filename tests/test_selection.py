"""Lifetimes against the oracle's masks, element by element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import GATES, make_gate, make_segments

from dmattn_jax import oracle, selection
from dmattn_jax.documents import document_bounds, document_positions
from dmattn_jax.selection import last_keys

select_keys = jax.jit(selection.select_keys, static_argnums=1, static_argnames="causal")
visible_keys_oracle = jax.jit(oracle.visible_keys_oracle, static_argnums=1, static_argnames="causal")


def mask_of(expiry, segment_ids, causal=True):
    """[B, K, S, S] from lifetimes, as the docstring of select_keys says to read them."""
    batch, length, _ = expiry.shape
    bounds = document_bounds(None if segment_ids is None else jnp.asarray(segment_ids), batch, length)
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    expiry = np.moveaxis(np.asarray(expiry), 2, 1)[:, :, None]
    first = key if causal else np.where(expiry > key, np.asarray(bounds.start)[:, None, None], length)
    return (first <= query) & (query < expiry) & np.asarray(bounds.token)[:, None, :, None]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segments", ["none", "packed", "right", "left", "inside", "returning", "empty"])
@pytest.mark.parametrize("gate", GATES)
def test_lifetimes_are_the_mask(gate, segments, causal):
    rng = np.random.default_rng(len(gate) + 10 * len(segments))
    gates = jnp.asarray(make_gate(gate, rng, 2, 37, 5))
    ids = make_segments(segments, rng, 2, 37)
    ids = None if ids is None else jnp.asarray(ids)
    windows = (1, 3, 11, 37, 101)
    got = mask_of(select_keys(gates, windows, ids, causal=causal), ids, causal)
    np.testing.assert_array_equal(got, visible_keys_oracle(gates, windows, causal=causal, segment_ids=ids), strict=True)


@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 127, 128, 129])
def test_lengths_around_powers_of_two(length):
    windows = (1, 2, 31, 32, 127)
    gates = jnp.asarray(make_gate("rounded", np.random.default_rng(length), 1, length, 5))
    got = mask_of(select_keys(gates, windows), None)
    np.testing.assert_array_equal(got, visible_keys_oracle(gates, windows))


def test_ties_go_to_the_later_key():
    """Every gate equal is a sliding window: exactly w keys, the latest."""
    expiry = select_keys(jnp.full((2, 41, 3), 0.5), (1, 7, 41))
    documents = document_bounds(None, 2, 41)
    np.testing.assert_array_equal(np.moveaxis(expiry, 2, 1), last_keys((1, 7, 41), documents).expiry)
    np.testing.assert_array_equal(expiry[0, :, 1], np.minimum(np.arange(41) + 7, 41))


def test_negative_zero_ties_with_zero():
    zeros = jnp.zeros((1, 19, 1))
    signed = jnp.where(jnp.arange(19)[None, :, None] % 3 == 0, -0.0, zeros)
    np.testing.assert_array_equal(select_keys(signed, 4), select_keys(zeros, 4))


def test_minus_infinity_is_never_visible_and_takes_no_place():
    gates = np.array([1.0, -np.inf, 2.0, -np.inf, -np.inf, 0.0], np.float32)[None, :, None]
    np.testing.assert_array_equal(select_keys(jnp.asarray(gates), 2)[0, :, 0], [6, 1, 6, 3, 4, 5])
    np.testing.assert_array_equal(select_keys(jnp.asarray(gates), 99)[0, :, 0], [6, 1, 6, 3, 4, 6])


def test_infinity_and_nan_rank_above_all_numbers():
    gates = np.array([np.nan, np.inf, 3e38, 0.0, 1.0], np.float32)[None, :, None]
    np.testing.assert_array_equal(select_keys(jnp.asarray(gates), 2)[0, :, 0], [5, 5, 2, 3, 4])


def test_a_prefix_selects_as_the_whole_does():
    """No look ahead: lifetimes of a prefix are those of the whole, cut off at its end."""
    gates = jnp.asarray(make_gate("walk", np.random.default_rng(3), 2, 97, 3))
    whole = select_keys(gates, 13)
    for cut in (1, 12, 13, 14, 60, 96):
        np.testing.assert_array_equal(select_keys(gates[:, :cut], 13), np.minimum(whole[:, :cut], cut))


def test_packed_documents_select_as_they_do_alone():
    gates = jnp.asarray(make_gate("rounded", np.random.default_rng(4), 1, 60, 2))
    ids = jnp.asarray(np.repeat([1, 2, 3], [17, 1, 42])[None])
    packed = select_keys(gates, 5, ids)
    for begin, end in ((0, 17), (17, 18), (18, 60)):
        alone = select_keys(gates[:, begin:end], 5)
        np.testing.assert_array_equal(packed[:, begin:end], alone + begin)


def test_no_gradient_flows_through_the_choice():
    gates = jnp.asarray(make_gate("random", np.random.default_rng(5), 1, 23, 1))
    slope = jax.grad(lambda gate: select_keys(gate, 4).sum() * 1.0)(gates)
    np.testing.assert_array_equal(slope, 0)


def test_memory_is_linear():
    def temporary(length):
        shape = jax.ShapeDtypeStruct((1, length, 2), jnp.float32)
        compiled = jax.jit(lambda gate: select_keys(gate, 256)).lower(shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(16_384), temporary(65_536)
    assert large < 4.5 * small
    assert large < 64 * 65_536 * 2 * 4


def test_document_positions_restart():
    ids = jnp.asarray([[0, 0, 4, 4, 0, 4, 9, 9, 0, 4]])
    np.testing.assert_array_equal(document_positions(ids, 10)[0, [2, 3, 5, 6, 7, 9]], [0, 1, 2, 0, 1, 0])


def test_document_bounds():
    bounds = document_bounds(jnp.asarray([[0, 0, 4, 4, 0, 4, 9, 9, 0, 4, 0]]), 1, 11)
    np.testing.assert_array_equal(bounds.start[0, 2:], [2, 2, 2, 2, 6, 6, 6, 9, 9])
    np.testing.assert_array_equal(bounds.end[0], [0, 0, 6, 6, 6, 6, 8, 8, 8, 10, 10])
    np.testing.assert_array_equal(bounds.token[0], [0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 0])
