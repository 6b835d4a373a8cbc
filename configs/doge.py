"""The released Doge ladder: 20M to 320M parameters, one block design."""

from dataclasses import replace

from dmattn_jax.models.config import DogeConfig
from train.config import OptimizerConfig, TrainConfig

DOGE_20M = TrainConfig(
    name="doge-20m",
    model=DogeConfig(
        vocab_size=32768,
        hidden_size=256,
        intermediate_size=512,
        num_layers=8,
        num_heads=2,
        num_kv_heads=1,
        window=1024,
    ),
    optimizer=OptimizerConfig(learning_rate="auto"),
    sequence_length=2048,
    batch_size="auto",
    steps="auto",
)
DOGE_60M = replace(
    DOGE_20M,
    name="doge-60m",
    model=replace(DOGE_20M.model, hidden_size=512, intermediate_size=1024, num_layers=16, num_heads=4, num_kv_heads=2),
)
DOGE_160M = replace(
    DOGE_20M,
    name="doge-160m",
    model=replace(DOGE_20M.model, hidden_size=768, intermediate_size=1536, num_layers=24, num_heads=6, num_kv_heads=3),
)
DOGE_320M = replace(
    DOGE_20M,
    name="doge-320m",
    model=replace(DOGE_20M.model, hidden_size=1024, intermediate_size=2048, num_layers=32, num_heads=8, num_kv_heads=4),
)
