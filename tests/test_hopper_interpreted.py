"""The Hopper kernels against float64 without a GPU, every access to shared memory checked against the barriers.

NPROC=32 python -m pytest -m slow -n 0 tests/test_hopper_interpreted.py
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import AVAILABLE, interpret, interpret_gathers
from reference import (
    EACH,
    RATIO,
    assert_close,
    check_gates_of_any_size,
    check_hidden_numbers,
    make_case,
    residue,
    rms_ratio,
    rounded,
    run,
    truth,
)
from test_decoding import KERNEL_CASES, STEPS, check, evicted_nan, make_step, odd_gates, without_nan
from test_head_gradients import CASES as HEAD_CASES
from test_head_gradients import check_head_gradients
from test_pattern_hopper import HEADS, KV_HEADS, make_patterns, visible

from benchmarks import tune
from dmattn_jax.documents import document_bounds
from pallas_kernels import BlockSizes
from pallas_kernels.gpu import MOSAIC_GPU, backward_key, counting, gathers
from pallas_kernels.gpu.backward_key import KeyGradientSizes, parts_of
from pallas_kernels.gpu.backward_query import QueryGradientSizes
from pallas_kernels.gpu.config import block_sizes
from pallas_kernels.gpu.forward import ForwardSizes
from pallas_kernels.patterns.gpu import of_one_document

pytestmark = pytest.mark.slow

INTERPRETED = {
    "three parts of a group": (
        {"keys": 137, "window": 150, "kv_heads": 1, "group": 6, "multiprocessors": 3},
        "float16",
    ),
    "packed documents, a window per head": ({"keys": 331, "window": (150, 41), "segments": "inside"}, "bfloat16"),
    "lists, fewer queries than keys": (
        {"keys": 601, "queries": 523, "window": 20, "gate": "rounded", "kv_heads": 1},
        "float16",
    ),
    "four keys, whose gradients nearly cancel": ({"keys": 4, "window": 3, "kv_heads": 1, "dim": 16}, "float16"),
    "narrow heads": ({"keys": 257, "window": 300, "gate": "holes", "dim": 40}, "float16"),
    "heads of 192, lists": ({"keys": 601, "window": 20, "gate": "rounded", "kv_heads": 1, "dim": 192}, "bfloat16"),
    "heads of 256, no lists": ({"keys": 201, "window": 77, "segments": "inside", "dim": 250}, "float16"),
}


# The interpreter belongs to newer versions of JAX; where it is not, the kernels are lowered and no more.
@pytest.mark.parametrize("name", INTERPRETED if AVAILABLE else ())
def test_kernels_without_races_under_the_interpreter(monkeypatch, name):
    """Forward and backward against float64, with every access to shared memory checked against the barriers."""
    options, dtype = INTERPRETED[name]
    options = {"batch": 1, "kv_heads": 2, "dim": 64, "multiprocessors": 2, **options}
    interpret(monkeypatch, options.pop("multiprocessors"))
    cut = []
    monkeypatch.setattr(backward_key, "parts_of", lambda *args, **how: cut.append(parts_of(*args, **how)) or cut[-1])
    case = rounded(make_case(**options), dtype)
    got, want = run(case, dtype, implementation="mosaic_gpu"), truth(case)
    assert name != "three parts of a group" or cut == [3]
    assert_close(got, want, ratio=RATIO[dtype], each=EACH[dtype], zero=residue(case, dtype))
    if dtype == "float16":
        # The gate's gradient does not have the rounding of the outputs in it.
        assert rms_ratio(got[4], want[4]) <= 1e-5


@pytest.mark.parametrize(("dim", "multiprocessors"), [(64, 1), (64, 2)] if AVAILABLE else ())
def test_pieces_without_keys_between_others_under_the_interpreter(monkeypatch, dim, multiprocessors):
    """Of three rows the second is padding, and so is all but the end of the third: of their pieces some visit no key,
    one or several in a row, before others and behind them."""
    case = rounded(make_case(batch=3, keys=601, kv_heads=1, dim=dim, window=20), "bfloat16")
    ids = np.ones((3, 601), np.int32)
    ids[1], ids[2, :540] = 0, 0
    case = replace(case, segment_ids=ids)
    interpret(monkeypatch, multiprocessors)
    got, want = run(case, "bfloat16", implementation="mosaic_gpu"), truth(case)
    assert_close(got, want, ratio=RATIO["bfloat16"], each=EACH["bfloat16"])
    assert not np.asarray(got[0][1], np.float32).any()


HIDDEN = [
    ("key", 64, 37, "packed"),
    ("value", 64, 37, "packed"),
    ("value", 256, 37, "packed"),
    ("key", 64, 151, "none"),
]


@pytest.mark.parametrize(("place", "dim", "window", "segments"), HIDDEN if AVAILABLE else ())
def test_nan_under_a_mask_stays_there_under_the_interpreter(monkeypatch, place, dim, window, segments):
    """A key that no query ever sees may hold anything."""
    case = rounded(make_case(batch=1, keys=151, kv_heads=1, dim=dim, window=window, segments=segments), "bfloat16")
    # In a tile that the later queries see whole.
    case.gate[0, 100] = -np.inf
    interpret(monkeypatch)
    without = run(case, "bfloat16", implementation="mosaic_gpu")
    getattr(case, place)[np.isneginf(case.gate)] = np.nan
    got = run(case, "bfloat16", implementation="mosaic_gpu")
    for left, right in zip(got, without, strict=True):
        assert np.isfinite(np.asarray(left, np.float32)).all()
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(("window", "packed"), [(17, True), (131, False)] if AVAILABLE else ())
def test_large_numbers_under_the_interpreter(monkeypatch, window, packed):
    interpret(monkeypatch)
    check_hidden_numbers("mosaic_gpu", window, packed)
    check_gates_of_any_size("mosaic_gpu", 37 if window > 37 else 5)


@pytest.mark.parametrize(("dim", "dtype"), [(64, "float16"), (192, "bfloat16")] if AVAILABLE else ())
def test_nan_of_one_document_under_the_interpreter(monkeypatch, dim, dtype):
    """A key that is NaN, and seen, leaves the document before it alone, whose queries share its tiles."""
    case = rounded(make_case(batch=1, keys=149, kv_heads=1, group=1, dim=dim, window=200), dtype)
    case = replace(case, segment_ids=np.where(np.arange(149) < 83, 1, 2)[None].astype(np.int32))
    interpret(monkeypatch)
    without = run(case, dtype, implementation="mosaic_gpu")
    case.key[0, 100] = np.nan
    got = run(case, dtype, implementation="mosaic_gpu")
    for left, right in zip(got, without, strict=True):
        assert np.isfinite(np.asarray(right, np.float32)).all()
        np.testing.assert_array_equal(left[:, :83], right[:, :83])
    assert np.isnan(np.asarray(got[0][0, 100:], np.float32)).all()


@pytest.mark.parametrize("name", ("forward", "query_gradient", "key_gradient") if AVAILABLE else ())
def test_other_tiles_without_races_under_the_interpreter(monkeypatch, name):
    """Sizes that only tuning takes, as it checks them."""
    blocks = block_sizes(131, 131, 37, 64, "float16")
    tried = replace(
        blocks,
        forward=ForwardSizes(head_dim=64, block_k=64, stages=3, query_buffers=1),
        query_gradient=QueryGradientSizes(head_dim=64, block_k=64, stages=3, value_stages=1),
        key_gradient=KeyGradientSizes(head_dim=64, block_q=128, stages=3),
    )
    interpret(monkeypatch)
    monkeypatch.setattr(tune, "CHECKED_LENGTH", 131)
    monkeypatch.setattr(tune, "CHECKED_WINDOW", 37)
    options = tune.Options(head_dim=64, heads=2, kv_heads=1, dtype="float16")
    assert tune.error_of(name, replace(blocks, **{name: getattr(tried, name)}), options) <= tune.BAR["float16"]


@pytest.mark.parametrize(
    ("queries", "side", "reach", "columns"), [(300, 130, 60, 41), (397, 1, 150, 7)] if AVAILABLE else ()
)
def test_patterns_without_races_under_the_interpreter(monkeypatch, queries, side, reach, columns):
    """Against the rule of the contract, cell by cell, in float64; the last tokens are padding that holds NaN."""
    random = np.random.default_rng(queries)
    patterns = make_patterns(queries, side, reach, columns)
    shapes = (HEADS, KV_HEADS, KV_HEADS)
    query, key, value = (jnp.asarray(random.normal(size=(1, queries, n, 64)), jnp.float16) for n in shapes)
    token = np.arange(queries)[None] < queries - 9
    interpret(monkeypatch)
    nan = jnp.where(token[..., None, None], 0, jnp.nan).astype(jnp.float16)
    got = of_one_document(query, key + nan, value + nan, patterns, jnp.asarray(token), 0.125)
    q, k, v = (np.asarray(array, np.float64)[0] for array in (query, key, value))
    k, v = (np.repeat(array, HEADS // KV_HEADS, axis=1) for array in (k, v))
    seen = visible(patterns, queries) & token[0]
    logits = np.where(seen, 0.125 * np.einsum("thd,shd->hts", q, k), -np.inf)
    weights = np.exp(logits - np.where(seen.any(-1), logits.max(-1), 0)[..., None])
    weights /= np.where(weights.sum(-1) == 0, 1, weights.sum(-1))[..., None]
    want = np.einsum("hts,shd->thd", weights, v) * token[0][:, None, None]
    assert np.isfinite(np.asarray(got, np.float32)).all()
    assert rms_ratio(np.asarray(got)[0], want) <= RATIO["float16"]
    assert not np.asarray(got)[0, ~seen.any(-1).T].any()


@pytest.mark.parametrize("name", ("heads of 128, own angles", "heads of 64") if AVAILABLE else ())
def test_gradients_of_heads_under_the_interpreter(monkeypatch, name):
    interpret(monkeypatch)
    check_head_gradients(*HEAD_CASES[name])


@pytest.mark.parametrize("name", KERNEL_CASES if AVAILABLE else ())
def test_a_step_of_decoding_without_races_under_the_interpreter(monkeypatch, name):
    case = KERNEL_CASES[name]
    interpret(monkeypatch, case["multiprocessors"])
    inputs = make_step(*case["shape"], windows=case["windows"], filled=case["filled"], seed=len(name))
    step = jax.jit(STEPS["mosaic_gpu"], static_argnames=("windows", "scale"))
    first, again = (check(step, inputs, case["windows"]) for _ in range(2))
    for left, right in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(left, np.float32), np.asarray(right, np.float32))


@pytest.mark.parametrize("odd", ("gates", "evicted") if AVAILABLE else ())
def test_odd_steps_of_decoding_under_the_interpreter(monkeypatch, odd):
    interpret(monkeypatch, 1)
    windows = (128, 100)
    inputs = make_step(5, 4, 2, 128, 64, windows=windows, filled=999)
    step = STEPS["mosaic_gpu"]
    if odd == "gates":
        without_nan(step, odd_gates(inputs), windows)
    else:
        check(step, evicted_nan(inputs, windows), windows)


SELECTED = [
    (150, 32, (37, 5)),
    (1100, 1024, (37, 5)),
    # Without lists: a few keys, several tiles of them, and gates that are read in two pieces.
    (33, 64, (3, 40)),
    (150, 128, (37, 5)),
    (600, 512, (200, 200)),
]


@pytest.mark.parametrize(("length", "epoch", "windows"), SELECTED if AVAILABLE else ())
def test_selection_without_races_under_the_interpreter(monkeypatch, length, epoch, windows):
    """The kernels of selection against their portable form: several spans a program, and several chunks a span."""
    monkeypatch.setattr(counting, "READ", 512)
    random = np.random.default_rng(length)
    gate = jnp.asarray(np.round(random.normal(size=(1, 2, length)), 1), jnp.float32)
    document = jnp.asarray(np.cumsum(random.random(length) < 0.01)[None] + 1, jnp.int32)
    bounds = document_bounds(document, 1, length)

    def select():
        blocks = BlockSizes(epoch=epoch, granule=16)
        return MOSAIC_GPU.select(gate, windows, bounds.start, bounds.end, queries=length, blocks=blocks)

    want = select()
    interpret_gathers(monkeypatch)
    got = select()
    assert jax.tree.structure(want) == jax.tree.structure(got)
    for left, right in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(("lines", "length"), [(3, 1024), (2, 640)] if AVAILABLE else ())
def test_results_that_stand_together_under_the_interpreter(monkeypatch, lines, length):
    """Several chunks a line, and lines that only short chunks divide."""
    source = jnp.asarray(np.random.default_rng(length).permutation(lines * length), jnp.int32)

    def body(reads, n):
        own = reads[0](n)
        return own, reads[0](own) - n

    def run():
        return np.asarray(gathers.gathered_lines(body, (source,), lines, length, 2, jnp.int32))

    want = run()
    order = np.asarray(source)
    np.testing.assert_array_equal(want[:, 0].reshape(-1), order)
    np.testing.assert_array_equal(want[:, 1].reshape(-1), order[order] - np.arange(order.size))
    interpret_gathers(monkeypatch)
    np.testing.assert_array_equal(run(), want)
