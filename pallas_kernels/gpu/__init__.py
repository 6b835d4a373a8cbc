"""Mosaic GPU implementation for Hopper: TMA, warpgroup matrix products, warp specialisation."""

from pallas_kernels.contract import Implementation
from pallas_kernels.gpu.config import block_sizes, limits, unsupported
from pallas_kernels.gpu.device import unavailable
from pallas_kernels.gpu.passes import backward, forward
from pallas_kernels.gpu.selection import select

MOSAIC_GPU = Implementation(
    name="mosaic_gpu",
    forward=forward,
    backward=backward,
    block_sizes=block_sizes,
    unavailable=unavailable,
    unsupported=unsupported,
    select=select,
    limits=limits,
)

__all__ = ["MOSAIC_GPU"]
