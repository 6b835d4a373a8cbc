"""A step of decoding by the first implementation that runs here."""

from __future__ import annotations

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.choice import choose
from pallas_kernels.decoding.contract import Implementation, Slots
from pallas_kernels.decoding.gpu import MOSAIC_GPU
from pallas_kernels.decoding.xla import XLA

IMPLEMENTATIONS: dict[str, Implementation] = {entry.name: entry for entry in (MOSAIC_GPU, XLA)}
"""The most preferred first; a new backend adds itself here."""


def room_for(keys: int, head_dim: int, dtype: DTypeLike) -> int:
    """Slots for so many keys: as many, or the next multiple that the most preferred implementation here takes."""
    granule = choose(IMPLEMENTATIONS, None, lambda entry: entry.unavailable()).granule(head_dim, dtype)
    return -(-keys // granule) * granule


def decode_step(
    query: Float[Array, "B H D"],
    key: Float[Array, "B K D"],
    value: Float[Array, "B K D"],
    gate: Float[Array, "B K"],
    position: Int32[Array, " B"],
    slots: Slots,
    *,
    windows: tuple[int, ...],
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "B H D"], Slots]:
    """`contract.Step` by the named implementation, or by the first that runs here and takes such arrays.

    Raises: ValueError for a name that cannot run, with the reason.
    """
    entry = choose(
        IMPLEMENTATIONS, implementation, lambda entry: entry.unavailable() or entry.unsupported(query, slots)
    )
    return entry.step(query, key, value, gate, position, slots, windows=windows, scale=scale)
