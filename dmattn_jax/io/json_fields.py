"""Fields of a JSON object that nobody vouches for, each read as the type that it must have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar

from dmattn_jax.io.errors import CheckpointFormatError

T = TypeVar("T")

LARGEST_JSON = 100 * 2**20
"""Bytes of a JSON file that are read at most: the index of a model of a million tensors has as many."""

_REQUIRED: Any = object()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: CheckpointFormatError where there is no file, or something else in it."""
    if not path.is_file():
        raise CheckpointFormatError(f"{path} is missing")
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointFormatError(f"{path} must be at most {LARGEST_JSON} bytes, got {path.stat().st_size}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointFormatError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


class Fields:
    """Typed access to the fields of an object; `source` names it in messages.

    Every method raises CheckpointFormatError where the field has another type, or is missing without a default.
    A field that is null counts as missing.
    """

    def __init__(self, content: dict[str, Any], source: str) -> None:
        self.content = content
        self.source = source

    def get(self, name: str, kind: type[T] | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        value = self.content.get(name)
        if value is None:
            if default is _REQUIRED:
                raise CheckpointFormatError(f"{self.source}: field {name} is missing")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(one.__name__ for one in kinds)
            raise CheckpointFormatError(f"{self.source}: {name} must be of type {wanted}, got {value!r:.80}")
        return value

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        value = self.get(name, int, default)
        # what a signed size can be: anything larger is no shape, and would overflow on its way to an error
        if isinstance(value, int) and not -(2**31) <= value < 2**31:
            raise CheckpointFormatError(f"{self.source}: {name} must be below 2^31, got {value}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self.get(name, (int, float), default)
        if value is None:
            return default
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise CheckpointFormatError(f"{self.source}: {name} must be finite, got {value}")
        return value

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        return self.get(name, bool, default)

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        return self.get(name, str, default)

    def nested(self, name: str) -> Fields | None:
        """An object in the object, or None where there is none."""
        content = self.get(name, dict, None)
        return None if content is None else Fields(content, f"{self.source}: {name}")

    def rope(self) -> Fields:
        """The object that describes rotary positions: `rope_parameters` (transformers 5) or `rope_scaling` (before).

        Raises where layers of different kinds have one each.
        """
        rope = self.nested("rope_parameters") or self.nested("rope_scaling") or Fields({}, self.source)
        for name, value in rope.content.items():
            if isinstance(value, dict):
                raise CheckpointFormatError(
                    f"{rope.source}: {name} must not be an object: positions that differ by layer are not supported"
                )
        return rope

    def must_be(self, name: str, allowed: Any, meaning: str) -> None:
        """Raises unless the field is missing or `allowed`; `meaning` says what it asks for."""
        value = self.content.get(name)
        if value is not None and (value != allowed or isinstance(value, bool) != isinstance(allowed, bool)):
            raise CheckpointFormatError(
                f"{self.source}: {name} must be {json.dumps(allowed)}, got {value!r:.80}: {meaning} is not supported"
            )
