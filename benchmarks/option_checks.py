"""What the options of several benchmarks must be, checked before anything is measured."""

from __future__ import annotations

from typing import Any

from dmattn_jax.models.field_checks import at_least


def check_positive(options: Any, *names: str) -> None:
    """Raises: ValueError unless each of these fields is an int >= 1, or a tuple of such."""
    for name in names:
        values = getattr(options, name)
        for value in values if isinstance(values, tuple) else (values,):
            at_least(name, value, 1)


def check_groups(options: Any) -> None:
    """Raises: ValueError unless every kv head has as many query heads."""
    if options.kv_heads < 1 or options.heads % options.kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got {options.heads} and {options.kv_heads}")
