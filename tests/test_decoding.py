"""One step of decoding: evict, insert, attend, against sets and a float64 softmax."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmattn_jax import explain, nn
from dmattn_jax.cache import WindowCache
from pallas_kernels.decoding import IMPLEMENTATIONS, Slots, decode_step
from pallas_kernels.decoding.gpu import parts_of, unsupported

STEPS = {name: entry.step for name, entry in IMPLEMENTATIONS.items()}
KERNEL_CASES = {
    # One part of three tiles, so that buffers are used again.
    "full": {"shape": (1, 6, 2, 384, 64), "windows": (384, 300), "filled": 999, "multiprocessors": 1},
    "two parts, half full": {"shape": (2, 3, 1, 256, 128), "windows": (256,), "filled": 100, "multiprocessors": 2},
    "beyond the window": {"shape": (2, 4, 2, 256, 64), "windows": (200, 200), "filled": 999, "multiprocessors": 2},
    "empty": {"shape": (1, 2, 2, 128, 64), "windows": (128, 77), "filled": 0, "multiprocessors": 4},
}
"""What the kernel is tried on: slots beyond some heads' windows, or all heads', several parts and several tiles."""


def make_step(batch, heads, kv_heads, held, dim, *, windows, filled, seed=0, dtype=jnp.bfloat16):
    """Inputs of a step: `filled` slots of each head hold keys, in no order; gates have ties."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), dtype)

    gate = np.full((batch, kv_heads, held), -np.inf, np.float32)
    place = np.full((batch, kv_heads, held), -1, np.int32)
    keys, values = (np.zeros((batch, kv_heads, held, dim)) for _ in range(2))
    for row, head in np.ndindex(batch, kv_heads):
        count = min(filled, windows[head])
        at = random.permutation(windows[head])[:count]
        gate[row, head, at] = np.round(random.normal(size=count), 1)
        place[row, head, at] = random.permutation(10 * held)[:count]
        keys[row, head, at], values[row, head, at] = random.normal(size=(2, count, dim))
    slots = Slots(jnp.asarray(keys, dtype), jnp.asarray(values, dtype), jnp.asarray(gate), jnp.asarray(place))
    new = jnp.asarray(np.round(random.normal(size=(batch, kv_heads)), 1), jnp.float32)
    position = jnp.asarray(10 * held + np.arange(batch), jnp.int32)
    return normal(batch, heads, dim), normal(batch, kv_heads, dim), normal(batch, kv_heads, dim), new, position, slots


def rank(gate: float) -> tuple[bool, float]:
    return (True, 0.0) if math.isnan(gate) else (False, gate + 0.0)


def truth(query, key, value, gate, position, slots, windows):
    """By the definition: what is held as a set of (rank, position), and a float64 softmax over it."""
    query, key, value, keys, values = (
        np.asarray(a.astype(jnp.float32), np.float64) for a in (query, key, value, slots.keys, slots.values)
    )
    held, place = np.asarray(slots.gate), np.asarray(slots.position)
    batch, heads, dim = query.shape
    out, sets = np.zeros((batch, heads, dim)), {}
    group = heads // held.shape[1]
    for row, head in np.ndindex(*held.shape[:2]):
        used = np.flatnonzero(place[row, head] >= 0)
        own = (held[row, head, used], place[row, head, used], keys[row, head, used], values[row, head, used])
        rows = [(rank(g), int(p), g, k, v) for g, p, k, v in zip(*own, strict=True)]
        new = float(gate[row, head])
        if new != -math.inf:
            rows.append((rank(new), int(position[row]), new, key[row, head], value[row, head]))
        rows = sorted(rows, key=lambda r: r[:2])[-windows[head] :]
        sets[row, head] = {(place, float(gate)) for _, place, gate, _, _ in rows}
        for h in range(head * group, (head + 1) * group):
            if rows:
                logit = np.array([query[row, h] @ k * dim**-0.5 + g for _, _, g, k, _ in rows])
                weight = np.exp(logit - logit.max())
                out[row, h] = weight @ np.array([v for *_, v in rows]) / weight.sum()
    return out, sets


def check(step, inputs, windows, bar=2e-2):
    """out against the truth, and what is held after the step; returns both."""
    out, after = step(*inputs, windows=windows, scale=inputs[0].shape[2] ** -0.5)
    want, sets = truth(*inputs, windows)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=bar, rtol=bar)
    place, gate = np.asarray(after.position), np.asarray(after.gate)
    for (row, head), members in sets.items():
        used = place[row, head] >= 0
        assert (
            set(zip(place[row, head][used].tolist(), gate[row, head][used].astype(float).tolist(), strict=True))
            == members
        )
        assert np.isneginf(gate[row, head][~used]).all()
        assert not used[windows[head] :].any()
        # A slot keeps its key and value; the new position has the new ones.
        for slot in np.flatnonzero(used):
            fresh = place[row, head, slot] == int(inputs[4][row])
            for now, new, old in ((after.keys, inputs[1], inputs[5].keys), (after.values, inputs[2], inputs[5].values)):
                expected = new[row, head] if fresh else old[row, head, slot]
                np.testing.assert_array_equal(np.asarray(now[row, head, slot]), np.asarray(expected))
    return out, after


