"""Writing weights as transformers reads them: one safetensors file, or shards and their index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from dmattn_jax.io.safetensors_files import INDEX, SINGLE

SHARD_BYTES = 5 * 10**9
"""Of a shard at most, unless one tensor is larger; also the host memory that writing takes."""

OURS = re.compile(r"^model(-\d{5}-of-\d{5})?\.safetensors$")


def write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write all tensors into the folder, and remove those of an earlier model.

    Raises: ValueError when shard_bytes < 1; OSError where the folder cannot be written.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be >= 1, got {shard_bytes}")
    parts: list[tuple[Path, list[str]]] = []
    shard: dict[str, np.ndarray] = {}
    total = held = 0

    def flush() -> None:
        part = folder / f"part-{len(parts)}.safetensors.new"
        # save_file makes a file that its owner alone can read; this is as any other
        part.touch()
        mode = part.stat().st_mode
        # transformers asks for the format before it opens a file
        save_file(shard, part, metadata={"format": "pt"})
        part.chmod(mode)
        parts.append((part, list(shard)))
        shard.clear()

    try:
        for name, tensor in tensors:
            if shard and held + tensor.nbytes > shard_bytes:
                flush()
                held = 0
            shard[name] = tensor
            held += tensor.nbytes
            total += tensor.nbytes
        flush()
        _replace_earlier(folder, parts, total)
    finally:
        for path in folder.glob("part-*.safetensors.new"):
            path.unlink()


def _replace_earlier(folder: Path, parts: list[tuple[Path, list[str]]], total: int) -> None:
    for path in folder.iterdir():
        if OURS.match(path.name) or path.name == INDEX:
            path.unlink()
    if len(parts) == 1:
        parts[0][0].replace(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, (part, names) in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        part.replace(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
