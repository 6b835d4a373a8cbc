"""What every finished cell of an experiment writes: its numbers, and where they come from."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

RESULT = "result.json"


def origin() -> dict[str, Any]:
    """The device and the versions that numbers were measured with."""
    try:
        own = version("dmattn-jax")
    except PackageNotFoundError:
        own = "a source tree, not installed"
    versions = {"dmattn-jax": own, "jax": jax.__version__, "python": platform.python_version()}
    return {"device": jax.devices()[0].device_kind, "versions": versions}


def write_json(path: Path, content: Any) -> None:
    """Writes at once: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    fresh.replace(path)


def read_results(output: Path) -> Iterator[dict[str, Any]]:
    """The results of all finished cells below a folder, by name."""
    for path in sorted(output.glob(f"*/{RESULT}")):
        yield json.loads(path.read_text(encoding="utf-8"))
