"""From the name of a source to its files, and from a file to its documents, one at a time."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.errors import UserError

Format = Literal["text", "jsonl", "parquet", "npy"]

FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".npy": "npy"}
SNIFFED_BYTES = 8192
PARQUET_ROWS = 256
"""Rows of a Parquet file read at once."""


class DataError(UserError):
    """The data cannot be used: missing, damaged, too little, or not what the configuration says."""


class NotTextError(DataError):
    """A file is neither of a known format nor UTF-8 text."""


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus. `name` is its path below the source's root with `/`: the same wherever the root lies."""

    path: Path
    name: str

    @property
    def format(self) -> Format:
        return FORMATS.get(self.path.suffix.lower(), "text")

    @property
    def size(self) -> int:
        """In bytes."""
        return self.path.stat().st_size


def find_files(source: str) -> list[SourceFile]:
    """The files of a directory (all below it), a glob (`**` reaches any depth), or one file, sorted by name.

    Hidden files and folders and `__pycache__` are left out of directories. Raises DataError for a source
    that is not there or holds no file.
    """
    if not source:
        raise DataError("source must be 'stdlib', 'packages', a file, a directory, a glob or 'hf:NAME', got ''")
    path = Path(source).expanduser()
    if path.is_dir():
        files = files_under(path)
        if not files:
            raise DataError(f"source {source!r} is a directory without files")
        return files
    if path.is_file():
        return [SourceFile(path, path.name)]
    if not glob.has_magic(source):
        raise DataError(
            f"source {source!r} is not there: give 'stdlib', 'packages', a file, a directory, a glob or 'hf:NAME'; "
            f"relative paths start at {Path.cwd()}"
        )
    matches = sorted({Path(match) for match in glob.glob(str(path), recursive=True)})
    paths = [match for match in matches if match.is_file()]
    if not paths:
        raise DataError(f"source {source!r} matches no file; quote a glob, and use ** to reach any depth")
    root = Path(os.path.commonpath([match.parent for match in paths]))
    return sorted(
        (SourceFile(match, match.relative_to(root).as_posix()) for match in paths), key=lambda file: file.name
    )


def files_under(root: Path, skip: frozenset[str] = frozenset()) -> list[SourceFile]:
    """All files below `root`, sorted by name, without hidden ones, `__pycache__` and the folders in `skip`."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if not name.startswith(".") and name != "__pycache__" and name not in skip
        ]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                found.append(SourceFile(path, path.relative_to(root).as_posix()))
    return sorted(found, key=lambda file: file.name)


def read_documents(file: SourceFile, text_field: str) -> Iterator[str]:
    """The documents of a text file (one), a JSONL file or a Parquet file (one a row).

    Raises NotTextError for a file that is not UTF-8 text, DataError for a damaged row or a missing field.
    """
    try:
        match file.format:
            case "text":
                yield _read_text(file.path)
            case "jsonl":
                yield from _read_jsonl(file.path, text_field)
            case "parquet":
                yield from _read_parquet(file.path, text_field)
            case "npy":
                raise DataError(f"{file.path} holds token ids, not text")
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror or error}") from error


def _read_text(path: Path) -> str:
    with path.open("rb") as stream:
        # A look at the start keeps large binary files out of memory.
        head = stream.read(SNIFFED_BYTES)
        if b"\0" in head:
            raise NotTextError(f"{path} is not text: it has NUL bytes")
        content = head + stream.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotTextError(f"{path} is not UTF-8 text: {error}; convert it to UTF-8") from None


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: must be an object, got {type(row).__name__}")
            yield field_text(row, text_field, f"{path}, line {number}")


def field_text(row: dict[str, object], text_field: str, where: str) -> str:
    """The text of one row; null counts as empty. Raises DataError naming the fields there are."""
    if text_field not in row:
        raise DataError(f"{where}: no field text_field={text_field!r}; the fields are {sorted(row)}")
    value = row[text_field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {text_field!r} must be a string, got {type(value).__name__}")
    return value


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    # Half a second of import that only Parquet files should pay.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            schema = table.schema_arrow
            if text_field not in schema.names:
                raise DataError(f"{path}: no column text_field={text_field!r}; the columns are {sorted(schema.names)}")
            kind = schema.field(text_field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise DataError(f"{path}: column {text_field!r} must hold strings, got {kind}")
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    yield text or ""
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}") from None
