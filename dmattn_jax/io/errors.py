"""What can be wrong with a model's files, as types."""

from __future__ import annotations


class CheckpointFormatError(ValueError):
    """A model's file is damaged, hostile, or of a kind that this library does not read.

    The message names the file, the tensor or field, and what would do. Nothing of the file has been executed, and no
    array of a size that only the file claims has been made.
    """


class HubError(OSError):
    """A model named by its hub id could not be fetched. The message says what to do without a network."""
