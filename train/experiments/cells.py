"""The cells of an experiment one after the other: those that are done are passed over, time may run out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from train.errors import RunInUseError, TrainingDivergedError
from train.experiments.deadline import Deadline
from train.monitor import say


class Cell(Protocol):
    """Anything to train that has a name."""

    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Cell)


def train_missing(
    cells: Sequence[C], is_done: Callable[[C], bool], train: Callable[[C], int], deadline: Deadline
) -> int:
    """train(cell) -> exit code, for every cell that is not done, until one is not 0. Returns that exit code.

    A cell that diverges, or that another process is training, is reported and passed over: several processes may
    share a folder. One whose time ran out with the session is continued by the same command.
    """
    missing = [cell for cell in cells if not is_done(cell)]
    say(f"{len(cells)} cells, {len(cells) - len(missing)} of them done")
    for number, cell in enumerate(missing, 1):
        if deadline.passed:
            say(f"time is up: {len(missing) - number + 1} cells are left; the same command continues")
            break
        if is_done(cell):
            continue  # by another process, since the beginning
        say(f"cell {number} of {len(missing)}: {cell.name}")
        try:
            code = train(cell)
        except (TrainingDivergedError, RunInUseError) as error:
            say(f"passed over: {error}")
            continue
        if code:
            return code
    return 0
