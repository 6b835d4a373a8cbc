"""What a kernel keeps in shared memory: declared once, counted before anything is traced, and allocated as declared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.contract import check_sizes
from pallas_kernels.gpu.device import SHARED_MEMORY

HALF_TILE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
"""Transforms of half-precision tiles, as TMA writes and warpgroup products read them."""
SINGLE_TILE = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
"""Transforms of float32 tiles."""

# Where buffers may begin in shared memory, and what a barrier takes of it.
_ALIGNMENT = 1024
_BARRIER = 8


# A product's rows lie within warps, so that sums along them need none of the memory that the compiler would set aside.
_PARAMETERS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0)


class Scratch(NamedTuple):
    """Buffers and barriers, in the order in which the kernel's body takes them."""

    buffers: tuple[Any, ...]
    barriers: tuple[Any, ...]

    @property
    def size(self) -> int:
        """Bytes of shared memory."""
        sizes = (math.prod(buffer.shape) * jnp.dtype(buffer.dtype).itemsize for buffer in self.buffers)
        barriers = sum(int(np.prod(barrier.num_barriers)) for barrier in self.barriers)
        return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes) + barriers * _BARRIER


@dataclass(frozen=True, kw_only=True)
class PassSizes:
    """Tiles of one pass. head_dim: the padded head size; stages: steps in flight in shared memory.

    Raises: ValueError for sizes that the pass is not written for, or that shared memory does not hold.
    """

    head_dim: int
    stages: int = 2

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.head_dim % 64 or self.head_dim > 256:
            raise ValueError(f"head_dim must be a multiple of 64 up to 256, got {self.head_dim}")
        if self.stages < 2:
            raise ValueError(f"stages must be >= 2, got {self.stages}")
        self.check()
        size = self.scratch(jnp.bfloat16).size
        if size > SHARED_MEMORY:
            raise ValueError(
                f"{self} takes {size:,} bytes of shared memory, and a thread block has {SHARED_MEMORY:,}: "
                "take fewer stages or smaller tiles"
            )

    def check(self) -> None:
        """Raises: ValueError for tiles that the pass is not written for."""

    def scratch(self, dtype: DTypeLike) -> Scratch:
        """What the kernel allocates for inputs of a half-precision dtype."""
        raise NotImplementedError


def warp_specialized(name: str, body: Callable[..., None], scratch: Scratch, **options: Any) -> Callable[..., Any]:
    """The kernel that runs body(*refs, scratch=(buffers, barriers)) in two consumer warpgroups, threads 0 and 1, and a
    producer, thread 2. name: what profilers show. options: of `plgpu.kernel`."""

    def entry(*refs):
        pl.run_scoped(
            lambda *allocated: body(*refs, scratch=allocated),
            scratch.buffers,
            scratch.barriers,
            collective_axes="thread",
        )

    entry.__name__ = name
    return plgpu.kernel(
        entry,
        num_threads=3,
        thread_name="thread",
        compiler_params=_PARAMETERS,
        **options,
    )
