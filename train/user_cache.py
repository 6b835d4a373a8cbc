"""Where this user's caches are: what can be made again and takes long."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """`dmattn/<name>` below $XDG_CACHE_HOME, or ~/.cache. It need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dmattn", name)
