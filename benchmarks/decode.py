"""One layer's step of decoding after contexts of 1K … 512K tokens: the w-slot cache against cuDNN over the whole one.

    dmattn bench decode --output benchmarks/results/decode_h200.json
    dmattn bench decode --contexts 64 256 --batches 1 3 --window 128 --steps 4          # a CPU

A step evicts, inserts and attends; dense attention writes its new key and attends to all keys so far. Steps follow each
other inside one program, each with the cache of the one before, as in generation: what is timed is a step, not its
launch from Python. The w-slot cache is full, so the context makes no difference to it, and is measured as if it did.
Before anything is timed, every implementation's step is held against the portable one in float32.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import record
from benchmarks.option_checks import check_groups, check_positive
from dmattn_jax import explain
from pallas_kernels.decoding import IMPLEMENTATIONS, Slots

BAR = 1e-2
"""RMS of the difference over RMS, for half precision."""
DENSE_BYTES = 40 << 30
"""Dense caches beyond this are not tried."""


@dataclass(frozen=True)
class Options:
    """What to measure: every batch at every context."""

    contexts: tuple[int, ...] = (1024, 8192, 65536, 524288)
    batches: tuple[int, ...] = (1, 8, 64)
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    window: int = 1024
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    steps: int = 64
    """Steps of one program."""
    repeats: int = 5
    output: Path | None = None

    def __post_init__(self) -> None:
        check_positive(self, "contexts", "batches", "heads", "kv_heads", "head_dim", "window", "steps", "repeats")
        check_groups(self)


@dataclass
class Row:
    """One implementation at one batch and context. microseconds: of a step, per repeat. error: why there are none."""

    what: str
    batch: int
    context: int
    microseconds: list[float] = field(default_factory=list)
    cache_bytes: int = 0
    temporary_bytes: int = 0
    error: str = ""


Token = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""query [B, H, D], key and value [B, K, D], gate [B, K]."""


