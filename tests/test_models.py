"""The Doge decoder: its equations, parameters, losses, caches, and what it must never look at."""

import dataclasses
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmattn_jax import nn
from dmattn_jax.models import DogeConfig, DogeForCausalLM
from dmattn_jax.models.loss import chunked_cross_entropy
from dmattn_jax.nn.linear import in_compute_dtype
from dmattn_jax.oracle import visible_keys_oracle
from dmattn_jax.selection import select_keys

pytestmark = pytest.mark.usefixtures("float32_products")

V, T, B = 61, 23, 2
SMALL = DogeConfig(
    vocab_size=V,
    hidden_size=22,
    intermediate_size=37,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=10,
    window=(5, 3, 7),
    num_experts_per_token=3,
    dtype="float32",
    init_std=0.2,
)
ALL_KINDS = [(attention, experts) for attention in ("dma", "swa", "mha") for experts in (0, 16)]
KINDS = [("dma", 0), ("dma", 16), ("swa", 0), ("mha", 0)]
BASELINES = [pytest.param(kind, 0, marks=pytest.mark.slow) for kind in ("mla", "nsa")]
SIZES = {"mla": {"head_dim": 12}, "nsa": {"compression_block": 2, "selection_block": 4, "selected_blocks": 2}}

FOR_KERNELS = {"hidden_size": 64, "head_dim": 64, "window": 128}
"""Sizes for which, in half precision, devices have kernels of their own."""


def make(**changes) -> DogeForCausalLM:
    changes = SIZES.get(changes.get("attention", ""), {}) | changes
    model = DogeForCausalLM(dataclasses.replace(SMALL, **changes), rngs=nnx.Rngs(3))
    if model.config.attention == "dma":
        # As after training: A = 0 would tie all gates.
        shape = model.blocks.attention.gate.A.shape
        model.blocks.attention.gate.A[...] = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
        model.blocks.attention.gate.delta[...] *= 3
    return model


def tokens(seed=0, batch=B, length=T) -> jax.Array:
    """No token twice in a row of the batch: equal tokens would tie in the first layer but for rounding."""
    random = np.random.default_rng(seed)
    return jnp.asarray(np.stack([random.permutation(V)[:length] for _ in range(batch)]), jnp.int32)


@nnx.jit
def logits_of(model, tokens, segment_ids=None):
    return model(tokens, segment_ids)


@nnx.jit
def decode(model, tokens, cache, segment_ids=None):
    hidden, cache = model.decode(tokens, cache, segment_ids)
    return model.logits(hidden), cache


@nnx.jit
def loss_of(model, tokens, targets, segment_ids=None, weights=None):
    return model.loss(tokens, targets, segment_ids, weights)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("experts", [0, 16])
@pytest.mark.parametrize("attention", ["dma", "swa", "mha", "mla", "nsa"])
def test_parameter_count_is_the_models(attention, experts, tied):
    sizes = SIZES.get(attention, {})
    config = dataclasses.replace(SMALL, attention=attention, num_experts=experts, tie_embeddings=tied, **sizes)
    model = nnx.eval_shape(lambda: DogeForCausalLM(config, rngs=nnx.Rngs(0)))
    assert config.num_parameters() == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    tables = V * config.hidden_size * (1 if tied else 2)
    assert config.num_parameters(embeddings=False) == config.num_parameters() - tables


@pytest.mark.slow
def test_model_is_its_blocks_one_by_one():
    model = make(num_experts=16, tie_embeddings=False)
    model.blocks.attention_residual[...] *= 0.9
    model.blocks.mlp_residual[...] *= 1.1
    graph, state = nnx.split(model.blocks)
    ids = tokens()
    x = model.embedding[...][ids]
    balance = []

    @nnx.jit
    def one(block, x):
        x = 0.9 * x + block.attention(block.attention_norm(x))
        out, auxiliary = block.mlp(block.mlp_norm(x))
        return 1.1 * x + out, auxiliary

    for index in range(SMALL.num_layers):
        block = nnx.merge(graph, jax.tree.map(lambda leaf, i=index: leaf[i], state))
        x, auxiliary = one(block, x)
        balance.append(auxiliary)
    expected = model.norm(x) @ model.unembedding[...]
    np.testing.assert_allclose(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4)
    loss = loss_of(model, ids, ids)
    assert float(loss.auxiliary) == pytest.approx(0.01 * float(jnp.mean(jnp.stack(balance))), rel=1e-5)
    assert float(loss.loss) == pytest.approx(float(loss.cross_entropy + loss.auxiliary), rel=1e-6)


