"""Rows of thousands of keys on a Hopper GPU: the portable path's results in float32, and the same bits every time.

The short rows of other tests do not show what goes wrong only now and then, or where many tiles follow each other.
"""

import numpy as np
import pytest
from reference import EACH, NAMES, RATIO, assert_close, make_case, rounded, run

from pallas_kernels.gpu import MOSAIC_GPU

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
    first, *later = (run(case, DTYPE, implementation=implementation) for _ in range(runs))
    for number, again in enumerate(later, 2):
        for name, left, right in zip(NAMES, again, first, strict=True):
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
