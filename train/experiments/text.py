"""The vocabulary of an experiment: learned from the text that its runs train on, never from what is held out."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dmattn_jax.io.tokenizers import train_tokenizer
from train.config import DataConfig, TrainConfig
from train.config_json import show
from train.data import training_texts
from train.data.loader import source_files
from train.data.sources import NotTextError, SourceFile, read_documents
from train.data.split import never_held_out
from train.data.stream import PREFIX
from train.data.tokens import tokenize_files
from train.errors import ConfigError, bad_values_are_the_users
from train.experiments.results import write_json
from train.monitor import say
from train.run_files import open_tokenizer

VOCABULARY_CHARACTERS = 32_000_000
"""Text that a vocabulary is learned from, at most: files drawn by the hash of their names."""


def tokenizer_of(config: TrainConfig, vocab_size: int, folder: Path) -> TrainConfig:
    """The configuration with a BPE vocabulary of that size: `folder/tokenizer.json`, trained unless it is there.

    vocab_size: 0 leaves the configuration alone. Raises: ConfigError on a size that no vocabulary can have.
    """
    if not vocab_size:
        return config
    path, made = folder / "tokenizer.json", folder / "vocabulary.json"
    wanted = {"vocab_size": vocab_size, "source": config.data.source, "text_field": config.data.text_field}
    if path.exists():
        found_there = json.loads(made.read_text(encoding="utf-8")) if made.exists() else wanted
        both = {name: (found_there.get(name), value) for name, value in wanted.items()}
        if changed := {name: (old, new) for name, (old, new) in both.items() if old != new}:
            raise ConfigError(f"{path} was learned otherwise: {show(changed)}; choose another --output")
    else:
        say(f"learning a vocabulary of {vocab_size:,} tokens: {path}")
        # First, so that no vocabulary is ever without it.
        write_json(made, wanted)
        with bad_values_are_the_users():
            train_tokenizer(_sample(config.data), vocab_size, path, progress=sys.stderr.isatty())
    found = open_tokenizer(str(path)).vocab_size
    if found > vocab_size:
        raise ConfigError(f"{path} has {found:,} tokens, more than vocab-size {vocab_size:,}: choose another --output")
    return replace(
        config, data=replace(config.data, tokenizer=str(path)), model=replace(config.model, vocab_size=found)
    )


def tokenize_once(config: TrainConfig) -> None:
    """Leaves the tokens of a large text in the user's cache, before several processes want them."""
    if not config.data.source.startswith(PREFIX):
        tokenize_files(source_files(config.data), open_tokenizer(config.data.tokenizer), config.data.text_field)


def _sample(config: DataConfig) -> Iterator[str]:
    """So much of the training text, from files in no order."""
    files = [] if config.source.startswith(PREFIX) else _with_text(source_files(config), config.text_field)
    if len(files) > 1:
        texts = _texts_of(never_held_out(files, config.validation_fraction), config.text_field)
    else:
        texts = training_texts(config)
    taken = 0
    for text in texts:
        yield text
        taken += len(text)
        if taken > VOCABULARY_CHARACTERS:
            return


def _with_text(files: Sequence[SourceFile], text_field: str) -> list[SourceFile]:
    """Those that have documents: others are neither trained on nor held out."""
    return [file for file in files if any(_texts_of([file], text_field))]


def _texts_of(files: Sequence[SourceFile], text_field: str) -> Iterator[str]:
    for file in files:
        with contextlib.suppress(NotTextError):
            yield from read_documents(file, text_field)
