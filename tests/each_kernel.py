"""Every Hopper kernel once, on shapes small enough for compute-sanitizer, and held against the portable path:

    export XLA_FLAGS='--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer='
    compute-sanitizer --tool racecheck python tests/each_kernel.py counted
    compute-sanitizer --tool memcheck python tests/each_kernel.py listed decoding

Without these flags the tool ends in a fault of its own or says nothing; nor does it bear the test session, so this is a
program by itself. Each of the names takes some 20 seconds under it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from dmattn_jax import dynamic_mask_attention
from pallas_kernels import decoding, patterns
from pallas_kernels.gpu import MOSAIC_GPU
from pallas_kernels.gpu.head_gradients import head_gradients

Name = Literal["counted", "listed", "patterns", "decoding", "heads"]
Results = tuple[list[jax.Array], list[jax.Array]]
"""What a kernel gives, and what it should."""
BAR = 5e-3
"""RMS of the error over the RMS of the truth: of sums of products in bfloat16."""


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape) + seed).standard_normal(shape), jnp.bfloat16)


def _attention(length: int, dim: int, implementation: str) -> Results:
    query, cotangent = (_normal(2, length, 4, dim, seed=n) for n in range(2))
    key, value = (_normal(2, length, 2, dim, seed=n) for n in range(2))
    gate = _normal(2, length, 2).astype(jnp.float32)
    ids = jnp.asarray(np.arange(length) > np.array([[length // 3], [-1]]), jnp.int32) + 1

    def run(dtype: Any, implementation: str) -> list[jax.Array]:
        def attend(*arrays: jax.Array) -> jax.Array:
            return dynamic_mask_attention(*arrays, window=70, segment_ids=ids, implementation=implementation)

        @jax.jit
        def both(cotangent: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
            out, pull = jax.vjp(attend, *arrays)
            return [out, *pull(cotangent)]

        return both(*(array.astype(dtype) for array in (cotangent, query, key, value)), gate)

    return run(jnp.bfloat16, implementation), run(jnp.float32, "xla")


def counted(implementation: str) -> Results:
    """Attention and its gradients in a row without lists."""
    return _attention(300, 64, implementation)


def listed(implementation: str) -> Results:
    """The same in a row of three epochs: merges, lists, their rows and the sums over them."""
    return _attention(1100, 128, implementation)


def masks(implementation: str) -> Results:
    """Attention by the masks of frozen models: a map, diagonals and columns."""
    length, random = 700, np.random.default_rng(0)
    shown = [random.random(shape) < 0.2 for shape in ((2, 150, 150), (2, 201), (2, 41))]
    columns = np.full((1, 41), -1, np.int32)
    kept = np.flatnonzero(shown[2].any(0))
    columns[0, : len(kept)] = kept
    seen = patterns.Patterns(*map(jnp.asarray, (*shown, columns)), reach=201)
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))
    places = patterns.Places(place, jnp.zeros_like(place))
    arrays = [_normal(2, length, heads, 64) for heads in (2, 1, 1)]

    def run(dtype: Any, implementation: str) -> list[jax.Array]:
        attend = partial(patterns.pattern_attention, scale=0.125, implementation=implementation)
        return [jax.jit(attend)(*(array.astype(dtype) for array in arrays), seen, places, places)]

    return run(jnp.bfloat16, implementation), run(jnp.float32, "xla")


def step(implementation: str) -> Results:
    """A step of decoding with a full cache: what it evicts, holds and gives."""
    batch, heads, kv_heads, window, dim = 3, 4, 2, 256, 128
    place = jnp.broadcast_to(jnp.arange(window, dtype=jnp.int32), (batch, kv_heads, window))
    held = [_normal(batch, kv_heads, window, dim, seed=n) for n in range(2)]
    slots = decoding.Slots(*held, _normal(batch, kv_heads, window).astype(jnp.float32), place)
    token = [_normal(batch, count, dim) for count in (heads, kv_heads, kv_heads)]
    rest = (jnp.ones((batch, kv_heads)), jnp.full(batch, window, jnp.int32), slots)

    def run(name: str) -> list[jax.Array]:
        take = partial(decoding.IMPLEMENTATIONS[name].step, windows=(window,) * kv_heads, scale=dim**-0.5)
        return jax.tree.leaves(jax.jit(take)(*token, *rest))

    return run(implementation), run("xla")


def heads(implementation: str) -> Results:
    """Gradients of normed and turned heads."""
    shape, eps = (2, 192, 3, 128), 1e-3
    angle = _normal(1, shape[1], shape[3] // 2).astype(jnp.float32)
    turned = (jnp.cos(angle), jnp.sin(angle), _normal(shape[3]).astype(jnp.float32))
    own, cotangent = (_normal(*shape, seed=n) for n in range(2))

    def equation(own: jax.Array, weight: jax.Array) -> jax.Array:
        normed = own * jax.lax.rsqrt(jnp.square(own).mean(-1, keepdims=True) + eps) * weight
        first, second = jnp.split(normed, 2, axis=-1)
        cos, sin = (array[:, :, None] for array in turned[:2])
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    wide = own.astype(jnp.float32)
    d_own, d_weight = jax.vjp(equation, wide, turned[2])[1](cotangent.astype(jnp.float32))
    want = [d_own, d_weight, (wide * d_own).sum((-2, -1))]
    if implementation == "xla":
        return want, want
    return list(jax.jit(partial(head_gradients, eps=eps))(own, cotangent, *turned)), want


CASES: dict[Name, Callable[[str], Results]] = {
    "counted": counted, "listed": listed, "patterns": masks, "decoding": step, "heads": heads,
}  # fmt: skip


def error(name: Name, implementation: str) -> float:
    """The largest RMS of an error over the RMS of the truth among all that the kernels give."""
    with jax.default_matmul_precision("highest"):
        results = CASES[name](implementation)
    got, want = ([np.asarray(array, np.float64) for array in arrays] for arrays in results)
    return max(
        float(np.sqrt(np.square(left - right).mean() / np.square(right).mean()))
        for left, right in zip(got, want, strict=True)
    )


def main(names: tyro.conf.Positional[tuple[Name, ...]] = tuple(CASES)) -> None:
    if reason := MOSAIC_GPU.unavailable():
        raise SystemExit(f"the Hopper kernels do not run here: {reason}")
    for name in names:
        found = error(name, "mosaic_gpu")
        print(f"{name}: RMS ratio {found:.1e}", flush=True)
        if not found <= BAR:
            raise SystemExit(f"{name} is wrong: at most {BAR:.0e} is rounding")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