@pytest.mark.parametrize("filled", [0, 3, 999])
def test_a_step_is_the_definition(filled):
    windows = (13, 7)
    inputs = make_step(3, 10, 2, 13, 6, windows=windows, filled=filled, dtype=jnp.float32, seed=filled)
    check(STEPS["xla"], inputs, windows, bar=1e-5)


@pytest.mark.parametrize("last", [2**24 + 9, 2**31 - 1])
def test_steps_up_to_the_greatest_position(last):
    windows = (13, 7)
    *token, position, slots = make_step(3, 10, 2, 13, 6, windows=windows, filled=999, dtype=jnp.float32, seed=1)
    more = last - int(position.max())
    held = jnp.where(slots.position >= 0, slots.position + more, slots.position)
    check(STEPS["xla"], (*token, position + more, slots._replace(position=held)), windows, bar=1e-5)


def test_float32_is_not_rounded_on_the_way():
    # What an accelerator may do with a product whose precision is not said.
    inputs = make_step(3, 10, 2, 13, 6, windows=(13, 7), filled=3, dtype=jnp.float32, seed=5)
    step = functools.partial(STEPS["xla"], windows=(13, 7), scale=0.5)
    products = [line for line in jax.jit(step).lower(*inputs).as_text().splitlines() if "dot_general" in line]
    assert len(products) == 2
    assert all("HIGHEST" in line for line in products)


def odd_gates(inputs):
    """Row by row: a new key of NaN gate, one below all that is held, padding, +inf held, ties of −0 and 0."""
    query, key, value, gate, position, slots = inputs
    gate = gate.at[0, 0].set(jnp.nan).at[1].set(-9.0).at[2].set(-jnp.inf).at[4].set(-0.0)
    held = slots.gate.at[4].set(jnp.where(slots.position[4] >= 0, 0.0, -jnp.inf))
    return query, key, value, gate, position, slots._replace(gate=held)


def without_nan(function, inputs, windows):
    """A NaN gate makes NaN of its own row's heads and of nothing else."""
    out, after = function(*inputs, windows=windows, scale=inputs[0].shape[2] ** -0.5)
    group = inputs[0].shape[1] // inputs[3].shape[1]
    assert np.isnan(np.asarray(out[0, :group], np.float32)).all()
    rest = [a[1:] for a in inputs[:5]] + [Slots(*(a[1:] for a in inputs[5]))]
    want, _ = truth(*rest, windows)
    np.testing.assert_allclose(np.asarray(out[1:], np.float64), want, atol=2e-2, rtol=2e-2)
    first = np.asarray(after.position)
    assert (first[0, 0] == int(inputs[4][0])).sum() == 1
    assert (first[1] == int(inputs[4][1])).sum() == 0
    assert (first[2] == int(inputs[4][2])).sum() == 0
    assert (first[4] == int(inputs[4][4])).sum() == first.shape[1]
    for before, now in zip(inputs[5], after, strict=True):
        np.testing.assert_array_equal(np.asarray(now[1:3], np.float32), np.asarray(before[1:3], np.float32))


def test_gates_that_are_odd():
    windows = (5, 11)
    without_nan(STEPS["xla"], odd_gates(make_step(5, 4, 2, 11, 6, windows=windows, filled=99)), windows)


def evicted_nan(inputs, windows):
    """The key that leaves is NaN: its row must be clean again."""
    slots = inputs[5]
    gate = jnp.where(slots.position >= 0, slots.gate + 5, slots.gate).at[..., 2].set(-7.0)
    poison = [a.at[:, :, 2].set(jnp.nan) for a in slots[:2]]
    return *inputs[:3], jnp.zeros_like(inputs[3]), inputs[4], Slots(*poison, gate, slots.position)


def test_an_evicted_nan_is_gone():
    windows = (11, 11)
    inputs = evicted_nan(make_step(2, 4, 2, 11, 6, windows=windows, filled=99, dtype=jnp.float32), windows)
    check(STEPS["xla"], inputs, windows, bar=1e-5)


@pytest.mark.parametrize(
    ("rows", "slots", "parts"), [(1, 2048, 16), (8, 2048, 16), (264, 2048, 1), (100, 1920, 3), (40, 896, 7)]
)
def test_parts_are_whole_tiles(rows, slots, parts):
    """Of an H100's 132 multiprocessors."""
    assert parts_of(rows, slots) == parts
    assert slots // 128 % parts == 0


