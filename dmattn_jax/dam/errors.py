"""What can go wrong between a frozen model and its masks, as one type."""

from __future__ import annotations


class DamError(ValueError):
    """Maps or masks do not fit: the model has no dense attention, they are of another model, or nothing is left of
    them. The message names what is wrong and the fix."""
