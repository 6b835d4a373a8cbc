"""Gradients of normed and rotated heads: the Hopper kernel against float64, and what the norm makes of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmattn_jax import nn
from dmattn_jax.nn import norms
from dmattn_jax.nn.norms import Projection
from dmattn_jax.nn.rope import rotation
from pallas_kernels.gpu import MOSAIC_GPU
from pallas_kernels.gpu.head_gradients import head_gradients, unsupported

EPS = 1e-3
CASES = {
    "heads of 128, own angles": ((3, 192, 5, 128), 3, jnp.bfloat16),
    "heads of 128, one row of angles": ((2, 320, 3, 128), 1, jnp.float16),
    "heads of 64": ((1, 704, 7, 64), 1, jnp.bfloat16),
    "one head": ((5, 64, 1, 64), 5, jnp.float16),
}


def make_heads(shape: tuple[int, ...], angle_rows: int, dtype) -> tuple[jax.Array, ...]:
    """heads, cotangent, cos, sin and weight; a token of zeros, and one where eps is most of the mean square."""
    random = np.random.default_rng(sum(shape))
    heads, cotangent = (random.normal(size=shape) for _ in range(2))
    heads[0, 5], heads[-1, 33] = 0, heads[-1, 33] * 1e-2
    angle = random.normal(size=(angle_rows, shape[1], shape[3] // 2)) * 9
    weight = random.uniform(-1, 2, shape[3])
    rounded = (jnp.asarray(array, dtype) for array in (heads, cotangent))
    return *rounded, *(jnp.asarray(array, jnp.float32) for array in (np.cos(angle), np.sin(angle), weight))


def equation(heads, weight, cos, sin):
    z = heads / jnp.sqrt((heads**2).mean(-1, keepdims=True) + EPS) * weight
    first, second = jnp.split(z, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def check_head_gradients(shape, angle_rows, dtype) -> None:
    """Every element: what is stored in half precision to its rounding, sums to float32's."""
    heads, cotangent, cos, sin, weight = make_heads(shape, angle_rows, dtype)
    got = head_gradients(heads, cotangent, cos, sin, weight, eps=EPS)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(array, np.float64)) for array in (heads, weight, cos, sin, cotangent)]
        d_heads, d_weight = jax.vjp(lambda h, w: equation(h, w, *wide[2:4]), *wide[:2])[1](wide[4])
        dot = (wide[0] * d_heads).sum((-2, -1))
        want = [np.asarray(array) for array in (d_heads, d_weight, dot)]
    half = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-10
    for left, right, relative in zip(got, want, (half, 0, 0), strict=True):
        assert left.shape == right.shape
        bound = relative * np.abs(right) + 2e-5 * np.abs(right).max()
        assert (np.abs(np.asarray(left, np.float64) - right) <= bound).all()


@pytest.mark.parametrize("name", CASES)
def test_kernel_on_a_hopper_gpu(name):
    if reason := MOSAIC_GPU.unavailable():
        pytest.skip(reason)
    check_head_gradients(*CASES[name])


@pytest.mark.usefixtures("only_signed_integers")
@pytest.mark.parametrize("name", CASES)
def test_kernel_lowers_for_cuda(name):
    shape, angle_rows, dtype = CASES[name]
    assert unsupported(shape, dtype) is None
    arrays = make_heads(shape, angle_rows, dtype)
    lowered = jax.jit(lambda *a: head_gradients(*a, eps=EPS)).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ((2, 64, 3, 128), jnp.float32, "float16 and bfloat16"),
        ((2, 64, 3, 96), jnp.bfloat16, "head sizes of 64 and 128"),
        ((2, 65, 3, 64), jnp.bfloat16, "multiples of 64 tokens"),
    ],
)
def test_what_the_kernel_does_not_take(shape, dtype, said):
    assert said in unsupported(shape, dtype)


@pytest.mark.parametrize("length", [64, 67])
@pytest.mark.parametrize("turned", [False, True])
def test_a_norm_gives_the_kernel_what_it_takes(monkeypatch, length, turned):
    """Where there is a Hopper GPU; and has the same gradients without one."""
    size, heads, dim, seen = 37, 3, 64, []
    random = np.random.default_rng(length)
    norm, of_query = nn.RMSNorm(size), nn.RMSNorm(dim, eps=EPS)
    of_query.weight[...] = jnp.asarray(random.uniform(-1, 2, dim), jnp.float32)
    x = jnp.asarray(random.normal(size=(2, length, size)), jnp.bfloat16)
    weight = jnp.asarray(random.normal(size=(size, heads, dim)) * 0.2, jnp.bfloat16)
    angles = rotation(jnp.arange(length)[None], dim, theta=10.0) if turned else None
    cotangent = jnp.asarray(random.normal(size=(2, length, heads, dim)), jnp.bfloat16)

    def gradients():
        def run(x, norm, of_query, weight):
            return norm.project(x, Projection(weight, of_query), rotation=angles)[0]

        return jax.tree.leaves(jax.vjp(run, x, norm, of_query, weight)[1](cotangent))

    def stand_in(heads, d, cos, sin, weight, *, eps):
        assert unsupported(heads.shape, heads.dtype) is None
        assert cos.shape == (1, length, dim // 2)
        assert eps == EPS
        seen.append(heads.shape)
        wide = heads.astype(jnp.float32), weight
        d_heads, d_weight = jax.vjp(lambda h, w: equation(h, w, cos, sin), *wide)[1](d.astype(jnp.float32))
        return d_heads.astype(heads.dtype), d_weight, (wide[0] * d_heads).sum((-2, -1))

    want = gradients()
    monkeypatch.setattr(norms.hopper, "head_gradients", stand_in)
    monkeypatch.setitem(MOSAIC_GPU.__dict__, "unavailable", lambda: None)
    got = gradients()
    assert len(seen) == (turned and length == 64)
    for left, right in zip(got, want, strict=True):
        left, right = (np.asarray(array, np.float64) for array in (left, right))
        np.testing.assert_allclose(left, right, rtol=2e-2, atol=2e-2 * np.abs(right).max())
