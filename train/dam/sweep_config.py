"""What `dmattn dam sweep` measures, as data."""

from __future__ import annotations

import dataclasses

from train.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Every capture length with every threshold and every match share."""

    captures: tuple[int, ...] = (128, 512, 1024)
    """Capture lengths L."""
    thresholds: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    """τ."""
    mus: tuple[float, ...] = (0.5, 0.8, 0.9)
    """μ."""
    amplifier: str = "box_cox"
    """How attention is amplified before the threshold."""
    capture_rows: int = 96
    """Rows of L tokens that are recorded."""
    length: int = 2048
    """Tokens of an evaluated row."""
    rows: int = 8
    """Evaluated rows of each kind of text."""
    sinks: int = 4
    """First keys that a rival sees besides its window."""
    batch_size: int = 8
    """Rows computed at once."""
    megabytes: float = 3.0
    """Text gathered for each split and kind, where the folder has none yet."""

    def check(self) -> None:
        """Raises: ConfigError naming what cannot work."""
        for name, least in (("captures", 2), ("length", 2), ("rows", 1), ("capture_rows", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=0) < least:
                raise ConfigError(f"{name.replace('_', '-')} must be >= {least}, got {value}")
        if self.sinks < 0 or not self.thresholds or not self.mus:
            raise ConfigError("sinks must be >= 0, and thresholds and mus must name at least one number each")

    def cells(self) -> list[Cell]:
        return [
            Cell(length, threshold, mu) for length in self.captures for threshold in self.thresholds for mu in self.mus
        ]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One capture length and one way to match."""

    capture: int
    threshold: float
    mu: float

    @property
    def name(self) -> str:
        return f"L{self.capture}_t{self.threshold:g}_m{self.mu:g}"
