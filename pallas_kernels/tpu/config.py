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

Semantics: TypeAlias = Literal["parallel", "arbitrary"]

LANES = 128
"""Lanes of a vector register: keys of one tile, and what every row of scalars is a multiple of."""

MAX_HEAD_DIM = 256

# VMEM of one TensorCore in MiB, by the device kind that JAX reports.
_VMEM = {"TPU v4": 16, "TPU v5 lite": 128, "TPU v5": 64, "TPU v6 lite": 128, "TPU7x": 64}
_SMALLEST_VMEM = min(_VMEM.values())
# What a kernel may take without asking, and what tiles of logits, queries and outputs take beside the lists.
_DEFAULT_VMEM = 16 << 20
_TILE_BYTES = 8 << 20

_interpreted: ContextVar[Any] = ContextVar("interpreted", default=False)
_target: ContextVar[str | None] = ContextVar("target", default=None)


@dataclass(frozen=True)
class TpuBlockSizes(BlockSizes):
    """Tiles of block_q positions, all query heads of a group together, by block_k keys.

    wide: keys of a tile that all of its queries see; chunk: keys of the identity layout in VMEM at a time.
    """

    wide: int = 512
    chunk: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_k != LANES:
            raise ValueError(f"block_k must be {LANES}, the lanes of a register, got {self.block_k}")
        for name, divisor in (("block_q", LANES), ("wide", 2 * LANES), ("granule", self.wide), ("chunk", self.wide)):
            if getattr(self, name) % divisor:
                raise ValueError(f"{name} must be a multiple of {divisor}, got {getattr(self, name)}")


def block_sizes(queries: int, keys: int, window: int, head_dim: int) -> TpuBlockSizes:
    """Sizes for the TPU at hand, or, where there is none, for the generation with the least VMEM.

    Long epochs move each carried row less often; the lists of one must fit in VMEM together with the float32
    gradients of its rows. Raises: ValueError for a window whose lists do not fit at any size.
    """
    kind = _device_kind()
    room = _VMEM.get(kind or "", _SMALLEST_VMEM) << 20
    epoch = min(max(512, _round_up(window, 256)), 2048, _round_up(queries, LANES))
    carried = _round_up(window, 512)
    while epoch > 256 and list_bytes(carried + epoch, carried, head_dim) > room // 2:
        epoch = _round_up(epoch // 2, LANES)
    if kind and window + epoch < keys and list_bytes(carried + epoch, carried, head_dim) > 3 * room // 4:
        raise ValueError(
            f"window {window} is too large for the {room >> 20} MiB of VMEM of a {kind} core; "
            "take a smaller window or implementation='xla'"
        )
    return TpuBlockSizes(epoch=epoch, block_q=256 if epoch % 256 == 0 else LANES, block_k=LANES, granule=512)


def list_bytes(slots: int, carried: int, head_dim: int) -> int:
    """VMEM of one list in the backward pass: bfloat16 keys and values twice (one pair is on its way), float32
    gradients of its slots and of those carried on, and columns of scalars."""
    dim = _round_up(head_dim, LANES)
    return slots * dim * (2 * 2 * 2 + 2 * 4) + carried * (2 * dim + LANES) * 4 + slots * LANES * 4 * 4


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


def compiler_params(*semantics: Semantics, vmem: int = 0) -> pltpu.CompilerParams:
    """Grid dimensions that may run in any order are "parallel": chips of two cores share them.

    vmem: bytes of the rows a kernel keeps; beyond what the compiler grants by default, room is asked for.
    """
    wanted = vmem + _TILE_BYTES
    limit = wanted if wanted > _DEFAULT_VMEM else None
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
