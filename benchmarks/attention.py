"""Time and memory of attention, one process, one table: ours against cuDNN on the same inputs.

    python benchmarks/attention.py --output benchmarks/results/attention.json

Everything is checked against the float64 oracle at a short length before anything is timed. Selection is always part
of the time; `select + layout` shows it apart. Times are compared with the matrix unit's own: `matrix product` is one
of 8,192³, and `share of it` counts 4·D operations for every visible (query, key) pair, 14·D with the backward pass.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import record, torch_peers
from benchmarks.device_clock import measure
from benchmarks.gates import MADE_UP, Gate, make_gates
from benchmarks.kernel_times import Breakdown, profile
from benchmarks.option_checks import check_groups, check_positive
from dmattn_jax import dynamic_mask_attention, explain, select_keys
from dmattn_jax.attention import choose_intervals
from dmattn_jax.oracle import attention_oracle
from pallas_kernels import IMPLEMENTATIONS, Implementation, Intervals
from train.flops import visible_pairs

PORTABLE_LENGTH = 8192
"""Where a faster implementation runs, the portable one is measured up to here only."""
DENSE_LENGTH = 1 << 17
"""Dense attention is measured up to here: at a million tokens forward and backward are a minute."""
RESULTS = ("out", "dquery", "dkey", "dvalue", "dgate")
TOKENS_OF_A_PROGRAM = 8192
"""Of shorter rows a timed program has so many: what a machine takes to learn that a queue has ended, some 50 µs more or
less, is then little beside it."""
PROFILED_RUNS = 10
"""Of a timed program, once more, to see its kernels."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    lengths, windows: measured in pairs. batch: rows at once; what is published has 1, training on short rows many.
    heads, kv_heads, head_dim: Table 5 of the DMA paper by default. gates: all of them where `gates_at` stands first
    among the lengths, elsewhere the first alone.
    """

    lengths: tuple[int, ...] = (1024, 1024, 2048, *[8192] * 4, *[32768] * 3, *[131072] * 3, 1 << 20)
    windows: tuple[int, ...] = (1024, 256, 1024, 1024, 256, 2048, 8192, 1024, 256, 2048, 2048, 256, 1024, 2048)
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    gates: tuple[Gate, ...] = MADE_UP
    gates_at: int = 32768
    checkpoint: Path | None = None
    """A run whose gates `--gates … trained` measures."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    torch: bool = True
    """FlashAttention-2 and FlexAttention too, where torch is installed and the batch is 1."""
    repeats: int = 9
    output: Path | None = None

    def __post_init__(self) -> None:
        check_positive(self, "lengths", "windows", "batch", "heads", "kv_heads", "head_dim", "repeats")
        if len(self.lengths) != len(self.windows):
            raise ValueError(f"lengths and windows are pairs, got {len(self.lengths)} and {len(self.windows)} of them")
        check_groups(self)
        if "trained" in self.gates and self.checkpoint is None:
            raise ValueError("gates 'trained' needs --checkpoint")
        if self.checkpoint is not None and not self.checkpoint.is_dir():
            raise ValueError(f"checkpoint must be a run's folder, such as runs/quickstart, got {self.checkpoint}")


@dataclass
class Row:
    """One measurement: milliseconds of each repeat, and the temporary bytes of the compiled program. breakdown: where
    the time of ours and of dense attention goes on a GPU, kernel by kernel."""

    length: int
    window: int
    gate: str
    what: str
    direction: str
    milliseconds: list[float] = field(default_factory=list)
    temporary_bytes: int = 0
    share_of_matmul: float | None = None
    breakdown: Breakdown | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


