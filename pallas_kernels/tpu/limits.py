"""What the TPU kernels leave to the portable functions, in words."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.tpu.config import GRANULE, MAX_HEAD_DIM, block_sizes, walk_fits
from pallas_kernels.tpu.selection import MAX_EPOCH, MAX_WINDOW
from pallas_kernels.tpu.vmem import LANES


def limits() -> list[str]:
    """`contract.Implementation.limits` for the TPU at hand."""
    windows, long = range(GRANULE, MAX_WINDOW + 1, GRANULE), 1 << 24

    def listed(window: int) -> bool:
        return window + block_sizes(long, long, window, LANES, jnp.dtype(jnp.bfloat16)).epoch < long

    chosen = max(window for window in windows if walk_fits(window, MAX_EPOCH))
    return [
        f"float16, float64 and head sizes above {MAX_HEAD_DIM} run on: xla",
        f"windows above {max(filter(listed, windows))} (head size {LANES}, bfloat16): lists do not fit in VMEM; each "
        "block of queries goes through all keys before it, past those that none of it sees",
        f"chosen by portable functions, slowly: keys of windows above {chosen}, of sliding windows over packed "
        "documents, and of causal=False",
    ]
