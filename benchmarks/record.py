"""How a benchmark writes down what it measured: with the command, the device and the versions."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax


def write(output: Path | None, options: Any, rows: Sequence[dict[str, Any]], **more: Any) -> None:
    """All rows so far, so that a run cut short has its measurements; nothing without an output.

    options: a dataclass. more: what else belongs to the whole run.
    """
    if output is None:
        return
    record = {
        "command": sys.argv,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "options": asdict(options),
        **more,
        "rows": list(rows),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1, default=str) + "\n")
