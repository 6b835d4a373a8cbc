"""What the commands of `dmattn dam` have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from train.errors import ConfigError

Model = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]


def at_least(name: str, value: int, least: int) -> None:
    """Raises: ConfigError for a smaller value."""
    if value < least:
        raise ConfigError(f"{name} must be >= {least}, got {value}")
