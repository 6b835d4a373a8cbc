"""Rotary position embedding, half-split: dimension i turns with dimension i + D/2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from dmattn_jax.partitioning import axis_size


@dataclass(frozen=True)
class LinearRope:
    """Position interpolation (arXiv 2306.15595): all angles divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        _check_positive(self)

    def scale(self, frequency: Float[Array, " N"], theta: float) -> Float[Array, " N"]:
        return frequency / self.factor


@dataclass(frozen=True)
class Llama3Rope:
    """The stretching of Llama 3.1: long wavelengths are divided by `factor`, short ones are left alone.

    With turns = original_max_position_embeddings / wavelength, a frequency is divided by `factor` where
    turns <= low_freq_factor, kept where turns >= high_freq_factor, and in between interpolated linearly in turns.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _check_positive(self)
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be > low_freq_factor, got {self.high_freq_factor} and {self.low_freq_factor}"
            )

    def scale(self, frequency: Float[Array, " N"], theta: float) -> Float[Array, " N"]:
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = jnp.clip(kept, 0, 1)
        return (1 - kept) * frequency / self.factor + kept * frequency


@dataclass(frozen=True)
class YarnRope:
    """YaRN (arXiv 2309.00071): slow dimensions are divided by `factor`, fast ones left alone, cos and sin enlarged.

    Dimension i makes original_max_position_embeddings · θ^(−2i/D) / 2π turns over the context that the model was
    trained for. Dimensions of more than beta_fast turns are kept, those of fewer than beta_slow divided, and those in
    between interpolated linearly in i. truncate: whether these two bounds are widened to whole dimensions.
    attention_factor: multiplies cos and sin; None is the paper's 0.1·ln(factor) + 1.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_positive(self)
        if not self.beta_fast > self.beta_slow:
            raise ValueError(f"beta_fast must be > beta_slow, got {self.beta_fast} and {self.beta_slow}")

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(max(self.factor, 1.0)) + 1.0

    def scale(self, frequency: Float[Array, " N"], theta: float) -> Float[Array, " N"]:
        half = frequency.shape[0]
        low, high = (self._dimension(turns, half, theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        # A step where both bounds are one dimension.
        divided = jnp.clip((jnp.arange(half, dtype=frequency.dtype) - low) / max(high - low, 1e-3), 0, 1)
        return divided * frequency / self.factor + (1 - divided) * frequency

    def _dimension(self, turns: float, half: int, theta: float) -> float:
        """The dimension, not a whole one, that makes so many turns."""
        return half * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)


@dataclass(frozen=True)
class FactorsRope:
    """One divisor for each of the D/2 frequencies, as a GGUF file stores them."""

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        for factor in self.factors:
            if not (factor > 0 and math.isfinite(factor)):
                raise ValueError(f"factors must be finite and > 0, got {factor}")

    def scale(self, frequency: Float[Array, " N"], theta: float) -> Float[Array, " N"]:
        if len(self.factors) != frequency.shape[0]:
            raise ValueError(f"factors must be head_dim / 2 = {frequency.shape[0]} numbers, got {len(self.factors)}")
        return frequency / jnp.asarray(self.factors, frequency.dtype)


RopeScaling = LinearRope | Llama3Rope | YarnRope | FactorsRope


def _check_positive(scaling: LinearRope | Llama3Rope | YarnRope) -> None:
    for name, value in vars(scaling).items():
        if value is None or isinstance(value, bool):
            continue
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be finite and > 0, got {value}")


@jax.named_scope("rope")
def apply_rope(
    x: Float[Array, "B T H D"],
    position: Int[Array, "B T"] | Int[Array, "1 T"],
    *,
    theta: float = 10_000.0,
    scaling: RopeScaling | None = None,
) -> Float[Array, "B T H D"]:
    """Rotate each pair (x_i, x_{i+D/2}) by position · theta^(−2i/D); float32 inside, x's dtype outside.

    scaling: how the frequencies are changed for longer contexts than theta was trained for.
    Angles are float32: beyond 2^24 positions they are those of the nearest representable position.
    Raises: ValueError when D is odd.
    """
    return turn(x, *rotation(position, x.shape[-1], theta=theta, scaling=scaling))


@jax.named_scope("rope")
def rotation(
    position: Int[Array, "b T"], head_dim: int, *, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "b T N"], Float[Array, "b T N"]]:
    """The cos and the sin that `apply_rope` turns the N = D/2 pairs of every token with, float32."""
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary positions, got {head_dim}")
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequency = scaling.scale(frequency, theta)
    angle = position.astype(jnp.float32)[:, :, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if isinstance(scaling, YarnRope):
        cos, sin = scaling.magnitude * cos, scaling.magnitude * sin
    return cos, sin


@jax.named_scope("rope")
def turn(x: Float[Array, "B T H D"], cos: Float[Array, "b T N"], sin: Float[Array, "b T N"]) -> Float[Array, "B T H D"]:
    """x_i cos_i − x_{i+N} sin_i, and x_{i+N} cos_i + x_i sin_i: by −sin it is the transpose."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    # The same numbers in either form. A GPU's compiler reads a flipped axis in place, where it would write two halves
    # apart and join them in another pass; a TPU's would move every row for it, and before JAX 0.11 compilers do not cut
    # over devices what has a layout asked for.
    if axis_size("batch") * axis_size("heads") > 1:
        return _turn_by_halves(x, cos, sin)
    return lax.platform_dependent(x, cos, sin, cuda=_turn_by_flip, default=_turn_by_halves)


def _turn_by_halves(x: Float[Array, "B T H D"], cos: Float[Array, "b T 1 N"], sin: Float[Array, "b T 1 N"]) -> Array:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _turn_by_flip(x: Float[Array, "B T H D"], cos: Float[Array, "b T 1 N"], sin: Float[Array, "b T 1 N"]) -> Array:
    # Rows in memory as the kernels of attention read them: of one long sequence the compiler would have time innermost,
    # and write transposed float32 for every step back.
    x = with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    sign = jnp.array([[-1.0], [1.0]], jnp.float32)
    turned = halves * cos[..., None, :] + halves[..., ::-1, :] * (sin[..., None, :] * sign)
    return turned.astype(x.dtype).reshape(x.shape)
