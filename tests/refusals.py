"""How a model's file must be refused."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from dmattn_jax.io import CheckpointFormatError, load_pretrained

MEMORY = 2**28
"""Bytes that refusing a file of a few kilobytes may take at most: an honest error takes next to none."""


def refuse(path: Path, *named: str) -> str:
    with pytest.raises(CheckpointFormatError) as caught:
        load_pretrained(path)
    message = str(caught.value)
    for name in (str(path), *named):
        assert name in message
    assert "\n" not in message
    assert len(message) < 1000
    return message


def refused_or_fine(load: Callable[[Path], object], path: Path) -> None:
    """No error but the one, which names the file, and no more memory than an honest file takes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = str(path)
    try:
        load(path)
    except CheckpointFormatError as error:
        message = str(error)
    assert str(path) in message
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MEMORY
