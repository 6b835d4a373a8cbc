"""What the TPU compiler makes of the kernels: their final schedule, read without a TPU.

    python benchmarks/tpu_schedule.py --output benchmarks/results/tpu_schedule.json

Each kernel is compiled for a TPU that is not there, and the compiler writes out the final VLIW schedule. From it: how
many bundles an inner loop takes for each 128 × 128 block of logits, how full the matrix unit is, how many loads and
spills there are; and, with the blocks that a random gate really visits, what the whole pass takes. JAX's own splash
attention goes through the same compiler on dense causal attention. Bundles are a lower bound of cycles: waits for
memory and for the matrix unit are not in them, on either side.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
# Bundles a second of one core. The compiler's listing has none; these are the vendor's published peak FLOP/s over
# what the matrix units of a core do in a cycle (4 × 128 × 128 multiply-adds).
CLOCK = {"v5e": 197e12 / (2 * 4 * 128 * 128), "v5p": 459e12 / 2 / (2 * 4 * 128 * 128)}


@dataclass(frozen=True)
class Options:
    """What to compile.

    topology: any that `jax.experimental.topologies` knows. length, window: of the modelled pass, a random gate.
    """

    topology: str = "v5e:2x2"
    length: int = 32768
    window: int = 1024
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    output: Path | None = None


@dataclass(frozen=True)
class Loop:
    """One straight run of bundles between branches, with the slots that its instructions take of each unit."""

    bundles: int
    slots: dict[str, int]

    @property
    def matrix_share(self) -> float:
        return self.slots["MXU"] / (4 * self.bundles)


# What JAX calls a device of each generation: block sizes follow from it.
KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}


def sizes_for(options: Options) -> Any:
    import jax.numpy as jnp

    from pallas_kernels.tpu.config import block_sizes, compiling_for

    with compiling_for(KINDS[options.topology.split(":")[0]]):
        return block_sizes(options.length, options.length, options.window, options.head_dim, jnp.dtype(jnp.bfloat16))


Kernel = Literal["selection", "forward", "dquery", "dkey", "stream", "splash"]
# Names that kernels have in the dump, and how many 128 × 128 blocks each of their matrix loops handles, in the order of
# the schedule: `tiles.walk` has a wide step (a pair for gradients of keys), a masked pair and a masked single tile;
# splash has one step.
# 1,024 query rows (four heads of 256 positions, as here) are 8 blocks high.
WIDE, PAIR, SINGLE = 8 * 4, 8 * 2, 8
MATRIX_LOOPS: dict[str, tuple[tuple[str, int], ...]] = {
    "interval_attention_forward": (("whole", WIDE), ("masked pair", PAIR), ("masked single", SINGLE)),
    "interval_attention_dquery": (("whole", WIDE), ("masked pair", PAIR), ("masked single", SINGLE)),
    "interval_attention_dkey": (
        *(("carry", 0), ("key whole", PAIR), ("key masked pair", PAIR), ("key masked single", SINGLE), ("read out", 0)),
    ),
    "stream_rows": (("carry pair", 0), ("carry", 0), ("enter pair", 0), ("enter", 0)),
    "choose_keys": (
        *(("close up", 0), ("row", 0), ("turn", 0), ("in turn: carried", 0), ("in turn: entered", 0), ("tile", 0)),
        *(("safe", 0), ("carried", 0), ("entered", 0), ("own", 0), ("next", 0)),
        *(("settle", 0), ("row", 0), ("let in", 0), ("row", 0)),
    ),
    "lifetimes": (("close up", 0), ("row", 0), ("ask", 0), ("spread", 0)),
    "splash_mqa_fwd": (("block", 64),),
    "splash_mqa_dkv": (("block", 64),),
    "splash_mqa_dq": (("block", 64),),
}


def main(options: Options) -> None:
    schedules: dict[str, Any] = {}
    for kernel in get_args(Kernel):
        schedules |= scheduled(kernel, options)
    print(f"{options.topology}, bundles for each 128 × 128 block of logits, head size {options.head_dim}")
    for name, loops in schedules.items():
        for (label, blocks), loop in zip(MATRIX_LOOPS[name], long_loops(name, loops), strict=True):
            each = f"{loop.bundles / blocks:7.1f} a block" if blocks else f"{loop.bundles:7d} a tile "
            print(
                f"  {name:28} {label:14} {each}  matrix unit {loop.matrix_share:4.0%}  "
                f"loads {loop.slots['VLOAD']}  fills {loop.slots['FILL']}  spills {loop.slots['SPILL']}"
            )
    model = modelled(schedules, options)
    loops = beside_splash(schedules, model)
    print("bundles a block ÷ splash's; masked blocks weighted by how often each kind is visited")
    for name, ratios in loops.items():
        print(f"  {name:40} " + ", ".join(f"{label} {ratio:.2f}" for label, ratio in ratios.items()))
    print(f"a random gate at {options.length:,} tokens, window {options.window:,}")
    for name, value in model.items():
        print(f"  {name:40} {value:,.3f}" if isinstance(value, float) else f"  {name:40} {value:,}")
    if options.output:
        import jax

        plain = {name: [asdict(loop) for loop in loops] for name, loops in schedules.items()}
        record = {"command": sys.argv, "jax": jax.__version__, "libtpu": _libtpu(), "options": asdict(options)}
        record |= {"matrix_loops": MATRIX_LOOPS, "model": model, "beside splash": loops, "schedules": plain}
        options.output.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")


def _libtpu() -> str:
    from importlib.metadata import version

    return version("libtpu")


def scheduled(kernel: Kernel, options: Options) -> dict[str, list[Loop]]:
    """The loops of every kernel in one compiled program, from a process whose compiler writes its schedules out."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }
        program = "import json, sys, benchmarks.tpu_schedule as own; own.compile_kernel(**json.loads(sys.argv[1]))"
        arguments = [json.dumps({"kernel": kernel, **asdict(options)}, default=str)]
        child = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env=environment | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            raise RuntimeError(f"{kernel} does not compile for {options.topology}:\n{child.stderr[-3000:]}")
        found = {}
        for path in sorted(Path(folder).glob("*-final_bundles.txt")):
            name = next((known for known in MATRIX_LOOPS if known in path.name), None)
            if name and "schedule-analysis" not in path.name:
                stem = re.sub(r"-\d+-final_bundles.txt$", "", path.name)
                (utilization,) = Path(folder).glob(f"{stem}-*-final_hlo-static-per-bundle-utilization.txt")
                found[name] = read_loops(path.read_text(), utilization.read_text())
    if not found:
        raise RuntimeError(f"the compiler wrote no schedule of {kernel} for {options.topology}")
    return found


