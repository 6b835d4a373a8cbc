"""The cells of an experiment one after the other: those that are done are passed over, time may run out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from train.errors import RunInUseError, TrainingDivergedError
from train.experiments.deadline import Deadline
from train.experiments.results import has_diverged, note_sharing, write_diverged
from train.monitor import say
from train.run_directory import FolderLock


class Cell(Protocol):
    """Anything to train: a dataclass with the name of its folder."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Cell)


def train_missing(
    cells: Sequence[C], output: Path, is_done: Callable[[C], bool], train: Callable[[C], int], deadline: Deadline
) -> int:
    """train(cell) -> exit code, for every cell that is not done, until one is not 0. Returns that exit code.

    A cell that diverges is recorded as such in `output/<its name>` and not trained again; one that another process is
    training is passed over: several processes may share a folder. One whose time ran out with the command's is
    continued by the same command.
    """

    def ended(cell: C) -> bool:
        return is_done(cell) or has_diverged(output / cell.name, cell)

    missing = [cell for cell in cells if not ended(cell)]
    say(f"{len(cells)} cells, {len(cells) - len(missing)} of them done")
    for number, cell in enumerate(missing, 1):
        if deadline.passed:
            say(f"time is up: {len(missing) - number + 1} cells are left; the same command continues")
            break
        try:
            # Until its result is written: a run's own lock ends with its training.
            with FolderLock(output / cell.name, ".cell.lock"):
                if ended(cell):
                    continue  # by another process, since the beginning
                say(f"cell {number} of {len(missing)}: {cell.name}")
                note_sharing(output / cell.name)
                try:
                    code = train(cell)
                except TrainingDivergedError as error:
                    write_diverged(output / cell.name, cell, str(error))
                    say(f"diverged: {error}")
                    continue
        except RunInUseError as error:
            say(f"passed over: {error}")
            continue
        if code:
            return code
    return 0
