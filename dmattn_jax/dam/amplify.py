"""From accumulated attention to maps that a threshold can cut: Box-Cox and its eight alternatives.

Every amplifier is a pure function (mean, total) -> amplified of one layer's maps, float32 [H, L, L]. mean is Σ A·mᵢmⱼ
over Σ mᵢmⱼ, total the sum itself. Statistics are of the whole layer, all of its heads together, the upper triangle
(which is 0) included, as in step 2 of the recipe: equal thresholds then mean the same in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

from dmattn_jax.dam.errors import DamError

Amplifier = Callable[[np.ndarray, np.ndarray], np.ndarray]

EPSILON = 1e-10
LAMBDA = 0.5


def box_cox(mean: np.ndarray, total: np.ndarray) -> np.ndarray:
    """(max(x, 1e-10)^λ − 1)/λ with λ = 0.5, shifted by the layer's minimum so that all are >= 0."""
    del total
    transformed = (np.maximum(mean, EPSILON) ** LAMBDA - 1) / LAMBDA
    return transformed - transformed.min()


def _min_max(mean: np.ndarray, total: np.ndarray) -> np.ndarray:
    del total
    low, high = mean.min(), mean.max()
    return (mean - low) / (high - low) if high > low else np.zeros_like(mean)


def _z_score(mean: np.ndarray, total: np.ndarray) -> np.ndarray:
    del total
    spread = mean.std()
    return (mean - mean.mean()) / spread if spread > 0 else np.zeros_like(mean)


AMPLIFIERS: Mapping[str, Amplifier] = {
    "box_cox": box_cox,
    "average": lambda mean, total: mean,
    "sum": lambda mean, total: total,
    "log1p": lambda mean, total: np.log1p(mean),
    "sqrt": lambda mean, total: np.sqrt(mean),
    "min_max": _min_max,
    "arcsinh": lambda mean, total: np.arcsinh(mean),
    "z_score": _z_score,
    "yeo_johnson": lambda mean, total: ((mean + 1) ** LAMBDA - 1) / LAMBDA,
}
"""All amplifiers by name; attention is never negative, so Yeo-Johnson has its upper branch alone (λ = 0.5)."""


def amplify(
    total: Float[np.ndarray, "H L L"], count: Float[np.ndarray, "L L"], method: str = "box_cox"
) -> Float[np.ndarray, "H L L"]:
    """Step 2 of arXiv 2506.11104 for one layer: total Σ A·mᵢmⱼ and count Σ mᵢmⱼ -> amplified maps, float32.

    Raises: DamError for a method that is none of AMPLIFIERS.
    """
    if method not in AMPLIFIERS:
        raise DamError(f"amplifier must be one of {', '.join(AMPLIFIERS)}, got {method!r}")
    mean = total / np.maximum(count, 1)
    return AMPLIFIERS[method](mean.astype(np.float32), total.astype(np.float32)).astype(np.float32)
