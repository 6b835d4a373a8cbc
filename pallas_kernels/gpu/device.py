"""The GPU at hand, as the Hopper kernels need to know it."""

from __future__ import annotations

import jax

SHARED_MEMORY = 227 * 1024
"""Bytes that one thread block may take."""


def multiprocessors() -> int:
    """How many the GPU has; as many as an H100 where there is none, so that kernels can be lowered anywhere."""
    return getattr(jax.devices()[0], "core_count", 132)


def unavailable() -> str | None:
    """None on a Hopper GPU; else what is missing."""
    if jax.default_backend() != "gpu":
        return f"it needs an NVIDIA Hopper GPU, and the default backend is {jax.default_backend()}"
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability not in ("9.0", "9.0a"):
        return f"it needs an NVIDIA Hopper GPU (compute capability 9.0), and this one has {capability}"
    return None
