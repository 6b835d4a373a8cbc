"""Block sizes of the TPU kernels, what they run on, and what they support."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.contract import BlockSizes
from pallas_kernels.tpu import vmem
from pallas_kernels.tpu.vmem import LANES

Semantics: TypeAlias = Literal["parallel", "arbitrary"]

MAX_HEAD_DIM = 256
GRANULE = 512
"""Slots that the parts of a list are rounded up to."""

MOST_ROWS = 16
"""Rows that a query's lists may hold in memory: epochs are no shorter than a window over this."""

# VMEM of one TensorCore in MiB, by the device kind that JAX reports.
_VMEM = {"TPU v4": 16, "TPU v5 lite": 128, "TPU v5": 64, "TPU v6 lite": 128, "TPU7x": 64}
_SMALLEST_VMEM = min(_VMEM.values())
# What a kernel may take without asking.
_DEFAULT_VMEM = 16 << 20

_interpreted: ContextVar[Any] = ContextVar("interpreted", default=False)
_target: ContextVar[str | None] = ContextVar("target", default=None)


@dataclass(frozen=True, kw_only=True)
class TpuBlockSizes(BlockSizes):
    """Tiles of block_q positions, all query heads of a group together, by block_k keys.

    wide: keys of a tile that all of its queries see; chunk: keys of the identity layout in VMEM at a time; rows: query
    heads × positions that a tile may have. Larger groups take shorter tiles, and then stand apart.
    """

    block_q: int
    block_k: int
    wide: int = 512
    chunk: int = 2048
    rows: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epoch % self.block_q:
            raise ValueError(f"epoch must be a multiple of block_q, got {self.epoch} and {self.block_q}")
        if self.block_k != LANES:
            raise ValueError(f"block_k must be {LANES}, the lanes of a register, got {self.block_k}")
        units = {"block_q": LANES, "rows": LANES, "wide": 2 * LANES, "granule": self.wide, "chunk": self.wide}
        for name, divisor in units.items():
            if getattr(self, name) % divisor:
                raise ValueError(f"{name} must be a multiple of {divisor}, got {getattr(self, name)}")


def block_sizes(queries: int, keys: int, window: int, head_dim: int, dtype: jnp.dtype) -> TpuBlockSizes:
    """Sizes for the TPU at hand, or, where there is none, for the generation with the least VMEM.

    Long epochs move each carried row less often; the lists of one must fit in VMEM together with the float32
    gradients of its rows. Where those of no epoch fit, one epoch takes all queries: that is the identity layout.
    """
    room = _room()
    dim, itemsize = head_dim, jnp.dtype(dtype).itemsize
    longest = min(max(512, _round_up(window, 256)), 2048, _round_up(queries, LANES))
    epochs = [longest]
    while epochs[-1] > 256:
        epochs.append(_round_up(epochs[-1] // 2, LANES))
    for rows in (1024, 512, 256):
        for epoch in epochs:
            if window + epoch >= keys or window > MOST_ROWS * epoch:
                continue
            carried, before = _round_up(window, GRANULE), queries < keys
            capacity = _round_up(carried + epoch, GRANULE)
            needed = max(
                vmem.dquery_bytes(capacity, rows, dim, itemsize, 512),
                vmem.dkey_bytes(capacity, carried, epoch, rows, dim, itemsize, listed=True, before=before),
                vmem.stream_bytes(capacity, carried, epoch, dim, itemsize, before=before),
            )
            if needed <= room:
                return _sizes(epoch, rows=rows)
    whole = _round_up(max(queries, keys - window), LANES) if window < keys else longest
    for rows in (1024, 512, 256):
        for chunk in (2048, 1024, 512):
            needed = max(
                vmem.dquery_bytes(chunk, rows, dim, itemsize, 512),
                vmem.dkey_bytes(chunk, 0, chunk, rows, dim, itemsize, listed=False, before=False),
            )
            if needed <= room:
                return _sizes(whole, rows=rows, chunk=chunk)
    raise AssertionError(f"no tile of head size {head_dim} fits in {room} bytes")


def walk_fits(carried: int, epoch: int) -> bool:
    """Whether keys can be chosen in VMEM, with so many kept from epoch to epoch."""
    return max(vmem.choosing_bytes(carried, epoch), vmem.lifetimes_bytes(carried, epoch)) <= _room()


def _room() -> int:
    """Bytes of VMEM that a kernel may take: what is there, less a sixteenth for the compiler's own."""
    return (_VMEM.get(_device_kind() or "", _SMALLEST_VMEM) << 20) * 15 // 16


def _sizes(epoch: int, **others: int) -> TpuBlockSizes:
    block_q = 2 * LANES if epoch % (2 * LANES) == 0 else LANES
    return TpuBlockSizes(epoch=epoch, block_q=block_q, block_k=LANES, granule=GRANULE, **others)


def unavailable() -> str | None:
    """None on a TPU, where kernels are interpreted, and where programs are compiled for a TPU; else what is missing."""
    if interpret_mode() is not False or _device_kind() is not None:
        return None
    return f"it needs a TPU, and the default backend is {jax.default_backend()}"


def unsupported(dtype: jnp.dtype, head_dim: int) -> str | None:
    """None for bfloat16 and float32 and head sizes up to 256; else what is out of range."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"it multiplies bfloat16 or float32, not {jnp.dtype(dtype).name}"
    if head_dim > MAX_HEAD_DIM:
        return f"it takes head sizes up to {MAX_HEAD_DIM}, not {head_dim}"
    return None


@contextlib.contextmanager
def interpreted(params: Any = True) -> Iterator[None]:
    """Run the TPU kernels without a TPU, slowly: True by plain XLA, `pltpu.InterpretParams` in a simulated TPU.

    For tests. What is traced inside stays interpreted, so jit a function anew for use outside.
    """
    token = _interpreted.set(params)
    try:
        yield
    finally:
        _interpreted.reset(token)


def interpret_mode() -> Any:
    return _interpreted.get()


@contextlib.contextmanager
def compiling_for(device_kind: str) -> Iterator[None]:
    """Choose and size the TPU kernels for a TPU that is not there (`jax.experimental.topologies`), by its
    `device_kind`. What is traced inside can be compiled for it, not run."""
    token = _target.set(device_kind)
    try:
        yield
    finally:
        _target.reset(token)


def _device_kind() -> str | None:
    """The TPU that programs are for; None where that is another device."""
    if _target.get() is not None:
        return _target.get()
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else None


def compiler_params(*semantics: Semantics, needed: int) -> pltpu.CompilerParams:
    """Grid dimensions that may run in any order are "parallel": chips of two cores share them.

    needed: bytes of VMEM, by `vmem`; beyond what the compiler grants by default, room is asked for.
    """
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=max(needed, _DEFAULT_VMEM))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
