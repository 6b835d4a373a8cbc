"""What of the Hopper implementation runs or lowers without a GPU: selection, slot tables, sums, and all kernels."""

import dataclasses
from functools import partial

import each_kernel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import GATES, make_gate, make_segments

from dmattn_jax import dynamic_mask_attention
from dmattn_jax.documents import document_bounds
from dmattn_jax.layout import lay_out
from dmattn_jax.selection import choose_keys
from pallas_kernels import BlockSizes, Intervals
from pallas_kernels.gpu import MOSAIC_GPU, config, scratch, selection, tiles
from pallas_kernels.gpu.backward_key import KeyGradientSizes, key_gradients, parts_of
from pallas_kernels.gpu.backward_query import QueryGradientSizes, query_gradient
from pallas_kernels.gpu.config import (
    HEAD_SIZES,
    SHORT_ROW,
    HopperBlockSizes,
    block_sizes,
    native_head_size,
    unsupported,
)
from pallas_kernels.gpu.counting import MOST_KEYS, expiry_by_counting
from pallas_kernels.gpu.device import SHARED_MEMORY
from pallas_kernels.gpu.epoch_sums import sum_over_epochs
from pallas_kernels.gpu.forward import ForwardSizes, attend
from pallas_kernels.gpu.list_rows import listed_rows
from pallas_kernels.gpu.ranked import nth_set_bit, set_bits
from pallas_kernels.gpu.tiles import (
    BLOCK_Q,
    Rows,
    gather_rows,
    key_walks,
    query_runs,
    visits_of_keys,
    visits_of_queries,
)
from pallas_kernels.powers_of_two import LOG2E

BATCH, HEADS = 2, 3


def blocks_of(epoch: int) -> BlockSizes:
    return BlockSizes(epoch=epoch, granule=16)


def both_ways(windows, queries, epoch):
    """Compiled: (gate, segment_ids) -> intervals by the portable functions, and by the merge tree."""

    @jax.jit
    def run(gate, ids):
        documents = document_bounds(ids, gate.shape[0], gate.shape[2])
        choice = choose_keys(gate, windows, documents, causal=True)
        want = lay_out(choice, queries=queries, window=max(windows), blocks=blocks_of(epoch))
        gate = jnp.where(documents.token[:, None], gate, -jnp.inf)
        bounds = (None, None) if ids is None else (documents.start, documents.end)
        return want, MOSAIC_GPU.select(gate, windows, *bounds, queries=queries, blocks=blocks_of(epoch))

    return run


@pytest.mark.parametrize(
    ("length", "windows", "queries", "epoch", "most_keys"),
    [
        pytest.param(397, (67, 5, 33), 397, 64, MOST_KEYS, marks=pytest.mark.slow),
        (397, (67, 5, 33), 211, 64, MOST_KEYS),
        pytest.param(1021, (129, 1, 64), 1021, 128, MOST_KEYS, marks=pytest.mark.slow),
        pytest.param(700, (37, 700, 1), 333, 32, MOST_KEYS, marks=pytest.mark.slow),
        # Without lists: the keys of short rows are counted, those of longer ones merged.
        (130, (64, 7, 1), 130, 64, 130),
        (130, (64, 7, 1), 130, 64, 129),
        (397, (396, 1, 370), 211, 64, MOST_KEYS),
        (33, (30, 3, 32), 33, 32, MOST_KEYS),
        (65, (40, 40, 40), 65, 32, MOST_KEYS),
        pytest.param(517, (300, 1, 517), 517, 64, MOST_KEYS, marks=pytest.mark.slow),
        pytest.param(517, (300, 1, 517), 517, 64, 0, marks=pytest.mark.slow),
        pytest.param(1021, (960, 960, 960), 1021, 128, MOST_KEYS, marks=pytest.mark.slow),
    ],
)
def test_selection_is_the_portable_one(monkeypatch, length, windows, queries, epoch, most_keys):
    """Lifetimes and lists, integer by integer: ties, holes, infinities, documents, padding, a window per head."""
    monkeypatch.setattr(selection, "MOST_KEYS", most_keys)
    run = both_ways(windows, queries, epoch)
    for number, gate in enumerate((*GATES, "extreme")):
        for segments in ("none", "packed", "inside", "left", "returning"):
            rng = np.random.default_rng(number)
            values = make_gate("random" if gate == "extreme" else gate, rng, BATCH, length, HEADS)
            if gate == "extreme":
                special = rng.choice([np.inf, -np.inf, np.nan, 0.0, -0.0, 3e38], values.shape)
                values = np.where(rng.random(values.shape) < 0.3, special, values).astype(np.float32)
            ids = make_segments(segments, rng, BATCH, length)
            want, got = run(jnp.asarray(np.moveaxis(values, 2, 1)), ids)
            assert jax.tree.structure(want) == jax.tree.structure(got)
            for name, left, right in zip(
                ("start", "end", "index", "next_slot", "entry_slot"),
                jax.tree.leaves(want),
                jax.tree.leaves(got),
                strict=False,
            ):
                np.testing.assert_array_equal(left, right, err_msg=f"{name}, {gate} gate, {segments} documents")


