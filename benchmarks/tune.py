"""The best tiles of the Hopper kernels for one shape, found by trying all that fit in shared memory, pass by pass.

    dmattn bench tune --head-dim 256 --output benchmarks/results/tune_256.json
    dmattn bench tune --head-dim 64 --passes forward --length 8192

Every candidate is first held against the portable XLA implementation, in float32, at a short length; one that is off by
more than its dtype allows ends the run. Then its kernel alone is timed, without selection and without the gathering of
rows. The table marks what `pallas_kernels/gpu/config.py` takes by itself for the head size: where another line is
faster by more than the repeats differ, that is the place to change. Needs a Hopper GPU.
"""

from __future__ import annotations

import itertools
import statistics as numbers
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from benchmarks import attention, device_clock, record
from benchmarks.option_checks import check_groups
from pallas_kernels import IMPLEMENTATIONS, interval_attention
from pallas_kernels.gpu import MOSAIC_GPU
from pallas_kernels.gpu.backward_key import key_gradients
from pallas_kernels.gpu.backward_query import query_gradient
from pallas_kernels.gpu.config import HopperBlockSizes, block_sizes
from pallas_kernels.gpu.forward import attend
from pallas_kernels.gpu.passes import pad_heads, statistics
from pallas_kernels.gpu.scratch import PassSizes
from pallas_kernels.gpu.tiles import BLOCK_Q, gather_rows, key_walks, query_runs

FIELDS: dict[str, dict[str, tuple[int, ...]]] = {
    "forward": {"block_k": (64, 128), "stages": (2, 3, 4), "query_buffers": (1, 2)},
    "query_gradient": {"block_k": (64, 128), "stages": (2, 3, 4), "value_stages": (1, 2, 3, 4)},
    "key_gradient": {"block_q": (64, 128), "stages": (2, 3, 4)},
}
"""What is tried of each pass."""
BAR = {"bfloat16": 5e-3, "float16": 1e-3}
"""RMS of the error over the RMS of the truth."""
CHECKED_LENGTH, CHECKED_WINDOW = 1021, 100


@dataclass(frozen=True)
class Options:
    """The shape to tune for: query [1, length, heads, head_dim], keys of kv_heads, a window of keys for each query."""

    head_dim: int = 128
    heads: int = 32
    kv_heads: int = 8
    length: int = 32768
    window: int = 1024
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    passes: tuple[Literal["forward", "query_gradient", "key_gradient"], ...] = (
        "forward",
        "query_gradient",
        "key_gradient",
    )
    repeats: int = 5
    output: Path | None = None

    def __post_init__(self) -> None:
        reason = MOSAIC_GPU.unsupported(jnp.dtype(self.dtype), self.head_dim)
        if reason is not None:
            raise ValueError(f"head_dim {self.head_dim} has no tiles to tune: {reason}")
        if self.length < BLOCK_Q or self.length % BLOCK_Q:
            raise ValueError(f"length must be a multiple of {BLOCK_Q}, got {self.length}")
        check_groups(self)

    @property
    def inputs(self) -> attention.Options:
        """The same shape, as the benchmark of attention makes inputs of it."""
        return attention.Options(heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, dtype=self.dtype)


@dataclass
class Row:
    """One candidate. shared_bytes: of shared memory; error: RMS over RMS; default: what is taken without tuning."""

    name: str
    sizes: dict[str, int]
    shared_bytes: int
    default: bool
    error: float
    milliseconds: list[float]


def candidates(name: str, default: PassSizes) -> Iterator[PassSizes]:
    """All sizes of a pass that it is written for and that shared memory holds, the default first."""
    yield default
    fields = FIELDS[name]
    for values in itertools.product(*fields.values()):
        try:
            sizes = replace(default, **dict(zip(fields, values, strict=True)))
        except ValueError:
            continue
        if sizes != default and getattr(sizes, "value_stages", 0) <= sizes.stages:
            yield sizes


