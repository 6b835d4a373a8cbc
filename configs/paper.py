"""The four sizes of the method's scaling law (2508.02124v6, Table 4), with d_ff = 3·d.

Tokens a step become whole sequences: 64, 96, 192 of 2,048 for 0.128M, 0.192M, 0.392M, and 256 of 4,096 for 1M
(its window of 2,048 would be dense attention at 2,048).
"""

from dataclasses import replace

from configs.doge import DOGE_20M
from train.config import OptimizerConfig

PAPER_80M = replace(
    DOGE_20M,
    name="80m",
    model=replace(DOGE_20M.model, hidden_size=768, intermediate_size=2304, num_layers=12, num_heads=6, num_kv_heads=3),
    optimizer=OptimizerConfig(learning_rate=3e-3),
    batch_size=64,
    steps=13_500,
)
PAPER_200M = replace(
    PAPER_80M,
    name="200m",
    model=replace(
        PAPER_80M.model, hidden_size=1024, intermediate_size=3072, num_layers=16, num_heads=8, num_kv_heads=4
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3),
    batch_size=96,
    steps=20_800,
)
PAPER_680M = replace(
    PAPER_80M,
    name="680m",
    model=replace(
        PAPER_80M.model, hidden_size=1536, intermediate_size=4608, num_layers=24, num_heads=12, num_kv_heads=6
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    batch_size=192,
    steps=35_000,
)
PAPER_1_7B = replace(
    PAPER_680M,
    name="1.7b",
    model=replace(
        PAPER_680M.model,
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        window=2048,
        remat=True,
    ),
    sequence_length=4096,
    batch_size=256,
    steps=40_000,
)