def test_layers_start_differently_and_residual_scales_at_one():
    model = DogeForCausalLM(SMALL, rngs=nnx.Rngs(0))
    query = np.asarray(model.blocks.attention.query[...])
    assert not np.array_equal(query[0], query[1])
    assert query.std() == pytest.approx(SMALL.init_std, rel=0.1)
    for ones in (model.blocks.attention_residual, model.blocks.mlp_residual, model.norm.weight):
        np.testing.assert_array_equal(ones[...], 1)
    np.testing.assert_array_equal(model.blocks.attention.gate.A[...], 0)


@pytest.mark.parametrize(("attention", "experts"), ALL_KINDS)
def test_future_tokens_leave_earlier_logits_bitwise_alone(attention, experts):
    model, ids = make(attention=attention, num_experts=experts), tokens()
    before = np.asarray(logits_of(model, ids))
    for cut in (1, 11, T - 1):
        changed = ids.at[:, cut:].set((ids[:, cut:] + 7) % V)
        after = np.asarray(logits_of(model, changed))
        np.testing.assert_array_equal(after[:, :cut], before[:, :cut])
        assert not np.array_equal(after[:, cut:], before[:, cut:])


@pytest.mark.parametrize(
    ("attention", "experts"), [KINDS[0], *(pytest.param(*kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
)
def test_packed_documents_are_separate_ones(attention, experts):
    model, ids = make(attention=attention, num_experts=experts), tokens()
    segments = jnp.asarray([[1] * 10 + [2] * 10 + [0] * 3, [5] * 10 + [4] * 13])
    packed = logits_of(model, ids, segments)
    alone = logits_of(model, jnp.concatenate([ids[:, :10], ids[:, 10:20]]))
    expected = jnp.concatenate([alone[:2], alone[2:]], axis=1)
    np.testing.assert_allclose(packed[:, :20], expected, rtol=1e-4, atol=1e-4)
    louder = logits_of(model, ids.at[:, 3].set((ids[:, 3] + 1) % V), segments)
    np.testing.assert_array_equal(louder[:, 10:], packed[:, 10:])
    targets = jnp.where(segments == 0, -1, (ids + 1) % V)
    loss = loss_of(model, ids, targets, segments)
    other = loss_of(model, ids.at[0, 20:].set(0), targets, segments)
    assert float(loss.loss) == float(other.loss), "padding must not count, in the balance loss either"


@pytest.mark.parametrize(("attention", "experts"), [*KINDS, *BASELINES])
def test_prefill_and_decoding_at_every_split_is_the_whole_forward(attention, experts):
    model, ids = make(attention=attention, num_experts=experts), tokens()
    whole = np.asarray(logits_of(model, ids))
    scale = np.abs(whole).max()
    empty = model.init_cache(B, T)
    # One token at a time from the start: the state before every split.
    states, cache, steps = [], empty, []
    for i in range(T):
        states.append(cache)
        logits, cache = decode(model, ids[:, i : i + 1], cache)
        steps.append(logits)
    final = cache
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), whole, rtol=0, atol=1e-5 * scale)
    if attention in ("dma", "swa"):
        check_visible(model, ids, states)
    # Chunks are padded to one length, so that one program serves every split.
    for split in range(1, T):
        head, cache = decode(model, ids, empty, jnp.asarray(np.arange(T) < split, jnp.int32)[None].repeat(B, 0))
        rest = jnp.asarray(np.arange(T) < T - split, jnp.int32)[None].repeat(B, 0)
        tail, after = decode(model, jnp.roll(ids, -split, axis=1), cache, rest)
        both = jnp.concatenate([head[:, :split], tail[:, : T - split]], axis=1)
        np.testing.assert_allclose(both, whole, rtol=0, atol=1e-5 * scale, err_msg=f"split {split}")
        if attention in ("dma", "swa"):
            np.testing.assert_array_equal(jnp.sort(cache.position), jnp.sort(states[split].position))
            np.testing.assert_array_equal(jnp.sort(after.position), jnp.sort(final.position))


@pytest.mark.parametrize(
    ("attention", "experts"), [("dma", 16), *BASELINES, pytest.param("mha", 0, marks=pytest.mark.slow)]
)
def test_unrolled_decoder_is_the_stacked_one(attention, experts):
    model, ids = make(attention=attention, num_experts=experts), tokens()
    unrolled = model.unrolled()
    assert (model.is_unrolled, unrolled.is_unrolled) == (False, True)
    assert unrolled.unrolled() is unrolled
    whole = np.asarray(logits_of(model, ids))
    close = {"rtol": 0, "atol": 1e-5 * np.abs(whole).max()}
    np.testing.assert_allclose(logits_of(unrolled, ids), whole, **close)
    np.testing.assert_allclose(loss_of(unrolled, ids, ids).loss, loss_of(model, ids, ids).loss, rtol=1e-5)
    # Caches that the stacked decoder filled are taken along, and then both go on.
    present = jnp.asarray(np.arange(T) < 19, jnp.int32)[None].repeat(B, 0)
    _, stacked = decode(model, ids, model.init_cache(B, T), present)
    listed = unrolled.from_stack(stacked)
    assert model.from_stack(stacked) is stacked
    assert jax.tree.structure(listed) == jax.tree.structure(unrolled.init_cache(B, T))
    for step in range(19, T):
        want, stacked = decode(model, ids[:, step : step + 1], stacked)
        got, listed = decode(unrolled, ids[:, step : step + 1], listed)
        np.testing.assert_allclose(got, want, **close)
    for layer, cache in enumerate(listed):
        for own, all_layers in zip(jax.tree.leaves(cache), jax.tree.leaves(stacked), strict=True):
            np.testing.assert_allclose(own, all_layers[layer], rtol=1e-4, atol=1e-5)
    if attention == "dma":
        np.testing.assert_allclose(unrolled.gates(ids), model.gates(ids), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(unrolled.layer(1).mlp_residual[...], model.layer(1).mlp_residual[...])


@pytest.mark.parametrize("attention", ["dma", "swa", "mha"])
def test_half_precision_decoding_in_one_program_is_the_whole_forward(attention):
    """A device's own step of decoding reads a layer's part of the cache in a loop."""
    length, split = 170, 150
    model = make(attention=attention, dtype="bfloat16", **FOR_KERNELS)
    ids = jax.random.randint(jax.random.key(0), (B, length), 0, V)
    whole = np.asarray(logits_of(model, ids), np.float32)

    @nnx.jit
    def in_steps(model, ids):
        def step(cache, token):
            hidden, cache = model.decode(token[:, None], cache)
            return cache, model.logits(hidden[:, 0])

        hidden, cache = model.decode(ids[:, :split], model.init_cache(B, length))
        logits = jax.lax.scan(step, cache, ids[:, split:].T)[1]
        return jnp.concatenate([model.logits(hidden), jnp.moveaxis(logits, 0, 1)], axis=1)

    error = np.sqrt(np.mean(np.square(np.asarray(in_steps(model, ids), np.float32) - whole), axis=(0, 2)))
    scale = np.sqrt(np.mean(np.square(whole)))
    assert error.max() <= 2e-2 * scale


@pytest.mark.parametrize(("attention", "experts"), [*KINDS, *BASELINES])
def test_matrices_in_the_compute_dtype_change_no_bit(attention, experts):
    model = make(attention=attention, num_experts=experts, dtype="bfloat16", tie_embeddings=False)
    converted = in_compute_dtype(model)
    held = {path[-1]: leaf.dtype for path, leaf in nnx.to_flat_state(nnx.state(converted))}
    assert held["embedding"] == held["unembedding"] == held["query"] == held["down_projection"] == jnp.bfloat16
    assert all(dtype == jnp.float32 for name, dtype in held.items() if name in ("weight", "A", "delta"))
    assert model.embedding.dtype == jnp.float32, "the model itself is as it was"
    ids = tokens()
    np.testing.assert_array_equal(logits_of(converted, ids), logits_of(model, ids))
    cache = model.init_cache(B, T)
    for chunk in (ids[:, :7], ids[:, 7:8]):
        (found, cache_found), (wanted, cache) = (decode(each, chunk, cache) for each in (converted, model))
        np.testing.assert_array_equal(found, wanted)
        jax.tree.map(np.testing.assert_array_equal, cache_found, cache)


def test_matrices_that_are_in_the_compute_dtype_are_shared():
    model = make()
    assert in_compute_dtype(model).embedding[...] is model.embedding[...]


@pytest.mark.parametrize("attention", ["dma", "swa", "mha"])
def test_half_precision_gradients_are_those_of_single_precision(attention):
    """A device's own kernels, which layers call in a loop, checkpointed. Gates are tied: those of a trained model
    choose other keys where they round otherwise."""
    length = 300
    ids = jax.random.randint(jax.random.key(0), (B, length), 0, V)
    segments = jnp.asarray(np.where(np.arange(length) < 131, 1, 2)[None].repeat(B, 0), jnp.int32)
    gradients = []
    for dtype in ("bfloat16", "float32"):
        config = dataclasses.replace(SMALL, attention=attention, dtype=dtype, **FOR_KERNELS)
        model = DogeForCausalLM(config, rngs=nnx.Rngs(3))
        loss = nnx.jit(nnx.grad(lambda m: m.loss(ids, jnp.roll(ids, -1, 1), segments).loss))
        gradients.append(jax.tree_util.tree_leaves_with_path(loss(model)))
    for (path, half), (_, single) in zip(*gradients, strict=True):
        half, single = np.asarray(half, np.float64), np.asarray(single, np.float64)
        error = np.sqrt(np.mean(np.square(half - single)))
        assert error <= 5e-2 * np.sqrt(np.mean(np.square(single))), jax.tree_util.keystr(path)


def check_visible(model, ids, states) -> None:
    """The cached positions before step i are what query i − 1 of the whole forward sees, in every layer."""
    if model.config.attention == "dma":
        gates = nnx.jit(DogeForCausalLM.gates)(model, ids)
    else:
        gates = jnp.zeros((model.config.num_layers, B, T, model.config.num_kv_heads))
    for layer in range(model.config.num_layers):
        visible = np.asarray(visible_keys_oracle(gates[layer], model.config.window))
        for i in range(1, T):
            for b, k in np.ndindex(visible.shape[:2]):
                position = np.asarray(states[i].position[layer, b, k])
                assert sorted(position[position >= 0]) == np.flatnonzero(visible[b, k, i - 1]).tolist()


@pytest.mark.slow
def test_gates_of_all_layers_and_their_masks():
    model, ids = make(), tokens()
    gates = nnx.jit(DogeForCausalLM.gates)(model, ids)
    assert gates.shape == (SMALL.num_layers, B, T, 3)
    assert gates.dtype == jnp.float32
    x = model.embedding[...][ids]
    graph, state = nnx.split(model.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))
    np.testing.assert_allclose(gates[0], block.attention.gates(block.attention_norm(x)), rtol=1e-5)
    expiry = select_keys(gates[1], SMALL.window)
    assert int(expiry.max()) <= T
    with pytest.raises(ValueError, match="attention='dma', got 'swa'"):
        make(attention="swa").gates(ids)


def plain_loss(hidden, unembedding, targets, weights):
    logits = hidden.astype(jnp.float32) @ unembedding
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    weights = jnp.where(targets >= 0, weights, 0)
    return jnp.sum(weights * nll), weights.sum()


@pytest.mark.parametrize("chunk", [1, 6, 14, 1000])
def test_chunked_loss_is_the_plain_formula(chunk):
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(B, T, 11)), jnp.float32)
    unembedding = jnp.asarray(random.normal(size=(11, V)), jnp.float32)
    targets = jnp.asarray(random.integers(-1, V, (B, T)), jnp.int32).at[0, :5].set(-1)
    weights = jnp.asarray(random.random((B, T)), jnp.float32)

    def chunked(hidden, unembedding, weights):
        total, count = chunked_cross_entropy(hidden, unembedding, targets, weights, chunk_tokens=chunk)
        return total / count, count

    def plain(hidden, unembedding, weights):
        total, count = plain_loss(hidden, unembedding, targets, weights)
        return total / count, count

    got = jax.value_and_grad(chunked, argnums=(0, 1, 2), has_aux=True)(hidden, unembedding, weights)
    wanted = jax.value_and_grad(plain, argnums=(0, 1, 2), has_aux=True)(hidden, unembedding, weights)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_loss_never_holds_all_logits():
    vocabulary, length = 16384, 1024
    hidden = jnp.zeros((4, length, 16), jnp.bfloat16)
    unembedding, targets = jnp.zeros((16, vocabulary)), jnp.zeros((4, length), jnp.int32)
    logits = 4 * length * vocabulary * 4

    def temporary(chunk):
        def loss(hidden, unembedding):
            return chunked_cross_entropy(hidden, unembedding, targets, chunk_tokens=chunk)[0]

        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, unembedding).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(256) < 0.25 * logits
    assert temporary(4 * length) > logits, "or the measure shows nothing"


