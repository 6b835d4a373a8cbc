"""Sweeps of the recall experiment."""

from dataclasses import replace

from train.experiments.mqar_config import MQARConfig, MQARSweep

PAPER_MQAR = MQARSweep()
"""2508.02124v6: 512 pairs (256 at a length of 1,024) and vocabularies of length + 1."""

ZOOLOGY_MQAR = MQARSweep(
    lengths=(64, 128, 256, 512),
    pairs=(4, 8, 16, 64),
    dims=(64, 128, 256),
    cell=MQARConfig(
        vocab_size=8192, train_examples=100_000, test_examples=3_000, epochs=64, batch_size=512, learning_rate=1e-3
    ),
)
"""The easier grid of zoology's first figure (arXiv 2312.04927), for which published curves exist."""

SMOKE_MQAR = replace(
    ZOOLOGY_MQAR,
    lengths=(32,),
    pairs=(8,),
    dims=(64,),
    cell=MQARConfig(
        vocab_size=64,
        train_examples=20_000,
        test_examples=200,
        epochs=10,
        batch_size=64,
        learning_rate=2e-3,
        eval_every=250,
        dtype="float32",
    ),
)
"""One easy cell for each variant: minutes on a CPU."""

SWEEPS: dict[str, MQARSweep] = {"paper": PAPER_MQAR, "zoology": ZOOLOGY_MQAR, "smoke": SMOKE_MQAR}
