"""Memory is part of correctness: what the compiled programs say they need."""

from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dmattn_jax.attention import causal_attention, dynamic_mask_attention, sliding_window_attention
from dmattn_jax.models import DogeConfig, DogeForCausalLM
from dmattn_jax.models.config import AttentionKind
from dmattn_jax.nn import block_attention

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
    (16 of them, with the output), and grows as N does."""
    unit = DIM * 4
    short, long = (compiled_bytes(ATTENTIONS[name], length) for length in (16_384, 65_536))
    assert long < 24 * 65_536 * unit
    assert long < 4.1 * short


def test_a_million_tokens_compile_within_linear_memory():
    assert compiled_bytes(ATTENTIONS["dynamic mask"], 2**20) < 24 * 2**20 * DIM * 4


HOW = {"as it comes": {}, "packed": {}, "unrolled": {"unroll_layers": True}, "remat": {"remat": True}}


@pytest.mark.parametrize(
    ("attention", "how"),
    [
        pytest.param(attention, how, marks=[] if (attention, how) == ("mha", "packed") else pytest.mark.slow)
        for attention in get_args(AttentionKind)
        for how in HOW
    ],
)
def test_training_a_model_is_linear(attention, how, monkeypatch):
    """Layers in a loop, checkpointed: what differentiation keeps there is not what a layer by itself keeps."""
    monkeypatch.setattr(block_attention, "CHUNK_ELEMENTS", 2**18)
    config = DogeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        attention=attention,
        window=64,
        dtype="float32",
        **HOW[how],
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: DogeForCausalLM(config, rngs=nnx.Rngs(0))))

    def memory(length):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        step = jax.jit(jax.grad(lambda state, x, ids: nnx.merge(graph, state).loss(x, x, ids).loss))
        compiled = step.lower(state, tokens, tokens if how == "packed" else None).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # A T×T array of one byte would be 67 MB at 8,192 tokens, one of logits 537.
    short, long = memory(2048), memory(8192)
    assert long < 4.5 * short
    assert long < 128 * 2**20
