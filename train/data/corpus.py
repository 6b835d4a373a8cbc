"""The default corpus: the sources of Python's own standard library, found on any machine, downloaded from nowhere."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from train.data.sources import DataError, SourceFile, files_under

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