def make_inputs(options: Options, length: int, gate: str) -> list[jax.Array]:
    """query, key, value, gate and a cotangent."""
    keys = jax.random.split(jax.random.key(length), 5)
    shape = (options.batch, length, options.heads, options.head_dim)
    kv_shape = (options.batch, length, options.kv_heads, options.head_dim)
    scores = make_gates(gate, length, options.kv_heads, options.checkpoint, options.batch)
    arrays = [
        jax.random.normal(key, s, options.dtype) for key, s in zip(keys, (shape, kv_shape, kv_shape), strict=False)
    ]
    return [*arrays, scores, jax.random.normal(keys[4], shape, options.dtype)]


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
    """RMS error over RMS of the truth of every implementation in a row of 1,021 tokens, by lists and by a window that
    hides nothing; raises beyond the dtype's bar."""
    length = 1021
    bar = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}[options.dtype]
    query, key, value, gate, cotangent = make_inputs(replace(options, batch=1), length, "random")
    errors: dict[str, float] = {}
    with jax.enable_x64(True):
        *exact, pulled = (jnp.asarray(np.asarray(a, np.float64)) for a in (query, key, value, gate, cotangent))
    for window in (100, length):
        with jax.enable_x64(True):
            truth_out, truth_pull = jax.vjp(partial(attention_oracle, window=window), *exact)
            want = [np.asarray(array) for array in (truth_out, *truth_pull(pulled))]
        for name, attend in peers(window).items():
            if not name.startswith("dma"):
                continue
            out, pull = jax.vjp(attend, query, key, value, gate)
            found = [record.rms_ratio(got, truth) for got, truth in zip((out, *pull(cotangent)), want, strict=True)]
            if not max(found) <= bar:
                shown = ", ".join(f"{what} {error:.2e}" for what, error in zip(RESULTS, found, strict=True))
                raise SystemExit(f"{name} is wrong in a window of {window}, RMS ratio above {bar}: {shown}")
            errors[name] = max(errors.get(name, 0.0), *found)
    return errors


def matrix_product(dtype: str, repeats: int) -> float:
    """Operations per second of one large product, the practical ceiling of this device."""
    size = 8192 if jax.default_backend() == "gpu" else 512
    left, right = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in (0, 1))
    [times] = measure([(jax.jit(jnp.dot).lower(left, right).compile(), [left, right])], repeats)
    return 2 * size**3 / (statistics.median(times) * 1e-3)


def rows_of(options: Options, length: int, window: int, gate: str, ceiling: float, *, dense: bool) -> list[Row]:
    """dense: with cuDNN's dense attention, and PyTorch's, which have no window."""
    inputs = make_inputs(options, length, gate)
    rows = []

    def keep(row: Row, dense: bool) -> None:
        if row.what != "select + layout":
            pairs = visible_pairs(length, None if dense else window) * options.batch * options.heads
            work = pairs * options.head_dim * (4 if row.direction == "forward" else 14)
            row.share_of_matmul = work / (row.median * 1e-3) / ceiling
        rows.append(row)
        share = "" if row.share_of_matmul is None else f"{row.share_of_matmul:5.0%} of a matrix product"
        print(
            f"{length:>8} {window:>6} {gate:>7} {row.what:>22} {row.direction:>8} {row.median:9.3f} ms {share}",
            flush=True,
        )
        if row.breakdown is not None:
            parts = (f"{part} {time:.3f}" for part, time in row.breakdown.milliseconds.items())
            print(f"    ms: {', '.join(parts)}; idle {row.breakdown.idle:.3f}", flush=True)

    table = peers(window)
    fastest = next(entry for name, entry in IMPLEMENTATIONS.items() if f"dma {name}" in table)
    selection = partial(prepare, fastest, window, options.head_dim)
    # What is timed, and which of the inputs it takes.
    work: list[tuple[str, str, Callable[..., Any], slice]] = [("select + layout", "forward", selection, slice(3, 4))]
    for name, attend in table.items():
        if (name.startswith("cudnn") and gate != options.gates[0]) or (name == "cudnn dense" and not dense):
            continue
        if name == "dma xla" and fastest.name != "xla" and (length > PORTABLE_LENGTH or gate != options.gates[0]):
            continue

        def both(query, key, value, gate, cotangent, attend=attend):
            out, pull = jax.vjp(attend, query, key, value, gate)
            return out, pull(cotangent)

        work += [(name, "forward", attend, slice(4)), (name, "both", both, slice(5))]
    copies = max(1, TOKENS_OF_A_PROGRAM // (options.batch * length))
    sets = [inputs, *([jnp.array(array) for array in inputs] for _ in range(copies - 1))]
    arguments = [[array for each in sets for array in each[taken]] for *_, taken in work]
    lowered = [jax.jit(in_a_row(entry[2], copies)).lower(*taken) for entry, taken in zip(work, arguments, strict=True)]
    # All before the first measurement, and at once: compiling is most of the time, and each is one thread's work.
    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(lambda program: program.compile(), lowered))
    measured = measure(list(zip(programs, arguments, strict=True)), options.repeats)
    profiled = (f"dma {fastest.name}", "cudnn dense") if jax.default_backend() == "gpu" else ()
    for (what, direction, *_), program, taken, times in zip(work, programs, arguments, measured, strict=True):
        temporary = program.memory_analysis().temp_size_in_bytes
        row = Row(length, window, gate, what, direction, [time / copies for time in times], temporary)
        if what in profiled:

            def run(program=program, taken=taken):
                jax.block_until_ready([program(*taken) for _ in range(PROFILED_RUNS)])

            row.breakdown = profile(run, program.as_text(), PROFILED_RUNS * copies)
        keep(row, dense=what == "cudnn dense")
    if options.torch and options.batch == 1 and torch_peers.available() and dense and length <= options.gates_at:
        shape = (length, options.heads, options.kv_heads, options.head_dim)
        expiry = np.asarray(jax.jit(select_keys, static_argnums=1)(inputs[3], window))[0]
        try:
            for name, function in torch_peers.peers(*shape, expiry, np.asarray(inputs[3])[0]):
                for direction, times in torch_peers.measure(function, *shape, options.repeats).items():
                    keep(Row(length, window, gate, name, direction, times), dense=name != "flex attention")
        except torch_peers.out_of_memory() as error:
            # JAX holds the rest: XLA_PYTHON_CLIENT_MEM_FRACTION says how much.
            print(f"PyTorch has no memory left for more here: {str(error).splitlines()[0]}", flush=True)
    return rows


