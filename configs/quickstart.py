"""A first run: a byte-level model on the Python standard library's text, in minutes on two CPU cores."""

from dmattn_jax.models.config import DogeConfig
from train.config import CheckpointConfig, DataConfig, LogConfig, OptimizerConfig, TrainConfig

# What the corpus is full of: so small a model needs to be told that it is to write code.
PROMPT = """class TestCase(unittest.TestCase):

    def test_"""

QUICKSTART = TrainConfig(
    name="quickstart",
    model=DogeConfig(
        vocab_size=257,
        hidden_size=160,
        intermediate_size=480,
        num_layers=4,
        num_heads=6,
        num_kv_heads=3,
        head_dim=32,
        window=128,
        # Without a margin the first update breaks every tie, and heads forget the bytes just before (docs/journal.md).
        gate_step=0.1,
        dtype="float32",
    ),
    data=DataConfig(source="stdlib", tokenizer="bytes"),
    optimizer=OptimizerConfig(learning_rate=5e-3),
    sequence_length=512,
    batch_size=2,
    steps=700,
    checkpoint=CheckpointConfig(every=350, keep=2),
    log=LogConfig(every=10, eval_every=175, eval_batches=32, sample_every=350, sample_tokens=192, sample_prompt=PROMPT),
)