@pytest.mark.slow
def test_no_target_gives_loss_zero_and_no_gradient():
    model, ids = make(), tokens()
    targets = jnp.full((B, T), -1)
    assert float(loss_of(model, ids, targets).token_count) == 0
    loss, gradient = nnx.jit(nnx.value_and_grad(lambda m: m.loss(ids, targets).loss))(model)
    assert float(loss) == 0
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, 0)


def test_weights_and_ignored_targets_leave_the_mean_of_the_rest():
    model, ids = make(), tokens()
    targets = jnp.roll(ids, -1, axis=1).at[:, -1].set(-1)
    logits = jax.nn.log_softmax(logits_of(model, ids))
    nll = -np.asarray(jnp.take_along_axis(logits, targets[..., None] % V, axis=-1))[..., 0]
    output = loss_of(model, ids, targets)
    assert float(output.token_count) == B * (T - 1)
    assert float(output.cross_entropy) == pytest.approx(nll[:, :-1].mean(), rel=1e-5)
    weights = jnp.zeros((B, T)).at[0, 3].set(1.0).at[1, 5].set(3.0)
    assert float(loss_of(model, ids, targets, weights=weights).loss) == pytest.approx(
        (nll[0, 3] + 3 * nll[1, 5]) / 4, rel=1e-5
    )


