"""The Hopper kernels on a machine without a GPU: JAX's GPU interpreter (from JAX 0.12), with its race detection on.

It simulates blocks, warpgroups, TMA copies and barriers, but not a product whose left side or running sum is in
registers. Those are ordinary products here, in the same place of the program. Elementwise kernels with computed reads
keep their XLA form, as on any CPU.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decoding import IMPLEMENTATIONS as DECODING
from pallas_kernels.gpu import MOSAIC_GPU, counting, gathers

THREADS = 32
AVAILABLE = hasattr(plgpu, "InterpretGPUParams")


class Sum:
    """A running sum in registers."""

    def __init__(self, start: jax.Array):
        self.value = start


def interpret(monkeypatch: pytest.MonkeyPatch, multiprocessors: int = 2) -> None:
    """Until the test ends, "mosaic_gpu" runs on this machine. Few multiprocessors, so that each has pieces in turn."""
    if int(os.environ.get("NPROC", "0")) < THREADS:
        # Warpgroups wait for each other in callbacks, and in a pool of as many threads as cores they would for ever.
        pytest.fail(f"set NPROC={THREADS} before Python starts: it is how many threads the interpreter may use")
    kernel, in_place, multiply, arrive = plgpu.kernel, pl.kernel, plgpu.wgmma, plgpu.barrier_arrive

    def interpreted(body: Any, *args: Any, **options: Any) -> Any:
        if "num_threads" in options or body.__name__ == "head_gradients":
            options["interpret"] = plgpu.InterpretGPUParams(detect_races=True)
        return kernel(body, *args, **options)

    def interpreted_in_place(*args: Any, **options: Any) -> Any:
        return in_place(*args, interpret=plgpu.InterpretGPUParams(detect_races=True), **options)

    def run_state(body: Any) -> Any:
        def run(sums: Any) -> Any:
            body(sums)
            return jax.tree.map(lambda each: each.value, sums)

        return run

    def wgmma(sums: Any, left: Any, right: Any) -> None:
        if isinstance(sums, Sum):
            left = left if isinstance(left, jax.Array) else left[...]
            sums.value = sums.value + jnp.dot(left, right[...], preferred_element_type=jnp.float32)
        else:
            multiply(sums, left, right)

    def barrier_arrive(barrier: Any) -> None:
        # A plain read of shared memory has ended when its thread arrives; the interpreter wants a fence before TMA may
        # write there. Reads after the arrival stay races.
        plgpu.commit_smem()
        arrive(barrier)

    for room in ("gpu.pipeline", "gpu.backward_key", "gpu.head_gradients", "decoding.gpu"):
        monkeypatch.setattr(f"pallas_kernels.{room}.multiprocessors", lambda: multiprocessors)
    for entry in (MOSAIC_GPU, DECODING["mosaic_gpu"]):
        monkeypatch.setitem(entry.__dict__, "unavailable", lambda: None)
    monkeypatch.setattr(plgpu, "kernel", interpreted)
    monkeypatch.setattr(pl, "kernel", interpreted_in_place)
    monkeypatch.setattr(plgpu, "wgmma", wgmma)
    monkeypatch.setattr(plgpu, "barrier_arrive", barrier_arrive)
    monkeypatch.setattr(plgpu.ACC, "init", staticmethod(Sum))
    monkeypatch.setattr(pl, "run_state", run_state)


def interpret_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, elementwise kernels with computed reads are kernels on this machine, too."""
    kernel = plgpu.kernel

    def interpreted(*args: Any, **options: Any) -> Any:
        return kernel(*args, **options, interpret=plgpu.InterpretGPUParams(detect_races=True))

    def cuda(*operands: Any, cuda: Any, default: Any) -> Any:
        return cuda(*operands)

    def write(target: Any, values: Any, *places: Any) -> None:
        target[...] = target[...].at[places].set(values)

    monkeypatch.setattr(plgpu, "kernel", interpreted)
    for room in (gathers, counting):
        monkeypatch.setattr(room, "read", lambda source, *places: source[...][places])
    monkeypatch.setattr(counting, "write", write)
    monkeypatch.setattr(gathers.lax, "platform_dependent", cuda)