def full_slots(options: Options, batch: int, context: int) -> Slots:
    """A full cache whose keys stand anywhere in the context."""
    shape = (batch, options.kv_heads, options.window)
    keys = jax.random.split(jax.random.key(context), 4)
    places = jnp.argsort(jax.random.uniform(keys[3], shape), axis=-1).astype(jnp.int32)
    held = [jax.random.normal(key, (*shape, options.head_dim), options.dtype) for key in keys[:2]]
    return Slots(*held, jax.random.normal(keys[2], shape), places * max(context // options.window, 1))


def tokens(options: Options, batch: int) -> Token:
    """`steps` tokens, the first axis."""
    keys = jax.random.split(jax.random.key(batch), 4)
    kv = (options.steps, batch, options.kv_heads)
    return (
        jax.random.normal(keys[0], (options.steps, batch, options.heads, options.head_dim), options.dtype),
        jax.random.normal(keys[1], (*kv, options.head_dim), options.dtype),
        jax.random.normal(keys[2], (*kv, options.head_dim), options.dtype),
        jax.random.normal(keys[3], kv),
    )


def ours(name: str, options: Options, context: int) -> Callable[[Slots, Token], Any]:
    """All tokens one after the other -> the cache after them, and the sum of their outputs."""
    step = functools.partial(
        IMPLEMENTATIONS[name].step, windows=(options.window,) * options.kv_heads, scale=options.head_dim**-0.5
    )

    def run(slots: Slots, stream: Token) -> Any:
        def one(carry: Any, token: Token) -> Any:
            slots, position, total = carry
            out, slots = step(*token, position, slots)
            return (slots, position + 1, total + out.astype(jnp.float32)), None

        query = stream[0]
        start = (slots, jnp.full(query.shape[1], context, jnp.int32), jnp.zeros(query.shape[1:], jnp.float32))
        (slots, _, total), _ = jax.lax.scan(one, start, stream)
        return slots, total

    return run


def dense(context: int) -> Callable[[Any, Token], Any]:
    """cuDNN's attention of one query over `context` keys, of which each step writes one anew."""

    def run(cache: tuple[jax.Array, jax.Array], stream: Token) -> Any:
        def one(carry: Any, token: Token) -> Any:
            keys, values, place, total = carry
            query, key, value, _ = token
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(array, new[:, None], place, axis=1)
                for array, new in ((keys, key), (values, value))
            )
            out = jax.nn.dot_product_attention(query[:, None], keys, values, implementation="cudnn")[:, 0]
            return (keys, values, place + 1, total + out.astype(jnp.float32)), None

        query = stream[0]
        start = (*cache, jnp.int32(max(context - query.shape[0], 0)), jnp.zeros(query.shape[1:], jnp.float32))
        (keys, values, _, total), _ = jax.lax.scan(one, start, stream)
        return (keys, values), total

    return run


def check(options: Options) -> dict[str, float]:
    """RMS of the difference from the portable step in float32, over its RMS, of outputs; what is held must be equal."""
    batch, context = 3, 4 * options.window
    stream, slots = tokens(options, batch), full_slots(options, batch, context)
    exact = slots._replace(keys=slots.keys.astype(jnp.float32), values=slots.values.astype(jnp.float32))
    wide = tuple(array.astype(jnp.float32) for array in stream)
    held, want = jax.jit(ours("xla", options, context))(exact, wide)
    errors = {}
    for name, entry in IMPLEMENTATIONS.items():
        if entry.unavailable() or entry.unsupported(stream[0][0], slots):
            continue
        after, got = jax.jit(ours(name, options, context))(slots, stream)
        error = record.rms_ratio(got, want)
        order = [np.sort(np.asarray(each.position), axis=-1) for each in (after, held)]
        if not error <= BAR or not (order[0] == order[1]).all():
            raise SystemExit(f"{name} is wrong: RMS ratio {error:.2e}, equal sets: {(order[0] == order[1]).all()}")
        errors[name] = error
    return errors


def measure(row: Row, function: Callable[..., Any], cache: Any, stream: Token, options: Options) -> Row:
    """The cache is given away and taken back, so that steps change it in place; running out of memory is a result."""
    row.cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    try:
        program = jax.jit(function, donate_argnums=0).lower(cache, stream).compile()
        row.temporary_bytes = program.memory_analysis().temp_size_in_bytes
        for repeat in range(options.repeats + 1):
            began = time.perf_counter()
            cache, total = program(cache, stream)
            jax.block_until_ready(total)
            if repeat:  # the first time: what a device does only once
                row.microseconds.append((time.perf_counter() - began) / options.steps * 1e6)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        row.error = "out of memory"
    except (NotImplementedError, ValueError) as error:
        # A rival that does not take the shape is a result too.
        if row.what.startswith("dma"):
            raise
        row.error = f"refused: {str(error).splitlines()[0]}"
    return row


def main(options: Options) -> list[Row]:
    print(explain())
    errors = check(options)
    print("RMS difference from the portable step in float32:", errors)
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        shown = row.error or f"{statistics.median(row.microseconds):10.1f} µs a step"
        print(f"{row.what:>14} batch {row.batch:>3} context {row.context:>8,} {shown}, "
              f"cache {row.cache_bytes / 2**20:10,.1f} MiB", flush=True)  # fmt: skip
        record.write(options.output, options, [asdict(row) for row in rows], errors=errors)

    for batch in options.batches:
        stream = tokens(options, batch)
        for context in options.contexts:
            for name in errors:
                slots = full_slots(options, batch, context)
                keep(measure(Row(f"dma {name}", batch, context), ours(name, options, context), slots, stream, options))
            if jax.default_backend() != "gpu":
                continue
            row, shape = Row("cudnn dense", batch, context), (batch, context, options.kv_heads, options.head_dim)
            if 4 * np.prod(shape, dtype=np.int64) > DENSE_BYTES:
                row.error = f"not tried: a cache of {4 * np.prod(shape, dtype=np.int64) / 2**30:,.0f} GiB"
                keep(row)
                continue
            cache = tuple(jax.random.normal(jax.random.key(n), shape, options.dtype) for n in range(2))
            keep(measure(row, dense(context), cache, stream, options))
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
