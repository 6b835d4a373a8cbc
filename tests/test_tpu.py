"""TPU kernels without a TPU: interpreted by XLA, run in a simulated TPU that detects races, and compiled for real ones.

Lists need several epochs to mean anything, so blocks here are the smallest that the kernels take.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from reference import GATES, RATIO, check, make_case, make_gate, run

from dmattn_jax import explain
from dmattn_jax.documents import document_bounds
from dmattn_jax.layout import epoch_lists
from dmattn_jax.selection import choose_keys
from pallas_kernels import IMPLEMENTATIONS
from pallas_kernels.tpu import MOSAIC_TPU
from pallas_kernels.tpu.config import TpuBlockSizes, block_sizes, compiling_for, interpreted
from pallas_kernels.tpu.stream import from_planes, stream_rows, to_planes

SMALL = TpuBlockSizes(epoch=128, block_q=128, block_k=128, granule=256, wide=256, chunk=256)
"""Lists of 40 keys carried and 128 entered, 512 slots; the identity layout in chunks of 256."""


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "mosaic_tpu", replace(MOSAIC_TPU, block_sizes=lambda *_: SMALL))
    jax.clear_caches()


@pytest.fixture
def on_xla(small_blocks):
    with interpreted():
        yield


def slow_but(quick, everything):
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in everything]


@pytest.mark.parametrize("segments", slow_but(["none"], ["none", "packed", "inside", "returning"]))
@pytest.mark.parametrize("gate", slow_but(["rounded"], GATES))
def test_lists(on_xla, gate, segments):
    """Four epochs of lists against float64, values and gradients."""
    check(make_case(batch=1, keys=421, kv_heads=2, group=3, window=40, gate=gate, segments=segments), "mosaic_tpu")


@pytest.mark.parametrize("window", slow_but([], [1, 39, 128, 257, 290, (1, 150)]))
def test_windows_of_lists(on_xla, window):
    check(make_case(batch=1, keys=421, kv_heads=2, window=window, gate="holes", segments="packed"), "mosaic_tpu")


@pytest.mark.parametrize("queries", slow_but([], [1, 128, 129, 200, 400]))
def test_fewer_queries_than_keys_with_lists(on_xla, queries):
    """Epoch 0 carries keys from before the first query, and their gradients come back to them."""
    check(make_case(batch=1, keys=421, kv_heads=2, queries=queries, window=40), "mosaic_tpu")


@pytest.mark.parametrize("dim", slow_but([], [40, 64, 96, 160, 256]))
@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["float32", "bfloat16"]))
def test_head_sizes_of_lists(on_xla, dim, dtype):
    case = make_case(batch=1, keys=331, kv_heads=1, group=2, dim=dim, window=40)
    got, want = (run(case, dtype, implementation=name) for name in ("mosaic_tpu", "xla"))
    for left, right in zip(got, want, strict=True):
        left, right = (np.asarray(array, np.float64) for array in (left, right))
        assert np.sqrt(np.mean((left - right) ** 2)) <= 2 * RATIO[dtype] * np.sqrt(np.mean(right**2))


@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["float32", "bfloat16"]))
@pytest.mark.parametrize("gate", slow_but(["holes"], ["random", "rising", "holes"]))
@pytest.mark.parametrize("offset", slow_but([], [0, 90]))
def test_streamed_rows_are_the_gathered_ones(on_xla, gate, dtype, offset):
    """Products with 0/1 matrices move every bit: rows and scalars equal a gather, NaN and infinities included."""
    rng = np.random.default_rng(5)
    length, heads, dim, window = 512 + offset, 2, 24, 130
    queries = length - offset
    documents = document_bounds(None, 1, length)
    gates = jnp.moveaxis(jnp.asarray(make_gate(gate, rng, 1, length, heads)), 2, 1)
    cut = {"queries": queries, "window": window, "epoch_size": SMALL.epoch, "granule": SMALL.granule}
    lists = jax.jit(lambda gates: epoch_lists(choose_keys(gates, (window,) * heads, documents, causal=True), **cut))(
        gates
    )
    key, value = (jnp.asarray(rng.standard_normal((1, heads, length, dim)), dtype) for _ in range(2))
    scalars = [
        jnp.asarray(rng.standard_normal((1, heads, length)), jnp.float32)
        .at[..., 3]
        .set(jnp.nan)
        .at[..., 9]
        .set(jnp.inf),
        *(jnp.asarray(rng.integers(0, 2**31 - 1, (1, heads, length)), jnp.int32) for _ in range(2)),
    ]
    planes = to_planes(*scalars)

    def at(array, index):
        picked = jnp.take_along_axis(array, jnp.minimum(index, length - 1).reshape(1, heads, -1, 1), axis=2)
        return jnp.where((index < length).reshape(1, heads, -1, 1), picked, 0).reshape(*index.shape, -1)

    initial = None
    if offset:
        first = lists.index[:, :, 0, : lists.carried]
        initial = (at(key, first), at(value, first), jnp.moveaxis(at(jnp.moveaxis(planes, 2, 3), first), 3, 2))
    own = (key[:, :, offset:], value[:, :, offset:], planes[..., offset:], lists, lists.entry_slot[..., offset:])
    got_key, got_value, got_planes = stream_rows(*own, initial)
    np.testing.assert_array_equal(got_key, at(key, lists.index))
    np.testing.assert_array_equal(got_value, at(value, lists.index))
    bits = jnp.stack([jax.lax.bitcast_convert_type(scalar, jnp.int32) for scalar in scalars], axis=3)
    np.testing.assert_array_equal(from_planes(got_planes), jnp.moveaxis(at(bits, lists.index), 4, 3))


def test_the_future_changes_nothing_in_lists(on_xla):
    case, other = make_case(batch=1, keys=421, window=40), make_case(batch=1, keys=421, window=40, seed=99)
    late = np.arange(421) >= 300
    mixed = [
        np.where(late.reshape(1, -1, *[1] * (left.ndim - 2)), right, left)
        for left, right in zip(case.arrays, other.arrays, strict=True)
    ]
    names = ("query", "key", "value", "gate")
    changed = replace(case, **dict(zip(names, mixed, strict=True)))
    before, after = (run(each, implementation="mosaic_tpu")[0][:, :300] for each in (case, changed))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("window", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_no_races_in_a_simulated_tpu(small_blocks, window, capfd):
    """Lists and the identity layout, run twice: right, bitwise equal, and no race reported."""
    case = make_case(batch=1, keys=331, kv_heads=1, group=2, window=window)
    with interpreted(pltpu.InterpretParams(detect_races=True)):
        check(case, "mosaic_tpu")
        for left, right in zip(*(run(case, implementation="mosaic_tpu") for _ in range(2)), strict=True):
            np.testing.assert_array_equal(left, right)
    shown = "".join(capfd.readouterr())
    assert "RACE" not in shown.upper()


def test_sizes_fit_the_memory_of_every_generation():
    for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"):
        with compiling_for(kind):
            sizes = block_sizes(32768, 32768, 1024, 128, jnp.bfloat16)
            assert sizes.epoch >= 256
            assert MOSAIC_TPU.unavailable() is None
            # Where no lists fit, one epoch of all queries: the identity layout.
            assert block_sizes(131072, 131072, 65536, 128, jnp.float32).epoch + 65536 >= 131072


@pytest.mark.parametrize(
    ("field", "size"), [("block_k", 256), ("block_q", 64), ("wide", 128), ("granule", 128), ("chunk", 100)]
)
def test_block_sizes_are_checked(field, size):
    with pytest.raises(ValueError, match=f"{field} must be"):
        replace(SMALL, **{field: size})


def compiled(*arguments: str) -> list[dict]:
    """What `tpu_programs.py` reports; its standard error where it fails."""
    here = Path(__file__).parent
    child = subprocess.run(
        [sys.executable, str(here / "tpu_programs.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(here.parent), "XLA_FLAGS": ""},
    )
    assert child.returncode == 0, child.stderr[-3000:]
    reports = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    for each in reports:
        print(each)
    return reports


GENERATIONS = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v4:2x2x1", "tpu7x:2x2x1"]


@pytest.mark.slow
@pytest.mark.parametrize("topology", GENERATIONS)
def test_attention_compiles(topology):
    """Forward and backward at 32,768 tokens, gates to gradients: seven kernels, and no room for an array of N×N.

    Nothing is scattered, gathered or sorted: a TPU does that number by number. Temporaries take 1.5 to 2.1 times the
    672 MB of inputs; one byte for each pair of one head would add 1.6 times more.
    """
    (program,) = compiled("attention", topology, "32768")
    assert program["kernels"] == 7
    assert program["scatters"] == program["gathers"] == program["sorts"] == 0
    assert program["temporary"] < 3 * program["arguments"]


@pytest.mark.slow
def test_compiled_memory_is_linear():
    """Twice the length takes about twice the memory, where a square would take four times."""
    short, long = compiled("attention", "v5e:2x2", "16384", "32768")
    assert long["temporary"] < 2.5 * short["temporary"]


@pytest.mark.slow
def test_other_shapes_compile():
    """Head sizes, float32, all heads in one group; windows past the sequence have no lists to stream: five kernels."""
    programs = compiled("shapes", "v5e:2x2")
    assert [each["kernels"] for each in programs] == [7, 7, 7, 5, 7]
    for each in programs:
        assert each["scatters"] == each["gathers"] == each["sorts"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "windows", "kernels"),
    [
        ("v5e:2x2", (8192, 19456, 19968), [7, 7, 5]),
        ("v5p:2x2x1", (9216,), [7]),
        ("v4:2x2x1", (1536, 2048), [7, 5]),
    ],
)
def test_what_is_said_to_fit_in_vmem_does(topology, windows, kernels):
    """The largest windows whose lists fit, as `explain` says, and beyond them all keys, block by block."""
    programs = compiled("windows", topology, *map(str, windows))
    assert [each["kernels"] for each in programs] == kernels
    assert all(each["temporary"] < 16 * each["arguments"] for each in programs)


def test_limits_are_told():
    with compiling_for("TPU v5 lite"):
        text = explain()
    assert "runs on: mosaic_tpu" in text
    assert "windows above 19456" in text
    assert "keys of windows above 32768" in text


@pytest.mark.parametrize("group", [5, pytest.param(12, marks=pytest.mark.slow)])
def test_groups_larger_than_a_tile(monkeypatch, group):
    """Tiles of two heads: a group of five is five parts, one of twelve six; their gradients are added."""
    sizes = replace(SMALL, rows=256)
    monkeypatch.setitem(IMPLEMENTATIONS, "mosaic_tpu", replace(MOSAIC_TPU, block_sizes=lambda *_: sizes))
    jax.clear_caches()
    with interpreted():
        check(make_case(batch=1, keys=307, kv_heads=2, group=group, window=40, queries=290), "mosaic_tpu")


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize("tensor", ["1", "2"])
def test_a_training_step_compiles(topology, tensor):
    """A whole step of doge-160m on fsdp × tensor; of its three kv heads two chips each compute all."""
    (step,) = compiled("training", topology, "doge-160m", tensor)
    assert step["kernels"] >= 3
    assert step["temporary"] < 12 << 30


@pytest.mark.slow
def test_pattern_attention_compiles():
    """One kernel each, memory linear in the length: twice as long takes about twice as much."""
    programs = compiled("patterns", "v5e:2x2")
    assert [each["kernels"] for each in programs] == [1] * len(programs)
    short, long = (each["temporary"] for each in programs[1:3])
    assert long < 2.5 * short
