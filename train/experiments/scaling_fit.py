"""Power laws with one floor: L(C) = E + a·C^−b, E the same for all variants, with bootstrap intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

STARTS = (0.0, 0.3, 0.6, 0.8, 0.9, 0.97)
"""First guesses of E, as shares of the least loss."""
MOST_EXPONENT = 3.0


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """E + a·C^−b."""

    floor: float
    scale: float
    exponent: float

    def __call__(self, compute: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return self.floor + self.scale * np.asarray(compute, float) ** -self.exponent


@dataclasses.dataclass(frozen=True)
class Fit:
    """laws: by variant, all with one floor. samples: the laws of every bootstrap sample. error: root mean square of
    log(fit / loss)."""

    laws: dict[str, PowerLaw]
    samples: list[dict[str, PowerLaw]]
    error: float

    @property
    def floor(self) -> float:
        return next(iter(self.laws.values())).floor

    def interval(self, name: str, field: str, level: float = 0.95) -> tuple[float, float]:
        """Percentile interval of `floor`, `scale` or `exponent` of a variant."""
        values = [getattr(sample[name], field) for sample in self.samples]
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def fit_power_laws(points: Mapping[str, Sequence[tuple[float, float]]], samples: int = 300, seed: int = 0) -> Fit:
    """Least squares of log L over all variants together.

    points: (compute in FLOPs, loss) of the runs of each variant, of at least 3 different computes. The bootstrap adds
    residuals drawn with replacement from all of them, enlarged for the degrees of freedom that the fit used up: with
    few sizes, drawing runs would leave many samples without a slope.
    Raises: ValueError, naming the variant, on too few points or numbers that no power law has.
    """
    names = list(points)
    if not names:
        raise ValueError("points must hold at least one variant, got none")
    for name, own in points.items():
        values = np.asarray(own, float)
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError(f"points of {name!r} must be finite and > 0, got {own}")
        if len({compute for compute, _ in own}) < 3:
            raise ValueError(f"points of {name!r} must have at least 3 different computes, got {len(own)} points")
    owner = np.concatenate([[index] * len(points[name]) for index, name in enumerate(names)])
    compute, loss = (np.concatenate([[point[i] for point in points[name]] for name in names]) for i in (0, 1))
    centre = np.exp(np.log(compute).mean())
    x, y = np.log(compute / centre), np.log(loss)
    count, parameters = len(y), 1 + 2 * len(names)
    if count <= parameters:
        raise ValueError(f"points must be more than the {parameters} parameters of the fit, got {count}")

    def predict(theta: np.ndarray) -> np.ndarray:
        return np.log(theta[0] + np.exp(theta[1::2][owner] - theta[2::2][owner] * x))

    def jacobian(theta: np.ndarray) -> np.ndarray:
        power = np.exp(theta[1::2][owner] - theta[2::2][owner] * x)
        value = theta[0] + power
        out = np.zeros((count, parameters))
        rows = np.arange(count)
        out[:, 0] = 1 / value
        out[rows, 1 + 2 * owner] = power / value
        out[rows, 2 + 2 * owner] = -x * power / value
        return out

    def solve(target: np.ndarray, starts: Sequence[np.ndarray]) -> np.ndarray:
        # The floor below every loss, exponents that shrink the rest.
        low = np.array([0.0] + [-np.inf, 0.0] * len(names))
        high = np.array([np.exp(target.min())] + [np.inf, MOST_EXPONENT] * len(names))
        best = None
        for start in starts:
            guess = np.clip(start, low + 1e-9, high - 1e-9)
            found = least_squares(
                lambda theta: predict(theta) - target, guess, jac=jacobian, bounds=(low, high), x_scale="jac"
            )
            if best is None or found.cost < best.cost:
                best = found
        assert best is not None
        return best.x

    def start(target: np.ndarray, share: float) -> np.ndarray:
        floor = share * np.exp(target.min())
        theta = [floor]
        for index in range(len(names)):
            own = owner == index
            slope, height = np.polyfit(x[own], np.log(np.exp(target[own]) - floor), 1)
            theta += [height, min(max(-slope, 0.01), MOST_EXPONENT - 0.01)]
        return np.array(theta)

    def laws(theta: np.ndarray) -> dict[str, PowerLaw]:
        return {
            name: PowerLaw(
                float(theta[0]), float(np.exp(theta[1 + 2 * i]) * centre ** theta[2 + 2 * i]), float(theta[2 + 2 * i])
            )
            for i, name in enumerate(names)
        }

    theta = solve(y, [start(y, share) for share in STARTS])
    fitted = predict(theta)
    residual = y - fitted
    enlarged = (residual - residual.mean()) * np.sqrt(count / (count - parameters))
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(samples):
        target = fitted + random.choice(enlarged, count)
        drawn.append(laws(solve(target, [theta, start(target, 0.6)])))
    return Fit(laws(theta), drawn, float(np.sqrt(np.mean(residual**2))))
