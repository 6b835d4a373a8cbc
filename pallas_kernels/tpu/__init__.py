"""The Mosaic TPU implementation."""

from pallas_kernels.contract import Implementation
from pallas_kernels.tpu.config import block_sizes, unavailable, unsupported
from pallas_kernels.tpu.limits import limits
from pallas_kernels.tpu.passes import backward, forward
from pallas_kernels.tpu.selection import select

MOSAIC_TPU = Implementation("mosaic_tpu", forward, backward, block_sizes, unavailable, unsupported, select, limits)

__all__ = ["MOSAIC_TPU"]
