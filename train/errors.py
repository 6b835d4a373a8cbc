"""What can go wrong by the user's hand or the machine's, as types the command line turns into one line.

`main()` prints the message of a `UserError` and exits with its `exit_code`; any other exception is a bug and keeps
its traceback.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Something the user can put right. The message names what is wrong and the fix, in one line."""

    exit_code = 2


class UnknownPresetError(UserError):
    """No preset has this name."""


class ConfigError(UserError):
    """A value of the configuration is impossible, alone or beside the others."""


class MeshError(ConfigError):
    """The devices cannot form the mesh, or the batch cannot be split over it."""


class RunDirectoryError(UserError):
    """The run's folder cannot be used: missing, unwritable, or held by another process."""


class RunInUseError(RunDirectoryError):
    """Another process holds the run's folder."""


class CheckpointError(UserError):
    """No checkpoint can be loaded: none is there, all are damaged, or the architecture is another."""


class MissingExtraError(UserError):
    """An optional dependency is asked for and not installed."""


class TrainingDivergedError(UserError):
    """Too many steps in a row had a non-finite loss or gradient."""

    exit_code = 3


@contextlib.contextmanager
def bad_values_are_the_users() -> Iterator[None]:
    """The library refuses impossible arguments with ValueError; where they come from the command line, that is the
    user's to put right."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error