@pytest.mark.usefixtures("only_signed_integers")
@pytest.mark.parametrize(("heads", "kv_heads", "held", "dim"), [(16, 4, 2048, 64), (6, 2, 384, 128), (3, 3, 4224, 64)])
def test_the_kernel_lowers_for_cuda(heads, kv_heads, held, dim):
    """With the caches changed in place."""
    step = functools.partial(STEPS["mosaic_gpu"], windows=(held,) * kv_heads, scale=dim**-0.5)
    shape = jax.ShapeDtypeStruct
    token, line = shape((2, kv_heads, dim), jnp.bfloat16), shape((2, kv_heads, held), jnp.float32)
    slots = Slots(*[shape((2, kv_heads, held, dim), jnp.bfloat16)] * 2, line, shape(line.shape, jnp.int32))
    gate = shape((2, kv_heads), jnp.float32)
    arguments = (shape((2, heads, dim), jnp.bfloat16), token, token, gate, shape((2,), jnp.int32), slots)
    text = jax.jit(step, donate_argnums=5).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 1
    assert text.count("#stablehlo.output_operand_alias<") >= 2
    # Barriers around it, or XLA takes slices of a model's cache into a fusion with it, which changes nothing in place.
    barrier, call, after = (line.split() for line in text.splitlines() if "_barrier" in line or "@mosaic_gpu" in line)
    name = barrier[0].split(":")[0]
    operands = "".join(call).split("(")[1].split(")")[0].split(",")
    assert {operand.split("#")[0] for operand in operands} == {name}
    assert all(word.split("#")[0] == call[0].split(":")[0] for word in after[3:9])


@pytest.mark.parametrize(("window", "tokens", "slots"), [(2048, 1544, 1664), (200, None, 256), ((3, 140), 1, 128)])
def test_caches_of_any_window_and_length_are_the_kernels(monkeypatch, window, tokens, slots):
    def made(head_dim=64, dtype=jnp.bfloat16):
        return WindowCache.create(1, window, 2, head_dim, max_length=tokens, dtype=dtype)

    monkeypatch.setitem(IMPLEMENTATIONS["mosaic_gpu"].__dict__, "unavailable", lambda: "it is not there")
    exact = made()
    assert exact.keys.shape[2] == max(exact.windows)
    monkeypatch.setitem(IMPLEMENTATIONS["mosaic_gpu"].__dict__, "unavailable", lambda: None)
    cache = made()
    assert cache.windows == exact.windows
    assert cache.keys.shape[2] == slots
    assert unsupported(jnp.zeros((1, 4, 64), jnp.bfloat16), cache.slots) is None
    # What the kernel would not take anyway has no more than it needs.
    for other in (made(head_dim=96), made(dtype=jnp.float32)):
        assert other.keys.shape[2] == max(exact.windows)


def test_explain_says_which_steps_the_kernel_does_not_take(monkeypatch):
    line = "steps of decoding in float32 or float64, or of head sizes other than 64 and 128, run on: xla"
    for reason in (None, "it is not there"):
        monkeypatch.setitem(IMPLEMENTATIONS["mosaic_gpu"].__dict__, "unavailable", lambda reason=reason: reason)
        assert (line in explain()) == (reason is None)


def test_a_layer_decodes_by_the_kernel(monkeypatch):
    """Whatever its window and the length of what it reads."""
    monkeypatch.setitem(IMPLEMENTATIONS["mosaic_gpu"].__dict__, "unavailable", lambda: None)
    layer = nn.DynamicMaskAttention(
        128, num_heads=2, num_kv_heads=1, head_dim=64, window=200, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(layer)

    @jax.jit
    def step(state, x, cache):
        return nnx.merge(graph, state).decode(x, cache)

    arguments = (state, jnp.zeros((1, 1, 128), jnp.bfloat16), layer.init_cache(1, 77))
    text = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_the_kernel_on_a_hopper_gpu(name):
    if reason := IMPLEMENTATIONS["mosaic_gpu"].unavailable():
        pytest.skip(reason)
    case = KERNEL_CASES[name]
    inputs = make_step(*case["shape"], windows=case["windows"], filled=case["filled"], seed=len(name))
    check(jax.jit(STEPS["mosaic_gpu"], static_argnames=("windows", "scale")), inputs, case["windows"])


def test_what_the_kernel_does_not_take_is_said():
    inputs = make_step(1, 4, 2, 128, 64, windows=(128, 128), filled=1)
    query, slots = inputs[0], inputs[5]
    assert unsupported(query, slots) is None
    assert "bfloat16 or float16 and head sizes 64 and 128, not float32" in unsupported(query.astype(jnp.float32), slots)
    assert "multiples of 128, not 127" in unsupported(query, Slots(*(a[:, :, 1:] for a in slots)))
    assert "head sizes 64 and 128, not bfloat16 with bfloat16 and 63" in unsupported(query[..., 1:], slots)
    with pytest.raises(ValueError, match="implementation must be None or one of 'mosaic_gpu', 'xla', got 'cuda'"):
        decode_step(*inputs, windows=(128, 128), scale=1.0, implementation="cuda")
    if IMPLEMENTATIONS["mosaic_gpu"].unavailable():
        with pytest.raises(
            ValueError, match="implementation 'mosaic_gpu' cannot run here: it needs an NVIDIA Hopper GPU"
        ):
            decode_step(*inputs, windows=(128, 128), scale=1.0, implementation="mosaic_gpu")
