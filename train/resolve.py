"""Turns `auto` into numbers: the step law's learning rate and batch, and how many steps 20 tokens a parameter are."""

from __future__ import annotations

import dataclasses
import math

from train import optimizer
from train.config import TrainConfig
from train.errors import ConfigError
from train.flops import count_parameters


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
    Raises ConfigError for impossible numbers.
    """
    optimizer.validate(config.optimizer)
    for name in ("sequence_length", "accumulate"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name.replace('_', '-')} must be >= 1, got {getattr(config, name)}")
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
