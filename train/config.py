"""A training run as typed data: what is trained, on what, how, and on which devices.

Presets in `configs/` compose these with `dataclasses.replace`; the command line shows every field as a flag.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from dmattn_jax.models.config import DogeConfig


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens.

    source: `stdlib` (the Python standard library's own sources, found on any machine), `packages` (those, and the
      code and prose of all installed packages, each file once), a directory, a glob, or a file; `.txt`, `.py`, `.md`,
      … are one document a file, `.jsonl` and `.parquet` one document a row (`text_field`), `.npy` an array of already
      tokenised int tokens; `hf:NAME` streams a Hugging Face dataset.
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
    """AdamW with a schedule."""

    learning_rate: Annotated[float | Literal["auto"], tyro.conf.arg(aliases=["--lr"])] = 3e-3
    """Peak learning rate; `auto` takes the step law 1.79·N^−0.713·D^0.307 (N parameters, D tokens)."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """`wsd`: linear warmup, constant, linear decay. `cosine`: linear warmup, then half a cosine."""
    warmup_fraction: float = 0.1
    """Share of the steps that warm up."""
    decay_fraction: float = 0.1
    """Share of the steps that decay (`wsd`)."""
    min_ratio: float = 0.0
    """Final learning rate as a share of the peak."""
    b1: float = 0.9
    """Decay of the mean of gradients."""
    b2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.01
    """Of matrices and embeddings; never of norms, gates, residual scales or biases."""
    clip_norm: float = 1.0
    """Gradients are scaled down to at most this global norm."""
    max_bad_steps: int = 20
    """Consecutive steps with a non-finite loss or gradient before the run stops."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis. -1 (at most one axis) takes what the others leave."""

    data: int = -1
    """Copies of the model, each with its part of the batch."""
    fsdp: int = 1
    """Devices that a copy's parameters and optimizer state are cut over, beside the batch."""
    tensor: int = 1
    """Devices that heads and MLP columns are cut over; must divide the kv heads."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: int = 500
    """Steps between checkpoints."""
    keep: int = 3
    """Newest checkpoints kept, beside the best by validation loss."""


@dataclass(frozen=True)
class LogConfig:
    """What is measured and shown as training goes."""

    every: int = 10
    """Steps between rows of metrics.csv."""
    eval_every: int = 200
    """Steps between validations, each with new pictures."""
    eval_batches: int = 16
    """Batches of a validation, always the same ones."""
    sample_every: int = 500
    """Steps between samples in samples.txt; 0: none."""
    sample_tokens: int = 256
    """Tokens of a sample."""
    sample_prompt: str = "def "
    """What a sample continues."""
    wandb: bool = False
    """Also log to Weights & Biases: needs pip install 'dmattn-jax[wandb]'."""


@dataclass(frozen=True)
class TrainConfig:
    """One run. Everything a run needs to be repeated is in here, and is written to `runs/<name>/config.json`."""

    name: str = "run"
    """The run's folder below runs-dir. The same name and configuration again continues the run."""
    model: DogeConfig = field(default_factory=DogeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    sequence_length: int = 512
    """Tokens of a row; documents are packed into rows and see only themselves."""
    batch_size: int | Literal["auto"] = 8
    """Sequences per optimizer step, over all devices; `auto` takes the step law batch = 0.58·D^0.571 tokens."""
    accumulate: int = 1
    """Microbatches per optimizer step: the same step with less memory."""
    steps: int | Literal["auto"] = 1000
    """Optimizer steps; `auto`: 20 tokens a parameter."""
    seed: int = 0
    """Of the initial parameters, the order of the data, and the samples."""
    runs_dir: str = "runs"
    """Where the folders of runs are."""
