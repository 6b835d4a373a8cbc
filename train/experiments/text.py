"""The vocabulary of an experiment: learned from the text that its runs train on, never from what is held out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dmattn_jax.io.tokenizers import train_tokenizer
from train.config import DataConfig, TrainConfig
from train.data import training_texts
from train.data.loader import source_files
from train.data.stream import PREFIX
from train.errors import ConfigError, bad_values_are_the_users
from train.monitor import say
from train.run_files import open_tokenizer

VOCABULARY_BYTES = 64_000_000
"""Text that a vocabulary is learned from, about: every k-th document of more."""


def tokenizer_of(config: TrainConfig, vocab_size: int, folder: Path) -> TrainConfig:
    """The configuration with a BPE vocabulary of that size, `folder/tokenizer.json`, which is trained unless it is there.

    vocab_size: 0 leaves the configuration alone. Raises: ConfigError on a size that no vocabulary can have.
    """
    if not vocab_size:
        return config
    path = folder / "tokenizer.json"
    if not path.exists():
        say(f"learning a vocabulary of {vocab_size:,} tokens: {path}")
        folder.mkdir(parents=True, exist_ok=True)
        with bad_values_are_the_users():
            train_tokenizer(_sample(config.data), vocab_size, path, progress=sys.stderr.isatty())
    found = open_tokenizer(str(path)).vocab_size
    if found > vocab_size:
        raise ConfigError(f"{path} has {found:,} tokens, more than vocab-size {vocab_size:,}: choose another --output")
    return replace(
        config, data=replace(config.data, tokenizer=str(path)), model=replace(config.model, vocab_size=found)
    )


def _sample(config: DataConfig) -> Iterator[str]:
    """Every k-th document of the training text."""
    stride = 1
    if not config.source.startswith(PREFIX):
        stride = max(1, -(-sum(file.size for file in source_files(config)) // VOCABULARY_BYTES))
    taken = 0
    for text in itertools.islice(training_texts(config), 0, None, stride):
        yield text
        taken += len(text)
        if taken > 2 * VOCABULARY_BYTES:
            return
