"""Rows of thousands of keys on a Hopper GPU: the portable path's results in float32, and the same bits every time.

The short rows of other tests do not show what goes wrong only now and then, or where many tiles follow each other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import EACH, NAMES, RATIO, assert_close, make_case, rounded, run
from test_pattern_hopper import BATCH, HEADS, KV_HEADS, make_patterns

from pallas_kernels.gpu import MOSAIC_GPU
from pallas_kernels.patterns import Places, pattern_attention

DTYPE = "bfloat16"
RUNS = 10


@pytest.fixture(params=["mosaic_gpu"])
def implementation(request):
    if reason := MOSAIC_GPU.unavailable():
        pytest.skip(reason)
    return request.param


def check_long_rows(length: int, window: int, dim: int, implementation: str, runs: int) -> None:
    case = rounded(make_case(batch=1, keys=length, kv_heads=2, dim=dim, window=window), DTYPE)
    want = [array.astype(np.float64) for array in run(case, "float32", implementation="xla")]
    check_runs([run(case, DTYPE, implementation=implementation) for _ in range(runs)], want)


def check_runs(results: list[list[np.ndarray]], want: list[np.ndarray]) -> None:
    """All the same, and close to what is wanted."""
    first, *later = results
    for number, again in enumerate(later, 2):
        for name, left, right in zip(NAMES, again, first, strict=False):
            assert np.array_equal(left, right), f"{name} of run {number} is not that of the first run"
    assert_close(first, want, ratio=RATIO[DTYPE], each=EACH[DTYPE])


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize(("length", "window"), [(1021, 1021), (4093, 4093), (4093, 509)])
def test_every_head_size(implementation, length, window, dim):
    """Without lists and with them."""
    check_long_rows(length, window, dim, implementation, RUNS)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "window"), [(16381, 1024), (32768, 1024), (65536, 256), (131072, 2048)])
def test_lengths(implementation, length, window):
    check_long_rows(length, window, 128, implementation, 3)


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("length", "side", "reach", "columns"), [(1021, 200, 401, 150), (4093, 1, 611, 31)])
def test_masks_of_frozen_models(implementation, length, side, reach, columns, dim):
    """Of a map, diagonals and columns; one head's diagonals are a window, whose tiles are whole."""
    random = np.random.default_rng(length)
    patterns = make_patterns(length, side, reach, columns, window=reach - 7)
    shapes = [(BATCH, length, heads, dim) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    arrays = [jnp.asarray(random.standard_normal(shape), DTYPE) for shape in shapes]
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (BATCH, length))
    places = Places(position, jnp.zeros_like(position))

    @functools.partial(jax.jit, static_argnames="implementation")
    def attend(query, key, value, implementation):
        return pattern_attention(
            query, key, value, patterns, places, places, scale=dim**-0.5, implementation=implementation
        )

    want = attend(*(array.astype(jnp.float32) for array in arrays), implementation="xla")
    results = [[np.asarray(attend(*arrays, implementation=implementation))] for _ in range(RUNS)]
    check_runs(results, [np.asarray(want, np.float64)])
