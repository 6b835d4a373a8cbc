"""Portable implementation: plain XLA, any device, any float type."""

from pallas_kernels.contract import Implementation
from pallas_kernels.xla.backward import backward
from pallas_kernels.xla.config import block_sizes
from pallas_kernels.xla.forward import forward

XLA = Implementation(
    name="xla",
    forward=forward,
    backward=backward,
    block_sizes=block_sizes,
    unavailable=lambda: None,
    unsupported=lambda dtype, head_dim: None,
)

__all__ = ["XLA"]
