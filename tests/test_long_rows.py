"""Rows of thousands of keys on a Hopper GPU: the portable path's results in float32, and the same bits every time.

The short rows of other tests do not show what goes wrong only now and then, or where many tiles follow each other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import EACH, RATIO, assert_close

from dmattn_jax import dynamic_mask_attention
from pallas_kernels.gpu import MOSAIC_GPU

DTYPE = "bfloat16"
RUNS = 10


@pytest.fixture(params=["mosaic_gpu"])
def implementation(request):
    if reason := MOSAIC_GPU.unavailable():
        pytest.skip(reason)
    return request.param


def arrays(length: int, dim: int, dtype: str = DTYPE, heads: int = 4, kv_heads: int = 2) -> list[jax.Array]:
    """query, key, value, gate and a cotangent; half precision holds them exactly."""
    keys = jax.random.split(jax.random.key(length + dim), 5)
    shapes = [(1, length, n, dim) for n in (heads, kv_heads, kv_heads)]
    made = [jax.random.normal(key, shape, DTYPE) for key, shape in zip(keys, shapes, strict=False)]
    cotangent = jax.random.normal(keys[4], shapes[0], DTYPE)
    gate = 2 * jax.random.normal(keys[3], (1, length, kv_heads))
    return [*(array.astype(dtype) for array in made), gate, cotangent.astype(dtype)]


@functools.partial(jax.jit, static_argnums=(5, 6))
def results(query, key, value, gate, cotangent, window: int, implementation: str) -> tuple[jax.Array, ...]:
    attend = functools.partial(dynamic_mask_attention, window=window, implementation=implementation)
    out, pull = jax.vjp(attend, query, key, value, gate)
    return (out, *pull(cotangent))


def check_long_rows(length: int, window: int, dim: int, implementation: str, runs: int) -> None:
    want = [np.asarray(array, np.float64) for array in results(*arrays(length, dim, "float32"), window, "xla")]
    inputs = arrays(length, dim)
    got = [[np.asarray(array) for array in results(*inputs, window, implementation)] for _ in range(runs)]
    for number, again in enumerate(got):
        for name, left, right in zip(("out", "dquery", "dkey", "dvalue", "dgate"), again, got[0], strict=True):
            assert np.array_equal(left, right), f"{name} of run {number} is not that of the first run"
    assert_close(
        [np.asarray(jnp.asarray(array, jnp.float32)) for array in got[0]], want, ratio=RATIO[DTYPE], each=EACH[DTYPE]
    )


@pytest.mark.parametrize("dim", [64, 128, 192])
@pytest.mark.parametrize(("length", "window"), [(1021, 1021), (4093, 4093), (4093, 509)])
def test_every_head_size(implementation, length, window, dim):
    """Without lists and with them."""
    check_long_rows(length, window, dim, implementation, RUNS)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "window"), [(16381, 1024), (32768, 1024), (65536, 256), (131072, 2048)])
def test_lengths(implementation, length, window):
    check_long_rows(length, window, 128, implementation, 3)
