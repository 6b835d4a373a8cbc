"""`metrics.csv`: one row every few steps, without a gap or a repeat however often the run is interrupted."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

COLUMNS = (
    "step",
    "tokens",
    "loss",
    "validation_loss",
    "learning_rate",
    "gradient_norm",
    "auxiliary",
    "bad_steps",
    "tokens_per_second",
    "mfu",
    "seconds",
)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The whole rows of the file, in order; [] when there is none. A row cut short by a kill is left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        text = file.read()
    complete = text[: text.rfind("\n") + 1]
    rows = list(csv.DictReader(complete.splitlines()))
    return [row for row in rows if None not in row.values() and row["step"].isdecimal()]


class MetricsFile:
    """Appends rows. Rows after `step` (the checkpoint that a run resumes from) are dropped when it opens, because
    those steps run again."""

    def __init__(self, path: Path, step: int, columns: Sequence[str] = COLUMNS) -> None:
        kept = [row for row in read_metrics(path) if int(row["step"]) <= step]
        fresh = path.with_suffix(".csv.new")
        with fresh.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        os.replace(fresh, path)
        self.seconds_before = float(kept[-1]["seconds"] or 0) if kept else 0.0
        """Training time of earlier sessions, up to the step resumed from."""
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns, restval="")

    def write(self, row: Mapping[str, object]) -> None:
        """One row; it is in the operating system's hands when this returns. Floats keep every bit."""
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
