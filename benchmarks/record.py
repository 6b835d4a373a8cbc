"""How a benchmark writes down what it measured: with the command, the device and the versions, and what was right."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike


def write(output: Path | None, options: Any, rows: Sequence[dict[str, Any]], **more: Any) -> None:
    """All rows so far, so that a run cut short has its measurements; nothing without an output.

    options: a dataclass. more: what else belongs to the whole run.
    """
    if output is None:
        return
    record = {
        "command": [_from_the_root(sys.argv[0]), *sys.argv[1:]],
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "options": asdict(options),
        **more,
        "rows": list(rows),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1, default=str) + "\n")


def _from_the_root(program: str) -> str:
    """A file of this repository by its path inside it."""
    path, root = Path(program).resolve(), Path(__file__).resolve().parents[1]
    return str(path.relative_to(root)) if path.is_relative_to(root) else program


def rms_ratio(got: ArrayLike, want: ArrayLike) -> float:
    """RMS of the difference over the RMS of what is wanted, in float64; inf where anything is NaN, so that no maximum
    of several hides it."""
    truth = np.asarray(want, np.float64)
    ratio = np.sqrt(np.mean((np.asarray(got, np.float64) - truth) ** 2) / np.mean(truth**2))
    return float(ratio) if np.isfinite(ratio) else float("inf")
