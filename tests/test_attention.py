"""The attention contract, for every implementation that runs here: a new backend joins by registering itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    EACH,
    GATES,
    NAMES,
    RATIO,
    Case,
    assert_close,
    check,
    check_gates_of_any_size,
    check_hidden_numbers,
    dtype_of,
    make_case,
    residue,
    rms_ratio,
    rounded,
    run,
    truth,
)

from dmattn_jax.attention import causal_attention, dynamic_mask_attention, sliding_window_attention
from dmattn_jax.oracle import visible_keys_oracle
from pallas_kernels import IMPLEMENTATIONS
from pallas_kernels.tpu.config import interpreted


def everywhere(name: str):
    """TPU kernels are interpreted where there is no TPU, which takes long."""
    interprets = name == "mosaic_tpu" and jax.default_backend() != "tpu"
    return pytest.param(name, marks=pytest.mark.slow) if interprets else name


@pytest.fixture(params=map(everywhere, IMPLEMENTATIONS))
def implementation(request):
    if request.param == "mosaic_tpu" and jax.default_backend() != "tpu":
        with interpreted():
            yield request.param
        return
    reason = IMPLEMENTATIONS[request.param].unavailable()
    if reason is not None:
        pytest.skip(reason)
    yield request.param


def some_slow(quick: list, long: list) -> list:
    """Parameters of which only some run by default: each is a compilation."""
    return [*quick, *(pytest.param(value, marks=pytest.mark.slow) for value in long)]


def evaluate(case: Case, implementation: str) -> list[np.ndarray]:
    return run(case, dtype_of(implementation), implementation=implementation)


@pytest.mark.parametrize("segments", ["none", "packed", "right", "left", "inside", "returning"])
@pytest.mark.parametrize("gate", GATES)
def test_values_and_gradients(implementation, gate, segments):
    """Lists of several epochs, GQA, every kind of gate and packing, random cotangents, against float64."""
    check(make_case(gate=gate, segments=segments, seed=len(gate) + 7 * len(segments)), implementation)


@pytest.mark.parametrize("segments", ["none", pytest.param("inside", marks=pytest.mark.slow)])
@pytest.mark.parametrize("window", some_slow([1, 40, 132, (1, 40, 999)], [5, 131, 1310]))
def test_windows(implementation, window, segments):
    check(make_case(window=window, segments=segments), implementation)


@pytest.mark.parametrize("gate", ["random", "rounded", "holes"])
@pytest.mark.parametrize("segments", ["none", "packed", "inside"])
@pytest.mark.parametrize("window", some_slow([29], [3, 500]))
def test_not_causal(implementation, window, segments, gate):
    """One choice a document, of the largest gates over all its keys."""
    check(make_case(keys=83, window=window, segments=segments, gate=gate, causal=False), implementation)


@pytest.mark.parametrize("window", some_slow([600], [1030]))
def test_not_causal_in_several_blocks(implementation, window):
    """Fewer chosen keys than queries, in more than one block of keys, the last of them partial."""
    check(make_case(batch=1, keys=1031, kv_heads=1, group=1, dim=8, window=window, causal=False), implementation)


@pytest.mark.parametrize("queries", some_slow([1, 67], [2, 130]))
@pytest.mark.parametrize("causal", [True, False])
def test_fewer_queries_than_keys(implementation, queries, causal):
    """The queries are the last T of S positions."""
    check(make_case(queries=queries, segments="inside", causal=causal), implementation)


@pytest.mark.parametrize("dim", some_slow([40, 128, 256], [16, 32, 64, 72, 80, 96, 100, 112, 160, 192]))
def test_head_sizes(implementation, dim):
    if all(IMPLEMENTATIONS[implementation].unsupported(jnp.dtype(dtype), dim) for dtype in RATIO):
        with pytest.raises(ValueError, match="cannot run here: it "):
            run(make_case(dim=dim), "bfloat16", implementation=implementation)
        return
    check(make_case(batch=1, keys=97, kv_heads=1, group=2, dim=dim), implementation)


@pytest.mark.parametrize("group", some_slow([3], [1, 2, 4, 8, 16]))
def test_query_heads_per_kv_head(implementation, group):
    check(make_case(batch=1, keys=97, kv_heads=2, group=group, dim=20), implementation)


def check_length(length: int, implementation: str) -> None:
    case = make_case(batch=1, keys=length, kv_heads=1, group=2, dim=16, window=min(11, 1 + length // 2))
    check(case, implementation)


@pytest.mark.parametrize("length", [1, 2, 64, 65, 257])
def test_lengths(implementation, length):
    check_length(length, implementation)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, 258, 8))
def test_every_length(implementation, first):
    # Interpreted kernels pad all of these to the same blocks, and take seconds each: the first one alone.
    few = implementation == "mosaic_tpu" and jax.default_backend() != "tpu"
    for length in range(first, first + 1 if few else min(first + 8, 258)):
        check_length(length, implementation)
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("power", range(9, 13))
def test_lengths_around_powers_of_two(implementation, power):
    for length in (2**power - 1, 2**power, 2**power + 1):
        check_length(length, implementation)


def dense_attention(query, key, value, gate, *, window, segment_ids):
    """Plain dense attention in query's dtype, products accumulated in float32, whole masks and logits."""
    group = query.shape[2] // key.shape[2]
    visible = jnp.repeat(visible_keys_oracle(gate, window), group, axis=1)
    key, value, gate = (jnp.repeat(array, group, axis=2) for array in (key, value, gate))
    logits = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)
    logits = logits * query.shape[-1] ** -0.5 + jnp.moveaxis(gate, 1, 2)[:, :, None, :]
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf)).astype(query.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, value, preferred_element_type=jnp.float32).astype(query.dtype)