@pytest.mark.parametrize("length", [1, 2])
def test_rows_of_a_key_or_two_are_counted(length):
    gate, zeros = jnp.asarray([[[1.0, 2.0][:length]]]), jnp.zeros((1, length), jnp.int32)
    expiry = expiry_by_counting(gate, (1,), zeros, zeros + length)
    assert expiry.tolist() == [[[1, 2][:length]]]


def test_windows_beyond_32_bits_are_counted():
    gate = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 300)), jnp.float32)
    many, row = (
        jax.jit(partial(expiry_by_counting, windows=(1, 50, w), start=None, end=None))(gate) for w in (2**31, 300)
    )
    np.testing.assert_array_equal(many, row)


def test_longer_rows_are_not_counted():
    gate = jnp.zeros((1, 1, MOST_KEYS + 1))
    with pytest.raises(ValueError, match="at most 4,096 keys to be counted, got 4,097"):
        expiry_by_counting(gate, (8,), gate[:, 0].astype(jnp.int32), gate[:, 0].astype(jnp.int32))


def test_gates_that_an_order_of_32_bits_would_tie_are_left_to_the_portable_choice():
    bounds = jnp.zeros((1, 4), jnp.int32), jnp.full((1, 4), 4, jnp.int32)
    for dtype, taken in ((jnp.float32, True), (jnp.bfloat16, True), (jnp.float64, False)):
        with jax.enable_x64(True):
            gate = jnp.asarray([[[1 + 1e-12, 1, 0, 0]]], dtype)
            found = MOSAIC_GPU.select(gate, (1,), *bounds, queries=4, blocks=blocks_of(64))
        assert (found is not None) == taken


def test_selection_refuses_epochs_that_do_not_halve():
    gate = jnp.zeros((1, 1, 400))
    bounds = (jnp.zeros((1, 400), jnp.int32), jnp.full((1, 400), 400, jnp.int32))
    with pytest.raises(ValueError, match="power of two"):
        MOSAIC_GPU.select(gate, (8,), *bounds, queries=400, blocks=blocks_of(96))


@pytest.mark.parametrize(
    ("programs", "group", "equal", "parts"),
    [
        (64, 4, True, 2),
        (32, 4, True, 4),
        (44, 6, True, 3),
        (66, 3, True, 1),
        (1, 16, True, 16),
        (133, 4, True, 1),
        (9, 1, True, 1),
        (128, 4, False, 2),
        (64, 4, False, 4),
        (133, 4, False, 1),
        (9, 1, False, 1),
    ],
)
def test_a_group_is_cut_where_multiprocessors_would_be_idle(programs, group, equal, parts):
    """Of an H100's 132 multiprocessors."""
    assert parts_of(programs, group, equal=equal) == parts