@pytest.mark.slow
def test_remat_changes_memory_but_no_gradient():
    ids = tokens()
    results = []
    for remat, unroll in itertools.product((False, True), repeat=2):
        model = make(attention="dma", remat=remat, unroll_layers=unroll)
        results.append(nnx.jit(nnx.value_and_grad(lambda m: m.loss(ids, jnp.roll(ids, -1, 1)).loss))(model))
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    def temporary(remat):
        config = dataclasses.replace(SMALL, num_layers=16, remat=remat, attention="swa")
        graph, state = nnx.split(nnx.eval_shape(lambda: DogeForCausalLM(config, rngs=nnx.Rngs(0))))
        step = jax.jit(jax.grad(lambda s, x: nnx.merge(graph, s).loss(x, x).loss))
        compiled = step.lower(state, jax.ShapeDtypeStruct((B, 256), jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(True) < 0.5 * temporary(False)


def test_backward_pass_keeps_products_and_attention_only():
    config = dataclasses.replace(SMALL, num_layers=3)
    graph, state = nnx.split(nnx.eval_shape(lambda: DogeForCausalLM(config, rngs=nnx.Rngs(0))))
    length = 64

    def kept(state):
        run = jax.vjp(lambda s: nnx.merge(graph, s).hidden(jnp.zeros((1, length), jnp.int32))[0], state)[1]
        return [leaf for leaf in jax.tree.leaves(run) if leaf.shape[:3] == (3, 1, length)]

    leaves = jax.eval_shape(kept, state)
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # x, q, k, v, attention's output, its projection, the two products of the MLP; and a few numbers a head.
    rows = 2 * config.hidden_size + 2 * heads + 2 * kv_heads + 2 * config.intermediate_size
    few = 8 * config.num_heads
    assert rows <= sum(math.prod(leaf.shape[3:]) for leaf in leaves) <= rows + few


def test_depth_does_not_grow_the_program():
    def size(layers):
        config = dataclasses.replace(SMALL, num_layers=layers)
        graph, state = nnx.split(nnx.eval_shape(lambda: DogeForCausalLM(config, rngs=nnx.Rngs(0))))
        step = jax.jit(jax.grad(lambda s, x: nnx.merge(graph, s).loss(x, x).loss))
        return len(step.lower(state, jax.ShapeDtypeStruct((B, T), jnp.int32)).as_text())

    assert size(32) < 1.05 * size(2)


def test_bfloat16_model_has_float32_parameters_logits_and_loss():
    model = make(dtype="bfloat16", num_experts=16)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model))} == {"float32"}
    ids = tokens()
    logits, wide = logits_of(model, ids), logits_of(make(num_experts=16), ids)
    assert logits.dtype == jnp.float32
    assert float(jnp.corrcoef(logits.ravel(), wide.ravel())[0, 1]) > 0.98
    loss, gradient = nnx.jit(nnx.value_and_grad(lambda m: m.loss(ids, ids).loss))(model)
    assert loss.dtype == jnp.float32
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_a_few_steps_lower_the_loss_and_move_the_gates():
    model, ids = DogeForCausalLM(SMALL, rngs=nnx.Rngs(0)), tokens()
    step = nnx.jit(nnx.value_and_grad(lambda m: m.loss(ids, jnp.roll(ids, -1, 1)).loss))
    losses = []
    for _ in range(8):
        loss, gradient = step(model)
        losses.append(float(loss))
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model), gradient))
    assert losses[-1] < 0.8 * losses[0]
    assert float(jnp.abs(model.blocks.attention.gate.A[...]).min()) > 0