def in_a_row(function: Callable[..., Any], copies: int) -> Callable[..., list[Any]]:
    """`function` of as many sets of arguments, one after the other. Each set has arrays of its own, and waits for the
    result before: of equal calls the compiler would make one, and of independent ones it merges the small programs."""
    function = jax.jit(function)  # traced once

    def run(*arguments: jax.Array) -> list[Any]:
        each = len(arguments) // copies
        results: list[Any] = []
        for first in range(0, len(arguments), each):
            own = arguments[first : first + each]
            if results:
                own, results[-1] = jax.lax.optimization_barrier((own, results[-1]))
            results.append(function(*own))
        return results

    return run


def prepare(implementation: Implementation, window: int, head_dim: int, gate: jax.Array) -> Intervals:
    """Lifetimes and lists as attention makes them, without the attention."""
    length, kv_heads = gate.shape[1:]
    ranked = jnp.moveaxis(gate, 2, 1)
    blocks = implementation.block_sizes(length, length, window, head_dim, jnp.bfloat16)
    return choose_intervals(ranked, (window,) * kv_heads, None, length, implementation, blocks)


def main(options: Options) -> None:
    print(explain())
    errors = check(options)
    print("RMS error over RMS of the float64 oracle:", errors)
    ceiling = matrix_product(options.dtype, options.repeats)
    print(f"matrix product: {ceiling / 1e12:.1f} TFLOP/s")
    rows: list[Row] = []
    for index, (length, window) in enumerate(zip(options.lengths, options.windows, strict=True)):
        new = length not in options.lengths[:index]
        for gate in options.gates if new and length == options.gates_at else options.gates[:1]:
            # Once a length, and beside windows that hide nothing, which are the same attention.
            dense = (new or window >= length) and gate == options.gates[0] and length <= DENSE_LENGTH
            rows += rows_of(options, length, window, gate, ceiling, dense=dense)
            more = {"errors": errors, "matrix_product_flops": ceiling}
            record.write(options.output, options, [asdict(row) for row in rows], **more)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