def test_bits():
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, 257).astype(np.int32)
    words[:3] = 0, -1, np.iinfo(np.int32).min
    for which in (0, 1, 2, 13, 31, 32, 33):
        places = np.asarray(nth_set_bit(jnp.asarray(words), jnp.full(words.shape, which, jnp.int32)))
        for word, place in zip(words.tolist(), places.tolist(), strict=True):
            bits = [bit for bit in range(32) if word >> bit & 1]
            assert place == (0 if which < 1 else bits[which - 1] if which <= len(bits) else 32)
    np.testing.assert_array_equal(set_bits(jnp.asarray(words)), [(word % 2**32).bit_count() for word in words.tolist()])


@pytest.mark.parametrize(
    ("queries", "dim", "dtype"),
    [
        (211, 128, jnp.bfloat16),
        pytest.param(397, 64, jnp.float16, marks=pytest.mark.slow),
        pytest.param(211, 192, jnp.float16, marks=pytest.mark.slow),
        pytest.param(397, 256, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_rows_and_their_sums(queries, dim, dtype):
    """Gathering rows and summing their gradients are each other's transposes, against loops over the lists."""
    length, epoch, windows, seen = 397, 128, (67, 5, 33), set()
    rng = np.random.default_rng(queries)
    sizes = BlockSizes(epoch=epoch, granule=128)
    gate = make_gate("random", rng, BATCH, length, HEADS)
    # Of two keys one number is not finite, of another the value's last; all are seen.
    broken = {(1, 7, 2), (0, length - 1, 1), (0, length - 9, 0)}
    for place in broken:
        gate[place] = 9
    bounds = (jnp.zeros((BATCH, length), jnp.int32), jnp.full((BATCH, length), length, jnp.int32))
    select = jax.jit(lambda gate: MOSAIC_GPU.select(gate, windows, *bounds, queries=queries, blocks=sizes))
    intervals = select(jnp.asarray(np.moveaxis(gate, 2, 1)))
    key, value = (rng.standard_normal((BATCH, length, HEADS, dim)).astype(dtype) for _ in range(2))
    key[1, 7, 2, 3], key[0, length - 1, 1, dim - 1], value[0, length - 9, 0, dim - 1] = np.inf, np.nan, -np.inf
    rows = gather_rows(*map(jnp.asarray, (key, value, gate)), intervals, queries=queries)
    got = (rows.key, rows.value, rows.meta, intervals.end, intervals.lists.index)
    got_key, got_value, meta, ends, index = map(np.asarray, got)
    epochs, capacity = index.shape[2:]
    cotangent = rng.standard_normal((BATCH, epochs * capacity, HEADS, 2 * dim)).astype(np.float32)
    want = np.zeros((BATCH, length + 1, HEADS, 2 * dim))
    occupied = np.repeat(index[..., :: sizes.granule] < length, sizes.granule, axis=-1)
    for b, k, e, c in np.ndindex(*index.shape):
        own, row = index[b, k, e, c], e * capacity + c
        want[b, own, k] += cotangent[b, row, k]
        first = length - queries + e * epoch
        bias, start, end = meta[b, k, :, row]
        # A granule without a key is left as memory was.
        if occupied[b, k, e, c]:
            for found, array in ((got_key, key), (got_value, value)):
                true = np.zeros(dim, dtype) if own == length else array[b, own, k]
                np.testing.assert_array_equal(found[b, row, k], np.where(np.isfinite(true), true, 0))
        if own < length and (b, own, k) in broken:
            assert np.isnan(bias)
            seen.add((b, own, k))
        else:
            assert bias == np.float32(0 if own == length else gate[b, own, k] * np.float32(LOG2E))
        if own == length:
            assert start > end
        else:
            assert start == max(own - first, -1)
            assert end == min(ends[b, k, own] - first, epoch + 1)
    assert seen == broken
    sums = sum_over_epochs(
        jnp.asarray(cotangent), intervals, length=length, queries=queries, parts=2, dtype=jnp.float32
    )
    np.testing.assert_allclose(np.concatenate(sums, axis=3), want[:, :length], rtol=0, atol=3e-5)


@pytest.mark.parametrize(("batch", "kernel"), [(63, True), (64, False)])
def test_rows_beyond_what_int32_counts_are_copied_by_the_compiler(batch, kernel):
    key = jax.ShapeDtypeStruct((batch, 1 << 17, 8, 128), jnp.bfloat16)
    index = jax.ShapeDtypeStruct((batch, 8, 1 << 18), jnp.int32)
    program = str(jax.make_jaxpr(lambda *arrays: listed_rows(*arrays, 128))(key, key, index))
    assert ("list_rows" in program) == kernel


def test_rows_come_in_whole_programs():
    key, index = jnp.zeros((1, 9, 1, 64), jnp.float16), jnp.zeros((1, 1, 128), jnp.int32)
    for changed, granule in (((key[..., :48], index), 128), ((key, index), 64), ((key, index[..., :100]), 128)):
        with pytest.raises(ValueError, match="multiples of 64"):
            listed_rows(changed[0], changed[0], changed[1], granule)


def visited(rows, block_k):
    """What the kernels make of `query_runs`, [B, K, 4, tiles]."""
    numbers = jnp.moveaxis(query_runs(rows, block_k), 2, 0)
    return jnp.stack(jnp.broadcast_arrays(*visits_of_queries(rows, block_k, numbers)), axis=2)


def walked(rows, block_k, block_q):
    """What the kernels make of `key_walks`, [B, K, 4, tiles]."""
    return jnp.stack(visits_of_keys(rows, block_q, jnp.moveaxis(key_walks(rows, block_k), 2, 0)), axis=2)


@pytest.mark.parametrize(
    ("length", "queries", "windows", "epoch", "key_by_key"),
    [
        (677, 677, (700, 701), 512, 768),
        (677, 331, (700, 701), 512, 768),
        (677, 331, (700, 701), 512, 767),
        (677, 331, (197, 300), 128, 768),
    ],
)
def test_tiles_that_meet_are_visited_and_those_called_whole_need_no_mask(
    monkeypatch, length, queries, windows, epoch, key_by_key
):
    """Every pair of tiles, against the intervals themselves; without lists, key by key and by tiles, and with lists."""
    monkeypatch.setattr(tiles, "KEY_BY_KEY", key_by_key)
    block_q, heads = 64, len(windows)

    @jax.jit
    def tables(gate, ids):
        documents = document_bounds(ids, BATCH, length)
        choice = choose_keys(jnp.moveaxis(gate, 2, 1), windows, documents, causal=True)
        sizes = BlockSizes(epoch=epoch, granule=128)
        intervals = lay_out(choice, queries=queries, window=max(windows), blocks=sizes)
        key = jnp.zeros((BATCH, length, heads, 64), jnp.bfloat16)
        rows = gather_rows(key, key, gate, intervals, queries=queries)

        def of(rows):
            return [(visited(rows, size), walked(rows, size, block_q)) for size in (64, 128)]

        return rows, of(rows), of(dataclasses.replace(rows, offset=None))

    for segments in ("none", "packed", "left"):
        rng = np.random.default_rng(length + queries)
        gate = make_gate("random", rng, BATCH, length, heads)
        gate[:, 390:400] = -np.inf
        ids = make_segments(segments, rng, BATCH, length)
        rows, *found = tables(gate, np.ones((BATCH, length), np.int32) if ids is None else ids)
        assert rows.offset == (length - queries if min(windows) >= length else None)
        for block_k, (runs, walks), (runs_sought, walks_sought) in zip((64, 128), *found, strict=True):
            runs, walks = np.asarray(runs), np.asarray(walks)
            np.testing.assert_array_equal(runs, runs_sought)
            np.testing.assert_array_equal(walks[:, :, 2:], walks_sought[:, :, 2:])
            shape = (BATCH, heads, rows.epochs, -1, block_k, 1)
            start, end = (np.asarray(rows.meta[:, :, n]).reshape(shape) for n in (1, 2))
            position = np.arange(rows.epoch_size)
            sees, alive = (start <= position) & (position < end), position < end
            per_epoch, whole_runs, all_begun = sees.shape[3], 0, 0
            for b, k, tile in np.ndindex(BATCH, heads, -(-queries // BLOCK_Q)):
                own_epoch, first = divmod(tile * BLOCK_Q, rows.epoch_size)
                mine = slice(first, first + BLOCK_Q)
                own = sees[b, k, own_epoch, ..., mine]
                whole, carried, skipped, count = runs[b, k, :, tile].tolist()
                visits = [n if n < carried else n + skipped for n in range(count)]
                assert set(np.flatnonzero(own.any((-1, -2)))) <= set(visits)
                assert own[visits[:whole]].all()
                # Who has not ended by a query of these is seen by it.
                begun = int(rows.begun_tiles(block_k, whole, carried, count))
                assert whole <= begun <= count
                np.testing.assert_array_equal(own[visits[:begun]], alive[b, k, own_epoch, visits[:begun]][..., mine])
                all_begun += begun
                whole_runs += whole
            assert (whole_runs > 0 and all_begun > whole_runs) or segments != "none"
            by_tile, alive_by_tile = (each.reshape(*each.shape[:5], -1, block_q) for each in (sees, alive))
            meets, wholly = by_tile.any((-1, -3)), by_tile.all((-1, -3))
            for at in np.ndindex(*meets.shape[:4]):
                first, lead, whole, count = walks[at[0], at[1], :, at[2] * per_epoch + at[3]].tolist()
                assert set(np.flatnonzero(meets[at])) <= set(range(first, first + count))
                assert wholly[at][first + lead : first + lead + whole].all()
                assert 0 <= lead <= lead + whole <= count
                later = slice(first + lead, first + count)
                np.testing.assert_array_equal(by_tile[at][:, later], alive_by_tile[at][:, later])


@pytest.mark.parametrize(("length", "queries"), [(677, 677), (677, 331), (256, 256), (129, 1)])
def test_bounds_that_tracing_knows_are_those_that_are_sought(length, queries):
    """A row that its last query sees whole: the tables are part of the program, and equal."""
    shape = (BATCH, 3, length)
    start = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape)
    intervals = Intervals(start, jnp.full(shape, length, jnp.int32), starts_at_key=True, ends_with_row=True)
    key, gate = jnp.zeros((BATCH, length, 3, 64), jnp.bfloat16), jnp.zeros((BATCH, length, 3))
    rows = gather_rows(key, key, gate, intervals, queries=queries)
    sought = dataclasses.replace(rows, offset=None, filled=None)
    for size in (64, 128):
        assert all(isinstance(bound, np.ndarray) for bound in (*rows.starts(size), *rows.ends(size)))
        np.testing.assert_array_equal(visited(rows, size), visited(sought, size))
        walks, walks_sought = (walked(each, size, 64) for each in (rows, sought))
        np.testing.assert_array_equal(walks[:, :, 2:], walks_sought[:, :, 2:])
        some = walks[:, :, 3] > 0
        np.testing.assert_array_equal(walks[:, :, 0][some], walks_sought[:, :, 0][some])


@pytest.mark.usefixtures("only_signed_integers")
@pytest.mark.parametrize(
    ("queries", "keys", "window", "dim", "dtype"),
    [
        (1031, 1031, 100, 128, jnp.bfloat16),
        (300, 1031, 100, 72, jnp.float16),
        (257, 257, 257, 64, jnp.bfloat16),
        (1031, 1031, 100, 192, jnp.float16),
        (257, 257, 257, 256, jnp.bfloat16),
        (601, 601, 300, 64, jnp.float16),
    ],
)
def test_every_kernel_lowers_for_cuda(monkeypatch, queries, keys, window, dim, dtype):
    """Forward and backward, with lists and without, become CUDA programs on a machine that has no GPU."""
    # A frozen record: how it would look on a machine with a Hopper GPU.
    monkeypatch.setitem(MOSAIC_GPU.__dict__, "unavailable", lambda: None)

    def both(query, key, value, gate, cotangent):
        attend = lambda *args: dynamic_mask_attention(*args, window=window, implementation="mosaic_gpu")  # noqa: E731
        out, pull = jax.vjp(attend, query, key, value, gate)
        return out, pull(cotangent)

    query = jax.ShapeDtypeStruct((1, queries, 6, dim), dtype)
    key = jax.ShapeDtypeStruct((1, keys, 3, dim), dtype)
    gate = jax.ShapeDtypeStruct((1, keys, 3), jnp.float32)
    program = jax.jit(both).trace(query, key, key, gate, query).lower(lowering_platforms=("cuda",)).as_text()
    kernels = program.count("stablehlo.custom_call @mosaic_gpu")
    # Three of attention; where some keys are hidden, also the one that counts, or with lists merges, tables and sums.
    least, most = {257: (3, 3), 300: (4, 4), 100: (14, 40)}[window]
    assert least <= kernels <= most, f"{kernels} kernels"


def test_a_gate_in_float64_lowers_with_lists(monkeypatch):
    monkeypatch.setitem(MOSAIC_GPU.__dict__, "unavailable", lambda: None)
    with jax.enable_x64(True):
        array, gate = jnp.zeros((1, 1500, 1, 64), jnp.bfloat16), jnp.zeros((1, 1500, 1), jnp.float64)
        run = jax.jit(partial(dynamic_mask_attention, window=64, implementation="mosaic_gpu"))
        text = run.trace(array, array, array, gate).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.custom_call @mosaic_gpu" in text


def test_no_shape_has_more_programs_than_cuda_launches(monkeypatch):
    """The last axis of a grid is CUDA's first, and may be long; the others have at most 65,535."""
    monkeypatch.setitem(MOSAIC_GPU.__dict__, "unavailable", lambda: None)
    kernel, grids = scratch.plgpu.kernel, []

    def recorded(body, *args, grid, **options):
        grids.append(grid)
        return kernel(body, *args, grid=grid, **options)

    monkeypatch.setattr(scratch.plgpu, "kernel", recorded)
    shape = (1, 1 << 20, 1, 128)
    arrays = (*[jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3, jax.ShapeDtypeStruct(shape[:3], jnp.float32))
    jax.eval_shape(
        lambda *arrays: jax.vjp(partial(dynamic_mask_attention, window=32_768), *arrays)[1](arrays[0]), *arrays
    )
    assert max(grid[-1] for grid in grids) > 65_535
    assert all(size <= 65_535 for grid in grids for size in grid[:-1])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name == "listed" else name for name in each_kernel.CASES],
)
def test_the_program_for_sanitizers(name):
    """With the portable path in the kernels' place, and where there are none."""
    assert each_kernel.error(name, "xla") <= each_kernel.BAR
    if MOSAIC_GPU.unavailable():
        with pytest.raises(SystemExit, match="the Hopper kernels do not run here: it needs an NVIDIA Hopper GPU"):
            each_kernel.main((name,))


def test_epochs_are_powers_of_two():
    for window in (1, 100, 512, 513, 1000, 1024, 3000, 70_000):
        epoch = block_sizes(100_000, 100_000, window, 128, jnp.bfloat16).epoch
        assert epoch & (epoch - 1) == 0
        assert min(window, 4096) <= epoch <= max(512, 2 * window)


@pytest.mark.parametrize(
    ("keys", "window", "epoch"),
    [(300, 7, 1024), (1024, 256, 1024), (1025, 256, 512), (2048, 700, 2048), (2049, 700, 1024), (4096, 2048, 2048)],
)
def test_short_rows_of_two_epochs_are_one(monkeypatch, keys, window, epoch):
    monkeypatch.setattr(config, "SHORT_ROW", SHORT_ROW)
    assert block_sizes(keys, keys, window, 128, jnp.bfloat16).epoch == epoch


@pytest.mark.parametrize(("head_dim", "native"), [(1, 64), (64, 64), (96, 128), (129, 192), (192, 192), (250, 256)])
def test_sizes_of_every_head_size(head_dim, native):
    """Heads are padded to the next size that there are kernels for, and every pass has tiles that fit."""
    sizes = block_sizes(4096, 4096, 512, head_dim, jnp.bfloat16)
    assert sizes.head_dim == native == native_head_size(head_dim)
    assert unsupported(jnp.dtype("float16"), head_dim) is None
    for each in (sizes.forward, sizes.query_gradient, sizes.key_gradient):
        assert each.scratch(jnp.float16).size <= SHARED_MEMORY
        assert sizes.granule % each.block_k == 0


def test_sizes_that_no_kernel_has_are_refused():
    assert "head sizes up to 256, not 257" in unsupported(jnp.dtype("bfloat16"), HEAD_SIZES[-1] + 1)
    for make, reason in (
        (lambda: ForwardSizes(head_dim=96), "head_dim must be a multiple of 64 up to 256, got 96"),
        (lambda: ForwardSizes(head_dim=64, stages=1), "stages must be >= 2, got 1"),
        (lambda: ForwardSizes(head_dim=64, block_k=96), "block_k must be 64 or 128, got 96"),
        (lambda: ForwardSizes(head_dim=64, query_buffers=3), "query_buffers must be 1 or 2, got 3"),
        (lambda: ForwardSizes(head_dim=256, block_k=64), r"query_buffers=2\) takes 265,\d+ bytes of shared memory"),
        (lambda: QueryGradientSizes(head_dim=128, value_stages=0), "value_stages must be an int >= 1, got 0"),
        (lambda: QueryGradientSizes(head_dim=256, block_k=64), r"a thread block has 232,448: take fewer stages"),
        (lambda: KeyGradientSizes(head_dim=192, block_q=128), "block_q must be 64, or 128 up to head size 128"),
        (lambda: KeyGradientSizes(head_dim=256, stages=3), "stages=3, block_q=64.* bytes of shared memory"),
    ):
        with pytest.raises(ValueError, match=reason):
            make()
    passes = {
        "forward": ForwardSizes(head_dim=64),
        "query_gradient": QueryGradientSizes(head_dim=64),
        "key_gradient": KeyGradientSizes(head_dim=64),
    }
    for changes, reason in (
        ({"epoch": 192}, "epoch must be a multiple of 128, got 192"),
        ({"epoch": 384}, "epoch must be a power of two, got 384"),
        ({"granule": 64}, "granule must be a multiple of 128, got 64"),
        ({"key_gradient": KeyGradientSizes(head_dim=128)}, r"head_dim must be the same in every pass, got \[64, 128\]"),
    ):
        with pytest.raises(ValueError, match=reason):
            HopperBlockSizes(**{"epoch": 512, **passes, **changes})


def test_shared_memory_is_counted_as_the_compiler_counts_it(monkeypatch):
    """The compiler says how much a program takes that does not fit."""
    shape = jax.ShapeDtypeStruct
    query, key = shape((1, 128, 2, 256), jnp.bfloat16), shape((1, 256, 1, 256), jnp.bfloat16)
    meta, stats = shape((1, 1, 3, 256), jnp.float32), shape((1, 2, 3, 128), jnp.float32)
    visits = shape((1, 1, 4, 4), jnp.int32)
    monkeypatch.setattr(scratch, "SHARED_MEMORY", 2 * SHARED_MEMORY)
    for kernel, sizes, arguments in (
        (attend, ForwardSizes(head_dim=256, block_k=64), ()),
        (query_gradient, QueryGradientSizes(head_dim=256, block_k=64), (query, stats)),
        (key_gradients, KeyGradientSizes(head_dim=256, stages=3), (query, stats)),
    ):
        assert sizes.scratch(jnp.bfloat16).size > SHARED_MEMORY

        def run(query, key, meta, visits, *more, kernel=kernel, sizes=sizes):
            rows = Rows(key, key, meta, 1, 256, 0, 128)
            return kernel(query, *more, rows, visits, scale=1.0, sizes=sizes)

        with pytest.raises(ValueError, match=rf"smem_bytes={sizes.scratch(jnp.bfloat16).size} "):
            jax.jit(run).trace(query, key, meta, visits, *arguments).lower(lowering_platforms=("cuda",))
