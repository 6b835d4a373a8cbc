"""Weights in safetensors: one file, or shards and their index. Read by slices, refused when damaged."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
import numpy as np
import safetensors

from dmattn_jax.io.errors import CheckpointFormatError
from dmattn_jax.io.json_fields import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".msgpack")
"""Endings of weights that are, or may hold, a pickle, or are of another framework. None is ever opened."""

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types of tensors that are read, and their bytes."""

PLAIN_NAME = re.compile(r"^[\w-][\w.-]*\.safetensors\Z")
LARGEST_HEADER = 100_000_000


class SafetensorsFolder:
    """The tensors of a folder's `model.safetensors`, or of the shards that its index names."""

    def __init__(self, folder: Path) -> None:
        """Raises: CheckpointFormatError when there are no such files, or one is damaged; names file and tensor."""
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._slices: dict[str, Any] = {}
        if (folder / INDEX).is_file():
            self._file_of = self._indexed(folder / INDEX)
        elif (folder / SINGLE).is_file():
            self._file_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise CheckpointFormatError(_no_weights(folder))

    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def check_type(self, name: str) -> None:
        kind = self._slice(name).get_dtype()
        if kind not in FLOATS:
            raise CheckpointFormatError(f"{self.where(name)} must be one of {', '.join(FLOATS)}, got {kind}")

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._slice(name)[index]

    def where(self, name: str) -> str:
        if not name:
            return str(self.folder)
        return f"{self.folder / self._file_of[name]}: tensor {name}"

    def _slice(self, name: str) -> Any:
        if name not in self._slices:
            self._slices[name] = self._open(self._file_of[name]).get_slice(name)
        return self._slices[name]

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.folder / file
            try:
                self._files[file] = safetensors.safe_open(path, framework="numpy")
            except (safetensors.SafetensorError, OSError) as error:
                raise CheckpointFormatError(f"{path}: {_fault(path) or error}") from None
        return self._files[file]

    def _indexed(self, path: Path) -> dict[str, str]:
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointFormatError(f"{path}: weight_map must be an object that names a file for every tensor")
        inside: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            # A name, not a path: an index must not reach out of its folder.
            if not isinstance(file, str) or not PLAIN_NAME.match(file):
                raise CheckpointFormatError(
                    f"{path}: the file of tensor {name} must be the name of a .safetensors file in this folder, "
                    f"got {file!r:.200}"
                )
            if file not in inside:
                if not (self.folder / file).is_file():
                    raise CheckpointFormatError(f"{path}: the shard {file} of tensor {name} is missing")
                inside[file] = set(self._open(file).keys())
            if name not in inside[file]:
                raise CheckpointFormatError(f"{path}: tensor {name} is not in {file}, which the index says holds it")
        return weight_map


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (
            f"{folder / pickles[0]} may be a pickle, which can run any code when it is opened, so it is not: "
            "convert the model to safetensors where you trust it"
        )
    return f"{folder} holds neither {SINGLE} nor {INDEX}"


def _fault(path: Path) -> str | None:
    """What is wrong with a file that the library refused, by tensor, or None where its own message must do."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            return f"truncated: {size} bytes, where a header of at least 8 must be"
        length = struct.unpack("<Q", first)[0]
        if length > LARGEST_HEADER:
            return f"not safetensors: a header of {length} bytes, where at most {LARGEST_HEADER} are allowed"
        if length > size - 8:
            return f"truncated: a header of {length} bytes in a file of {size}"
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            return f"the header is not JSON: {error}"
    if not isinstance(header, dict):
        return "the header must be a JSON object"
    header.pop("__metadata__", None)
    end_of_last, last = 0, ""
    for name, entry in sorted(header.items(), key=_start):
        fault = _tensor_fault(entry, size - 8 - length)
        if fault is None and entry["data_offsets"][0] < end_of_last:
            fault = f"overlaps tensor {last!r:.200}"
        if fault is not None:
            return f"tensor {name!r:.200} {fault}"
        end_of_last, last = entry["data_offsets"][1], name
    return None


def _start(item: tuple[str, Any]) -> int:
    try:
        start = item[1]["data_offsets"][0]
    except (TypeError, KeyError, IndexError):
        return -1
    return start if isinstance(start, int) else -1


def _tensor_fault(entry: Any, data_size: int) -> str | None:
    if not isinstance(entry, dict):
        return "has no description"
    shape, offsets, kind = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
        return f"has the shape {shape!r:.80}, which is none"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(isinstance(at, int) for at in offsets):
        return f"has the data_offsets {offsets!r:.80}, which are not two numbers"
    begin, end = offsets
    if not 0 <= begin <= end:
        return f"has the data_offsets {offsets}, which are no range"
    if end > data_size:
        return f"ends at byte {end} of {data_size}: the file is truncated"
    if not isinstance(kind, str):
        return f"has the dtype {kind!r:.80}, which is none"
    if kind in FLOATS and math.prod(shape) * FLOATS[kind] != end - begin:
        return f"of shape {shape} and type {kind} must have {math.prod(shape) * FLOATS[kind]} bytes, got {end - begin}"
    return None
