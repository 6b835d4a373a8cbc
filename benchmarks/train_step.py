"""Whole training steps: a model with dynamic-mask attention against the same model with dense attention.

    python benchmarks/train_step.py --output benchmarks/results/train_step.json

Forward, backward, clipping and AdamW of a preset of `configs/`, on random tokens without documents, so that the dense
model takes cuDNN where it runs. Gates start untied (A = 1/2), so that the mask is not a sliding window.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks import record
from benchmarks.kernel_times import Breakdown, profile
from benchmarks.option_checks import check_positive
from dmattn_jax import explain
from dmattn_jax.models.config import AttentionKind, DogeConfig
from train.cli import find_preset
from train.config import TrainConfig
from train.flops import device_peak_flops, training_flops_per_token
from train.optimizer import make_optimizer, make_schedule
from train.parameters import make_skeleton
from train.step import apply_gradients, loss_and_gradients, make_state


@dataclass(frozen=True)
class Options:
    """What to measure."""

    presets: tuple[str, ...] = ("doge-160m", "doge-320m")
    lengths: tuple[int, ...] = (2048, 8192, 32768)
    """Tokens of a sequence."""
    attentions: tuple[AttentionKind, ...] = ("dma", "mha")
    tokens: int = 32768
    """Of a step, in as many sequences as fit."""
    unroll: bool = True
    """Compile every layer by itself, for speed."""
    repeats: int = 20
    """Timed steps, from the end of one to the end of the next."""
    output: Path | None = None

    def __post_init__(self) -> None:
        for preset in self.presets:
            find_preset(preset)
        check_positive(self, "lengths", "tokens", "repeats")


@dataclass
class Row:
    """One model at one length. seconds: of each timed step. loss: of the last one."""

    preset: str
    attention: str
    length: int
    sequences: int
    seconds: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    mfu: float | None = None
    """Useful operations, over the peak of the device; None where that is not known."""
    temporary_bytes: int = 0
    compile_seconds: float = 0.0
    loss: float = 0.0
    breakdown: Breakdown | None = None
    """Of as many steps once more, where the profiler sees a GPU."""
    error: str | None = None


def measure(config: TrainConfig, row: Row, repeats: int, unroll: bool) -> Row:
    """Fills the row; running out of memory is a result."""
    model: DogeConfig = dataclasses.replace(config.model, attention=row.attention, unroll_layers=unroll)
    skeleton = make_skeleton(model)
    schedule = make_schedule(config.optimizer, 1e-4, 1000)
    optimizer = make_optimizer(config.optimizer, schedule, skeleton.decay_mask())

    def start() -> Any:
        params = skeleton.initialize(0)
        gates = {name: array + 0.5 for name, array in params.items() if name.endswith("gate.A")}
        return make_state(params | gates, optimizer)

    def step(state: Any, batch: dict[str, Any]) -> Any:
        losses, gradients = loss_and_gradients(skeleton, state.params, batch, 1)
        return apply_gradients(state, gradients, losses, optimizer)

    tokens = jax.random.randint(jax.random.key(0), (row.sequences, row.length + 1), 0, model.vocab_size)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": None}
    try:
        state = jax.jit(start)()
        begin = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
        row.compile_seconds = time.perf_counter() - begin
        row.temporary_bytes = compiled.memory_analysis().temp_size_in_bytes
        state, metrics = compiled(state, batch)
        for number in range(repeats + 2):
            # As in training, a step is queued before the one ahead of it is waited for.
            ahead = metrics
            state, metrics = compiled(state, batch)
            jax.block_until_ready(ahead)
            end = time.perf_counter()
            # The first two: what a device does only once.
            if number >= 2:
                row.seconds.append(end - begin)
            begin = end
        row.loss = float(metrics["loss"])

        def run_again() -> None:
            nonlocal state
            for _ in range(repeats):
                state, metrics = compiled(state, batch)
            jax.block_until_ready(metrics)

        row.breakdown = profile(run_again, compiled.as_text(), repeats)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        row.error = "out of memory"
        return row
    row.tokens_per_second = row.sequences * row.length / statistics.median(row.seconds)
    peak = device_peak_flops(jax.devices()[0].device_kind)
    if peak is not None:
        row.mfu = training_flops_per_token(model, row.length).total * row.tokens_per_second / peak
    return row


def main(options: Options) -> list[Row]:
    print(explain())
    rows = []
    for preset in options.presets:
        for length in options.lengths:
            for attention in options.attentions:
                row = Row(preset, attention, length, max(1, options.tokens // length))
                rows.append(measure(find_preset(preset), row, options.repeats, options.unroll))
                mfu = "" if row.mfu is None else f"{row.mfu:7.1%} of peak"
                print(
                    f"{preset:>10} {length:>6} {attention:>4} {row.tokens_per_second:10,.0f} tokens/s {mfu} "
                    f"{row.temporary_bytes / 2**30:6.1f} GiB, compiled in {row.compile_seconds:.0f} s "
                    f"{row.error or ''}",
                    flush=True,
                )
                if row.breakdown is not None:
                    parts = (f"{part} {time:.1f}" for part, time in row.breakdown.milliseconds.items())
                    print(f"    ms: {', '.join(parts)}; idle {row.breakdown.idle:.1f}", flush=True)
                record.write(options.output, options, [dataclasses.asdict(row) for row in rows])
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