@pytest.mark.slow
def test_linen_runs_the_model():
    bridge = nnx.bridge.to_linen(DogeForCausalLM, SMALL)
    ids = tokens()
    variables = bridge.init(jax.random.key(0), ids)
    assert bridge.apply(variables, ids).shape == (B, T, V)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 4}, "num_heads must be a multiple of num_kv_heads, got num_heads=6, num_kv_heads=4"),
        ({"head_dim": 9}, "head_dim must be even for rotary positions, got 9"),
        ({"vocab_size": 0}, "vocab_size must be >= 1, got 0"),
        ({"num_layers": 2.0}, "num_layers must be an int, got 2.0"),
        ({"window": 0}, "window must be >= 1, got 0"),
        ({"window": (5, 0, 7)}, "window must be >= 1, got 0"),
        ({"window": 5.0}, "window must be an int, got 5.0"),
        ({"window": None}, "window must be an int, got None"),
        ({"window": (5, 7)}, "expected 3 values, got (5, 7)"),
        ({"num_experts": 17}, "num_experts must be 0 or a square number, got 17: use 16 or 25"),
        ({"num_experts": 4, "num_experts_per_token": 5}, "num_experts_per_token must be in 1 … num_experts=4, got 5"),
        ({"attention": "dense"}, "attention must be one of dma, mha, swa, mla, nsa, got 'dense'"),
        ({"gate_activation": "relu"}, "gate_activation must be one of exp, linear, got 'relu'"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"rope_theta": 0.0}, "rope_theta must be > 0, got 0.0"),
        ({"norm_eps": float("nan")}, "norm_eps must be > 0, got nan"),
        ({"balance_loss_weight": -1.0}, "balance_loss_weight must be >= 0, got -1.0"),
    ],
)
def test_config_refuses_what_cannot_work(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(SMALL, **changes)


def test_config_survives_json():
    again = DogeConfig(**json.loads(json.dumps(dataclasses.asdict(SMALL))))
    assert again == SMALL
    assert hash(again) == hash(SMALL)


def test_layers_are_public():
    assert {"DynamicMaskAttention", "MultiHeadAttention", "SlidingWindowAttention", "RMSNorm", "CDMoE"} <= set(
        nn.__all__
    )
