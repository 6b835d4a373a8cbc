"""Block sizes of the Hopper kernels, what they run on, and what they support."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.contract import BlockSizes

HEAD_SIZES = (64, 128)
"""Head sizes the kernels are written for; smaller ones are padded with zeros to the next."""


@dataclass(frozen=True)
class HopperBlockSizes(BlockSizes):
    """block_q × block_k tiles of logits; the key gradients walk queries in tiles of key_block_q.

    stages: key tiles in flight in shared memory.
    """

    key_block_q: int = 64
    stages: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        # Each of the two consumer warpgroups takes half of a tile, and a warpgroup's matrix product has 64 rows.
        for name in ("block_q", "block_k"):
            if getattr(self, name) != 128:
                raise ValueError(f"{name} must be 128, got {getattr(self, name)}")
        if self.key_block_q % 8 or self.epoch % self.key_block_q:
            raise ValueError(f"key_block_q must be a multiple of 8 that divides epoch, got {self.key_block_q}")
        if self.stages < 2:
            raise ValueError(f"stages must be >= 2, got {self.stages}")


def block_sizes(queries: int, keys: int, window: int, head_dim: int, dtype: jnp.dtype) -> HopperBlockSizes:
    """Epochs as long as the window or the next power of two, at least 512 and at most 4,096 queries: a list then holds
    at most 2 rows a query beyond short windows."""
    del queries, keys, head_dim, dtype
    epoch = min(max(512, 1 << (window - 1).bit_length()), 4096)
    return HopperBlockSizes(epoch=epoch, block_q=128, block_k=128, granule=128)


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


def limits() -> list[str]:
    """`contract.Implementation.limits`."""
    return ["float32, float64 and head sizes above 128 run on: xla"]


def unsupported(dtype: jnp.dtype, head_dim: int) -> str | None:
    """None for half precision and head sizes up to 128; else what is out of range."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies bfloat16 or float16, not {jnp.dtype(dtype).name}"
    if head_dim > HEAD_SIZES[-1]:
        return f"it takes head sizes up to {HEAD_SIZES[-1]}, not {head_dim}"
    return None
