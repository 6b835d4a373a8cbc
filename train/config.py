"""A training run as typed data: what is trained, on what, how, and on which devices.

Presets in `configs/` compose these with `dataclasses.replace`; the command line shows every field as a flag.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dmattn_jax.models.config import DogeConfig


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens.

    source: `stdlib` (the Python standard library's own sources, found on any machine), a directory, a glob, or
      a file; `.txt`, `.py`, `.md`, … are one document a file, `.jsonl` and `.parquet` one document a row
      (`text_field`), `.npy` an array of already tokenised int tokens; `hf:NAME` streams a Hugging Face dataset.
    tokenizer: `bytes`, or the path of a `tokenizer.json`.
    validation_fraction: share of whole files (or whole rows of a single file) held out for validation.
    """

    source: str = "stdlib"
    text_field: str = "text"
    tokenizer: str = "bytes"
    validation_fraction: float = 0.05
    shuffle_seed: int = 0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a schedule. `learning_rate="auto"` takes the step law lr = 1.79·N^−0.713·D^0.307."""

    learning_rate: float | Literal["auto"] = 3e-3
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup_fraction: float = 0.1
    decay_fraction: float = 0.1
    min_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    max_bad_steps: int = 20
    """Consecutive steps with a non-finite loss or gradient before the run stops."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis. −1 (at most one axis) takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500
    """Steps between checkpoints."""
    keep: int = 3
    """Newest checkpoints kept, beside the best by validation loss."""


@dataclass(frozen=True)
class LogConfig:
    every: int = 10
    """Steps between rows of metrics.csv."""
    eval_every: int = 200
    eval_batches: int = 16
    sample_every: int = 500
    sample_tokens: int = 256
    sample_prompt: str = "def "
    wandb: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """One run. Everything a run needs to be repeated is in here, and is written to `runs/<name>/config.json`."""

    name: str = "run"
    model: DogeConfig = field(default_factory=DogeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    sequence_length: int = 512
    batch_size: int | Literal["auto"] = 8
    """Sequences per optimizer step, over all devices; `auto` takes the step law batch = 0.58·D^0.571 tokens."""
    accumulate: int = 1
    """Microbatches per optimizer step."""
    steps: int | Literal["auto"] = 1000
    """`auto`: 20 tokens a parameter."""
    seed: int = 0
    runs_dir: str = "runs"