def error_of(name: str, blocks: HopperBlockSizes, options: Options) -> float:
    """The largest RMS error over RMS, of what the pass computes, against the portable path in float32."""
    query, key, value, gate, cotangent = attention.make_inputs(options.inputs, CHECKED_LENGTH, "random")
    scale = options.head_dim**-0.5
    intervals = attention.prepare(MOSAIC_GPU, CHECKED_WINDOW, options.head_dim, gate)

    def run(implementation, blocks, dtype, intervals):
        arrays = [*(array.astype(dtype) for array in (query, key, value)), gate]
        out, pull = jax.vjp(lambda *args: interval_attention(*args, intervals, implementation, scale, blocks), *arrays)
        dquery, *dkeys = pull(cotangent.astype(dtype))
        return {"forward": [out], "query_gradient": [dquery], "key_gradient": dkeys}[name]

    portable = IMPLEMENTATIONS["xla"]
    shape = (CHECKED_LENGTH, CHECKED_LENGTH, CHECKED_WINDOW, options.head_dim, jnp.dtype("float32"))
    # The lists are of the Hopper kernels' epochs; the portable path has the same intervals without lists.
    want = jax.jit(partial(run, portable, portable.block_sizes(*shape), jnp.float32))(replace(intervals, lists=None))
    got = jax.jit(partial(run, MOSAIC_GPU, blocks, options.dtype))(intervals)
    return max(record.rms_ratio(left, right) for left, right in zip(got, want, strict=True))


class Bench:
    """The inputs of every kernel, made once: padded heads, gathered rows, statistics of the softmax."""

    def __init__(self, options: Options):
        self.options, self.scale = options, options.head_dim**-0.5
        shape = (options.length, options.length, options.window, options.head_dim, jnp.dtype(options.dtype))
        self.blocks = block_sizes(*shape)
        self.query, self.dout, self.rows, self.stats = jax.jit(self._prepare)()

    def _prepare(self):
        options, scale = self.options, self.scale
        query, key, value, gate, dout = attention.make_inputs(options.inputs, options.length, "random")
        intervals = attention.prepare(MOSAIC_GPU, options.window, options.head_dim, gate)
        out, normalizer = MOSAIC_GPU.forward(query, key, value, gate, intervals, scale=scale, blocks=self.blocks)
        query, key, value, wide = (pad_heads(array, self.blocks.head_dim) for array in (query, key, value, dout))
        rows = gather_rows(key, value, gate, intervals, queries=options.length)
        return query, wide, rows, statistics(out, normalizer, dout)

    def measure(self, name: str, sizes: Any) -> list[float]:
        """Milliseconds of the kernel alone, per repeat."""
        fixed = {"scale": self.scale, "sizes": sizes}
        if name == "forward":
            kernel, arguments = partial(attend, **fixed), [self.query, self.rows]
        else:
            function = query_gradient if name == "query_gradient" else key_gradients
            kernel, arguments = partial(function, **fixed), [self.query, self.dout, self.stats, self.rows]
        visits = key_walks if name == "key_gradient" else query_runs
        arguments.append(visits(self.rows, sizes.block_k))
        return device_clock.measure([(jax.jit(kernel).lower(*arguments).compile(), arguments)], self.options.repeats)[0]


def main(options: Options) -> list[Row]:
    reason = MOSAIC_GPU.unavailable()
    if reason is not None:
        raise SystemExit(f"there is nothing to tune here: {reason}")
    bench = Bench(options)
    rows: list[Row] = []
    print(f"{'pass':>14}  {'ms':>9}  {'range':>15}  {'KiB':>5}  {'error':>8}  sizes")
    for name in options.passes:
        default = getattr(bench.blocks, name)
        for sizes in candidates(name, default):
            error = error_of(name, replace(bench.blocks, **{name: sizes}), options)
            if not error <= BAR[options.dtype]:
                raise SystemExit(f"{sizes} is wrong: RMS ratio {error:.2e} > {BAR[options.dtype]}")
            own = {field: getattr(sizes, field) for field in FIELDS[name]}
            row = Row(name, own, sizes.scratch(options.dtype).size, sizes == default, error, [])
            row.milliseconds = bench.measure(name, sizes)
            rows.append(row)
            spread = f"{min(row.milliseconds):.3f}–{max(row.milliseconds):.3f}"
            print(
                f"{name:>14}  {numbers.median(row.milliseconds):9.3f}  {spread:>15}  {row.shared_bytes / 1024:5.0f}  "
                f"{error:8.1e}  {', '.join(f'{field} {size}' for field, size in own.items())}"
                f"{'  (default)' if row.default else ''}",
                flush=True,
            )
            record.write(options.output, options, [asdict(each) for each in rows])
    for name in options.passes:
        own_rows = [row for row in rows if row.name == name]
        best = min(own_rows, key=lambda row: numbers.median(row.milliseconds))
        times = [numbers.median(row.milliseconds) for row in (own_rows[0], best)]
        print(f"{name}: fastest {best.sizes}, {times[0] / times[1]:.2f} times as fast as the default")
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
