"""The oracle against the definition written out as loops over scalars, and its own autodiff gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import GATES, make_case, make_gate, make_segments, truth

from dmattn_jax import oracle

visible_keys_oracle = jax.jit(oracle.visible_keys_oracle, static_argnums=1, static_argnames="causal")


def visible_by_loops(gate, windows, causal, segment_ids):
    """Listing 1 of the paper for one query at a time: sort what it may see, take the first w."""
    batch, length, heads = gate.shape
    visible = np.zeros((batch, heads, length, length), bool)
    for b in range(batch):
        numbers, number, last = [], 0, 0
        for i in range(length):
            current = 1 if segment_ids is None else int(segment_ids[b, i])
            if current and current != last:
                number, last = number + 1, current
            numbers.append(number if current else None)
        for h in range(heads):
            for i in range(length):
                if numbers[i] is None:
                    continue
                may = [
                    j
                    for j in range(i + 1 if causal else length)
                    if numbers[j] == numbers[i] and gate[b, j, h] != -np.inf
                ]
                may.sort(key=lambda j: (np.isnan(gate[b, j, h]), np.nan_to_num(gate[b, j, h], nan=0.0), j))
                for j in may[max(len(may) - windows[h], 0) :]:
                    visible[b, h, i, j] = True
    return visible


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segments", ["none", "packed", "right", "left", "inside", "returning", "empty"])
@pytest.mark.parametrize("gate", GATES)
def test_visibility_is_the_papers(gate, segments, causal):
    rng = np.random.default_rng(len(gate) + 10 * len(segments))
    gates = make_gate(gate, rng, 2, 13, 3)
    gates[0, 5, 1] = np.nan
    gates[1, 7, 2] = np.inf
    ids = make_segments(segments, rng, 2, 13)
    windows = (1, 4, 29)
    got = visible_keys_oracle(
        jnp.asarray(gates), windows, causal=causal, segment_ids=None if ids is None else jnp.asarray(ids)
    )
    np.testing.assert_array_equal(got, visible_by_loops(gates, windows, causal, ids))


def test_attention_by_loops():
    """Softmax of biased logits over the visible keys, one query and one head at a time."""
    case = make_case(queries=7, keys=11, dim=5, window=3, gate="holes", segments="inside")
    visible = visible_by_loops(case.gate, (3, 3, 3), True, case.segment_ids)
    expected = np.zeros_like(case.query)
    for b, t, h in np.ndindex(case.query.shape[:3]):
        k = h // 2
        seen = np.flatnonzero(visible[b, k, 4 + t])
        if len(seen):
            logit = case.key[b, seen, k] @ case.query[b, t, h] / np.sqrt(5) + case.gate[b, seen, k]
            weight = np.exp(logit - logit.max())
            expected[b, t, h] = weight / weight.sum() @ case.value[b, seen, k]
    np.testing.assert_allclose(truth(case)[0], expected, rtol=1e-12, atol=1e-12)


def test_gradients_by_finite_differences():
    case = make_case(batch=1, keys=7, kv_heads=2, dim=3, window=3)
    gradients = truth(case)[1:]
    rng = np.random.default_rng(5)
    step = 1e-6

    def loss(arrays):
        return float((oracle.attention_oracle(*arrays, window=3) * case.cotangent).sum())

    with jax.enable_x64(True):
        for position, gradient in enumerate(gradients):
            move = step * rng.standard_normal(gradient.shape)
            ahead, behind = (
                [
                    jnp.asarray(array + sign * move if number == position else array)
                    for number, array in enumerate(case.arrays)
                ]
                for sign in (1, -1)
            )
            assert loss(ahead) - loss(behind) == pytest.approx(2 * float((gradient * move).sum()), rel=1e-6)
