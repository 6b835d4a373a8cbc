"""Turns `auto` into numbers: the step law's learning rate and batch, and how many steps 20 tokens a parameter are."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from pathlib import Path

from train import optimizer
from train.config import TrainConfig
from train.errors import ConfigError
from train.flops import count_parameters

LEAST = {
    "sequence_length": 1,
    "accumulate": 1,
    "seed": 0,
    "data.shuffle_seed": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "log.every": 1,
    "log.eval_every": 1,
    "log.eval_batches": 1,
    "log.sample_every": 0,
    "log.sample_tokens": 1,
}
"""The smallest value of a field."""
SEEDS = ("seed", "data.shuffle_seed")
LARGEST_SEED = 2**32 - 1
"""JAX's keys have no more bits: a larger seed would be another's twin."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A configuration's numbers once nothing is `auto` any more."""

    learning_rate: float
    batch_size: int
    steps: int
    tokens: int
    """Tokens the run sees: steps · batch_size · sequence_length."""


def resolve(config: TrainConfig, shards: int) -> Plan:
    """Numbers for every `auto`, by N (parameters without embeddings) and D (tokens).

    steps: D = 20·N. batch_size: the step law's tokens, rounded to a multiple of accumulate · shards sequences.
    Raises ConfigError for impossible numbers, and for a name that is no folder of its own below runs-dir.
    """
    _check_name(config.name)
    optimizer.validate(config.optimizer)
    for name, least in LEAST.items():
        value = operator.attrgetter(name)(config)
        if value < least:
            raise ConfigError(f"{name.replace('_', '-')} must be >= {least}, got {value}")
    for name in SEEDS:
        check_seed(name, operator.attrgetter(name)(config))
    if config.steps != "auto" and config.steps < 1:
        raise ConfigError(f"steps must be >= 1 or auto, got {config.steps}")
    parameters = count_parameters(config.model).non_embedding
    target_tokens = optimizer.TOKENS_PER_PARAMETER * parameters
    batch_size: int
    if config.batch_size != "auto":
        batch_size = config.batch_size
        if batch_size < 1:
            raise ConfigError(f"batch-size must be >= 1 or auto, got {batch_size}")
    else:
        if config.steps == "auto":
            batch_tokens = optimizer.step_law_batch_tokens(target_tokens)
        else:
            batch_tokens = optimizer.step_law_batch_tokens_for_steps(config.steps)
        pieces = config.accumulate * shards
        batch_size = max(1, round(batch_tokens / config.sequence_length / pieces)) * pieces
    step_tokens = batch_size * config.sequence_length
    steps = math.ceil(target_tokens / step_tokens) if config.steps == "auto" else config.steps
    tokens = steps * step_tokens
    rate = config.optimizer.learning_rate
    learning_rate = optimizer.step_law_learning_rate(parameters, tokens) if rate == "auto" else rate
    return Plan(learning_rate, batch_size, steps, tokens)


def check_seed(name: str, value: int) -> None:
    """Raises ConfigError for a seed that would draw what another one draws."""
    if value > LARGEST_SEED:
        raise ConfigError(f"{name.replace('_', '-')} must be <= {LARGEST_SEED}, got {value}")


def _check_name(name: str) -> None:
    parts = Path(os.path.normpath(name)).parts
    # nothing is left of "" and ".", which are runs-dir itself
    if not parts or parts[0] == ".." or os.path.isabs(name):
        raise ConfigError(f"name must be that of a folder below runs-dir, got {name!r}; choose another --name")
