"""Where the time of a compiled program goes on a GPU: its kernels, by the part of the program that they come from."""

from __future__ import annotations

import collections
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

PRODUCT = re.compile(r"gemm|cublas|cutlass|nvjet|_dot|xmma", re.IGNORECASE)
ATTENTION = re.compile(
    r"cudnn|sdpa|fmha|flash|attention_(forward|query_gradient|key_gradients)_|decode_step", re.IGNORECASE
)
"""cuDNN's kernels and ours."""
SCOPES = ("select_keys", "interval_attention", "gate", "rope", "norm", "mlp", "loss", "optimizer", "embed")
"""Named scopes of the library and of the training step, the innermost first."""


@dataclass(frozen=True)
class Kernel:
    """One launch: the operation of the compiled program, the kernel's own name, and its place in time."""

    operation: str
    name: str
    start: float
    seconds: float


@dataclass(frozen=True)
class Breakdown:
    """One run of a program, the mean of several in a row.

    milliseconds: of each part's kernels. kernels: launches. idle: milliseconds between the first kernel's start and the
    last one's end in which none ran. slowest: (part, kernel, milliseconds) of the kernels that took most in all; those
    of one name but for its number are one.
    """

    milliseconds: dict[str, float]
    kernels: dict[str, float]
    idle: float
    slowest: list[tuple[str, str, float]]


def profile(call: Callable[[], Any], text: str, runs: int = 1) -> Breakdown | None:
    """The kernels of a call, which runs a program so often and waits for its results; None where the profiler sees no
    GPU. After a pause a GPU is faster than under load: what stands beside timed runs is to be a call of as many.

    text: the optimized program, `compiled.as_text()`.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        [path] = Path(folder).rglob("*.xplane.pb")
        kernels = list(kernels_of(ProfileData.from_file(str(path))))
    return breakdown(kernels, text, runs) if kernels else None


def kernels_of(profile: ProfileData) -> Iterator[Kernel]:
    """What ran on the streams of all GPUs, copies among it."""
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    yield Kernel(_operation(event), event.name, event.start_ns * 1e-9, event.duration_ns * 1e-9)


def _operation(event: Any) -> str:
    with warnings.catch_warnings():
        # Python warns of the type that JAX 0.12 gives statistics (it has no module), and does so amid C++, where a
        # warning that is an error ends the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        return str(dict(event.stats).get("hlo_op", ""))


def breakdown(kernels: Iterable[Kernel], text: str, runs: int = 1) -> Breakdown:
    scopes = dict(re.findall(r'^ *(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', text, re.MULTILINE))
    seconds: dict[str, float] = collections.defaultdict(float)
    counts: dict[str, int] = collections.Counter()
    by_name: dict[tuple[str, str], float] = collections.defaultdict(float)
    busy, end, first = 0.0, 0.0, None
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        # Of what is launched as a graph the profiler knows kernels alone, which are named after their operations.
        named = kernel.operation in scopes
        operation = kernel.operation if named else re.sub(r"_(\d+)$", r".\1", kernel.name)
        part = part_of(operation, kernel.name, scopes.get(operation, ""))
        seconds[part] += kernel.seconds
        counts[part] += 1
        by_name[part, re.sub(r"[._]\d+$", "", kernel.name)] += kernel.seconds
        first = kernel.start if first is None else first
        last = kernel.start + kernel.seconds
        busy += max(0.0, last - max(end, kernel.start))
        end = max(end, last)
    ordered = sorted(seconds, key=lambda part: -seconds[part])
    each = 1e3 / runs
    slowest = sorted(by_name.items(), key=lambda item: -item[1])[:40]
    return Breakdown(
        {part: seconds[part] * each for part in ordered},
        {part: counts[part] / runs for part in ordered},
        (end - (first or 0.0) - busy) * each,
        [(part, name, total * each) for (part, name), total in slowest],
    )


def part_of(operation: str, kernel: str, scope: str) -> str:
    """`matrix products`, `attention` (its kernels alone), `lists`, a scope's elementwise work, or `other`.

    Gradients of the residual stream are added where a norm's are made, in one kernel: `norm`.
    """
    inside = next((name for name in SCOPES if re.search(rf"\b{name}\b", scope)), "other")
    if inside == "other" and re.search(r"transpose\(.*checkpoint/(add_any|reduce_sum)$", scope):
        inside = "norm"
    if ATTENTION.search(operation) or ATTENTION.search(kernel):
        return "attention"
    if PRODUCT.search(operation) or PRODUCT.search(kernel):
        return "matrix products"
    if "memcpy" in kernel.lower() or "memset" in kernel.lower():
        return "copies"
    if "head_gradients" in kernel:
        return "norm"
    if "mosaic_gpu" in kernel:
        # Of a graph only the kernel's name is known: choosing keys, listing them, and gradients back from lists.
        return "lists"
    return {"interval_attention": "around attention", "select_keys": "lists"}.get(inside, inside)
