"""Rotary positions: both forms of the turn against the equation in float64, and which one is compiled where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmattn_jax import nn
from dmattn_jax.nn import rope

THETA = 50.0
FORMS = {"halves": rope._turn_by_halves, "flip": rope._turn_by_flip}


def exact(x, position):
    """x [B, T, H, D], position [b, T] in float64: pair (i, i + D/2) as a complex number, turned."""
    half = x.shape[-1] // 2
    angle = position[..., None, None] * THETA ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_turn_and_its_gradient(monkeypatch, form, dtype, rows):
    """rows: positions of every row, or one row of them for all."""
    monkeypatch.setattr(rope.lax, "platform_dependent", lambda *args, **_: FORMS[form](*args))
    random = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(random.normal(size=(3, 11, 5, 14)), dtype) for _ in range(2))
    position = random.integers(0, 1000, (rows, 11))
    out, pull = jax.vjp(lambda x: nn.apply_rope(x, jnp.asarray(position), theta=THETA), x)
    # The inverse of a turn turns back.
    for got, want in (
        (out, exact(np.asarray(x, np.float64), position)),
        (pull(cotangent)[0], exact(np.asarray(cotangent, np.float64), -position)),
    ):
        assert got.dtype == dtype
        # Angles of up to 1,000 are float32.
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=3e-4 if dtype == "float32" else 2e-2)


def test_both_forms_agree():
    x = jax.random.normal(jax.random.key(0), (2, 13, 3, 10))
    angle = jax.random.normal(jax.random.key(1), (1, 13, 1, 5))
    one, other = (form(x, jnp.cos(angle), jnp.sin(angle)) for form in FORMS.values())
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(("devices", "platform", "flips"), [(1, "cuda", True), (2, "cuda", False), (1, "tpu", False)])
def test_the_flip_is_for_one_gpu(devices, platform, flips):
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:1] * devices).reshape(1, devices, 1),
        ("data", "fsdp", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    ).abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda x: nn.apply_rope(x, jnp.arange(7)[None])).trace(jnp.ones((2, 7, 3, 8)))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.reverse" in program) == flips
    assert ("LayoutConstraint" in program) == flips
