"""Which implementation runs here, and why."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import IMPLEMENTATIONS, Implementation
from pallas_kernels.choice import choose
from pallas_kernels.decoding import IMPLEMENTATIONS as DECODING
from pallas_kernels.patterns import IMPLEMENTATIONS as PATTERNS


def choose_implementation(name: str | None, dtype: jnp.dtype, head_dim: int) -> Implementation:
    """The named implementation, or the first of the registry that runs on this machine and takes such queries.

    Raises: ValueError for a name that is unknown, or that cannot run here or with these queries (with the reason).
    """
    return choose(IMPLEMENTATIONS, name, lambda entry: entry.unavailable() or entry.unsupported(dtype, head_dim))


def explain() -> str:
    """Which implementation `implementation=None` takes on this machine, and why not the others."""
    devices = jax.devices()
    chosen = next(entry for entry in IMPLEMENTATIONS.values() if entry.unavailable() is None)
    decoding = next(entry for entry in DECODING.values() if entry.unavailable() is None)
    masks = next(entry for entry in PATTERNS.values() if entry.unavailable() is None)
    lines = [
        f"devices: {len(devices)} × {devices[0].device_kind} ({jax.default_backend()}), JAX {jax.__version__}",
        f"dynamic-mask attention runs on: {chosen.name}",
        f"steps of decoding run on: {decoding.name}",
        f"masks of frozen models run on: {masks.name}",
    ]
    for entry in IMPLEMENTATIONS.values():
        reason = entry.unavailable()
        if reason is not None:
            lines.append(f"not {entry.name}: {reason}")
    lines += chosen.limits() + decoding.limits()
    if chosen.name == "xla" and jax.default_backend() != "cpu":
        lines.append("xla is the portable path: right everywhere, not tuned for this device")
    return "\n".join(lines)