@pytest.mark.parametrize("dtype", RATIO)
@pytest.mark.parametrize("window", some_slow([17], [131]))
def test_precision(implementation, dtype, window):
    """Within the bar of each dtype, and at most twice the error of dense attention in that dtype."""
    case = rounded(make_case(window=window, dim=32, seed=3), dtype)
    if IMPLEMENTATIONS[implementation].unsupported(jnp.dtype(dtype), 32):
        with pytest.raises(ValueError, match="cannot run here: it "):
            run(case, dtype, implementation=implementation)
        return
    want = truth(case)
    got = run(case, dtype, implementation=implementation)
    dense = run(case, dtype, dense_attention)
    for name, ours, theirs, exact in zip(NAMES, got, dense, want, strict=True):
        ours, theirs = (np.asarray(array, np.float64) for array in (ours, theirs))
        assert rms_ratio(ours, exact) <= RATIO[dtype], name
        # Every element, with room for a few roundings of a result that dense attention happens to hit exactly.
        slack = float(jnp.finfo(dtype).eps) * np.abs(exact).max()
        assert np.abs(ours - exact).max() <= 2 * np.abs(theirs - exact).max() + slack, name


@pytest.mark.parametrize(("share", "window"), [(0.0, 17), (0.3, 17), (1.0, 17), (0.3, 131)])
def test_rows_without_keys_are_zero(implementation, share, window):
    """Padding queries and queries all of whose keys have gate −inf: output and every gradient exactly 0."""
    case = make_case(gate="random")
    hidden = np.random.default_rng(0).random((2, 131)) < share
    hidden[:, :9] |= share > 0
    gate = np.where(hidden[..., None], -np.inf, case.gate).astype(np.float32)
    ids = np.where(np.arange(131) % 7 == 3, 0, 1).astype(np.int32) * np.ones((2, 1), np.int32)
    # A window of the whole row is one document without padding.
    ids = ids if window < 131 else None
    case = Case(case.query, case.key, case.value, gate, case.cotangent, window, ids)
    check(case, implementation)
    got = evaluate(case, implementation)
    token = np.ones((2, 131), bool) if ids is None else ids != 0
    seen = np.cumsum(~hidden & token, axis=1) > 0
    blind = ~(seen & token)
    np.testing.assert_array_equal(got[0][blind], 0)
    np.testing.assert_array_equal(got[1][blind], 0)
    for gradient in got[2:]:
        np.testing.assert_array_equal(gradient[hidden | ~token], 0)


def test_window_of_one_returns_the_top_value(implementation):
    """One key a query: its value, and no gradient to anything but it."""
    dtype = dtype_of(implementation)
    case = rounded(make_case(window=1, gate="random"), dtype)
    out, dquery, dkey, dvalue, dgate = run(case, dtype, implementation=implementation, optimised=True)
    best = np.stack(
        [np.argmax(np.where(np.arange(131)[None, :, None] <= i, case.gate, -np.inf), 1) for i in range(131)], 1
    )
    value = np.take_along_axis(case.value.astype(dtype), best[..., None], axis=1)
    np.testing.assert_array_equal(out, np.repeat(value, 2, axis=2))
    for gradient in (dquery, dkey, dgate):
        assert np.abs(gradient).max() <= residue(case, dtype)
    assert np.abs(dvalue).max() > 0


@pytest.mark.parametrize("window", [131, 132, 1310])
def test_window_past_the_length_is_dense_with_a_bias(implementation, window):
    dtype = dtype_of(implementation)
    case = rounded(make_case(window=window), dtype)
    with jax.enable_x64(True):
        key, value, gate = (np.repeat(array, 2, axis=2) for array in (case.key, case.value, case.gate))
        dense = jax.nn.dot_product_attention(
            *(jnp.asarray(array) for array in (case.query, key, value)),
            bias=jnp.moveaxis(jnp.asarray(gate, jnp.float64), 1, 2)[:, :, None, :],
            is_causal=True,
            implementation="xla",
        )
    got = evaluate(case, implementation)[:1]
    assert_close(got, [np.asarray(dense)], ratio=RATIO[dtype], each=EACH[dtype])


