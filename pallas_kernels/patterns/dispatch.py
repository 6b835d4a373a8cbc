"""Pattern attention by the first implementation that runs here."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.choice import choose
from pallas_kernels.patterns.contract import Implementation, Kept, Patterns, Places
from pallas_kernels.patterns.gpu import MOSAIC_GPU
from pallas_kernels.patterns.tpu import MOSAIC_TPU
from pallas_kernels.patterns.xla import XLA

IMPLEMENTATIONS: dict[str, Implementation] = {entry.name: entry for entry in (MOSAIC_GPU, MOSAIC_TPU, XLA)}
"""The most preferred first; a new backend adds itself here."""


def pattern_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    patterns: Patterns,
    query_places: Places,
    key_places: Places,
    kept: Kept | None = None,
    *,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """`contract.Forward` by the named implementation, or by the first that runs here and takes such arrays.

    Not differentiable: the masks serve frozen models. Raises: ValueError for a name that cannot run, with the reason.
    """

    def obstacle(entry: Implementation) -> str | None:
        return entry.unavailable() or entry.unsupported(query, key, kept)

    entry = choose(IMPLEMENTATIONS, implementation, obstacle)
    return entry.forward(query, key, value, patterns, query_places, key_places, kept, scale=scale)