def read_loops(bundles: str, utilization: str) -> list[Loop]:
    """Straight runs of bundles: a label or the bundle after a branch begins one."""
    slots = [list(map(int, line.split())) for line in utilization.split("== UTILIZATION:")[1].strip().splitlines()]
    loops: list[tuple[int, list[int]]] = []
    number, begins = 0, True
    for line in bundles.splitlines():
        found = re.match(r"\s*(?:0x[0-9a-f]+|0)\s*(LH|LB|LE|PB|PF|CT)?:?\s*:?\s*>*\s*\{", line)
        if not found:
            continue
        if begins or found[1]:
            loops.append((0, [0] * len(UNITS)))
        count, sums = loops[-1]
        own = slots[number] if number < len(slots) else [0] * len(UNITS)
        loops[-1] = (count + 1, [a + b for a, b in zip(sums, own, strict=True)])
        begins = "sbr.rel" in line
        number += 1
    return [Loop(count, dict(zip(UNITS, sums, strict=True))) for count, sums in loops]


def long_loops(name: str, loops: list[Loop]) -> list[Loop]:
    """Those that MATRIX_LOOPS names: the ones with products, but for the few bundles between loops in which a last one
    may stand. Of the kernels that choose keys, whose time is not in products, all of some length with vector work."""
    if name in ("choose_keys", "lifetimes"):
        return [loop for loop in loops if loop.bundles > 8 and loop.slots["VALU"] > 7]
    return [loop for loop in loops if loop.slots["MXU"] and loop.bundles > 16]


