"""AdamW, its schedules, what decays and what does not, and the step law."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.config import OptimizerConfig
from train.errors import ConfigError

TOKENS_PER_PARAMETER = 20


def step_law_learning_rate(parameters: float, tokens: float) -> float:
    """lr = 1.79·N^−0.713·D^0.307, N parameters without embeddings, D training tokens."""
    return 1.79 * parameters**-0.713 * tokens**0.307


def step_law_batch_tokens(tokens: float) -> float:
    """batch = 0.58·D^0.571 tokens per optimizer step, D training tokens."""
    return 0.58 * tokens**0.571


def step_law_batch_tokens_for_steps(steps: int) -> float:
    """The batch b with b = 0.58·(steps·b)^0.571: what the step law asks for when steps, not tokens, are given."""
    return (0.58 * steps**0.571) ** (1 / (1 - 0.571))


def phase_steps(config: OptimizerConfig, steps: int) -> tuple[int, int]:
    """(warmup steps, decay steps) of a run of `steps`; their sum never exceeds `steps`."""
    warmup = round(config.warmup_fraction * steps)
    decay = min(round(config.decay_fraction * steps), steps - warmup)
    return warmup, decay


def make_schedule(config: OptimizerConfig, learning_rate: float, steps: int) -> optax.Schedule:
    """Learning rate of step 0, 1, …, steps − 1.

    Both kinds warm up linearly: step t of W has peak·(t + 1)/W, so that no step is wasted at 0. `wsd` then stays
    at the peak and falls linearly over the last `decay_fraction` steps towards peak·min_ratio, which step `steps`
    would have; `cosine` falls from the end of the warmup to the same place.
    """
    warmup, decay = phase_steps(config, steps)
    floor = config.min_ratio * learning_rate
    pieces: list[optax.Schedule] = []
    boundaries: list[int] = []
    if warmup:
        pieces.append(optax.linear_schedule(learning_rate / warmup, learning_rate, max(warmup - 1, 1)))
        boundaries.append(warmup)
    if config.schedule == "cosine":
        pieces.append(optax.cosine_decay_schedule(learning_rate, max(steps - warmup, 1), config.min_ratio))
    else:
        pieces.append(optax.constant_schedule(learning_rate))
        if decay:
            boundaries.append(steps - decay)
            pieces.append(optax.linear_schedule(learning_rate, floor, decay))
    return optax.join_schedules(pieces, boundaries)


def validate(config: OptimizerConfig) -> None:
    """Refuses impossible numbers. Raises ConfigError naming the field, the value and the fix."""
    fractions = {"warmup_fraction": config.warmup_fraction, "decay_fraction": config.decay_fraction}
    for name, value in fractions.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"optimizer.{name} must be between 0 and 1, got {value}")
    if sum(fractions.values()) > 1:
        raise ConfigError(
            "optimizer.warmup_fraction + optimizer.decay_fraction must be <= 1, "
            f"got {config.warmup_fraction} + {config.decay_fraction}"
        )
    positive = {"learning_rate": config.learning_rate, "eps": config.eps, "clip_norm": config.clip_norm}
    for name, number in positive.items():
        if number != "auto" and not (math.isfinite(number) and number > 0):
            raise ConfigError(f"optimizer.{name} must be a positive number, got {number}")
    if config.max_bad_steps < 1:
        raise ConfigError(f"optimizer.max_bad_steps must be >= 1, got {config.max_bad_steps}")


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule, decay_mask: Any) -> optax.GradientTransformation:
    """Clip by global norm, AdamW, weight decay where `decay_mask` (a tree of bools like the parameters) is True."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
            mu_dtype=jnp.float32,
        ),
    )


def tree_is_finite(*trees: Any) -> jax.Array:
    """True when no element of any floating-point leaf is NaN or infinite. bool []."""
    leaves = [leaf for leaf in jax.tree.leaves(trees) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]).all()
