"""Which of several implementations runs: the one that is named, or the first that can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def choose(implementations: Mapping[str, T], name: str | None, obstacle: Callable[[T], str | None]) -> T:
    """obstacle(implementation): None where it runs here and takes the arrays at hand, else the reason in words.

    Raises: ValueError for a name that is unknown, or that cannot run, with the reason.
    """
    if name is None:
        return next(entry for entry in implementations.values() if obstacle(entry) is None)
    if name not in implementations:
        known = ", ".join(map(repr, implementations))
        raise ValueError(f"implementation must be None or one of {known}, got {name!r}")
    if reason := obstacle(implementations[name]):
        raise ValueError(f"implementation {name!r} cannot run here: {reason}")
    return implementations[name]
