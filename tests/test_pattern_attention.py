"""Pattern attention against a dense float64 reference that knows nothing of blocks, bands or gathered columns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.patterns.xla as xla
from dmattn_jax.documents import document_bounds
from dmattn_jax.pattern_cache import PatternCache
from pallas_kernels.patterns import Patterns, Places, pattern_attention

BATCH, HEADS, KV_HEADS, DIM, SIDE, DISTANCES, COLUMNS, LENGTH = 2, 6, 3, 5, 13, 11, 17, 61


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of queries and keys, the last ones partial."""
    monkeypatch.setattr(xla, "BLOCK", 7)


def make_patterns(seed=0, distances=DISTANCES, columns=COLUMNS, share=0.3):
    """Random patterns with an empty head, a head that sees all of the map, and one of columns alone."""
    random = np.random.default_rng(seed)
    inside = np.tril(random.random((HEADS, SIDE, SIDE)) < share)
    diagonals = random.random((HEADS, distances)) < share
    verticals = random.random((HEADS, columns)) < share / 2
    inside[0], diagonals[0], verticals[0] = False, False, False
    inside[1] = np.tril(np.ones((SIDE, SIDE), bool))
    diagonals[2] = False
    return inside, diagonals, verticals


def packed(inside, diagonals, verticals):
    group = HEADS // KV_HEADS
    union = verticals.reshape(KV_HEADS, group, -1).any(1)
    columns = np.full((KV_HEADS, max(1, union.sum(1).max())), -1, np.int32)
    reach = int(np.flatnonzero(diagonals.any(0)).max(initial=0)) + 1
    for head in range(KV_HEADS):
        columns[head, : union[head].sum()] = np.flatnonzero(union[head])
        query, key = np.nonzero(inside[head * group : (head + 1) * group].any(0))
        reach = max([reach, *(q - k + 1 for q, k in zip(query, key, strict=True) if not union[head][k])])
    return Patterns(*map(jnp.asarray, (inside, diagonals, verticals, columns)), reach=int(reach))


def visible(inside, diagonals, verticals, segment_ids):
    """The rule of the paper cell by cell: [B, H, T, T]."""
    batch, length = segment_ids.shape
    out = np.zeros((batch, HEADS, length, length), bool)
    for row in range(batch):
        start = 0
        for i in range(length):
            if i and segment_ids[row, i] != segment_ids[row, i - 1]:
                start = i
            for j in range(start, i + 1):
                if not segment_ids[row, i]:
                    continue
                p, c, r = i - start, j - start, i - j
                for head in range(HEADS):
                    if p < SIDE:
                        out[row, head, i, j] = inside[head, p, c]
                    else:
                        on_diagonal = r < diagonals.shape[1] and diagonals[head, r]
                        out[row, head, i, j] = on_diagonal or (c < verticals.shape[1] and verticals[head, c])
    return out


