"""Text that any machine has, downloaded from nowhere: the sources of Python's own standard library, which are the
default corpus, and those of the packages installed beside it, some hundreds of megabytes."""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from train.data.sources import DataError, SourceFile, files_under

PACKAGE_TEXT = frozenset({".py", ".pyi", ".pyx", ".md", ".rst", ".txt", ".c", ".cc", ".h", ".hpp"})
"""Endings of the files of packages that are text worth learning: code and prose, not tables."""

INSTALLED_PACKAGES = frozenset({"site-packages", "dist-packages"})


def stdlib_files(root: Path | None = None) -> list[SourceFile]:
    """The `.py` files below `root` (this Python's standard library), sorted by name.

    Installed packages and caches are left out. What does not decode as UTF-8 (test data, mostly) is skipped when it
    is read. Parts that some systems leave out or package apart, such as `test` or `lib2to3`, are taken where they are.

    Raises DataError where the standard library has no sources (an embedded or frozen Python).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = [file for file in files_under(root, skip=INSTALLED_PACKAGES) if file.path.suffix == ".py"]
    if not files:
        raise DataError(
            f"source 'stdlib' needs the .py files of Python's standard library, and {root} has none: "
            "name a directory of text files instead"
        )
    return files


def package_files(roots: Mapping[str, Path] | None = None) -> list[SourceFile]:
    """Code and prose of the standard library and the installed packages, sorted by name: `stdlib/…`, `packages/…`.

    roots: name -> folder, by default those of this Python. Of equal files only the first is taken: packages carry
    copies of one another's files, which would be trained on and held out at once.

    Raises DataError where there is no such file.
    """
    return list(_installed_files() if roots is None else _distinct_files(roots))


@functools.cache
def _installed_files() -> list[SourceFile]:
    """Found once a process: every file of an equal size is read."""
    paths = {name: Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    roots = {"stdlib": paths["stdlib"], "packages": paths["purelib"]}
    if paths["platlib"].resolve() != paths["purelib"].resolve():
        roots["platform"] = paths["platlib"]
    return _distinct_files(roots)


def _distinct_files(roots: Mapping[str, Path]) -> list[SourceFile]:
    by_size: dict[int, list[SourceFile]] = {}
    for where, root in sorted(roots.items()):
        for file in files_under(root, skip=INSTALLED_PACKAGES if where == "stdlib" else frozenset()):
            if file.path.suffix.lower() in PACKAGE_TEXT:
                by_size.setdefault(file.size, []).append(SourceFile(file.path, f"{where}/{file.name}"))
    found = []
    for alike in by_size.values():
        if len(alike) > 1:
            contents = {file: hashlib.blake2b(file.path.read_bytes(), digest_size=16).digest() for file in alike}
            # The first of each content: later ones are overwritten by earlier.
            alike = list({contents[file]: file for file in reversed(alike)}.values())
        found += alike
    if not found:
        raise DataError(f"source 'packages' found no text below {', '.join(map(str, roots.values()))}")
    return sorted(found, key=lambda file: file.name)
