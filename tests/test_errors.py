"""Bad input is refused before any tracing, with the argument, the value and the fix in one line."""

import jax
import jax.numpy as jnp
import pytest

import dmattn_jax
from dmattn_jax.attention import causal_attention, dynamic_mask_attention, sliding_window_attention
from dmattn_jax.selection import select_keys


def inputs(**changes):
    arrays = {
        "query": jnp.zeros((2, 5, 6, 8)),
        "key": jnp.zeros((2, 7, 3, 8)),
        "value": jnp.zeros((2, 7, 3, 8)),
        "gate": jnp.zeros((2, 7, 3)),
        "window": 4,
    }
    return arrays | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": jnp.zeros((5, 6, 8))}, ValueError, r"query must have shape \[B, T, H, D\], got \(5, 6, 8\)"),
        ({"key": jnp.zeros((2, 7, 3))}, ValueError, r"key must have shape \[B, S, K, D\]"),
        ({"value": jnp.zeros((2, 7, 3))}, ValueError, r"value must have shape \[B, S, K, D\]"),
        ({"gate": jnp.zeros((2, 7))}, ValueError, r"gate must have shape \[B, S, K\]"),
        ({"gate": jnp.zeros((2, 7, 4))}, ValueError, r"gate must have shape .* = \(2, 7, 3\), got \(2, 7, 4\)"),
        ({"gate": jnp.zeros((2, 7, 3), jnp.bfloat16)}, TypeError, "gate must be float32 .* got bfloat16"),
        ({"gate": jnp.zeros((2, 7, 3), jnp.int32)}, TypeError, "gate must be a float array, got int32"),
        ({"query": jnp.zeros((2, 5, 7, 8))}, ValueError, "multiple of kv heads, got H = 7 and K = 3"),
        ({"query": jnp.zeros((2, 9, 6, 8))}, ValueError, "T must be <= S, got T = 9, S = 7"),
        ({"query": jnp.zeros((3, 5, 6, 8))}, ValueError, "one batch size, got 3 and 2"),
        ({"query": jnp.zeros((2, 5, 6, 16))}, ValueError, "one head size, got 16 and 8"),
        ({"value": jnp.zeros((2, 7, 3, 16))}, ValueError, "value must have key's head size 8, got 16"),
        ({"value": jnp.zeros((2, 6, 3, 8))}, ValueError, "value must have key's batch, length and heads"),
        ({"query": jnp.zeros((2, 5, 6, 8), jnp.bfloat16)}, TypeError, "one dtype, got bfloat16, float32"),
        ({"query": jnp.zeros((2, 5, 6, 8), jnp.int32)}, TypeError, "query must be one of .* got int32"),
        ({"key": jnp.zeros((2, 0, 3, 8))}, ValueError, "key must not be empty"),
        ({"window": 0}, ValueError, "window must be >= 1, got 0"),
        ({"window": -3}, ValueError, "window must be >= 1, got -3"),
        ({"window": 2.5}, TypeError, "window must be an int or a sequence of ints, got 2.5"),
        ({"window": (1, 2)}, ValueError, "one per kv head: expected 3 values, got 2"),
        ({"window": (1, 0, 2)}, ValueError, "window must be >= 1, got 0"),
        ({"segment_ids": jnp.ones((2, 5), jnp.int32)}, ValueError, r"segment_ids must have shape .* \(2, 7\)"),
        ({"segment_ids": jnp.ones((2, 7))}, TypeError, "segment_ids must be an integer array, got float32"),
        ({"segment_ids": [[1] * 7] * 2}, TypeError, "segment_ids must be an integer array, got list"),
        (
            {"implementation": "triton"},
            ValueError,
            "must be None or one of 'mosaic_gpu', 'mosaic_tpu', 'xla', got 'triton'",
        ),
    ],
)
def test_dynamic_mask_attention_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        dynamic_mask_attention(**inputs(**changes))
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: dynamic_mask_attention(**inputs(**changes)))


def test_relatives_refuse_too():
    arrays = {name: array for name, array in inputs().items() if name in ("query", "key", "value")}
    with pytest.raises(ValueError, match="window must be >= 1, got 0"):
        sliding_window_attention(**arrays, window=0)
    with pytest.raises(ValueError, match="multiple of kv heads"):
        causal_attention(**(arrays | {"query": jnp.zeros((2, 5, 7, 8))}))


def test_select_keys_refuses():
    with pytest.raises(ValueError, match="gate must have shape"):
        select_keys(jnp.zeros((3, 4)), 2)
    with pytest.raises(ValueError, match="window must be >= 1"):
        select_keys(jnp.zeros((1, 3, 4)), 0)
    with pytest.raises(ValueError, match="segment_ids must have shape"):
        select_keys(jnp.zeros((1, 3, 4)), 2, jnp.ones((1, 4), jnp.int32))


def test_a_traced_window_is_refused_with_the_reason():
    with pytest.raises(TypeError, match=r"window must be a Python int .* shapes depend on it"):
        jax.jit(lambda window: select_keys(jnp.zeros((1, 3, 4)), window))(2)


def test_explain_names_the_implementation():
    text = dmattn_jax.explain()
    assert "dynamic-mask attention runs on: xla" in text
    assert "masks of frozen models run on: xla" in text
    assert jax.devices()[0].device_kind in text
