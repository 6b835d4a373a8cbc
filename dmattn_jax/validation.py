"""Refuse bad input before anything is traced, naming the argument, what came, and what would do."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

FLOATS = ("bfloat16", "float16", "float32", "float64")


def check_window(window: int | Sequence[int], heads: int) -> tuple[int, ...]:
    """The window of each kv head, as Python ints."""
    if isinstance(window, jax.core.Tracer):
        raise TypeError("window must be a Python int or a sequence of them, got a traced array: shapes depend on it")
    try:
        values: Sequence[int] = [operator.index(window)] * heads  # type: ignore[arg-type]
    except TypeError:
        try:
            values = [operator.index(item) for item in window]  # type: ignore[union-attr]
        except TypeError:
            raise TypeError(f"window must be an int or a sequence of ints, got {window!r}") from None
        if len(values) != heads:
            raise ValueError(
                f"window must be an int or one per kv head: expected {heads} values, got {len(values)}"
            ) from None
    for value in values:
        if value < 1:
            raise ValueError(f"window must be >= 1, got {value}")
    return tuple(values)


def check_gate(gate: jax.Array) -> None:
    if gate.ndim != 3:
        raise ValueError(f"gate must have shape [B, S, K], got {gate.shape}")
    if not jnp.issubdtype(gate.dtype, jnp.floating):
        raise TypeError(f"gate must be a float array, got {gate.dtype}")


def check_segment_ids(segment_ids: jax.Array | None, batch: int, length: int) -> None:
    if segment_ids is None:
        return
    kind = getattr(segment_ids, "dtype", type(segment_ids).__name__)
    if isinstance(kind, str) or not jnp.issubdtype(kind, jnp.integer):
        raise TypeError(f"segment_ids must be an integer array, got {kind}")
    if segment_ids.shape != (batch, length):
        raise ValueError(
            f"segment_ids must have shape [B, S] = {(batch, length)}, one id per key position, got {segment_ids.shape}"
        )


def check_attention(query: jax.Array, key: jax.Array, value: jax.Array, gate: jax.Array | None) -> None:
    """Ranks, sizes and types of query [B, T, H, D], key and value [B, S, K, D], gate [B, S, K]."""
    for name, array, letters in (
        ("query", query, "B, T, H, D"),
        ("key", key, "B, S, K, D"),
        ("value", value, "B, S, K, D"),
    ):
        if array.ndim != 4:
            raise ValueError(f"{name} must have shape [{letters}], got {array.shape}")
        if str(array.dtype) not in FLOATS:
            raise TypeError(f"{name} must be one of {', '.join(FLOATS)}, got {array.dtype}")
        if 0 in array.shape:
            raise ValueError(f"{name} must not be empty, got shape {array.shape}")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            "query, key and value must have one dtype, got "
            f"{query.dtype}, {key.dtype} and {value.dtype}: cast them to the compute dtype first"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must have key's batch, length and heads {key.shape[:3]}, got {value.shape[:3]}")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"query and key must have one batch size, got {query.shape[0]} and {key.shape[0]}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have one head size, got {query.shape[3]} and {key.shape[3]}")
    if value.shape[3] != key.shape[3]:
        raise ValueError(
            f"value must have key's head size {key.shape[3]}, got {value.shape[3]}: pad the smaller with zeros"
        )
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"query heads must be a multiple of kv heads, got H = {query.shape[2]} and K = {key.shape[2]}")
    if query.shape[1] > key.shape[1]:
        raise ValueError(
            f"queries are the last T of S key positions: T must be <= S, got T = {query.shape[1]}, S = {key.shape[1]}"
        )
    if gate is not None:
        check_gate(gate)
        if gate.shape != key.shape[:3]:
            raise ValueError(f"gate must have shape [B, S, K] = {key.shape[:3]}, got {gate.shape}")
        if str(gate.dtype) not in ("float32", "float64"):
            raise TypeError(f"gate must be float32 (the choice of keys is exact), got {gate.dtype}")
