"""The Mosaic TPU kernel of pattern attention: interpreted, against a dense float64 reference and the portable path."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.patterns import IMPLEMENTATIONS, Patterns, Places, pattern_attention, tpu
from pallas_kernels.tpu.config import interpreted

DIM = 40


@pytest.fixture
def on_xla():
    jax.clear_caches()
    with interpreted():
        yield
    jax.clear_caches()


def make_masks(heads, *, side, distances, columns, seed=0):
    """Scattered bits, a band of neighbours, an empty head, a head of columns alone, one that sees all of the map."""
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


@pytest.mark.parametrize(
    "shape", [pytest.param(name, marks=pytest.mark.slow) if name != "below the map" else name for name in SHAPES]
)
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


def case(shape, dtype="float32", seed=1):
    heads, kv_heads, length, side, distances, columns = SHAPES[shape]
    masks = make_masks(heads, side=side, distances=distances, columns=columns)
    inputs = [array.astype(dtype) for array in arrays(length, heads, kv_heads, seed=seed)]
    return masks, inputs, packed(*masks, kv_heads), np.ones((2, length), bool)


def test_what_is_masked_may_be_anything_and_the_future_changes_no_bit(on_xla):
    masks, (query, key, value), patterns, token = case("below the map")
    places, shown = places_of(token), visible(*masks, token)
    before = np.asarray(attend(query, key, value, patterns, places))
    for victim in (3, 160, 433):
        own_key, own_value = key.copy(), value.copy()
        own_key[:, victim], own_value[:, victim] = np.nan, np.inf
        after = np.asarray(attend(query, own_key, own_value, patterns, places))
        sees = shown[0, :, :, victim].T
        np.testing.assert_array_equal(after[:, ~sees], before[:, ~sees])
        assert np.isnan(after[:, sees]).all()
    for cut in (1, 149, 512):
        future = np.arange(query.shape[1])[:, None, None] >= cut
        late = [np.where(future, np.nan, array) for array in (query, key, value)]
        np.testing.assert_array_equal(attend(*late, patterns, places)[:, :cut], before[:, :cut])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_portable_path_gives_the_same(on_xla, dtype):
    """Several documents a row, and documents that do not begin at 0, take that path: they are equal to the bit."""
    _, inputs, patterns, token = case("short bands")
    ours, portable = (
        np.asarray(attend(*inputs, patterns, places_of(token), name=name, dtype=dtype), np.float64)
        for name in ("mosaic_tpu", "xla")
    )
    np.testing.assert_allclose(ours, portable, rtol=0, atol={"float32": 2e-6, "bfloat16": 3e-2}[dtype])
    later = np.arange(token.shape[1]) >= 211
    places = Places(places_of(token).order, jnp.asarray(np.where(later, 211, 0)[None].repeat(2, 0), jnp.int32))
    ours, portable = (attend(*inputs, patterns, places, name=name, dtype=dtype) for name in ("mosaic_tpu", "xla"))
    np.testing.assert_array_equal(ours, portable)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_head_sizes_and_large_groups(on_xla, dim):
    """Eight query heads of a kv head are tiles of 128 positions."""
    masks = make_masks(8, side=130, distances=140, columns=300)
    inputs = arrays(431, 8, 1, dim=dim, batch=1)
    token = np.ones((1, 431), bool)
    want = reference(*inputs, visible(*masks, token))
    got = attend(*inputs, packed(*masks, 1), places_of(token))
    np.testing.assert_allclose(got, want, rtol=5e-5, atol=1e-5)


@pytest.mark.slow
def test_no_races_in_a_simulated_tpu(capfd):
    masks, inputs, patterns, token = case("short bands")
    want = reference(*inputs, visible(*masks, token))
    jax.clear_caches()
    with interpreted(pltpu.InterpretParams(detect_races=True)):
        got, again = (np.asarray(attend(*inputs, patterns, places_of(token))) for _ in range(2))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=4e-6)
    np.testing.assert_array_equal(got, again)
    jax.clear_caches()
    assert "RACE" not in "".join(capfd.readouterr()).upper()


def test_only_blocks_that_hold_something_are_visited():
    random = np.random.default_rng(0)
    block, reach, size = 16, 150, 5
    diagonals = random.random((3, reach)) < 0.03
    mapped = random.random((3, size * size)) < 0.3
    blocks = -(-(reach + block - 1) // block)
    columns = jnp.zeros((3, block), jnp.int32)
    visits = tpu._visits(jnp.asarray(diagonals), jnp.asarray(mapped), size, blocks, columns, block)
    distance = block * np.arange(blocks)[:, None, None] + np.arange(block)[:, None] - np.arange(block)
    for head in range(3):
        hit = np.isin(distance, np.flatnonzero(diagonals[head])).any((1, 2))
        listed = np.asarray(visits.distances).reshape(3, -1)[head, : visits.count_distances[head]]
        np.testing.assert_array_equal(listed, np.flatnonzero(hit))
        for tile in range(size):
            count = visits.count_mapped[head * size + tile]
            listed = np.asarray(visits.mapped).reshape(3, size, size)[head, tile, :count]
            np.testing.assert_array_equal(listed, np.flatnonzero(mapped[head, tile * size : (tile + 1) * size]))


def test_what_cannot_run_is_refused_by_name():
    _, inputs, patterns, token = case("short bands")
    with pytest.raises(ValueError, match="'mosaic_tpu' cannot run here: it needs a TPU"):
        attend(*inputs, patterns, places_of(token))
    with pytest.raises(ValueError, match=r"must be None or one of .*'xla', got 'triton'"):
        attend(*inputs, patterns, places_of(token), name="triton")
    queries = inputs[0][:, :5]
    assert "not to a cache" in IMPLEMENTATIONS["mosaic_tpu"].unsupported(queries, inputs[1], None)
