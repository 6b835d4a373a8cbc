"""A checksum list inside each checkpoint: what was written, so that damage is seen before anything is loaded.

The list is written into the checkpoint's temporary folder just before the one rename that commits it, so a
committed checkpoint always has its list, and one without is damaged.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"
_CHUNK = 1 << 22
# orbax writes these two after the list, while it commits: the time of the commit, and a note that it was done
_STEP_METADATA = "_CHECKPOINT_METADATA"
_COMMIT_NOTE = "commit_success.txt"


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _files(directory: Path) -> list[Path]:
    late = {directory / name for name in (MANIFEST_NAME, _STEP_METADATA, _COMMIT_NOTE)}
    return sorted(path for path in directory.rglob("*") if path.is_file() and path not in late)


def _find_commit_damage(directory: Path) -> str | None:
    try:
        metadata = json.loads((directory / _STEP_METADATA).read_bytes())
    except FileNotFoundError:
        return f"{_STEP_METADATA} is missing"
    except ValueError:  # not JSON, or not UTF-8
        return f"{_STEP_METADATA} is not JSON"
    if not (isinstance(metadata, dict) and isinstance(metadata.get("commit_timestamp_nsecs"), int)):
        return f"{_STEP_METADATA} has no time of commit"
    return None if (directory / _COMMIT_NOTE).is_file() else f"{_COMMIT_NOTE} is missing"


def write_manifest(directory: Path, facts: dict[str, Any]) -> None:
    """Writes size and CRC-32 of every file under `directory`, and `facts` (JSON-able), as `manifest.json`."""
    files = {
        path.relative_to(directory).as_posix(): [path.stat().st_size, _checksum(path)] for path in _files(directory)
    }
    body = json.dumps({"facts": facts, "files": files}, sort_keys=True)
    # the list protects itself too: a flipped bit in it must not pass for damage elsewhere, or for health
    (directory / MANIFEST_NAME).write_text(f"{zlib.crc32(body.encode()):08x}\n{body}\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The facts and files that `write_manifest` wrote, or None when the list is missing or damaged."""
    try:
        checksum, body = (directory / MANIFEST_NAME).read_bytes().decode("utf-8").split("\n", 1)
    except (FileNotFoundError, UnicodeDecodeError, ValueError):
        return None
    body = body.removesuffix("\n")
    return json.loads(body) if f"{zlib.crc32(body.encode()):08x}" == checksum else None


def find_damage(directory: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, in words, or None when it is whole.

    contents: also read every byte; without it only names and sizes are compared.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return f"{MANIFEST_NAME} is missing or damaged"
    expected: dict[str, list[int]] = manifest["files"]
    present = {path.relative_to(directory).as_posix() for path in _files(directory)}
    for name, (size, checksum) in expected.items():
        if name not in present:
            return f"{name} is missing"
        path = directory / name
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if contents and _checksum(path) != checksum:
            return f"{name} has other contents than were written"
    unknown = present - expected.keys()
    return f"{min(unknown)} does not belong to it" if unknown else _find_commit_damage(directory)