def test_ties_are_a_sliding_window(implementation):
    """All gates equal: bitwise what sliding-window attention gives, gradients too."""
    case = make_case(gate="tied")
    case = Case(case.query, case.key, case.value, 0 * case.gate, case.cotangent, 17)

    def sliding(query, key, value, gate, *, window, segment_ids):
        return sliding_window_attention(
            query, key, value, window=window, segment_ids=segment_ids, implementation=implementation
        )

    tied = evaluate(case, implementation)
    for left, right in zip(tied[:4], run(case, dtype_of(implementation), sliding)[:4], strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("window", some_slow([(2**40, 3, 2**31 - 1)], [2**31]))
def test_windows_beyond_32_bits(implementation, window):
    case = make_case(window=window)
    check(case, implementation)
    ids = np.ones((2, 131), np.int32)

    def sliding(query, key, value, gate, *, window, segment_ids, implementation):
        return sliding_window_attention(
            query, key, value, window=window, segment_ids=segment_ids, implementation=implementation
        )

    flat = Case(case.query, case.key, case.value, 0 * case.gate, case.cotangent, window, ids)
    dtype = dtype_of(implementation)
    got = run(rounded(flat, dtype), dtype, sliding, implementation=implementation)[:4]
    assert_close(got, truth(rounded(flat, dtype))[:4], ratio=RATIO[dtype], each=EACH[dtype])


@pytest.mark.parametrize("segments", some_slow(["inside"], ["none", "packed"]))
def test_relatives_without_a_gate(implementation, segments):
    """Sliding-window and dense causal attention, against masks written out."""
    dtype = dtype_of(implementation)
    case = rounded(make_case(segments=segments, seed=11), dtype)
    flat = Case(case.query, case.key, case.value, 0 * case.gate, case.cotangent, 131, case.segment_ids)

    def dense(query, key, value, gate, *, window, segment_ids):
        return causal_attention(query, key, value, segment_ids=segment_ids, implementation=implementation)

    def sliding(query, key, value, gate, *, window, segment_ids):
        return sliding_window_attention(
            query, key, value, window=17, segment_ids=segment_ids, implementation=implementation
        )

    bounds = {"ratio": RATIO[dtype], "each": EACH[dtype]}
    assert_close(run(flat, dtype, dense)[:4], truth(flat)[:4], **bounds)
    far = np.arange(131)[:, None] - np.arange(131) >= 17

    def masked(query, key, value, gate, *, window, segment_ids):
        logits = jnp.einsum("bthd,bshd->bhts", query, jnp.repeat(key, 2, 2)) / query.shape[-1] ** 0.5
        ids = jnp.ones(query.shape[:2], int) if segment_ids is None else segment_ids
        hidden = far | (jnp.arange(131)[:, None] < jnp.arange(131))
        hidden = hidden | (ids[:, :, None] != ids[:, None, :]) | (ids[:, :, None] == 0)
        logits = jnp.where(hidden[:, None], -jnp.inf, logits)
        weights = jnp.where(hidden[:, None], 0, jax.nn.softmax(jnp.where(ids[:, None, :, None] == 0, 0, logits)))
        return jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(value, 2, 2))

    assert_close(run(flat, dtype, sliding)[:4], truth(flat, masked)[:4], **bounds)


