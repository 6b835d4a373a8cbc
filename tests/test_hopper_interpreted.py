"""The Hopper kernels against float64 without a GPU, every access to shared memory checked against the barriers.

NPROC=32 python -m pytest -m slow -n 0 tests/test_hopper_interpreted.py
"""

import numpy as np
import pytest
from gpu_interpreter import AVAILABLE, interpret
from reference import EACH, RATIO, assert_close, make_case, residue, rounded, run, truth

pytestmark = pytest.mark.slow

INTERPRETED = {
    "packed documents, a window per head": ({"keys": 331, "window": (150, 41), "segments": "inside"}, "bfloat16"),
    "lists, fewer queries than keys": (
        {"keys": 601, "queries": 523, "window": 20, "gate": "rounded", "kv_heads": 1},
        "float16",
    ),
    "narrow heads": ({"keys": 257, "window": 300, "gate": "holes", "dim": 40}, "float16"),
}


# The interpreter belongs to newer versions of JAX; where it is not, the kernels are lowered and no more.
@pytest.mark.parametrize("name", INTERPRETED if AVAILABLE else ())
def test_kernels_without_races_under_the_interpreter(monkeypatch, name):
    """Forward and backward against float64, with every access to shared memory checked against the barriers."""
    options, dtype = INTERPRETED[name]
    case = rounded(make_case(**{"batch": 1, "kv_heads": 2, "dim": 64, **options}), dtype)
    interpret(monkeypatch)
    got = run(case, dtype, implementation="mosaic_gpu")
    assert_close(got, truth(case), ratio=RATIO[dtype], each=EACH[dtype], zero=residue(case, dtype))


@pytest.mark.parametrize("place", ("key", "value") if AVAILABLE else ())
def test_nan_under_a_mask_stays_there_under_the_interpreter(monkeypatch, place):
    """A key that no query ever sees may hold anything."""
    case = rounded(make_case(batch=1, keys=211, kv_heads=1, dim=64, window=37, segments="packed"), "bfloat16")
    case.gate[0, 100] = -np.inf
    interpret(monkeypatch)
    without = run(case, "bfloat16", implementation="mosaic_gpu")
    getattr(case, place)[0, 100] = np.nan
    got = run(case, "bfloat16", implementation="mosaic_gpu")
    for left, right in zip(got, without, strict=True):
        assert np.isfinite(np.asarray(left, np.float32)).all()
        np.testing.assert_array_equal(left, right)
