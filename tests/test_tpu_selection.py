"""The TPU's own choice of keys and lists, interpreted by XLA, bit for bit what the portable functions make."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import GATES, make_gate, make_segments

from dmattn_jax.documents import document_bounds
from dmattn_jax.layout import lay_out
from dmattn_jax.selection import choose_keys
from pallas_kernels.tpu.config import TpuBlockSizes, compiling_for, interpreted
from pallas_kernels.tpu.selection import select

SMALL = TpuBlockSizes(epoch=128, block_q=128, block_k=128, granule=256, wide=256, chunk=256)

# [B, S], windows of the heads, queries. Without lists where the longest window and an epoch reach the row's length.
CONTINUED = ((2, 397), (40, 150, 3), 201)
SHAPES = [
    ((1, 577), (257, 1, 130, 128, 127), 577),
    ((1, 1031), (300,), 700),
    ((3, 300), (200, 40), 300),
    ((1, 128), (7,), 128),
]


@cache
def programs(shape, windows, queries):
    """Intervals by the kernels and by the portable functions: gate [B, S, K], ids [B, S] -> Intervals."""

    def ours(gate, ids):
        documents = document_bounds(ids, *shape)
        gate = jnp.where(documents.token[:, None], jnp.moveaxis(gate, 2, 1), -jnp.inf)
        with interpreted():
            return select(gate, windows, documents.start, documents.end, queries=queries, blocks=SMALL)

    def portable(gate, ids):
        choice = choose_keys(jnp.moveaxis(gate, 2, 1), windows, document_bounds(ids, *shape), causal=True)
        return lay_out(choice, queries=queries, window=max(windows), blocks=SMALL)

    return jax.jit(ours), jax.jit(portable)


def check_equal(shape, windows, queries, gate, ids):
    got, want = (program(jnp.asarray(gate), jnp.asarray(ids)) for program in programs(shape, windows, queries))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def make_ids(segments, rng, shape):
    if segments == "many":
        return 1 + np.cumsum(rng.random(shape) < 0.2, axis=1, dtype=np.int32)
    ids = make_segments(segments, rng, *shape)
    return np.ones(shape, np.int32) if ids is None else ids


@pytest.mark.parametrize("segments", ["none", "packed", "left", "inside", "returning", "empty", "many"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("case", [CONTINUED, *(pytest.param(case, marks=pytest.mark.slow) for case in SHAPES)])
def test_chosen_as_by_the_portable_functions(case, gate, segments):
    """History before the first query, heads of unequal windows, and a row that fills no whole number of epochs."""
    shape, windows, queries = case
    rng = np.random.default_rng(len(gate) + 10 * len(segments))
    check_equal(shape, windows, queries, make_gate(gate, rng, *shape, len(windows)), make_ids(segments, rng, shape))


@pytest.mark.parametrize("segments", ["none", "inside"])
def test_special_numbers_rank_as_they_do_elsewhere(segments):
    """Ties of NaN, of infinities, and of −0 with 0; denormals."""
    shape, windows, queries = CONTINUED
    rng = np.random.default_rng(3)
    gate = make_gate("rounded", rng, *shape, len(windows))
    for value in (np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40):
        gate = np.where(rng.random(gate.shape) < 0.06, np.float32(value), gate)
    check_equal(shape, windows, queries, gate, make_ids(segments, rng, shape))


def test_shapes_it_does_not_take():
    documents = document_bounds(None, 1, 40_000)
    gate = jnp.zeros((1, 1, 40_000))
    assert select(gate, (33_000,), documents.start, documents.end, queries=40_000, blocks=SMALL) is None


@pytest.mark.slow
@pytest.mark.parametrize(("window", "length"), [(9000, 20_000), (32_768, 36_000)])
def test_long_windows(monkeypatch, window, length):
    """Counts of more slots than bfloat16 holds exactly, in epochs as long as the kernels take."""
    monkeypatch.setattr(sys.modules[__name__], "SMALL", replace(SMALL, epoch=2048, granule=512))
    with compiling_for("TPU v5 lite"):
        gate = make_gate("random", np.random.default_rng(0), 1, length, 1)
        check_equal((1, length), (window,), length, gate, np.ones((1, length), np.int32))
