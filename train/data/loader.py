"""From a configuration to batches: the training batches without end, and the held-out ones."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import grain
import numpy as np

from dmattn_jax.io.tokenizers import ByteTokenizer, Tokenizer
from train.config import DataConfig
from train.data.batches import Batch, RowIterator, Share, StreamIterator, TrainIterator
from train.data.corpus import package_files, stdlib_files
from train.data.held_out import HeldOut, hold_out
from train.data.packing import EndlessRows
from train.data.sources import DataError, SourceFile, find_files
from train.data.split import Split, split_documents
from train.data.stream import PREFIX, VALIDATION_TOKENS, stream_texts, stream_validation
from train.data.tokens import TokenStore, tokenize_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Datasets:
    """What a run trains and validates on; `validation` and `bytes_per_token` as in `HeldOut`.

    train_tokens: tokens of one epoch, or None for a stream, which does not say.
    """

    train: TrainIterator
    validation: grain.MapDataset[Batch]
    bytes_per_token: float
    description: str
    train_tokens: int | None


def make_datasets(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Datasets:
    """The batches that a run trains and validates on.

    batch_size: rows of a batch on this process; one step takes batch_size · process_count rows, and process p has
    the p-th block of them, so that the global batches do not depend on the count of processes.

    Raises DataError, in one line, for whatever is wrong with the source.
    """
    share = _checked(sequence_length, batch_size, process_index, process_count)
    if config.source.startswith(PREFIX):
        return _from_stream(config, tokenizer, sequence_length, share, seed)
    store = tokenize_files(source_files(config), tokenizer, config.text_field)
    split = split_documents(store, config.validation_fraction, config.source)
    train_tokens = int(store.length[split.train].sum())
    if train_tokens < sequence_length:
        raise DataError(
            f"source {config.source!r} has {train_tokens} tokens to train on, less than one row of "
            f"sequence_length={sequence_length}: give more text or a shorter sequence_length"
        )
    held_out = hold_out(store, split.validation, tokenizer, sequence_length, share, "")
    key = (seed, config.shuffle_seed)
    identity = {"corpus": _identity(store, split), "sequence_length": sequence_length, "seed": list(key)}
    train = RowIterator(EndlessRows(store, split.train, sequence_length, key), share, identity)
    description = (
        f"{_describe(config, store, tokenizer)}; held out {split.held_out:,} of {split.units:,} {split.unit} "
        f"({held_out.tokens:,} tokens, {held_out.tokens / (held_out.tokens + train_tokens):.1%})"
    )
    logger.info("%s", description)
    return Datasets(train, held_out.batches, held_out.bytes_per_token, description, train_tokens)


def make_evaluation(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> HeldOut:
    """All text of `config.source` (of a stream, its held-out part) as one fixed set, for evaluating a model on it."""
    share = _checked(sequence_length, batch_size, process_index, process_count)
    if config.source.startswith(PREFIX):
        held_out = _stream_held_out(config, tokenizer, sequence_length, share)
    else:
        store = tokenize_files(source_files(config), tokenizer, config.text_field)
        documents = np.arange(len(store), dtype=np.int64)
        description = _describe(config, store, tokenizer)
        held_out = hold_out(store, documents, tokenizer, sequence_length, share, description)
    logger.info("%s", held_out.description)
    return held_out


def training_texts(config: DataConfig) -> Iterator[str]:
    """The texts that a run would train on, without the held-out ones: what to train a tokenizer on."""
    if config.source.startswith(PREFIX):
        yield from stream_texts(config)
        return
    files = source_files(config)
    if any(file.format == "npy" for file in files):
        raise DataError(f"source {config.source!r} holds token ids: name the text they were made of")
    tokenizer = ByteTokenizer()
    store = tokenize_files(files, tokenizer, config.text_field)
    for document in split_documents(store, config.validation_fraction, config.source).train:
        yield tokenizer.decode(store.tokens(document).tolist())


def source_files(config: DataConfig) -> list[SourceFile]:
    match config.source:
        case "stdlib":
            return stdlib_files()
        case "packages":
            return package_files()
        case source if source.startswith(PREFIX):
            raise DataError(f"source {source!r} is a stream, which only training reads: give files")
        case _:
            return find_files(config.source)


def _checked(sequence_length: int, batch_size: int, process_index: int, process_count: int) -> Share:
    if sequence_length < 1:
        raise DataError(f"sequence_length must be >= 1, got {sequence_length}")
    return Share(batch_size, process_index, process_count)


def _from_stream(config: DataConfig, tokenizer: Tokenizer, sequence_length: int, share: Share, seed: int) -> Datasets:
    held_out = _stream_held_out(config, tokenizer, sequence_length, share)
    logger.info("%s", held_out.description)
    train = StreamIterator(config, tokenizer, sequence_length, share, seed)
    return Datasets(train, held_out.batches, held_out.bytes_per_token, held_out.description, None)


def _stream_held_out(config: DataConfig, tokenizer: Tokenizer, sequence_length: int, share: Share) -> HeldOut:
    if not 0 < config.validation_fraction < 1:
        raise DataError(f"validation_fraction must be between 0 and 1, both excluded, got {config.validation_fraction}")
    at_least = max(VALIDATION_TOKENS, share.global_batch * sequence_length)
    documents, text_bytes = stream_validation(config, tokenizer, at_least)
    length = np.array([len(document) for document in documents], np.int64)
    store = TokenStore(
        arrays=(np.concatenate(documents),),
        array=np.zeros_like(length),
        start=np.cumsum(length) - length,
        length=length,
        file=np.zeros_like(length),
        text_bytes=np.array(text_bytes, np.int64),
        files=(config.source,),
        not_text=0,
        empty=0,
    )
    description = f"{config.source}: a stream; held out {len(documents):,} documents ({int(length.sum()):,} tokens)"
    everything = np.arange(len(documents), dtype=np.int64)
    return hold_out(store, everything, tokenizer, sequence_length, share, description)


def _describe(config: DataConfig, store: TokenStore, tokenizer: Tokenizer) -> str:
    text_bytes = int(store.text_bytes[store.text_bytes > 0].sum())
    parts = [f"{len(store.files):,} files, {len(store):,} documents"]
    if text_bytes:
        parts.append(f"{text_bytes / 1e6:,.1f} MB of text")
    parts.append(f"{int(store.length.sum()):,} tokens")
    left_out = []
    if store.not_text:
        left_out.append(f"{store.not_text:,} files that are not UTF-8 text")
    if store.empty:
        left_out.append(f"{store.empty:,} empty documents")
    if left_out:
        parts.append("left out " + " and ".join(left_out))
    if tokenizer.eos_id is None:
        parts.append("the tokenizer has no end-of-document token")
    return f"{config.source}: " + ", ".join(parts)


def _identity(store: TokenStore, split: Split) -> str:
    """Differs where the documents trained on do: a file more or less, an edit that changes a length."""
    digest = hashlib.blake2b(digest_size=16)
    for index in np.unique(store.file[split.train]):
        digest.update(store.files[index].encode(errors="surrogateescape") + b"\0")
    digest.update(store.length[split.train].tobytes())
    return digest.hexdigest()
