"""What every finished cell of an experiment writes: its numbers, and where they come from."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RESULT = "result.json"
DIVERGED = "diverged.json"
JOBS = "DMATTN_JOBS"
"""In the environment: how many processes share this one's accelerator."""
SHARED = ".sharing"
"""In a cell's folder: the most that shared one while it was trained."""


def sharing() -> int:
    """How many processes share this one's accelerator, itself included; 1 where nothing says so."""
    return int(os.environ.get(JOBS, "1"))


def note_sharing(folder: Path) -> None:
    """Says in a cell's folder that it is trained by this process: `origin` gives the most that ever shared a device."""
    write_text(folder / SHARED, f"{_most_sharing(folder)}\n")


def _most_sharing(folder: Path | None) -> int:
    noted = folder / SHARED if folder else None
    return max(sharing(), int(noted.read_text(encoding="utf-8")) if noted and noted.exists() else 1)


def origin(folder: Path | None = None) -> dict[str, Any]:
    """The device, how many processes shared it, and the versions that numbers were measured with. folder: of a cell,
    which several processes may have trained after each other."""
    try:
        own = version("dmattn-jax")
    except PackageNotFoundError:
        own = "a source tree, not installed"
    versions = {"dmattn-jax": own, "jax": jax.__version__, "python": platform.python_version()}
    return {"device": jax.devices()[0].device_kind, "sharing": _most_sharing(folder), "versions": versions}


def write_json(path: Path, content: Any) -> None:
    """Writes at once: a reader never sees half a file."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes at once, and several processes may write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def read_results(output: Path) -> Iterator[dict[str, Any]]:
    """The results of all finished cells below a folder, by name."""
    for path in sorted(output.glob(f"*/{RESULT}")):
        yield json.loads(path.read_text(encoding="utf-8"))


def write_diverged(folder: Path, config: DataclassInstance, said: str) -> None:
    """A cell whose numbers stopped being finite: trained again it would end the same way, so that is its result."""
    write_json(
        folder / DIVERGED, {"name": folder.name, "said": said, "config": dataclasses.asdict(config), **origin(folder)}
    )


def has_diverged(folder: Path, config: DataclassInstance) -> bool:
    """Whether the cell of this configuration did; one of another is trained as if there were none."""
    path = folder / DIVERGED
    if not path.exists():
        return False
    known = json.loads(path.read_text(encoding="utf-8"))["config"]
    return known == json.loads(json.dumps(dataclasses.asdict(config)))


def read_diverged(output: Path) -> Iterator[dict[str, Any]]:
    """The cells below a folder that diverged, by name."""
    for path in sorted(output.glob(f"*/{DIVERGED}")):
        yield json.loads(path.read_text(encoding="utf-8"))
