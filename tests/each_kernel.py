"""Every Hopper kernel once, on shapes small enough for compute-sanitizer, and held against the portable path:

    export XLA_FLAGS='--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer='
    compute-sanitizer --tool racecheck python tests/each_kernel.py counted
    compute-sanitizer --tool memcheck python tests/each_kernel.py listed decoding

Without these flags the tool ends in a fault of its own or says nothing; nor does it bear the test session or XLA's own
products on the GPU, so this is a program by itself and the portable path runs on the host. Each of the names takes some
20 seconds under it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.typing import DTypeLike

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import rms_ratio
from dmattn_jax import dynamic_mask_attention
from pallas_kernels import decoding, patterns
from pallas_kernels.gpu import MOSAIC_GPU
from pallas_kernels.gpu.head_gradients import head_gradients
from pallas_kernels.patterns.gpu import of_one_document

Name = Literal["counted", "listed", "patterns", "decoding", "heads"]
BAR = 5e-3
"""RMS of the error over the RMS of the truth: of sums of products in bfloat16."""


def _normal(*shape: int, seed: int = 0, dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """Numbers that bfloat16 holds, in any dtype."""
    drawn = np.random.default_rng(sum(shape) + seed).standard_normal(shape)
    return jnp.asarray(drawn, jnp.bfloat16).astype(dtype)


def _attention(length: int, dim: int, implementation: str, dtype: DTypeLike) -> list[jax.Array]:
    query, cotangent = (_normal(2, length, 4, dim, seed=n, dtype=dtype) for n in range(2))
    key, value = (_normal(2, length, 2, dim, seed=n, dtype=dtype) for n in range(2))
    gate = _normal(2, length, 2, dtype=jnp.float32)
    ids = jnp.asarray(np.arange(length) > np.array([[length // 3], [-1]]), jnp.int32) + 1

    def attend(*arrays: jax.Array) -> jax.Array:
        return dynamic_mask_attention(*arrays, window=70, segment_ids=ids, implementation=implementation)

    @jax.jit
    def both(cotangent: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        out, pull = jax.vjp(attend, *arrays)
        return [out, *pull(cotangent)]

    return both(cotangent, query, key, value, gate)


def masks(implementation: str, dtype: DTypeLike) -> list[jax.Array]:
    """Attention by the masks of frozen models: a map, diagonals and columns."""
    length, random = 700, np.random.default_rng(0)
    shown = [random.random(shape) < 0.2 for shape in ((2, 150, 150), (2, 201), (2, 41))]
    columns = np.full((1, 41), -1, np.int32)
    kept = np.flatnonzero(shown[2].any(0))
    columns[0, : len(kept)] = kept
    seen = patterns.Patterns(*map(jnp.asarray, (*shown, columns)), reach=201)
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))
    arrays = [_normal(2, length, heads, 64, dtype=dtype) for heads in (2, 1, 1)]
    if implementation != "xla":
        # The kernel by itself: what `pattern_attention` compiles has the portable path as its other branch.
        kernel = partial(of_one_document, scale=0.125)
        return [jax.jit(kernel)(*arrays, seen, jnp.ones((2, length), bool))]
    places = patterns.Places(place, jnp.zeros_like(place))
    attend = partial(patterns.pattern_attention, scale=0.125, implementation="xla")
    return [jax.jit(attend)(*arrays, seen, places, places)]


def step(implementation: str, dtype: DTypeLike) -> list[jax.Array]:
    """A step of decoding with a full cache: what it evicts, holds and gives."""
    batch, heads, kv_heads, window, dim = 3, 4, 2, 256, 128
    place = jnp.broadcast_to(jnp.arange(window, dtype=jnp.int32), (batch, kv_heads, window))
    held = [_normal(batch, kv_heads, window, dim, seed=n, dtype=dtype) for n in range(2)]
    slots = decoding.Slots(*held, _normal(batch, kv_heads, window, dtype=jnp.float32), place)
    token = [_normal(batch, count, dim, dtype=dtype) for count in (heads, kv_heads, kv_heads)]
    rest = (jnp.ones((batch, kv_heads)), jnp.full(batch, window, jnp.int32), slots)
    take = partial(decoding.IMPLEMENTATIONS[implementation].step, windows=(window,) * kv_heads, scale=dim**-0.5)
    return jax.tree.leaves(jax.jit(take)(*token, *rest))


def heads(implementation: str, dtype: DTypeLike) -> list[jax.Array]:
    """Gradients of normed and turned heads."""
    shape, eps = (2, 192, 3, 128), 1e-3
    angle = _normal(1, shape[1], shape[3] // 2, dtype=jnp.float32)
    cos, sin, weight = jnp.cos(angle), jnp.sin(angle), _normal(shape[3], dtype=jnp.float32)
    own, cotangent = (_normal(*shape, seed=n, dtype=dtype) for n in range(2))
    if implementation != "xla":
        return list(jax.jit(partial(head_gradients, eps=eps))(own, cotangent, cos, sin, weight))

    def equation(own: jax.Array, weight: jax.Array) -> jax.Array:
        normed = own * jax.lax.rsqrt(jnp.square(own).mean(-1, keepdims=True) + eps) * weight
        first, second = jnp.split(normed, 2, axis=-1)
        across, along = cos[:, :, None], sin[:, :, None]
        return jnp.concatenate([first * across - second * along, second * across + first * along], -1)

    wide = own.astype(jnp.float32)
    d_own, d_weight = jax.vjp(equation, wide, weight)[1](cotangent.astype(jnp.float32))
    return [d_own, d_weight, (wide * d_own).sum((-2, -1))]


CASES: dict[Name, Callable[[str, DTypeLike], list[jax.Array]]] = {
    "counted": partial(_attention, 300, 64),  # a row without lists
    "listed": partial(_attention, 1100, 128),  # three epochs: merges, lists, their rows and the sums over them
    "patterns": masks,
    "decoding": step,
    "heads": heads,
}
"""What an implementation makes of the same numbers in a dtype."""


def error(name: Name, implementation: str) -> float:
    """The largest RMS of an error over the RMS of the truth among all that the kernels give. The truth is computed on
    the host: XLA's own products on a GPU end compute-sanitizer in a fault."""
    got = CASES[name](implementation, jnp.bfloat16)
    with jax.default_device(jax.devices("cpu")[0]):
        want = CASES[name]("xla", jnp.float32)
    return max(rms_ratio(left, right) for left, right in zip(got, want, strict=True))


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
