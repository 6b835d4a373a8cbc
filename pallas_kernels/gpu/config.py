"""Block sizes of the Hopper kernels, by pass and head size, and what they support."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.contract import BlockSizes
from pallas_kernels.gpu.backward_key import KeyGradientSizes
from pallas_kernels.gpu.backward_query import QueryGradientSizes
from pallas_kernels.gpu.forward import ForwardSizes
from pallas_kernels.gpu.tiles import BLOCK_Q, GRANULE

HEAD_SIZES = (64, 128, 192, 256)
"""Head sizes the kernels are written for; others are padded with zeros to the next."""
SHORT_ROW = 2048
"""Keys up to which two epochs are not worth their lists: a query meets three quarters or more of the row's keys in
them, and at 1,024 keys with a window of 256 making them takes as long as attention (on an H200, 8 kv heads)."""


@dataclass(frozen=True, kw_only=True)
class HopperBlockSizes(BlockSizes):
    """The tiles of each pass, for one head size (padded to one of HEAD_SIZES)."""

    granule: int = GRANULE
    forward: ForwardSizes
    query_gradient: QueryGradientSizes
    key_gradient: KeyGradientSizes

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, unit in (("epoch", max(BLOCK_Q, self.key_gradient.block_q)), ("granule", GRANULE)):
            if getattr(self, name) % unit:
                raise ValueError(f"{name} must be a multiple of {unit}, got {getattr(self, name)}")
        if self.epoch & (self.epoch - 1):
            raise ValueError(f"epoch must be a power of two, got {self.epoch}")
        sizes = {self.forward.head_dim, self.query_gradient.head_dim, self.key_gradient.head_dim}
        if len(sizes) > 1:
            raise ValueError(f"head_dim must be the same in every pass, got {sorted(sizes)}")

    @property
    def head_dim(self) -> int:
        """The padded head size."""
        return self.forward.head_dim


def block_sizes(queries: int, keys: int, window: int, head_dim: int, dtype: jnp.dtype) -> HopperBlockSizes:
    """Epochs as long as the window or the next power of two, at least 512 and at most 4,096 queries: a list then holds
    at most 2 rows a query beyond short windows. A short row of two is one, and needs no list. Tiles are as large as
    registers and shared memory allow: the sums of 64 rows of head size 256 are half of a warpgroup's registers, and its
    tiles of 128 keys half of the memory."""
    del queries, dtype
    epoch = min(max(512, 1 << (window - 1).bit_length()), 4096)
    if keys <= 2 * epoch <= SHORT_ROW:
        epoch *= 2
    dim = native_head_size(head_dim)
    block_k = 128 if dim <= 128 else 64
    return HopperBlockSizes(
        epoch=epoch,
        forward=ForwardSizes(head_dim=dim, block_k=block_k, query_buffers=2 if dim <= 192 else 1),
        query_gradient=QueryGradientSizes(head_dim=dim, block_k=block_k, value_stages=2 if dim <= 192 else 1),
        key_gradient=KeyGradientSizes(head_dim=dim),
    )


def native_head_size(head_dim: int) -> int:
    """The least of HEAD_SIZES that holds it."""
    return next(size for size in HEAD_SIZES if size >= head_dim)


def limits() -> list[str]:
    """`contract.Implementation.limits`."""
    return [f"float32, float64 and head sizes above {HEAD_SIZES[-1]} run on: xla"]


def unsupported(dtype: jnp.dtype, head_dim: int) -> str | None:
    """None for half precision and head sizes up to 256; else what is out of range."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies bfloat16 or float16, not {jnp.dtype(dtype).name}"
    if head_dim > HEAD_SIZES[-1]:
        return f"it takes head sizes up to {HEAD_SIZES[-1]}, not {head_dim}"
    return None
