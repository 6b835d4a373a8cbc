"""Tokens per second and memory of the caches after 1K … 1M tokens, read or generated: dynamic-mask attention against
the same model with dense attention.

    python benchmarks/generation.py --output benchmarks/results/generation.json
    python benchmarks/generation.py --lengths 64 256 --generated 64 --layers 2 --hidden-size 64 --window 32   # a CPU

First every model decodes a few tokens and must come to what it makes of them when it reads them at once. Then
`prefill` reads a prompt of the length in chunks; `decode` then draws further tokens one by one; `generated` draws all
of them after one token of prompt. The weights are random, and so are the gates: which keys are kept costs the same.
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
from flax import nnx

from benchmarks import record
from benchmarks.kernel_times import Breakdown, profile
from benchmarks.option_checks import check_groups, check_positive
from dmattn_jax import explain
from dmattn_jax.decoding import Rows, advance, empty_rows, for_many_tokens, read_chunk
from dmattn_jax.models import DogeConfig, DogeForCausalLM
from dmattn_jax.sampling import Sampling, row_sampling

BAR = {"bfloat16": 0.1, "float32": 1e-4}
"""RMS by which logits after steps may differ from those of a prompt read at once, over the RMS of those. In bfloat16 a
gate near the last one kept may round to the other side of it, in any layer; what is wrong differs by 1."""
ENOUGH_SECONDS = 30
"""Measurements are not repeated beyond so long: dense attention takes minutes to read a million tokens."""
PROFILED_STEPS = 8
"""Tokens whose kernels are looked at one by one: hundreds each."""


@dataclass(frozen=True)
class Options:
    """What to measure. lengths: tokens read, then followed by decode_steps more. generated: tokens drawn in all."""

    lengths: tuple[int, ...] = (1024, 8192, 65536, 1 << 20)
    generated: tuple[int, ...] = (1024, 8192)
    attentions: tuple[Literal["dma", "mha"], ...] = ("dma", "mha")
    batch: int = 1
    prefill_chunk: int = 8192
    decode_steps: int = 128
    repeats: int = 3
    vocab_size: int = 32768
    hidden_size: int = 1024
    layers: int = 16
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64
    window: int = 2048
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    output: Path | None = None

    def __post_init__(self) -> None:
        check_positive(self, *(vars(self).keys() - {"attentions", "dtype", "output"}))
        check_groups(self)
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")


@dataclass
class Row:
    """One measurement. seconds: of each repeat, for `tokens` tokens in all rows of the batch. cache_bytes: of all
    layers. peak_bytes: of the device so far, where it says. breakdown: of one token drawn, where the profiler sees a
    GPU. error: why there is none."""

    attention: str
    what: str
    length: int
    tokens: int
    seconds: list[float] = field(default_factory=list)
    cache_bytes: int = 0
    peak_bytes: int | None = None
    breakdown: Breakdown | None = None
    error: str = ""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / statistics.median(self.seconds)


def make_model(options: Options, attention: Literal["dma", "mha"]) -> DogeForCausalLM:
    config = DogeConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_layers=options.layers,
        num_heads=options.heads,
        num_kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        attention=attention,
        window=options.window,
        dtype=options.dtype,
        param_dtype=options.dtype,
    )
    model = DogeForCausalLM(config, rngs=nnx.Rngs(0))
    if attention == "dma":
        # A = 0 would make every gate equal, and the model a sliding window.
        gate = model.blocks.attention.gate
        gate.A[...] = jax.random.normal(jax.random.key(1), gate.A[...].shape, gate.A[...].dtype)
    return model


class Bench:
    """One model, its programs, and rows of a length."""

    def __init__(self, options: Options, attention: Literal["dma", "mha"]) -> None:
        self.options, self.attention = options, attention
        self.model = make_model(options, attention)
        self.graph, self.state = nnx.split(self.model)
        self.sampling = row_sampling([Sampling()] * options.batch, range(options.batch))
        self.programs: dict[Any, jax.stages.Compiled] = {}

    def measured(self, what: str, length: int, measure: Callable[[Row], None]) -> Row:
        row = Row(self.attention, what, length, 0)
        try:
            measure(row)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row.error = "out of memory"
        row.peak_bytes = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        shown = row.error or f"{row.tokens_per_second:12,.0f} tokens/s {row.cache_bytes / 2**20:10,.2f} MiB of cache"
        print(f"{self.attention:>4} {what:>9} {length:>8} {shown}", flush=True)
        return row

    def check(self, steps: int = 8) -> float:
        """Logits after a prompt longer than the window whose end is read step by step, against those of the whole."""
        options = self.options
        length = options.window + options.window // 2 + steps
        tokens = jax.random.randint(jax.random.key(2), (options.batch, length), 0, options.vocab_size)

        def read(model: DogeForCausalLM, rows: Rows, first: int, end: int) -> Rows:
            part = tokens[:, first:end]
            return read_chunk(*nnx.split(model), rows, part, jnp.ones_like(part))

        empty = functools.partial(empty_rows, self.graph, self.state, options.batch, length)
        whole = read(self.model, empty(), 0, length).logits
        # The steps by what is timed, which may have its layers in another form.
        model, rows = for_many_tokens(self.model, read(self.model, empty(), 0, length - steps))
        for step in range(length - steps, length):
            rows = read(model, rows, step, step + 1)
        stepwise = rows.logits
        error = record.rms_ratio(stepwise, whole)
        if not error <= BAR[options.dtype]:
            raise SystemExit(f"decoding with {self.attention} is wrong: RMS ratio {error:.2e}")
        return error

    def read_and_decode(self, length: int) -> list[Row]:
        """Prefill `length` tokens and decode after them; the decoding starts from the rows that were read."""
        options = self.options
        capacity = length + options.decode_steps * (options.repeats + 1) + PROFILED_STEPS
        rows: list[Rows] = []

        def prefill(row: Row) -> None:
            row.tokens = length * options.batch
            jax.block_until_ready(self.read(1, capacity, min(options.prefill_chunk, length)))  # compiles
            for _ in range(options.repeats):
                rows.clear()
                began = time.perf_counter()
                rows.append(self.read(length, capacity))
                jax.block_until_ready(rows)
                row.seconds.append(time.perf_counter() - began)
                if sum(row.seconds) > ENOUGH_SECONDS:
                    break
            row.cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(rows[0].cache))

        def decode(row: Row) -> None:
            row.tokens = options.decode_steps * options.batch
            draw, program = self.decoder(rows)
            row.seconds = seconds_of(draw, options.decode_steps, options.repeats)
            # Where the time of a token goes.
            row.breakdown = profile(lambda: draw(PROFILED_STEPS), program.as_text(), PROFILED_STEPS)
            row.cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(rows[0].cache))

        first = self.measured("prefill", length, prefill)
        return [first] if first.error else [first, self.measured("decode", length, decode)]

    def generate(self, length: int) -> Row:
        """Draw `length` tokens after one."""

        def draw(row: Row) -> None:
            row.tokens = length * self.options.batch
            for repeat in range(2):
                rows = [self.read(1, length + 1)]
                draw_more, _ = self.decoder(rows)
                seconds = seconds_of(draw_more, length, 0)
                if repeat:
                    row.seconds = seconds
            row.cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(rows[0].cache))

        return self.measured("generated", length, draw)

    def read(self, length: int, capacity: int, width: int | None = None) -> Rows:
        """Rows that have read `length` tokens, `width` at a time."""
        options = self.options
        width = width or min(options.prefill_chunk, length)
        rows = empty_rows(self.graph, self.state, options.batch, capacity)
        random = np.random.default_rng(0)
        for start in range(0, length, width):
            tokens = random.integers(0, options.vocab_size, (options.batch, width)).astype(np.int32)
            present = np.broadcast_to(np.arange(width) < length - start, tokens.shape).astype(np.int32)
            rows = read_chunk(self.graph, self.state, rows, jnp.asarray(tokens), jnp.asarray(present))
        return rows

    def decoder(self, rows: list[Rows]) -> tuple[Callable[[int], None], jax.stages.Compiled]:
        """Draws as many tokens after the rows, in their place, and the program that does."""
        model, rows[0] = for_many_tokens(self.model, rows[0])
        graph, state = nnx.split(model)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(rows[0]))
        if shapes not in self.programs:
            lowered = decode_many.lower(graph, state, rows[0], self.sampling, jnp.int32(0))
            self.programs[shapes] = lowered.compile()
        program = self.programs[shapes]

        def draw(steps: int) -> None:
            rows[0] = jax.block_until_ready(program(state, rows[0], self.sampling, jnp.int32(steps)))

        return draw, program


def seconds_of(draw: Callable[[int], None], steps: int, repeats: int) -> list[float]:
    """Of each repeat after a first one; with no repeats, of that one."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        draw(steps)
        seconds.append(time.perf_counter() - began)
    return seconds[1:] if repeats else seconds


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_many(graph, state, rows: Rows, sampling, steps: jax.Array) -> Rows:
    active = jnp.ones(rows.step.shape, bool)
    return jax.lax.fori_loop(0, steps, lambda _, rows: advance(graph, state, rows, sampling, active, 0)[0], rows)


def written(row: Row) -> dict[str, Any]:
    return asdict(row) | ({} if row.error else {"tokens_per_second": row.tokens_per_second})


def main(options: Options) -> list[Row]:
    print(explain())
    measured: list[Row] = []
    errors: dict[str, float] = {}

    def keep(rows: list[Row]) -> None:
        measured.extend(rows)
        record.write(options.output, options, [written(row) for row in measured], errors=errors)

    for attention in options.attentions:
        bench = Bench(options, attention)
        errors[attention] = bench.check()
        print(f"{attention:>4} logits after steps, RMS difference from the whole: {errors[attention]:.1e}", flush=True)
        for length in options.lengths:
            keep(bench.read_and_decode(length))
        for length in options.generated:
            keep([bench.generate(length)])
    return measured


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
