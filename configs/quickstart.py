"""A first run: a byte-level model on the Python standard library's text, in minutes on two CPU cores."""

from dmattn_jax.models.config import DogeConfig
from train.config import CheckpointConfig, DataConfig, LogConfig, OptimizerConfig, TrainConfig

QUICKSTART = TrainConfig(
    name="quickstart",
    model=DogeConfig(
        vocab_size=257,
        hidden_size=192,
        intermediate_size=512,
        num_layers=5,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        window=64,
        dtype="float32",
    ),
    data=DataConfig(source="stdlib", tokenizer="bytes"),
    optimizer=OptimizerConfig(learning_rate=5e-3),
    sequence_length=512,
    batch_size=2,
    steps=600,
    checkpoint=CheckpointConfig(every=300, keep=2),
    log=LogConfig(every=10, eval_every=150, eval_batches=32, sample_every=150, sample_tokens=192),
)
