"""Reading a prompt through the masks of a frozen model against the same model with dense attention: time and memory.

    dmattn bench dam --model model.gguf --masks dam512 --output benchmarks/results/dam_prefill_h200.json
    dmattn bench dam --lengths 256 512 --layers 2 --hidden-size 36 --dtype float32      # a CPU, without any files

Whole prompts of one document, up to the logits of the next token; dense attention is cuDNN's where that runs. Beyond
the positions of the model, RoPE's angles are divided so that they stay within: for the time alone, no text is read.
Without a model its weights are random, of SmolLM2-135M's shape; without masks they are a window and the first keys.
Before anything is timed, masked logits in this type are held against the portable path in float32, as dense ones are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from flax import nnx

from benchmarks import record
from benchmarks.option_checks import check_positive
from dmattn_jax import explain
from dmattn_jax.dam import DamError, Masks, apply_masks, load_masks, windows_and_sinks
from dmattn_jax.io.errors import CheckpointFormatError, HubError
from dmattn_jax.io.pretrained import load_pretrained
from dmattn_jax.models import LlamaConfig, LlamaForCausalLM
from dmattn_jax.models.decoder import CausalDecoder
from dmattn_jax.models.field_checks import at_least
from dmattn_jax.nn.rope import LinearRope
from train.errors import CheckpointError

CHECKED_TOKENS = 1021
WORST_RATIO = 2.0
"""Of the errors of masked logits, over those of dense ones."""
TINY = 1e-5
"""An error that is none in any type, for where dense ones have nearly none."""


@dataclass(frozen=True)
class Options:
    """What to measure. lengths: tokens of a prompt."""

    model: Path | None = None
    """A .gguf file or a Hugging Face folder."""
    masks: Path | None = None
    """Where dmattn dam match wrote them."""
    lengths: tuple[int, ...] = (8192, 32768, 65536, 131072)
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    repeats: int = 5
    window: int = 512
    """Of the masks, where none are given."""
    sinks: int = 4
    layers: int = LlamaConfig.num_layers
    """Of the model, where none is given."""
    hidden_size: int = LlamaConfig.hidden_size
    output: Path | None = None

    def __post_init__(self) -> None:
        check_positive(self, "lengths", "repeats", "window", "layers", "hidden_size")
        at_least("sinks", self.sinks, 0)
        # The model, which may be large, is read first.
        if self.masks is not None and not self.masks.is_dir():
            raise ValueError(f"masks must be a folder that dmattn dam match wrote, got {self.masks}")


@dataclass
class Row:
    """One model at one length. seconds: of each prefill. temporary_bytes: that the compiled program needs beside its
    inputs. peak_bytes: of the device so far, weights included. cache_bytes: of a cache for that many tokens."""

    attention: str
    length: int
    density: float
    seconds: list[float] = field(default_factory=list)
    temporary_bytes: int = 0
    cache_bytes: int = 0
    peak_bytes: int | None = None
    error: str = ""


@contextlib.contextmanager
def bad_files_are_the_users() -> Iterator[None]:
    """A model or masks that cannot be read, or do not fit one another, are the user's to put right."""
    try:
        yield
    except (CheckpointFormatError, DamError, HubError, FileNotFoundError) as error:
        raise CheckpointError(" ".join(str(error).split())) from error


@bad_files_are_the_users()
def make_model(options: Options, dtype: str) -> CausalDecoder:
    if options.model is not None:
        return load_pretrained(str(options.model), dtype=dtype)
    config = LlamaConfig(
        num_layers=options.layers, hidden_size=options.hidden_size, dtype=dtype, param_dtype=dtype, init_std=0.05
    )
    return LlamaForCausalLM(config, rngs=nnx.Rngs(0))


@bad_files_are_the_users()
def make_masks(options: Options, model: CausalDecoder) -> Masks:
    if options.masks is None:
        return windows_and_sinks(model.config.num_layers, model.config.num_heads, options.window, options.sinks)
    masks = load_masks(options.masks)
    # Random weights, or others in type, take as long; which model the masks fit is dmattn dam's to check.
    return dataclasses.replace(masks, model="")


def stretched(model: CausalDecoder, length: int) -> CausalDecoder:
    """The model with its angles divided where `length` is beyond its positions."""
    positions = getattr(model.config, "max_position_embeddings", length)
    changed = nnx.merge(*nnx.split(model))
    if length > positions:
        changed.blocks.attention.rope_scaling = LinearRope(length / positions)
    return changed


def prefill(graph: Any, state: Any, tokens: jax.Array) -> jax.Array:
    """Logits of the next token."""
    model = nnx.merge(graph, state)
    return model.logits(model.hidden(tokens)[0][:, -1])


def check(options: Options) -> dict[str, float]:
    """RMS error over RMS of last logits, against the same model in float32 on the portable path; raises where masked
    ones are much worse than dense ones."""
    exact, model = make_model(options, "float32"), make_model(options, options.dtype)
    masks = make_masks(options, model)
    tokens = jax.random.randint(jax.random.key(1), (1, CHECKED_TOKENS), 0, model.config.vocab_size)
    with bad_files_are_the_users():
        masked = apply_masks(exact, masks), apply_masks(model, masks)
    errors = {}
    for name, pair in {"dense": (exact, model), "dam": masked}.items():
        want, got = (jax.jit(prefill, static_argnums=0)(*nnx.split(each), tokens) for each in pair)
        errors[name] = record.rms_ratio(got, want)
    if not errors["dam"] <= max(WORST_RATIO * errors["dense"], TINY):
        raise SystemExit(f"masked logits are wrong: RMS ratio {errors['dam']:.2e}, dense {errors['dense']:.2e}")
    return errors


def measure(model: CausalDecoder, row: Row, options: Options) -> Row:
    """Fills the row; running out of memory is a result."""
    graph, state = nnx.split(stretched(model, row.length))
    tokens = jax.random.randint(jax.random.key(0), (1, row.length), 0, model.config.vocab_size)
    cache = jax.eval_shape(lambda state: nnx.merge(graph, state).init_cache(1, row.length), state)
    row.cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    try:
        program = jax.jit(prefill, static_argnums=0).lower(graph, state, tokens).compile()
        row.temporary_bytes = program.memory_analysis().temp_size_in_bytes
        for number in range(options.repeats + 1):
            began = time.perf_counter()
            jax.block_until_ready(program(state, tokens))
            if number:  # the first time: what a device does only once
                row.seconds.append(time.perf_counter() - began)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        row.error = "out of memory"
    row.peak_bytes = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return row


def main(options: Options) -> list[Row]:
    print(explain())
    errors = check(options)
    print("RMS error over RMS of float32 logits:", errors)
    model = make_model(options, options.dtype)
    masks = make_masks(options, model)
    rows: list[Row] = []
    for length in options.lengths:
        # The smaller peak first: the device's counter never falls.
        for name, each, density in (
            ("dam", apply_masks(model, masks), float(masks.density(length).mean())),
            ("dense", model, 1.0),
        ):
            row = measure(each, Row(name, length, density), options)
            rows.append(row)
            shown = row.error or f"{statistics.median(row.seconds) * 1e3:10.2f} ms"
            print(
                f"{name:>6} {length:>8} tokens, {density:6.1%} of pairs {shown}, temporary "
                f"{row.temporary_bytes / 2**20:10,.1f} MiB, cache {row.cache_bytes / 2**20:8,.1f} MiB",
                flush=True,
            )
            record.write(
                options.output,
                options,
                [dataclasses.asdict(row) for row in rows],
                errors=errors,
                settings=masks.settings,
            )
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
