"""The Llama family's decoder: its parameters, its cache, what it must never look at, and its rotary variants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmattn_jax.generation import generate
from dmattn_jax.models import LlamaConfig, LlamaForCausalLM
from dmattn_jax.nn import FactorsRope, LinearRope, Llama3Rope, YarnRope

SMALL = LlamaConfig(
    vocab_size=61,
    hidden_size=22,
    intermediate_size=37,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    dtype="float32",
    init_std=0.2,
)


def make(**changes) -> LlamaForCausalLM:
    return LlamaForCausalLM(dataclasses.replace(SMALL, **changes), rngs=nnx.Rngs(3))


@nnx.jit
def logits_of(model, tokens, segment_ids=None):
    return model(tokens, segment_ids)


@nnx.jit
def decode(model, tokens, cache, segment_ids=None):
    hidden, cache = model.decode(tokens, cache, segment_ids)
    return model.logits(hidden), cache


def tokens(batch=2, length=13) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, SMALL.vocab_size, (batch, length)), jnp.int32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_parameter_count_is_the_models(bias, qk_norm, tied):
    config = dataclasses.replace(
        SMALL, attention_bias=bias, mlp_bias=bias != tied, qk_norm=qk_norm, tie_embeddings=tied
    )
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0)))
    assert config.num_parameters() == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    tables = config.vocab_size * config.hidden_size * (1 if tied else 2)
    assert config.num_parameters(embeddings=False) == config.num_parameters() - tables


def test_decoding_in_chunks_is_the_whole_sequence():
    model, ids = make(qk_norm=True, attention_bias=True), tokens()
    whole = np.asarray(logits_of(model, ids))
    cache, parts = model.init_cache(2, 13), []
    for start, end in ((0, 6), (6, 7), (7, 13)):
        logits, cache = decode(model, ids[:, start:end], cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)


def test_future_tokens_and_other_documents_leave_logits_alone():
    model, ids = make(), tokens()
    one, second, packed = (
        jnp.asarray([row] * 2, jnp.int32) for row in ([1] * 13, [0] * 5 + [1] * 8, [1] * 5 + [2] * 8)
    )
    before = np.asarray(logits_of(model, ids, one))
    after = np.asarray(logits_of(model, ids.at[:, 7].add(1) % SMALL.vocab_size, one))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any()
    together = logits_of(model, ids, packed)
    np.testing.assert_allclose(together[:, :5], before[:, :5], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(together[:, 5:], logits_of(model, ids, second)[:, 5:], rtol=1e-4, atol=1e-5)


def test_greedy_generation_is_the_likeliest_token_each_time():
    model = make()
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    out = generate(model, prompts, max_new_tokens=4)
    for prompt, new in zip(prompts, out, strict=True):
        row = list(prompt)
        for token in new:
            # one length for all: what follows a token does not change its logits
            padded = jnp.asarray([row + [0] * (16 - len(row))])
            assert token == int(jnp.argmax(logits_of(model, padded)[0, len(row) - 1]))
            row.append(token)


@pytest.mark.slow
def test_loss_has_gradients_for_every_parameter():
    model, ids = make(attention_bias=True, mlp_bias=True, qk_norm=True, tie_embeddings=False, remat=True), tokens()
    graph, state = nnx.split(model)
    gradients = jax.jit(jax.grad(lambda state: nnx.merge(graph, state).loss(ids, ids).loss))(state)
    for path, leaf in nnx.to_flat_state(gradients):
        assert np.isfinite(leaf[...]).all(), path
        # softmax does not see what all keys have in common
        assert np.abs(leaf[...]).max() > 0 or path[-1] == "key_bias", path


def test_rotary_scalings():
    frequency = 1e4 ** (-jnp.arange(16) / 16)
    np.testing.assert_allclose(LinearRope(4.0).scale(frequency, 1e4), frequency / 4)
    np.testing.assert_allclose(FactorsRope((2.0,) * 16).scale(frequency, 1e4), frequency / 2)
    scaled = np.asarray(Llama3Rope(8.0, 1.0, 4.0, 128).scale(frequency, 1e4))
    wavelength = 2 * np.pi / np.asarray(frequency)
    np.testing.assert_allclose(scaled[wavelength < 128 / 4], frequency[wavelength < 128 / 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[wavelength > 128], frequency[wavelength > 128] / 8, rtol=1e-6)
    assert (np.diff(scaled) < 0).all()
    # dimension 16·log_θ(128 / 2π·turns): 1.3 for 8 turns, 5.2 for 1; whole ones around them are 1 and 6
    scaled = np.asarray(YarnRope(8.0, 128, beta_fast=10.0).scale(frequency, 1e4) / frequency)
    np.testing.assert_allclose(scaled[:2], 1, rtol=1e-6)
    np.testing.assert_allclose(scaled[6:], 1 / 8, rtol=1e-6)
    np.testing.assert_allclose(np.diff(scaled[1:7]), -7 / 8 / 5, rtol=1e-5)
    assert YarnRope(8.0, 128).magnitude == pytest.approx(1 + 0.1 * np.log(8))
    assert YarnRope(0.5, 128).magnitude == 1


@pytest.mark.parametrize(
    ("make_bad", "message"),
    [
        (lambda: LinearRope(0), "factor must be finite and > 0, got 0"),
        (lambda: Llama3Rope(8, 4, 4, 8192), "high_freq_factor must be > low_freq_factor"),
        (lambda: YarnRope(8, 128, beta_fast=1), "beta_fast must be > beta_slow, got 1 and 1.0"),
        (lambda: YarnRope(8, 0), "original_max_position_embeddings must be finite and > 0, got 0"),
        (lambda: dataclasses.replace(SMALL, rope_scaling=YarnRope(8, 16), rope_theta=1.0), "rope_theta must be > 1"),
        (lambda: FactorsRope((1.0, float("nan"))), "factors must be finite"),
        (lambda: dataclasses.replace(SMALL, rope_scaling=FactorsRope((1.0,))), r"head_dim / 2 = 5 numbers, got 1"),
        (lambda: dataclasses.replace(SMALL, num_kv_heads=4), "num_heads must be a multiple"),
        (lambda: dataclasses.replace(SMALL, head_dim=9), "head_dim must be even"),
        (lambda: dataclasses.replace(SMALL, dtype="int8"), "dtype must be one of"),
    ],
)
def test_bad_values_are_named(make_bad, message):
    with pytest.raises(ValueError, match=message):
        make_bad()
