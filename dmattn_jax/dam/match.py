"""True masks, and the diagonals and verticals that they match."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from dmattn_jax.dam.amplify import AMPLIFIERS, amplify
from dmattn_jax.dam.capture import Maps
from dmattn_jax.dam.errors import DamError
from dmattn_jax.dam.masks import Masks


@dataclasses.dataclass(frozen=True)
class MatchConfig:
    """threshold: τ, of the amplified map. match: μ, the share of a pattern's cells that must be in the mask.
    min_length: cells of a pattern at least; shorter ones, at the corner, match by chance. None: a quarter of L.

    Raises: DamError on a value out of its range.
    """

    threshold: float = 0.3
    match: float = 0.8
    min_length: int | None = None
    amplifier: str = "box_cox"

    def __post_init__(self) -> None:
        if not 0 < self.match <= 1:
            raise DamError(f"match must be in (0, 1], got {self.match}")
        if not np.isfinite(self.threshold):
            raise DamError(f"threshold must be finite, got {self.threshold}")
        if self.min_length is not None and self.min_length < 1:
            raise DamError(f"min_length must be >= 1, got {self.min_length}")
        if self.amplifier not in AMPLIFIERS:
            raise DamError(f"amplifier must be one of {', '.join(AMPLIFIERS)}, got {self.amplifier!r}")


def match(maps: Maps, config: MatchConfig | None = None) -> Masks:
    """Steps 2 to 5 of arXiv 2506.11104: amplify, cut at τ, score every diagonal and vertical, extend what matched.

    Raises: DamError where the threshold empties every head, or no calibration text reaches the capture length: cells
      that were never counted would count as not attended to.
    """
    config = config or MatchConfig()
    side = maps.length
    if not maps.count.all():
        longest = int(np.count_nonzero(np.diagonal(maps.count)))
        raise DamError(
            f"no calibration text has the capture length of {side} tokens, the longest has {longest}: capture longer "
            "text, or with a length of at most that"
        )
    least = max(1, side // 4) if config.min_length is None else config.min_length
    causal = np.tril(np.ones((side, side), bool))
    inside = np.zeros(maps.total.shape, bool)
    diagonals = np.zeros(maps.total.shape[:3], bool)
    verticals = np.zeros(maps.total.shape[:3], bool)
    largest = -np.inf
    for layer, total in enumerate(maps.total):
        amplified = amplify(total, maps.count, config.amplifier)
        largest = max(largest, float(amplified[:, causal].max()))
        inside[layer] = (amplified >= config.threshold) & causal
        by_diagonal, by_vertical = pattern_scores(inside[layer])
        # Distance r and column c have L − r and L − c cells.
        long_enough = side - np.arange(side) >= least
        diagonals[layer] = (by_diagonal >= config.match) & long_enough
        verticals[layer] = (by_vertical >= config.match) & long_enough
    if not inside.any():
        raise DamError(
            f"threshold {config.threshold} empties every head: the largest amplified value is {largest:.4g}; lower it"
        )
    fallback = np.logical_not(diagonals.any(-1) | verticals.any(-1))
    diagonals[fallback, 0] = True
    verticals[fallback, 0] = True
    settings: dict[str, Any] = {**dataclasses.asdict(config), "min_length": least, "rows": maps.rows}
    return Masks(inside, diagonals, verticals, fallback, maps.model, settings)


def pattern_scores(
    mask: Bool[np.ndarray, "H L L"],
) -> tuple[Float[np.ndarray, "H L"], Float[np.ndarray, "H L"]]:
    """γ = Σ M·P / Σ P of every diagonal (by distance i − j) and vertical (by column, i >= j): sums along the mask's
    own diagonals and columns, no pattern is ever built. mask is causal."""
    side = mask.shape[1]
    cells = side - np.arange(side)
    diagonal = np.stack([np.diagonal(mask, -distance, 1, 2).sum(-1) for distance in range(side)], axis=-1)
    return diagonal / cells, mask.sum(1) / cells
