"""How long a command that runs experiments may take."""

from __future__ import annotations

import time

from train.errors import ConfigError


class Deadline:
    """When the command must end. minutes: None for never. Raises: ConfigError unless minutes > 0."""

    def __init__(self, minutes: float | None) -> None:
        if minutes is not None and not minutes > 0:
            raise ConfigError(f"max-minutes must be > 0, got {minutes}")
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def passed(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end
