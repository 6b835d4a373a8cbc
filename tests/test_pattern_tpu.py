"""The Mosaic TPU kernel of pattern attention: interpreted, against a dense float64 reference and the portable path."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.patterns import IMPLEMENTATIONS, Patterns, Places, pattern_attention
from pallas_kernels.tpu.config import interpreted

DIM = 40


@pytest.fixture
def on_xla():
    jax.clear_caches()
    with interpreted():
        yield


def make_masks(heads, *, side, distances, columns, seed=0):
    """Scattered bits, a band of neighbours, an empty head, a head of columns alone, and one that sees all of the map."""
    random = np.random.default_rng(seed)
    inside = random.random((heads, side, side)) < 0.2
    diagonals = random.random((heads, distances)) < 4 / distances
    verticals = random.random((heads, columns)) < 9 / columns
    diagonals[:, distances // 2 : distances // 2 + 7] = True
    inside[0], diagonals[0], verticals[0] = False, False, False
    diagonals[1 % heads] = False
    inside[-1] = True
    return inside, diagonals, verticals


def packed(inside, diagonals, verticals, kv_heads):
    union = verticals.reshape(kv_heads, -1, verticals.shape[1]).any(1)
    columns = np.full((kv_heads, max(1, union.sum(1).max())), -1, np.int32)
    for head in range(kv_heads):
        columns[head, : union[head].sum()] = np.flatnonzero(union[head])
    reach = max(inside.shape[1], diagonals.shape[1])
    return Patterns(*map(jnp.asarray, (inside, diagonals, verticals, columns)), reach=reach)


def visible(inside, diagonals, verticals, token):
    """The rule of the paper, cell by cell: [B, H, T, T] for rows of one document from position 0."""
    length = token.shape[1]
    i, j = np.indices((length, length))

    def bits(vectors, at):
        inside = (at >= 0) & (at < vectors.shape[1])
        return vectors[:, np.clip(at, 0, vectors.shape[1] - 1)] & inside

    side = inside.shape[1]
    mapped = inside[:, np.minimum(i, side - 1), np.minimum(j, side - 1)]
    shown = np.where(i < side, mapped, bits(diagonals, i - j) | bits(verticals, j)) & (j <= i)
    return shown & (token[:, None, :, None] & token[:, None, None, :])


def reference(query, key, value, shown):
    group = query.shape[2] // key.shape[2]
    key, value = (np.repeat(array, group, axis=2) for array in (key, value))
    logits = np.einsum("bthd,bshd->bhts", query, key) * query.shape[3] ** -0.5
    weights = np.where(shown, np.exp(logits), 0)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshd->bthd", weights / np.where(total == 0, 1, total), value)


def arrays(length, heads, kv_heads, dim=DIM, batch=2, seed=1):
    random = np.random.default_rng(seed)
    return [random.normal(size=(batch, length, count, dim)) for count in (heads, kv_heads, kv_heads)]


def places_of(token):
    index = jnp.broadcast_to(jnp.arange(token.shape[1], dtype=jnp.int32), token.shape)
    return Places(index, jnp.where(jnp.asarray(token), 0, -1))


@functools.partial(jax.jit, static_argnames=("name", "dtype"))
def attend(query, key, value, patterns, places, name="mosaic_tpu", dtype="float32"):
    query, key, value = (array.astype(dtype) for array in (query, key, value))
    scale = query.shape[3] ** -0.5
    return pattern_attention(query, key, value, patterns, places, places, scale=scale, implementation=name)


# heads, kv heads, length, side of the map, distances, columns
SHAPES = {
    "below the map": (4, 2, 701, 150, 300, 650),
    "in the map": (3, 1, 251, 307, 263, 40),
    "short bands": (6, 1, 523, 128, 1, 17),
}


@pytest.mark.parametrize("shape", ["below the map", *(pytest.param(k, marks=pytest.mark.slow) for k in list(SHAPES)[1:])])
def test_equals_the_dense_reference(on_xla, shape):
    heads, kv_heads, length, side, distances, columns = SHAPES[shape]
    masks = make_masks(heads, side=side, distances=distances, columns=columns)
    inputs = arrays(length, heads, kv_heads)
    # Padding within and after.
    token = np.random.default_rng(3).random((2, length)) < 0.9
    token[:, length - 20 :] = False
    want = reference(*inputs, visible(*masks, token))
    got = attend(*inputs, packed(*masks, kv_heads), places_of(token))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=4e-6)
    assert not np.asarray(got)[:, :, 0].any()
