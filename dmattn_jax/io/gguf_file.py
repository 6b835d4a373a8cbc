"""GGUF files: metadata and tensors, read with every length checked against the file.

The reader of the package `gguf` believes the lengths in a file: an array that claims 2^60 elements has it loop, and
its list grow, for ever. So the header is walked here, and the package gives what a header means (its enumerations and
block sizes) and turns quantised blocks into numbers. Format: version 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmattn_jax.io.errors import CheckpointFormatError

try:
    import gguf
    import gguf.quants
except ImportError as error:
    raise ImportError("GGUF files need the package gguf: pip install 'dmattn-jax[gguf]'") from error

Kind = gguf.GGUFValueType
Quantization = gguf.GGMLQuantizationType

SCALARS: dict[int, str] = {
    Kind.UINT8: "<u1",
    Kind.INT8: "<i1",
    Kind.UINT16: "<u2",
    Kind.INT16: "<i2",
    Kind.UINT32: "<u4",
    Kind.INT32: "<i4",
    Kind.FLOAT32: "<f4",
    Kind.BOOL: "?",
    Kind.UINT64: "<u8",
    Kind.INT64: "<i8",
    Kind.FLOAT64: "<f8",
}

READABLE = (
    Quantization.F32,
    Quantization.F16,
    Quantization.BF16,
    Quantization.Q8_0,
    Quantization.Q4_0,
    Quantization.Q4_1,
    Quantization.Q5_0,
    Quantization.Q5_1,
    Quantization.Q2_K,
    Quantization.Q3_K,
    Quantization.Q4_K,
    Quantization.Q5_K,
    Quantization.Q6_K,
)
"""Types of tensors that are read."""

MOST_DIMENSIONS = 4
SMALLEST_ENTRY = 13
"""Bytes of a metadata entry at least: an empty key, a type, one byte."""
SMALLEST_TENSOR = 24
"""Bytes of a tensor's description at least."""


class GgufTensor(NamedTuple):
    """Where a tensor lies. shape: slowest axis first, as in numpy (the file has the fastest first)."""

    shape: tuple[int, ...]
    kind: Quantization
    offset: int
    size: int


