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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import tyro

from benchmarks.tpu_programs import Kernel, Shape
from benchmarks.tpu_visits import count_visits

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
# Bundles a second of one core. The compiler's listing has none; these are the vendor's published peak FLOP/s over
# what the matrix units of a core do in a cycle (4 × 128 × 128 multiply-adds).
CLOCK = {"v5e": 197e12 / (2 * 4 * 128 * 128), "v5p": 459e12 / 2 / (2 * 4 * 128 * 128)}


@dataclass(frozen=True)
class Options(Shape):
    """What to compile, and where to write what was found."""

    output: Path | None = None


@dataclass(frozen=True)
class Loop:
    """One straight run of bundles between branches, with the slots that its instructions take of each unit."""

    bundles: int
    slots: dict[str, int]

    @property
    def matrix_share(self) -> float:
        return self.slots["MXU"] / (4 * self.bundles)


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
        program = "import json, sys, benchmarks.tpu_programs as own; own.compile_kernel(**json.loads(sys.argv[1]))"
        shape = {field.name: getattr(options, field.name) for field in fields(Shape)}
        arguments = [json.dumps({"kernel": kernel, **shape})]
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


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