def modelled(schedules: dict[str, list[Loop]], options: Options) -> dict[str, float | int]:
    """Bundles of a whole forward and backward pass over a random gate, and of splash on dense causal attention."""
    visits = count_visits(options)

    def cost(name: str, steps: dict[str, int], calls: int, epochs: int = 0) -> int:
        named = long_loops(name, schedules[name])
        labels = [label for label, _ in MATRIX_LOOPS[name]]
        total = sum(steps[label] * loop.bundles for label, loop in zip(labels, named, strict=True))
        rest = [loop.bundles for loop in schedules[name] if loop not in named]
        # The key gradients' grid steps share an epoch: its long runs without products are its beginning and its end.
        once = sum(size for size in rest if epochs and size >= 100)
        return total + calls * (sum(rest) - once) + epochs * once

    by_tile = {label: visits[label] for label in ("whole", "masked pair", "masked single")}
    forward = cost("interval_attention_forward", by_tile, visits["query tiles"])
    dquery = cost("interval_attention_dquery", by_tile, visits["query tiles"])

    def cost_of_rows(name: str, steps: dict[str, int], innermost: int) -> int:
        """Eight rows are one step. What stands before and after all named loops runs once a step; short runs between
        them count as if all were innermost."""
        loops, named = schedules[name], long_loops(name, schedules[name])
        total = sum(steps[label] * loop.bundles for (label, _), loop in zip(MATRIX_LOOPS[name], named, strict=True))
        places = [place for place, loop in enumerate(loops) if loop in named]
        within = sum(loop.bundles for loop in loops[places[0] : places[-1]] if loop not in named)
        edges = sum(loop.bundles for loop in [*loops[: places[0]], *loops[places[-1] + 1 :]])
        return total + innermost * within + steps["close up"] * edges

    def selection(prefix: str) -> list[int]:
        counts = {label.removeprefix(prefix): count for label, count in visits.items() if label.startswith(prefix)}
        inner = (("choose_keys", "turn"), ("lifetimes", "ask"))
        return [cost_of_rows(name, counts, max(counts[tile], counts["row"])) for name, tile in inner]

    choosing, returning = selection("select: ")
    stream = cost("stream_rows", visits, visits["epochs"])
    dkey = cost(
        "interval_attention_dkey",
        visits
        | {"carry": visits["carry"] + 2 * visits["carry pair"], "read out": visits["enter"] + 2 * visits["enter pair"]},
        visits["query tiles"],
        visits["epochs"],
    )
    blocks = -(-options.length // 128)
    causal = options.heads * blocks * (blocks + 1) // 2

    def splash(name: str) -> int:
        (loop,) = long_loops(name, schedules[name])
        return round(causal * loop.bundles / 64)

    clock = CLOCK.get(options.topology.split(":")[0])
    ours, theirs = choosing + returning + forward + stream, splash("splash_mqa_fwd")
    both = ours + stream + dquery + dkey
    dense = theirs + splash("splash_mqa_dkv") + splash("splash_mqa_dq")
    results: dict[str, float | int] = {
        **visits,
        "selection bundles": choosing,
        "lifetimes bundles": returning,
        "selection and lifetimes bundles, rising gate": sum(selection("select, rising gate: ")),
        "forward bundles": forward,
        "stream bundles": stream,
        "dquery bundles": dquery,
        "dkey, dvalue, dgate bundles": dkey,
        "splash dense forward bundles": theirs,
        "splash dense backward bundles": dense - theirs,
        "splash dense ÷ ours, forward": theirs / ours,
        "splash dense ÷ ours, forward + backward": dense / both,
    }
    if clock:
        results |= {
            "forward, ms of bundles": 1e3 * ours / clock,
            "forward + backward, ms of bundles": 1e3 * both / clock,
        }
        pairs = options.length * options.window * options.heads
        peak = clock * 4 * 128 * 128
        results["forward share of peak, visible pairs only"] = 2 * pairs * options.head_dim / peak / (ours / clock)
    return results


def beside_splash(schedules: dict[str, list[Loop]], visits: dict[str, float | int]) -> dict[str, dict[str, float]]:
    """Bundles a block of each matrix loop over those of splash's loop, which masks nothing on dense blocks; "masked" is
    the mean over the masked blocks that a random gate visits."""
    ratios = {}
    for name, peer in (
        ("interval_attention_forward", "splash_mqa_fwd"),
        ("interval_attention_dquery", "splash_mqa_dq"),
        ("interval_attention_dkey", "splash_mqa_dkv"),
    ):
        (splash,) = long_loops(peer, schedules[peer])
        per_block = splash.bundles / MATRIX_LOOPS[peer][0][1]
        named = zip(MATRIX_LOOPS[name], long_loops(name, schedules[name]), strict=True)
        found = [(label, blocks, loop.bundles) for (label, blocks), loop in named if blocks]
        ratios[name] = {label: bundles / blocks / per_block for label, blocks, bundles in found}
        masked = [kind for kind in found if "masked" in kind[0]]
        spent = sum(visits[label] * bundles for label, _, bundles in masked)
        ratios[name]["masked"] = spent / sum(visits[label] * blocks for label, blocks, _ in masked) / per_block
    return ratios


def count_visits(options: Options) -> dict[str, int]:
    """How often each loop runs: the same selection, lists and bounds as a run has, on a random gate."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dmattn_jax.documents import document_bounds
    from dmattn_jax.layout import lay_out
    from dmattn_jax.selection import choose_keys
    from pallas_kernels.tpu.backward_key import WIDE
    from pallas_kernels.tpu.config import LANES
    from pallas_kernels.tpu.stream import tile_ranges

    sizes = sizes_for(options)
    heads, length = options.kv_heads, options.length
    gate = jnp.asarray(np.random.default_rng(0).standard_normal((1, heads, length)), jnp.float32)

    @jax.jit
    def lay(gate):
        choice = choose_keys(gate, (options.window,) * heads, document_bounds(None, 1, length), causal=True)
        return lay_out(choice, queries=length, window=options.window, blocks=sizes)

    intervals = lay(gate)
    lists = intervals.lists
    assert lists is not None
    epochs, capacity = lists.index.shape[2:]
    index = np.asarray(lists.index)
    first = np.arange(epochs)[:, None] * sizes.epoch

    def relative(array):
        there = np.take_along_axis(np.asarray(array)[:, :, None], np.minimum(index, length - 1), axis=3) - first
        return np.where(index < length, np.clip(there, 0, sizes.epoch), 0).reshape(heads, epochs, -1, LANES)

    start, end = relative(intervals.start), relative(intervals.end)
    kinds = ("whole", "masked pair", "masked single")
    counts = dict.fromkeys([*kinds, *(f"key {kind}" for kind in kinds)], 0)
    for begin in range(0, sizes.epoch, sizes.block_q):
        last = begin + sizes.block_q - 1
        meets = (start.min(-1) <= last) & (end.max(-1) > begin)
        whole = (start.max(-1) <= begin) & (end.min(-1) > last)
        for prefix, width in (("", sizes.wide // LANES), ("key ", WIDE // LANES)):
            wide = whole.reshape(heads, epochs, -1, width).all(-1)
            rest = meets & ~np.repeat(wide, width, axis=-1)
            pairs = rest.reshape(heads, epochs, -1, 2)
            counts[f"{prefix}whole"] += int(wide.sum())
            counts[f"{prefix}masked pair"] += int(pairs.all(-1).sum())
            counts[f"{prefix}masked single"] += int((pairs[..., 0] != pairs[..., 1]).sum())

    def moved(label, slots, low, high):
        ranges = np.asarray(tile_ranges(slots, low, high))
        tiles = np.maximum(ranges[..., 1, :] - ranges[..., 0, :], 0)
        return {f"{label} pair": int((tiles // 2).sum()), label: int((tiles % 2).sum())}

    own = lists.entry_slot.reshape(1, heads, epochs, sizes.epoch)
    rising = np.broadcast_to(np.arange(length), gate.shape[1:])
    chosen = {
        f"{label}: {name}": count
        for label, gates, listed in (
            ("select", np.asarray(gate)[0], index[0]),
            # Every key enters and is seen: the most there can be to compare.
            ("select, rising gate", rising, np.zeros_like(index[0])),
        )
        for name, count in count_comparisons(gates, listed, lists.carried, options.window, sizes.epoch).items()
    }
    carry = moved("carry", lists.next_slot, 0, lists.carried)
    enter = moved("enter", own, lists.carried, capacity)
    return chosen | counts | {"query tiles": heads * length // sizes.block_q, "epochs": heads * epochs} | carry | enter


def count_comparisons(gate: Any, index: Any, carried: int, window: int, epoch: int) -> dict[str, int]:
    """How often the loops of the two kernels run that choose keys: gate [K, N] without ties, index [K, E, C]."""
    import numpy as np

    from pallas_kernels.tpu.choosing import ROWS, compared_at_once
    from pallas_kernels.tpu.config import LANES

    heads, length = gate.shape
    epochs, wide = length // epoch, compared_at_once(carried)
    names = ("row", "turn", "in turn: carried", "in turn: entered", "tile", "safe", "carried", "entered", "ask")
    counts = dict.fromkeys(names, 0)
    for row, number in np.ndindex(heads, epochs):
        first = number * epoch
        until = gate[row, : first + 1]
        least = np.partition(until, -window)[-window] if until.size >= window else -np.inf
        enters = first + np.flatnonzero(gate[row, first : first + epoch] >= least)
        counts["row"] += 1
        for tile, at in enumerate(range(0, enters.size, LANES)):
            own = enters[at : at + LANES]
            # As the kernel asks: 128 positions without a gap, each above all before it.
            rises = (np.diff(gate[row, own]) >= 0).all() and gate[row, own[0]] >= gate[row, : own[0] + 1].max()
            counts["turn"] += 1
            if own.size == LANES and own[-1] - own[0] == LANES - 1 and rises and window >= LANES:
                counts["in turn: carried"] += carried // wide
                counts["in turn: entered"] += tile
                continue
            safe = int(np.clip((window - at - own.size) // wide, 0, carried // wide))
            counts["tile"] += 1
            counts["safe"] += safe
            counts["carried"] += carried // wide - safe
            counts["entered"] += tile
        counts["ask"] += -(-int((index[row, number, carried:] < length).sum()) // LANES)
    steps = -(-heads // ROWS) * epochs
    of_all = dict.fromkeys(("close up", "settle", "spread"), steps)
    return counts | {"own": counts["tile"], "next": counts["turn"], "let in": counts["turn"]} | of_all


def compile_kernel(kernel: Kernel, **fields: Any) -> None:
    """In the child: compile one program for the topology's first device; the schedule is its side effect."""
    import jax
    from jax.experimental import topologies

    options = Options(**fields)
    device = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices[0]
    function, arguments = _splash(options) if kernel == "splash" else _ours(kernel, options)
    sharding = jax.sharding.SingleDeviceSharding(device)
    jax.jit(function, in_shardings=sharding, out_shardings=sharding).trace(*arguments).lower().compile()


def _ours(kernel: Kernel, options: Options) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    import jax
    import jax.numpy as jnp

    from pallas_kernels import EpochLists
    from pallas_kernels.tpu.backward_key import key_gradients
    from pallas_kernels.tpu.backward_query import query_gradient
    from pallas_kernels.tpu.forward import attend
    from pallas_kernels.tpu.selection import select
    from pallas_kernels.tpu.stream import stream_rows
    from pallas_kernels.tpu.tiles import Rows

    sizes = sizes_for(options)
    kv_heads, dim, epochs = options.kv_heads, options.head_dim, 4
    group, epoch = options.heads // kv_heads, sizes.epoch
    carried = -(-options.window // sizes.granule) * sizes.granule
    length, capacity = epochs * epoch, -(-(epoch + carried) // sizes.granule) * sizes.granule
    shape = jax.ShapeDtypeStruct

    def blocks(*rest, dtype=jnp.bfloat16):
        return shape((1, kv_heads, epochs, *rest), dtype)

    rows = (
        blocks(capacity, dim),
        blocks(capacity, dim),
        blocks(1, capacity, dtype=jnp.float32),
        blocks(2, capacity, dtype=jnp.int32),
        blocks(4, capacity // 128, dtype=jnp.int32),
    )
    query = shape((1, kv_heads, group, length, dim), jnp.bfloat16)
    stats = shape((1, kv_heads, length // sizes.block_q, 8, group * sizes.block_q), jnp.float32)
    slots, entries = blocks(capacity, dtype=jnp.int32), shape((1, kv_heads, length), jnp.int32)
    kw: dict[str, Any] = {"scale": dim**-0.5, "sizes": sizes}

    def make(*arrays):
        return Rows(*arrays, True, epoch // sizes.block_q)

    def lists(slots):
        return EpochLists(jnp.zeros(slots.shape, jnp.int32), slots, slots, epoch, carried)

    if kernel == "selection":

        def choose(gate, start, end):
            return select(gate, (options.window,) * kv_heads, start, end, queries=length, blocks=sizes)

        bounds = shape((1, length), jnp.int32)
        return choose, (shape((1, kv_heads, length), jnp.float32), bounds, bounds)
    if kernel == "forward":
        return lambda q, *r: attend(q, make(*r), **kw), (query, *rows)
    if kernel == "dquery":
        return lambda q, do, s, *r: query_gradient(q, do, s, make(*r), **kw), (query, query, stats, *rows)
    if kernel == "dkey":

        def gradients(q, do, s, n, e, *r):
            return key_gradients(q, do, s, make(*r), lists(n), e, before=False, **kw)

        return gradients, (query, query, stats, slots, entries, *rows)
    keys = shape((1, kv_heads, length, dim), jnp.bfloat16)
    planes = shape((1, kv_heads, 16, length), jnp.bfloat16)
    return lambda k, v, p, n, e: stream_rows(k, v, p, lists(n), e, None), (keys, keys, planes, slots, entries)


def _splash(options: Options) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """JAX's splash attention for one kv head, blocks of 1,024 × 1,024, dense causal."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    group, dim, length = options.heads // options.kv_heads, options.head_dim, 8192
    sizes = splash.BlockSizes(
        block_q=1024,
        block_kv=1024,
        block_kv_compute=512,
        block_q_dkv=1024,
        block_kv_dkv=1024,
        block_kv_dkv_compute=512,
        block_q_dq=1024,
        block_kv_dq=1024,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * group)
    attend = splash.make_splash_mqa(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def both(query, key, value):
        out, pull = jax.vjp(lambda *arrays: attend(*arrays), query, key, value)
        return pull(out)

    keys = jax.ShapeDtypeStruct((length, dim), jnp.bfloat16)
    return both, (jax.ShapeDtypeStruct((group, length, dim), jnp.bfloat16), keys, keys)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
