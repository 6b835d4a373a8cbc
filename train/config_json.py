"""A run's configuration as JSON, and what differs between two of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from train.config import TrainConfig
from train.errors import ConfigError

T = TypeVar("T")

ONLY_A_RUN = (
    "eval --text and export take a run's folder; a Hugging Face folder or a .gguf file is for eval --tasks, generate, "
    "chat and serve"
)

RESUMABLE_PREFIXES = ("steps", "optimizer.", "mesh.", "checkpoint.", "log.", "runs_dir", "accumulate")
RESUMABLE_FIELDS = frozenset({"model.dtype", "model.remat", "model.unroll_layers"})
"""Fields that may change when a run is resumed: none of them alters what a checkpoint holds or how data is cut."""


def to_json(config: Any) -> str:
    """A dataclass as readable JSON; `from_json` of it equals it."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, origin: str = "config.json") -> TrainConfig:
    """The TrainConfig of `to_json`. Raises ConfigError naming the field when it is not one of ours, and for the
    configuration of a Hugging Face model.

    Fields that are absent take their default, so that an older run's file still reads.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{origin} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} must hold one JSON object, got {type(values).__name__}")
    if "model_type" in values or "architectures" in values:
        raise ConfigError(f"{origin} is of a Hugging Face model, not of a run: {ONLY_A_RUN}")
    return _build(TrainConfig(), values, origin, "")


def load(path: Path) -> TrainConfig:
    """The configuration in a file. Raises ConfigError when there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no configuration at {path}: is this a run's folder?") from None
    return from_json(text, str(path))


def _build(default: T, values: dict[str, Any], origin: str, prefix: str) -> T:
    fields = {f.name for f in dataclasses.fields(default)}  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(f"{origin} has the unknown field {prefix}{name}: written by another version?")
        current = getattr(default, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ConfigError(f"{origin}: {prefix}{name} must be an object, got {value!r}")
            value = _build(current, value, origin, f"{prefix}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        changes[name] = value
    return dataclasses.replace(default, **changes)  # type: ignore[type-var]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields that differ, with both values."""
    before, after = _flatten(dataclasses.asdict(old)), _flatten(dataclasses.asdict(new))
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def show(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """`name old -> new` of each, in one line."""
    return ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changes.items())


def may_change_on_resume(name: str) -> bool:
    """Whether a run can be continued with another value of this field."""
    return name in RESUMABLE_FIELDS or name.startswith(RESUMABLE_PREFIXES)
