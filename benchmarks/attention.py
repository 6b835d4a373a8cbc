"""Time and memory of attention, one process, one table: ours against cuDNN on the same inputs.

    python benchmarks/attention.py --output benchmarks/results/attention.json

Every row is checked against the float64 oracle at a short length, and against the portable implementation at its own
length, before it is timed. Selection is always part of the time; `select` and `layout` show it apart.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dmattn_jax import dynamic_mask_attention, explain, select_keys
from dmattn_jax.documents import document_bounds
from dmattn_jax.layout import lay_out
from dmattn_jax.oracle import attention_oracle
from dmattn_jax.selection import choose_keys
from pallas_kernels import IMPLEMENTATIONS


@dataclass(frozen=True)
class Options:
    """What to measure.

    lengths, windows: measured in pairs. heads, kv_heads, head_dim: Table 5 of the DMA paper by default.
    """

    lengths: tuple[int, ...] = (1024, 2048, 8192, 32768)
    windows: tuple[int, ...] = (1024, 1024, 1024, 1024)
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    gates: tuple[str, ...] = ("random", "walk")
    dtype: str = "bfloat16"
    repeats: int = 5
    output: Path | None = None


@dataclass
class Row:
    """One measurement: milliseconds of each repeat, and the temporary bytes of the compiled program."""

    length: int
    window: int
    gate: str
    what: str
    direction: str
    milliseconds: list[float] = field(default_factory=list)
    temporary_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


def make_inputs(options: Options, length: int, gate: str) -> list[jax.Array]:
    """query, key, value, gate and a cotangent of batch 1."""
    keys = jax.random.split(jax.random.key(length), 5)
    shape = (1, length, options.heads, options.head_dim)
    kv_shape = (1, length, options.kv_heads, options.head_dim)
    noise = jax.random.normal(keys[3], kv_shape[:3], jnp.float32)
    scores = {
        "random": lambda: noise,
        "rising": lambda: noise + 8 * jnp.arange(length)[None, :, None] / length,
        "walk": lambda: 0.02 * jnp.cumsum(noise, axis=1),
    }[gate]()
    arrays = [
        jax.random.normal(key, s, options.dtype) for key, s in zip(keys, (shape, kv_shape, kv_shape), strict=False)
    ]
    return [*arrays, scores, jax.random.normal(keys[4], shape, options.dtype)]


def measure(function: Callable[..., Any], arguments: list[jax.Array], repeats: int) -> tuple[list[float], int]:
    """Milliseconds a call, per repeat; a repeat queues calls for about 50 ms, so that launches are hidden."""
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    begin = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    calls = max(1, min(200, int(0.05 / max(time.perf_counter() - begin, 1e-6))))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            result = compiled(*arguments)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - begin) / calls * 1e3)
    return times, compiled.memory_analysis().temp_size_in_bytes


def peers(window: int) -> dict[str, Callable[..., jax.Array]]:
    """What each name computes from query, key, value, gate."""
    table: dict[str, Callable[..., jax.Array]] = {}
    for name, entry in IMPLEMENTATIONS.items():
        if entry.unavailable() is None:
            table[f"dma {name}"] = lambda q, k, v, g, name=name: dynamic_mask_attention(
                q, k, v, g, window=window, implementation=name
            )
    if jax.default_backend() == "gpu":
        table["cudnn dense"] = lambda q, k, v, g: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn"
        )
        table["cudnn sliding window"] = lambda q, k, v, g: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=(window - 1, 0), implementation="cudnn"
        )
    return table


def check(options: Options) -> dict[str, float]:
    """RMS error over RMS of the truth of every implementation at 1,021 tokens; raises beyond the dtype's bar."""
    bar = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}[options.dtype]
    query, key, value, gate, cotangent = make_inputs(options, 1021, "random")
    errors = {}
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(array, np.float64)) for array in (query, key, value, gate)]
        want = jax.vjp(lambda *a: attention_oracle(*a, window=100), *exact)
        want = [want[0], *want[1](jnp.asarray(np.asarray(cotangent, np.float64)))]
        want = [np.asarray(array) for array in want]
    for name, attend in peers(100).items():
        if not name.startswith("dma"):
            continue
        out, pull = jax.vjp(attend, query, key, value, gate)
        for got, truth in zip((out, *pull(cotangent)), want, strict=True):
            error = np.sqrt(np.mean((np.asarray(got, np.float64) - truth) ** 2) / np.mean(truth**2))
            errors[name] = max(errors.get(name, 0.0), float(error))
        if not errors[name] <= bar:
            raise SystemExit(f"{name} is wrong: RMS ratio {errors[name]:.2e} > {bar}")
    return errors


def rows_of(options: Options, length: int, window: int, gate: str) -> list[Row]:
    *inputs, cotangent = make_inputs(options, length, gate)
    rows = []

    def add(what: str, direction: str, function, arguments) -> None:
        times, temporary = measure(function, arguments, options.repeats)
        rows.append(Row(length, window, gate, what, direction, times, temporary))
        print(f"{length:>8} {window:>6} {gate:>7} {what:>22} {direction:>8} {rows[-1].median:9.3f} ms", flush=True)

    def prepare(gate):
        choice = choose_keys(
            jnp.moveaxis(gate, 2, 1), (window,) * options.kv_heads, document_bounds(None, 1, length), causal=True
        )
        blocks = IMPLEMENTATIONS["xla"].block_sizes(length, length, window, options.head_dim)
        return lay_out(choice, queries=length, window=window, blocks=blocks)

    add("select", "forward", lambda gate: select_keys(gate, window), inputs[3:])
    add("select + layout", "forward", prepare, inputs[3:])
    for name, attend in peers(window).items():
        if name.startswith("cudnn") and gate != options.gates[0]:
            continue

        def both(query, key, value, gate, cotangent, attend=attend):
            out, pull = jax.vjp(attend, query, key, value, gate)
            return out, pull(cotangent)

        add(name, "forward", attend, inputs)
        add(name, "both", both, [*inputs, cotangent])
    return rows


def main(options: Options) -> None:
    print(explain())
    errors = check(options)
    print("RMS error over RMS of the float64 oracle:", errors)
    rows = [
        row
        for length, window in zip(options.lengths, options.windows, strict=True)
        for gate in options.gates
        for row in rows_of(options, length, window, gate)
    ]
    if options.output:
        record = {
            "command": sys.argv,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "options": {**asdict(options), "output": str(options.output)},
            "errors": errors,
            "rows": [asdict(row) for row in rows],
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
