"""What of pattern attention on Hopper runs or lowers without a GPU: masks as words, visits, biases, and the kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.patterns import Patterns, Places, pattern_attention
from pallas_kernels.patterns.gpu import MAX_HEAD_SIZE, MOSAIC_GPU, of_one_document, unsupported
from pallas_kernels.patterns.slabs import HALF, NEVER, TILE, WORDS, biases, visits

BATCH, HEADS, KV_HEADS = 2, 6, 3


def make_patterns(seed, side, reach, columns, window=0):
    """Random bits, an empty head, one of columns alone, and a window, whose tiles are full."""
    random = np.random.default_rng(seed)
    inside = np.tril(random.random((HEADS, side, side)) < 0.3)
    diagonals = random.random((HEADS, reach)) < 0.03
    verticals = random.random((HEADS, columns)) < 0.2
    inside[0], diagonals[0], verticals[0] = False, False, False
    diagonals[1] = False
    diagonals[2, :window] = True
    verticals[3] = False
    union = verticals.reshape(KV_HEADS, -1, columns).any(1)
    listed = np.full((KV_HEADS, max(1, union.sum(1).max())), -1, np.int32)
    for head in range(KV_HEADS):
        listed[head, : union[head].sum()] = np.flatnonzero(union[head])
    return Patterns(*map(jnp.asarray, (inside, diagonals, verticals, listed)), reach=max(side, reach))


def visible(patterns, length):
    """The rule of the contract, cell by cell, for one document: [H, T, T]."""
    inside, diagonals, verticals = (np.asarray(a) for a in (patterns.inside, patterns.diagonals, patterns.verticals))
    side, reach, columns = inside.shape[1], diagonals.shape[1], verticals.shape[1]
    row, column = np.indices((length, length))
    distance = row - column
    near = inside[:, np.minimum(row, side - 1), np.minimum(column, side - 1)] & (column < side)
    far = diagonals[:, np.clip(distance, 0, reach - 1)] & (distance < reach)
    far |= verticals[:, np.minimum(column, columns - 1)] & (column < columns)
    return np.where(row < side, near, far) & (distance >= 0)


def walked(patterns, seen, meta, length):
    """How often each pair is counted, as the kernel goes from tile to tile: [B, H, T, T]; and the tiles seen whole."""
    masks, back, runs, columns = map(np.asarray, (seen.masks, seen.back, seen.runs, seen.columns))
    near, counts, whole_tiles = seen.near, np.zeros((BATCH, HEADS, length, length), int), 0
    for head, tile in np.ndindex(HEADS, length // TILE):
        whole, fulls, hole, masked, count = runs[head, :, tile]
        assert 0 <= whole <= fulls <= masked <= count or tile < near
        rows = slice(tile * TILE, (tile + 1) * TILE)
        for number in range(count):
            shown = np.ones((TILE, TILE), bool)
            if number < masked:
                if tile < near:
                    keys, mask, where = number, tile * near + number, number
                else:
                    distance = back[head, number if number < fulls else number + hole]
                    keys, mask, where = tile - distance, near * near + distance, near + tile - distance
                if number >= whole:
                    words = masks[head, mask].transpose(0, 2, 1).reshape(TILE, WORDS)
                    shown = (words[:, np.arange(TILE) // 32] >> (np.arange(TILE) % 32)) & 1 == 1
                at = np.arange(keys * TILE, (keys + 1) * TILE)
                where *= TILE
            else:
                place = (number - masked) * TILE
                at = columns[head, place : place + TILE]
                where = near * TILE + length + place
                start = meta[0, head, 1, where : where + TILE]
                shown = start <= np.arange(rows.start, rows.stop)[:, None]
                at = np.where(at == NEVER, 0, at)
            whole_tiles += number < whole
            for item in range(BATCH):
                added = shown & ~np.isneginf(meta[item, head, 0, where : where + TILE])
                np.add.at(counts[item, head, rows], (slice(None), at), added)
    return counts, whole_tiles


@pytest.mark.parametrize(
    ("length", "side", "reach", "columns", "window"),
    [
        (5 * TILE, 130, 201, 41, 0),
        (6 * TILE, 1, 3 * TILE + 2, 7, 3 * TILE - 1),
        pytest.param(4 * TILE, 2 * TILE, 37, 3 * TILE, 0, marks=pytest.mark.slow),
        pytest.param(2 * TILE, 300, 401, 350, 290, marks=pytest.mark.slow),
        pytest.param(5 * TILE, 5, 5 * TILE, 150, 5 * TILE, marks=pytest.mark.slow),
    ],
)
def test_every_visible_pair_is_visited_once(length, side, reach, columns, window):
    patterns = make_patterns(length + side, side, reach, columns, window)
    bias = np.zeros((BATCH, KV_HEADS, length), np.float32)
    bias[1, :, length - 23 :] = -np.inf
    bias[1, 2, 5] = -np.inf
    seen = jax.jit(lambda patterns: visits(patterns, length).__dict__)(patterns)
    seen = type("Seen", (), seen)
    meta = np.asarray(biases(patterns, seen, jnp.asarray(bias)))
    counts, whole_tiles = walked(patterns, seen, meta, length)
    hidden = np.isneginf(np.repeat(bias, HEADS // KV_HEADS, axis=1))
    want = visible(patterns, length)[None] & ~hidden[:, :, None, :]
    np.testing.assert_array_equal(counts, want)
    # Full tiles are known as such: of a window that is wide enough, beside the columns.
    if window >= 2 * TILE and seen.near == 1:
        assert whole_tiles > 0
    # Tiles that hold nothing are not visited, but those of the map.
    near = seen.near
    runs = np.asarray(seen.runs)[:, :, near:]
    assert not runs[0].any()
    by_tile = want[0].reshape(HEADS, length // TILE, TILE, length // TILE, TILE).any((2, 4))[:, near:]
    columns_only = np.asarray(patterns.verticals)[1].any()
    assert (runs[1, 4] == (1 if columns_only else 0) * -(-np.minimum(columns, TILE) // TILE)).all() or columns > TILE
    assert (runs[4, 3] <= by_tile[4].sum(1)).all()


def test_halves_of_a_tile_are_the_consumers():
    """Word m of query t of half h of the mask on the diagonal is keys 32 m … of row 64 h + t."""
    patterns = make_patterns(3, 2 * TILE, 5, 5)
    masks = np.asarray(jax.jit(lambda patterns: visits(patterns, 3 * TILE).masks)(patterns))
    inside = np.asarray(patterns.inside)
    for half, word, row in ((0, 0, 63), (1, 2, 17), (1, 3, 63)):
        bits = masks[4, 0, half, word, row] >> np.arange(32) & 1
        np.testing.assert_array_equal(bits, inside[4, half * HALF + row, 32 * word : 32 * word + 32])


@pytest.mark.usefixtures("only_signed_integers")
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "dim", "dtype", "side"),
    [(1031, 6, 3, 64, jnp.bfloat16, 200), pytest.param(300, 4, 1, 72, jnp.float16, 1, marks=pytest.mark.slow)],
)
def test_the_kernel_lowers_for_cuda(length, heads, kv_heads, dim, dtype, side):
    shape = jax.ShapeDtypeStruct
    patterns = Patterns(
        shape((heads, side, side), bool),
        shape((heads, 211), bool),
        shape((heads, 17), bool),
        shape((kv_heads, 5), jnp.int32),
        211,
    )
    query = shape((2, length, heads, dim), dtype)
    key = shape((2, length, kv_heads, dim), dtype)
    run = jax.jit(functools.partial(of_one_document, scale=0.1))
    program = run.trace(query, key, key, patterns, shape((2, length), bool)).lower(lowering_platforms=("cuda",))
    assert program.as_text().count("stablehlo.custom_call @mosaic_gpu") == 1


def test_what_it_does_not_take_is_said(monkeypatch):
    patterns = make_patterns(0, 13, 11, 17)
    query, key = jnp.zeros((1, 16, HEADS, 64), jnp.float32), jnp.zeros((1, 16, KV_HEADS, 64), jnp.float32)
    places = Places(*(jnp.zeros((1, 16), jnp.int32),) * 2)
    attend = functools.partial(pattern_attention, query, key, key, patterns, places, places, scale=1.0)
    # As on a machine without one, also where there is one.
    monkeypatch.setitem(MOSAIC_GPU.__dict__, "unavailable", lambda: "it needs an NVIDIA Hopper GPU")
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot run here: it needs an NVIDIA Hopper GPU"):
        attend(implementation="mosaic_gpu")
    monkeypatch.setitem(MOSAIC_GPU.__dict__, "unavailable", lambda: None)
    with pytest.raises(ValueError, match="it multiplies bfloat16 or float16, not float32"):
        attend(implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=r"implementation must be None or one of .*'xla', got 'cuda'"):
        attend(implementation="cuda")
    half = query.astype(jnp.bfloat16)
    assert "not to a cache" in unsupported(half[:, :3], key, None)
    wide = jnp.zeros((1, 16, HEADS, MAX_HEAD_SIZE + 8), jnp.bfloat16)
    assert "head sizes up to 128, not 136" in unsupported(wide, wide, None)
    assert unsupported(half, key.astype(jnp.bfloat16), None) is None