class GgufFile:
    """The metadata of a file, and its tensors, dequantised by rows as they are read.

    metadata: key → int, float, bool, str, a numpy array of numbers, or a list of strings.
    """

    def __init__(self, path: Path) -> None:
        """Raises: CheckpointFormatError where the file is damaged or of another kind; names key or tensor."""
        self.path = path
        size = path.stat().st_size
        if size < 24:
            raise CheckpointFormatError(f"{path} is not a GGUF file: {size} bytes")
        self._data = np.memmap(path, np.uint8, mode="r")
        cursor = _Cursor(self._data, path)
        if bytes(cursor.take(4, "the magic number")) != b"GGUF":
            raise CheckpointFormatError(f"{path} is not a GGUF file: it does not begin with GGUF")
        version = cursor.number("<u4", "the version")
        if version not in (2, 3):
            raise CheckpointFormatError(f"{path} must be GGUF of version 2 or 3, little-endian, got version {version}")
        tensor_count = cursor.count(SMALLEST_TENSOR, "tensors")
        key_count = cursor.count(SMALLEST_ENTRY, "metadata entries")
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = cursor.text("a metadata key")
            if key in self.metadata:
                raise CheckpointFormatError(f"{path}: the key {key!r:.200} is there twice")
            self.metadata[key] = cursor.value(cursor.number("<u4", key), key)
        self._tensors: dict[str, GgufTensor] = {}
        for _ in range(tensor_count):
            self._add_tensor(cursor)
        self._place_tensors(cursor.at)

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def check_type(self, name: str) -> None:
        """All types that cannot be read were refused when the file was opened."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """That part of the tensor, float32; whole rows are dequantised, and of the others nothing is read."""
        tensor = self._tensors[name]
        row = tensor.shape[-1]
        bytes_of_row = tensor.size // math.prod(tensor.shape[:-1])
        blocks = self._data[tensor.offset : tensor.offset + tensor.size].reshape(*tensor.shape[:-1], bytes_of_row)
        chosen = np.ascontiguousarray(blocks[index[:-1]])
        # A damaged block may hold a scale that is not finite: the weights then say so.
        with np.errstate(all="ignore"):
            numbers = gguf.quants.dequantize(chosen.reshape(-1, bytes_of_row), tensor.kind)
        return numbers.reshape(*chosen.shape[:-1], row)[..., index[-1]]

    def where(self, name: str) -> str:
        return f"{self.path}: tensor {name}" if name else str(self.path)

    def _add_tensor(self, cursor: _Cursor) -> None:
        name = cursor.text("a tensor's name")
        if name in self._tensors:
            raise CheckpointFormatError(f"{self.path}: tensor {name!r:.200} is there twice")
        where = f"{self.path}: tensor {name!r:.200}"
        dimensions = cursor.number("<u4", where)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise CheckpointFormatError(f"{where} must have 1 to {MOST_DIMENSIONS} dimensions, got {dimensions}")
        shape = tuple(int(cursor.number("<u8", where)) for _ in range(dimensions))[::-1]
        raw_kind, offset = cursor.number("<u4", where), cursor.number("<u8", where)
        if raw_kind not in READABLE:
            names = {int(kind): kind.name for kind in Quantization}
            raise CheckpointFormatError(
                f"{where} has type {names.get(raw_kind, raw_kind)}; those that are read are "
                f"{', '.join(kind.name for kind in READABLE)}"
            )
        kind = Quantization(raw_kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise CheckpointFormatError(
                f"{where} must have rows of a multiple of {block} numbers for {kind.name}, got shape {list(shape)}"
            )
        self._tensors[name] = GgufTensor(shape, kind, int(offset), math.prod(shape) // block * block_bytes)

    def _place_tensors(self, end_of_header: int) -> None:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise CheckpointFormatError(f"{self.path}: general.alignment must be a power of two, got {alignment!r:.80}")
        start = -(-end_of_header // alignment) * alignment
        end_of_last, last = start, ""
        for name, tensor in sorted(self._tensors.items(), key=lambda item: item[1].offset):
            begin, where = start + tensor.offset, f"{self.path}: tensor {name!r:.200}"
            if tensor.offset % alignment:
                raise CheckpointFormatError(f"{where} begins at {tensor.offset}, which {alignment} does not divide")
            if begin < end_of_last:
                raise CheckpointFormatError(f"{where} overlaps tensor {last!r:.200}")
            end_of_last, last = begin + tensor.size, name
            if end_of_last > self._data.size:
                raise CheckpointFormatError(
                    f"{where} of shape {list(tensor.shape)} ends at byte {end_of_last} of {self._data.size}: "
                    "the file is truncated, or the shape is wrong"
                )
            self._tensors[name] = tensor._replace(offset=begin)


class _Cursor:
    """Reads forward through the header, never past the end of the file."""

    def __init__(self, data: np.ndarray, path: Path) -> None:
        self._data = data
        self._path = path
        self.at = 0

    def take(self, size: int, what: str) -> np.ndarray:
        if size > self._data.size - self.at:
            raise CheckpointFormatError(
                f"{self._path} is truncated or damaged: {what:.200} needs {size} bytes at {self.at} "
                f"of {self._data.size}"
            )
        part = self._data[self.at : self.at + size]
        self.at += size
        return part

    def number(self, kind: str, what: str) -> Any:
        return self.take(np.dtype(kind).itemsize, what).view(kind)[0].item()

    def count(self, smallest: int, what: str) -> int:
        """A number of things that each take `smallest` bytes or more of what is left of the file."""
        count = self.number("<u8", what)
        if count * smallest > self._data.size - self.at:
            raise CheckpointFormatError(
                f"{self._path} is truncated or damaged: {count} {what:.200} in {self._data.size} bytes"
            )
        return count

    def text(self, what: str) -> str:
        raw = self.take(self.number("<u8", what), what).tobytes()
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise CheckpointFormatError(f"{self._path}: {what:.200} is not UTF-8: {raw[:40]!r}") from None

    def value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind], key)
        if kind == Kind.STRING:
            return self.text(key)
        if kind != Kind.ARRAY:
            raise CheckpointFormatError(f"{self._path}: the key {key!r:.200} has a value of type {kind}, which is none")
        inner = self.number("<u4", key)
        if inner in SCALARS:
            size = np.dtype(SCALARS[inner]).itemsize
            return self.take(self.count(size, key) * size, key).view(SCALARS[inner]).copy()
        if inner == Kind.STRING:
            return self._texts(self.count(8, key), key)
        raise CheckpointFormatError(f"{self._path}: the key {key!r:.200} is an array of type {inner}: it is not read")

    def _texts(self, count: int, key: str) -> list[str]:
        # A vocabulary has a hundred thousand: plain bytes are read ten times faster than slices of an array.
        rest = memoryview(self._data.data)[self.at :]
        texts, at = [], 0
        for _ in range(count):
            if at + 8 > len(rest):
                break
            (size,) = struct.unpack_from("<Q", rest, at)
            if size > len(rest) - at - 8:
                break
            raw = bytes(rest[at + 8 : at + 8 + size])
            at += 8 + size
            try:
                texts.append(raw.decode())
            except UnicodeDecodeError:
                raise CheckpointFormatError(f"{self._path}: {key:.200} is not UTF-8: {raw[:40]!r}") from None
        if len(texts) < count:
            raise CheckpointFormatError(
                f"{self._path} is truncated or damaged: string {len(texts)} of {count} of {key:.200} does not fit"
            )
        self.at += at
        return texts
