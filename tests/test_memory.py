"""Memory is part of correctness: what the compiled programs say they need."""

import jax
import jax.numpy as jnp
import pytest

from dmattn_jax.attention import causal_attention, dynamic_mask_attention, sliding_window_attention

HEADS, DIM, WINDOW = 2, 64, 256


def compiled_bytes(attend, length: int, *, kv_heads: int = HEADS) -> int:
    """Arguments, results and temporaries of forward and backward together."""
    query = jax.ShapeDtypeStruct((1, length, HEADS, DIM), jnp.float32)
    key = jax.ShapeDtypeStruct((1, length, kv_heads, DIM), jnp.float32)
    gate = jax.ShapeDtypeStruct((1, length, kv_heads), jnp.float32)

    def forward_backward(query, key, value, gate, cotangent):
        out, pull = jax.vjp(attend, query, key, value, gate)
        return out, pull(cotangent)

    compiled = jax.jit(forward_backward).lower(query, key, key, gate, query).compile()
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


ATTENTIONS = {
    "dynamic mask": lambda q, k, v, g: dynamic_mask_attention(q, k, v, g, window=WINDOW),
    "dynamic mask, packed": lambda q, k, v, g: dynamic_mask_attention(
        q, k, v, g, window=WINDOW, segment_ids=jnp.ones(k.shape[:2], jnp.int32)
    ),
    "dynamic mask, window past the end": lambda q, k, v, g: dynamic_mask_attention(q, k, v, g, window=10**9),
    "dynamic mask, not causal": lambda q, k, v, g: dynamic_mask_attention(q, k, v, g, window=WINDOW, causal=False),
    "sliding window": lambda q, k, v, g: sliding_window_attention(q, k, v, window=WINDOW),
    "dense causal": lambda q, k, v, g: causal_attention(q, k, v),
}


QUICK = ("dynamic mask, packed", "dense causal")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ATTENTIONS]
)
def test_forward_and_backward_are_linear(name):
    """At 65,536 tokens everything together is under 24 arrays of [N, 64] float32, the inputs and gradients included
    (14 of them), and grows as N does."""
    unit = DIM * 4
    short, long = (compiled_bytes(ATTENTIONS[name], length) for length in (16_384, 65_536))
    assert long < 24 * 65_536 * unit
    assert long < 4.1 * short


def test_a_million_tokens_compile_within_linear_memory():
    assert compiled_bytes(ATTENTIONS["dynamic mask"], 2**20) < 24 * 2**20 * DIM * 4