@pytest.mark.parametrize(("window", "packed"), [(17, True), (500, True), (500, False)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_masked_places_may_hold_anything(implementation, window, packed, bad):
    """NaN in keys and values that are padding, have gate −inf, or lie in the future: nothing else changes a bit."""
    ids = np.repeat([1, 0, 2], [50, 20, 61])[None].repeat(2, 0).astype(np.int32) if packed else None
    case = make_case(gate="holes", window=window)
    clean = Case(case.query, case.key, case.value, case.gate, case.cotangent, window, ids)
    padding = ids == 0 if packed else np.zeros((2, 131), bool)
    hidden = padding[..., None] | np.isneginf(case.gate)
    assert hidden.any()
    dirty_key, dirty_value = (np.where(hidden[..., None], bad, array) for array in (case.key, case.value))
    padded_query = np.where(padding[..., None, None], bad, case.query)
    padded_cotangent = np.where(padding[..., None, None], bad, case.cotangent)
    dirty = Case(padded_query, dirty_key, dirty_value, case.gate, padded_cotangent, window, ids)
    for left, right in zip(evaluate(dirty, implementation), evaluate(clean, implementation), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(("window", "packed"), [(17, True), (131, False)])
def test_hidden_numbers_may_be_as_large_as_any(implementation, window, packed):
    check_hidden_numbers(implementation, window, packed)


@pytest.mark.parametrize("window", some_slow([5], [37]))
def test_gates_may_be_as_large_as_any(implementation, window):
    check_gates_of_any_size(implementation, window)


@pytest.mark.parametrize("window", [17, 500])
@pytest.mark.parametrize("where", ["query", "key", "value", "gate"])
def test_nan_reaches_only_who_sees_it(implementation, where, window):
    """A NaN at position 70 of the second document: outputs before it, and all of the first document's, stay
    bitwise the same; so do all gradients of the first document, where it is a key's."""
    ids = np.repeat([1, 2], [50, 81])[None].repeat(2, 0).astype(np.int32)
    case = make_case(window=window)
    arrays = {"query": case.query, "key": case.key, "value": case.value, "gate": case.gate}
    clean = evaluate(Case(*arrays.values(), case.cotangent, window, ids), implementation)
    arrays[where] = arrays[where].copy()
    arrays[where][:, 70] = np.nan
    dirty = evaluate(Case(*arrays.values(), case.cotangent, window, ids), implementation)
    np.testing.assert_array_equal(dirty[0][:, :70], clean[0][:, :70])
    assert np.isnan(dirty[0][:, 70]).any()
    if where != "query":
        for left, right in zip(dirty[1:], clean[1:], strict=True):
            np.testing.assert_array_equal(left[:, :50], right[:, :50])


@pytest.mark.parametrize("cut", [1, 60, 70, 101, 130])
@pytest.mark.parametrize("window", [17, 500])
def test_the_future_changes_nothing(implementation, window, cut):
    """Change everything from a position on: outputs before it are bitwise the same."""
    case = make_case(window=window)
    other = make_case(window=window, seed=99)
    late = np.arange(131) >= cut
    mixed = [
        np.where(late.reshape(1, -1, *[1] * (left.ndim - 2)), 1000 * right, left)
        for left, right in zip(case.arrays, other.arrays, strict=True)
    ]
    before = evaluate(case, implementation)[0][:, :cut]
    after = evaluate(Case(*mixed, case.cotangent, window), implementation)[0][:, :cut]
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("window", [5, 500])
def test_packed_documents_do_not_touch(implementation, window):
    """+1000 in every array of one document leaves the others' outputs and gradients bitwise as they were."""
    ids = np.repeat([1, 2, 3], [37, 41, 53])[None].repeat(2, 0).astype(np.int32)
    case = make_case(window=window)
    middle = ids == 2
    moved = [array + 1000 * middle.reshape(2, -1, *[1] * (array.ndim - 2)) for array in (*case.arrays, case.cotangent)]
    before = evaluate(Case(*case.arrays, case.cotangent, window, ids), implementation)
    after = evaluate(Case(*moved, window, ids), implementation)
    for left, right in zip(before, after, strict=True):
        np.testing.assert_array_equal(left[~middle], right[~middle])


def test_packed_is_separate(implementation):
    lengths = (37, 41, 53)
    ids = np.repeat([1, 2, 3], lengths)[None].repeat(2, 0).astype(np.int32)
    case = make_case(window=9, gate="rounded")
    packed = evaluate(Case(*case.arrays, case.cotangent, 9, ids), implementation)
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        alone = Case(*(array[:, part] for array in (*case.arrays, case.cotangent)), 9)
        for left, right in zip(packed, evaluate(alone, implementation), strict=True):
            each = EACH[dtype_of(implementation)]
            np.testing.assert_allclose(left[:, part], right, rtol=each, atol=each)
        begin += length


def test_scale(implementation):
    check(make_case(scale=0.37), implementation)


@pytest.mark.slow
def test_inside_vmap_and_under_remat(implementation):
    case, dtype = make_case(keys=67), dtype_of(implementation)
    query, key, value = (jnp.asarray(array, dtype) for array in case.arrays[:3])
    gate = jnp.asarray(case.gate)

    def attend(query, key, value, gate):
        return dynamic_mask_attention(query, key, value, gate, window=17, implementation=implementation)

    def one(*row):
        return attend(*(array[None] for array in row))[0]

    together = attend(query, key, value, gate)
    each = EACH[dtype]
    np.testing.assert_allclose(jax.vmap(one)(query, key, value, gate), together, rtol=each, atol=each)
    plain = jax.grad(lambda query: (attend(query, key, value, gate) ** 2).sum())(query)
    saved = jax.grad(jax.checkpoint(lambda query: (attend(query, key, value, gate) ** 2).sum()))(query)
    np.testing.assert_array_equal(plain, saved)