def reference(query, key, value, shown):
    key, value = (np.repeat(array, HEADS // KV_HEADS, axis=2) for array in (key, value))
    logits = np.einsum("bthd,bshd->bhts", query, key) * DIM**-0.5
    weights = np.where(shown, np.exp(logits), 0)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshd->bthd", weights / np.where(total == 0, 1, total), value)


def arrays(seed=1, length=LENGTH):
    random = np.random.default_rng(seed)
    return [random.normal(size=(BATCH, length, heads, DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def places_of(segment_ids):
    documents = document_bounds(jnp.asarray(segment_ids), *segment_ids.shape)
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    return Places(index, jnp.where(documents.token, documents.start, -1))


@functools.partial(jax.jit, static_argnames="dtype")
def attend(query, key, value, patterns, places, dtype="float32"):
    query, key, value = (array.astype(dtype) for array in (query, key, value))
    return pattern_attention(query, key, value, patterns, places, places, scale=DIM**-0.5)


ONE = np.ones((BATCH, LENGTH), np.int32)
PACKED = np.array([[1] * 3 + [2] * 41 + [3] * 17, [4] * 20 + [5] * 2 + [6] * 32 + [0] * 7], np.int32)


@pytest.mark.parametrize("segment_ids", [ONE, PACKED], ids=["one", "packed"])
@pytest.mark.parametrize("distances", [1, DISTANCES, 29])
def test_equals_the_dense_reference(distances, segment_ids):
    masks = make_patterns(distances=distances)
    inputs = arrays()
    want = reference(*inputs, visible(*masks, segment_ids))
    with jax.enable_x64(True):
        got = attend(*inputs, packed(*masks), places_of(segment_ids), dtype="float64")
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)
    assert not np.asarray(got)[:, :, 0].any()


def test_no_vertical_and_no_diagonal_anywhere():
    inside, diagonals, verticals = make_patterns()
    want = visible(inside, diagonals, np.zeros_like(verticals), ONE), visible(inside, diagonals & False, verticals, ONE)
    inputs = arrays()
    for masks, shown in zip(
        ((inside, diagonals, np.zeros_like(verticals)), (inside, diagonals & False, verticals)), want, strict=True
    ):
        with jax.enable_x64(True):
            got = attend(*inputs, packed(*masks), places_of(ONE), dtype="float64")
        np.testing.assert_allclose(got, reference(*inputs, shown), rtol=1e-12, atol=1e-13)


def test_what_is_masked_may_be_anything():
    masks = make_patterns()
    seen = visible(*masks, ONE).any((0, 1))
    query, key, value = arrays()
    places, patterns = places_of(ONE), packed(*masks)
    before = np.asarray(attend(query, key, value, patterns, places))
    # a key in the middle: those who do not see it, in any head, keep every bit
    victim = 23
    key[:, victim], value[:, victim] = np.nan, np.inf
    after = np.asarray(attend(query, key, value, patterns, places))
    np.testing.assert_array_equal(after[:, ~seen[:, victim]], before[:, ~seen[:, victim]])
    assert np.isnan(after[:, seen[:, victim]]).any((0, 2, 3)).all()


def test_the_future_changes_no_bit():
    patterns, places = packed(*make_patterns()), places_of(ONE)
    query, key, value = arrays()
    before = np.asarray(attend(query, key, value, patterns, places))
    for cut in (1, 12, 40):
        changed = [array.copy() for array in (query, key, value)]
        for array in changed:
            array[:, cut:] += 1000
        np.testing.assert_array_equal(np.asarray(attend(*changed, patterns, places))[:, :cut], before[:, :cut])


def cached(inputs, patterns, chunks, tokens=None):
    """Outputs of the chunks one after another, through a cache."""
    query, key, value = (jnp.asarray(array, jnp.float32) for array in inputs)
    cache = PatternCache.create(
        BATCH, patterns.reach, patterns.columns.shape[1], KV_HEADS, DIM, max_length=query.shape[1]
    )
    parts, at = [], 0
    for size in chunks:
        token = jnp.ones((BATCH, size), bool) if tokens is None else tokens[:, at : at + size]
        out, cache = _step(
            query[:, at : at + size], key[:, at : at + size], value[:, at : at + size], token, cache, patterns
        )
        parts.append(np.asarray(out))
        at += size
    return np.concatenate(parts, axis=1), cache


@jax.jit
def _step(query, key, value, token, cache, patterns):
    position = cache.length[:, None] + jnp.cumsum(token, 1, dtype=jnp.int32) - 1
    own = Places(position, jnp.where(token, 0, -1))
    keys, values, places = cache.joined(key, value, own)
    after = cache.append(key, value, token, patterns.columns)
    kept = after.kept(patterns.columns, jnp.float32)
    return pattern_attention(query, keys, values, patterns, own, places, kept, scale=DIM**-0.5), after


@pytest.mark.parametrize(
    "chunks", [(LENGTH,), (1,) * 30 + (31,), (40, *(1,) * 21), pytest.param((5, 19, 1, 30, 6), marks=pytest.mark.slow)]
)
def test_any_split_is_the_whole(chunks):
    masks = make_patterns()
    patterns = packed(*masks)
    inputs = arrays()
    want = reference(*inputs, visible(*masks, ONE))
    got, cache = cached(inputs, patterns, chunks)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    # bounded, and smaller than what was read
    assert cache.keys.shape[2] == patterns.reach <= max(SIDE, DISTANCES)
    assert cache.column_keys.shape[2] == patterns.columns.shape[1] < COLUMNS


def test_padding_in_a_chunk_takes_no_position():
    masks = make_patterns()
    inputs = arrays()
    random = np.random.default_rng(5)
    tokens = random.random((BATCH, LENGTH)) < 0.6
    got, _ = cached(inputs, packed(*masks), (20, 20, 21), jnp.asarray(tokens))
    for row in range(BATCH):
        own = [np.repeat(array[row : row + 1, tokens[row]], BATCH, 0) for array in inputs]
        want = reference(*own, visible(*masks, np.ones(own[0].shape[:2], np.int32)))[0]
        np.testing.assert_allclose(got[row, tokens[row]], want, rtol=2e-5, atol=2e-6)
        assert not got[row, ~tokens[row]].any()


def test_no_array_of_all_pairs():
    length = 4096
    masks = make_patterns()
    shape = jax.ShapeDtypeStruct
    places = Places(*(shape((1, length), jnp.int32),) * 2)
    inputs = [shape((1, length, heads, DIM), jnp.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    lowered = jax.jit(functools.partial(pattern_attention, scale=1.0)).lower(*inputs, packed(*masks), places, places)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 4 * HEADS * length * DIM * 4 + 2**20
