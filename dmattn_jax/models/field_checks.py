"""Checks that the configurations of all decoders share: refuse what cannot work, naming field, value and fix."""

from __future__ import annotations

from typing import Any


def at_least(name: str, value: Any, least: int) -> None:
    """Raises: ValueError unless value is an int >= least."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises: ValueError unless value is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_decoder(config: Any) -> None:
    """The fields that every decoder has: sizes, heads, types, and what must be positive."""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        at_least(name, getattr(config, name), 1)
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got num_heads={config.num_heads}, "
            f"num_kv_heads={config.num_kv_heads}"
        )
    at_least("head_dim", config.head_dim, 2)
    if config.head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary positions, got {config.head_dim}")
    one_of("dtype", config.dtype, ("float32", "bfloat16", "float16"))
    one_of("param_dtype", config.param_dtype, ("float32", "bfloat16", "float16"))
    for name in ("rope_theta", "norm_eps", "init_std"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be > 0, got {getattr(config, name)}")
