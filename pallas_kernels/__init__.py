"""Interval-attention kernels and their contract. Imports jax only.

`IMPLEMENTATIONS` lists what there is, the most preferred first; a new backend adds itself there.
"""

from pallas_kernels.contract import BlockSizes, EpochLists, Implementation, Intervals
from pallas_kernels.gpu import MOSAIC_GPU
from pallas_kernels.tpu import MOSAIC_TPU
from pallas_kernels.vjp import RESIDUALS, interval_attention
from pallas_kernels.xla import XLA

IMPLEMENTATIONS: dict[str, Implementation] = {entry.name: entry for entry in (MOSAIC_GPU, MOSAIC_TPU, XLA)}

__all__ = [
    "IMPLEMENTATIONS",
    "RESIDUALS",
    "BlockSizes",
    "EpochLists",
    "Implementation",
    "Intervals",
    "interval_attention",
]
