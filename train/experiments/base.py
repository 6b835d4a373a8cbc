"""What the experiments on real text share, before anything of each is set."""

from __future__ import annotations

from dmattn_jax.models.config import DogeConfig
from train.config import CheckpointConfig, DataConfig, LogConfig, OptimizerConfig, TrainConfig


def on_real_text(every: int) -> TrainConfig:
    """What runs on the machine's own packages share, at the step law's numbers. every: steps between validations."""
    return TrainConfig(
        model=DogeConfig(vocab_size=257),
        data=DataConfig(source="packages"),
        optimizer=OptimizerConfig(learning_rate="auto"),
        checkpoint=CheckpointConfig(every=2 * every, keep=1),
        log=LogConfig(every=50, eval_every=every, eval_batches=64, sample_every=0),
        sequence_length=2048,
        batch_size="auto",
        steps="auto",
    )
