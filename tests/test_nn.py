"""Layers against the equations written out in NumPy float64, and inside Flax's transformations."""

import functools
import math

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmattn_jax import nn
from dmattn_jax.nn.exact import exact_mean_square, exact_projection, exact_row_products
from dmattn_jax.nn.linear import linear
from dmattn_jax.nn.norms import Projection, normed_together
from dmattn_jax.oracle import visible_keys_oracle

B, T, M, H, K, D = 2, 19, 23, 6, 3, 10
WINDOW = (5, 3, 7)
SEGMENTS = np.array([[1] * 8 + [2] * 8 + [0] * 3, [3] * 3 + [1] * 16], np.int32)
KINDS = ("dma", "linear", "swa", "mha")

float32_products = pytest.mark.usefixtures("float32_products")


def make(kind: str, window=WINDOW, **changes) -> nnx.Module:
    sizes = {"hidden_size": M, "num_heads": H, "num_kv_heads": K, "head_dim": D, "rngs": nnx.Rngs(7), "init_std": 0.2}
    sizes |= changes
    if kind == "mha":
        return nn.MultiHeadAttention(**sizes)
    if kind == "swa":
        return nn.SlidingWindowAttention(**sizes, window=window)
    return nn.DynamicMaskAttention(**sizes, window=window, gate_activation="linear" if kind == "linear" else "exp")


def trained(layer):
    """Gates and norms away from where they start, as after training."""
    if hasattr(layer, "gate"):
        layer.gate.A[...] = jnp.asarray([0.7, -0.9, 1.3])[: layer.num_kv_heads]
        layer.gate.delta[...] = 5 * layer.gate.delta[...]
    layer.query_norm.weight[...] = jnp.linspace(0.5, 1.5, layer.head_dim)
    layer.key_norm.weight[...] = jnp.linspace(1.7, 0.6, layer.head_dim)
    return layer


@nnx.jit
def run(layer, x, segment_ids=None):
    return layer(x, segment_ids)


def inputs(seed=0, batch=B, length=T) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, length, M)).astype(np.float32)


def reference(layer, x, segments, kind, visible=None) -> np.ndarray:
    """The layer's equations, one query and head at a time."""
    w = {"/".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(layer))}
    x = x.astype(np.float64)

    def normed(heads, weight):
        return heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-6) * weight

    def rotated(heads):
        out = np.empty_like(heads)
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                start = t
                while start and segments[b, start - 1] == segments[b, t]:
                    start -= 1
                for i in range(D // 2):
                    a = (t - start) * 10_000.0 ** (-2 * i / D)
                    u, v = heads[b, t, :, i], heads[b, t, :, i + D // 2]
                    out[b, t, :, i] = u * math.cos(a) - v * math.sin(a)
                    out[b, t, :, i + D // 2] = v * math.cos(a) + u * math.sin(a)
        return out

    q = rotated(normed(np.einsum("btm,mhd->bthd", x, w["query"]), w["query_norm/weight"]))
    k = rotated(normed(np.einsum("btm,mhd->bthd", x, w["key"]), w["key_norm/weight"]))
    v = np.einsum("btm,mhd->bthd", x, w["value"])
    gate = np.zeros(v.shape[:3])
    if kind in ("dma", "linear"):
        exponent = w["gate/A"] * np.log1p(np.exp(v.reshape(*v.shape[:2], -1) @ w["gate/delta"].T))
        gate = np.exp(exponent) if kind == "dma" else exponent
    out = np.zeros(q.shape)
    for b in range(x.shape[0]):
        for h in range(H):
            kv = h // (H // K)
            window = x.shape[1] if kind == "mha" else layer.windows[kv]
            for i in range(x.shape[1]):
                if segments[b, i] == 0:
                    continue
                keys = [j for j in range(i + 1) if segments[b, j] == segments[b, i]]
                keys = sorted(keys, key=lambda j: (gate[b, j, kv], j))[-window:]
                logits = np.array([q[b, i, h] @ k[b, j, kv] / math.sqrt(D) + gate[b, j, kv] for j in keys])
                weights = np.exp(logits - logits.max())
                out[b, i, h] = (weights / weights.sum()) @ v[b, keys, kv]
    return np.einsum("bthd,hdm->btm", out, w["out"])


@float32_products
@pytest.mark.parametrize("kind", ["dma", "mha"])
def test_padding_amid_a_document_takes_no_position(kind):
    layer, x = trained(make(kind)), jnp.asarray(inputs())
    tokens = np.array([3, 4, 6, 7, 11, 12, 13, 14])
    segments = jnp.zeros((B, T), jnp.int32).at[:, tokens].set(1)
    alone = run(layer, x[:, tokens])
    np.testing.assert_allclose(run(layer, x, segments)[:, tokens], alone, atol=1e-6)
    chunk, _ = layer.decode(x, layer.init_cache(B, T), segments)
    np.testing.assert_allclose(chunk[:, tokens], alone, atol=1e-6)


@pytest.mark.parametrize("kind", ["dma", "mha", "swa"])
@pytest.mark.parametrize("shape", [(0, 5, M), (B, 0, M)])
def test_no_rows_and_no_tokens_are_refused(kind, shape):
    with pytest.raises(ValueError, match="query must not be empty, got shape"):
        make(kind)(jnp.zeros(shape))


@float32_products
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_layer_is_its_equations(kind, packed):
    layer, x = trained(make(kind)), inputs()
    segments = SEGMENTS if packed else np.ones((B, T), np.int32)
    out = run(layer, jnp.asarray(x), jnp.asarray(segments) if packed else None)
    np.testing.assert_allclose(out, reference(layer, x, segments, kind), rtol=2e-5, atol=2e-5)


@float32_products
@pytest.mark.parametrize("kind", KINDS)
def test_layer_gradients_are_the_slopes_of_its_equations(kind):
    layer, x = trained(make(kind)), inputs()
    cotangent = inputs(seed=1).astype(np.float64)

    def loss(layer, x):
        return jnp.sum(layer(x, jnp.asarray(SEGMENTS)) * cotangent.astype(np.float32))

    gradients, dx = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(layer, jnp.asarray(x))
    graph, state = nnx.split(layer)
    flat = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state)] + [x.astype(np.float64)]
    slopes = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradients)] + [np.asarray(dx, np.float64)]
    random = np.random.default_rng(3)
    treedef = jax.tree.structure(state)

    def value(leaves):
        moved = nnx.merge(graph, jax.tree.unflatten(treedef, leaves[:-1]))
        return np.sum(reference(moved, leaves[-1], SEGMENTS, kind) * cotangent)

    for index, leaf in enumerate(flat):
        direction = random.normal(size=leaf.shape)
        direction /= np.linalg.norm(direction)
        step = 1e-6 * max(1, np.linalg.norm(leaf))
        ends = [value([l + s * step * direction if i == index else l for i, l in enumerate(flat)]) for s in (1, -1)]
        numeric = (ends[0] - ends[1]) / (2 * step)
        scale = max(np.linalg.norm(slopes[index]), 1)
        assert abs(numeric - np.sum(slopes[index] * direction)) < 2e-4 * scale, f"leaf {index} of {treedef}"


def test_gate_parameters_and_values_learn_only_through_the_bias():
    """At A = 0 every gate is tied: A has a slope, Δ has none yet, and no gradient is NaN."""
    layer = make("dma")
    gradients = nnx.jit(nnx.grad(lambda layer: jnp.sum(jnp.square(layer(jnp.asarray(inputs()))))))(layer)
    assert np.abs(gradients["gate"]["A"][...]).min() > 0
    np.testing.assert_array_equal(gradients["gate"]["delta"][...], 0)


@float32_products
@pytest.mark.parametrize("activation", ["exp", "linear"])
def test_untrained_dynamic_mask_is_a_sliding_window(activation):
    dynamic, sliding = make("linear" if activation == "linear" else "dma"), make("swa")
    nnx.update(sliding, nnx.state(dynamic, lambda path, _: "gate" not in path))
    x = jnp.asarray(inputs())
    np.testing.assert_array_equal(dynamic.gates(x), 1.0 if activation == "exp" else 0.0)
    for segments in (None, jnp.asarray(SEGMENTS)):
        # The values of the two layers are rounded on different ways.
        np.testing.assert_allclose(run(dynamic, x, segments), run(sliding, x, segments), rtol=0, atol=5e-6)
    visible = np.asarray(visible_keys_oracle(dynamic.gates(x), WINDOW))
    i, j = np.indices((T, T))
    for k, window in enumerate(WINDOW):
        np.testing.assert_array_equal(visible[:, k], np.broadcast_to((j <= i) & (j > i - window), (B, T, T)))


@pytest.mark.parametrize("size", [1.0, 40.0])
def test_gates_that_have_run_away_stay_finite(size):
    """An exponent of hundreds, as high learning rates make them: values and gradients are numbers, ties go later."""
    layer = make("dma")
    layer.gate.A[...] = jnp.full_like(layer.gate.A[...], size)
    layer.gate.delta[...] = 100 * size * layer.gate.delta[...]
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 31, M)), jnp.float32)
    gates = np.asarray(layer.gates(x))
    np.testing.assert_allclose(gates.max(), 2.0**40, rtol=1e-6)
    visible = np.asarray(visible_keys_oracle(jnp.asarray(gates), WINDOW))
    tied = np.flatnonzero(gates[0, :, 0] == gates.max())
    assert len(tied) > 1
    assert visible[0, 0, tied[-1], tied[-2]]
    loss, gradients = nnx.value_and_grad(lambda layer: (layer(x) ** 2).sum())(layer)
    assert np.isfinite(loss)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()


def test_gate_is_the_equation_and_picks_the_reference_keys():
    layer, x = trained(make("dma")), inputs()
    v = np.einsum("btm,mhd->bthd", x.astype(np.float64), np.asarray(layer.value[...], np.float64)).reshape(B, T, -1)
    score = np.log1p(np.exp(v @ np.asarray(layer.gate.delta[...], np.float64).T))
    expected = np.exp(np.asarray(layer.gate.A[...], np.float64) * score)
    gate = layer.gates(jnp.asarray(x))
    assert gate.dtype == jnp.float32
    # exp multiplies the relative error of its argument, here up to 16.
    np.testing.assert_allclose(gate, expected, rtol=1e-5)
    picked = visible_keys_oracle(gate, WINDOW, segment_ids=jnp.asarray(SEGMENTS))
    wanted = visible_keys_oracle(jnp.asarray(expected), WINDOW, segment_ids=jnp.asarray(SEGMENTS))
    np.testing.assert_array_equal(picked, wanted)


@float32_products
def test_a_gate_step_asks_for_a_margin():
    """δ in multiples of the step, its gradient untouched; where a coarse step ties all, a sliding window."""
    exact, stepped = (trained(make("dma", gate_step=step)) for step in (0.0, 0.25))
    x = jnp.asarray(inputs())
    np.testing.assert_array_equal(stepped.gates(x), 0.25 * np.round(np.asarray(exact.gates(x)) / 0.25))
    slopes = [nnx.grad(lambda layer: layer.gates(x).sum())(layer)["gate"]["delta"][...] for layer in (exact, stepped)]
    np.testing.assert_array_equal(*slopes)
    assert np.abs(slopes[0]).max() > 0
    sliding, coarse = make("swa"), make("dma", gate_step=1e9)
    nnx.update(sliding, nnx.state(coarse, lambda path, _: "gate" not in path))
    np.testing.assert_allclose(sliding(x), coarse(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="gate_step must be >= 0"):
        make("dma", gate_step=-0.5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("features", [1, 37, *(pytest.param(size, marks=pytest.mark.slow) for size in (256, 1031))])
def test_gate_sums_have_the_same_bits_for_any_number_of_rows(features, dtype):
    random = np.random.default_rng(features)
    rows = jnp.asarray(random.normal(size=(3, 67, features)), dtype)
    weight = jnp.asarray(random.normal(size=(5, features)), jnp.float32)
    products = jax.jit(exact_row_products)
    whole = np.asarray(products(rows, weight))
    exact = np.asarray(rows, np.float64) @ np.asarray(weight, np.float64).T
    assert np.abs(whole - exact).max() < 4e-7 * np.abs(exact).max() + 1e-7
    for start, stop in ((0, 1), (5, 7), (3, 40), (66, 67)):
        np.testing.assert_array_equal(products(rows[:, start:stop], weight), whole[:, start:stop])
        np.testing.assert_array_equal(products(rows[1:2, start:stop], weight), whole[1:2, start:stop])
    order = random.permutation(features)
    np.testing.assert_array_equal(products(rows[..., order], weight[:, order]), whole)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("features", [23, *(pytest.param(size, marks=pytest.mark.slow) for size in (256, 1031))])
def test_norms_and_values_have_the_same_bits_for_any_number_of_rows(features, dtype):
    random = np.random.default_rng(features)
    # Rows and columns of very different sizes, and a row of zeros.
    x = random.normal(size=(3, 67, features)) * 10.0 ** random.integers(-5, 5, (3, 67, 1))
    x[0, 1] = 0
    x = jnp.asarray(x, dtype)
    weight = jnp.asarray(random.normal(size=(features, 3, 10)) * 10.0 ** random.integers(-3, 3, (1, 3, 10)), dtype)
    wide, columns = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    project, square = jax.jit(exact_projection), jax.jit(lambda x: exact_mean_square(x.astype(jnp.float32)))
    values, squares = np.asarray(project(x, weight).astype(jnp.float32)), np.asarray(square(x))
    np.testing.assert_allclose(squares[..., 0], (wide**2).mean(-1), rtol=5e-7)
    exact = np.einsum("btm,mkd->btkd", wide, columns)
    norms = np.linalg.norm(wide, axis=-1)[..., None, None] * np.linalg.norm(columns, axis=0)
    assert (np.abs(values - exact) <= (2.0**-21 if dtype == jnp.float32 else 2.0**-8) * norms).all()
    for row, start, stop in ((1, 0, 1), (2, 5, 7), (0, 3, 40), (slice(0, 2), 66, 67)):
        part = x[row, start:stop].reshape(-1, stop - start, features)
        np.testing.assert_array_equal(
            project(part, weight).astype(jnp.float32), values[row, start:stop].reshape(-1, stop - start, 3, 10)
        )
        np.testing.assert_array_equal(square(part), squares[row, start:stop].reshape(-1, stop - start, 1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_heads_normed_together_have_the_bits_of_each_norm(dtype):
    random = np.random.default_rng(3)
    query, key = (jnp.asarray(random.normal(size=(B, 5, heads, D)), dtype) for heads in (H, K))
    norms = nn.RMSNorm(D, eps=1e-3), nn.RMSNorm(D, eps=1e-3)
    for norm, low in zip(norms, (0.5, -2), strict=True):
        norm.weight[...] = jnp.linspace(low, 1.5, D)
    whole = jax.jit(lambda query, key: [norm(heads) for norm, heads in zip(norms, (query, key), strict=True)])(
        query, key
    )
    together = jax.jit(lambda *heads: normed_together(*zip(heads, norms, strict=True)))
    for step in range(5):
        now = slice(step, step + 1)
        for got, want in zip(together(query[:, now], key[:, now]), whole, strict=True):
            np.testing.assert_array_equal(got.astype(jnp.float32), want[:, now].astype(jnp.float32))
    for got, want in zip(together(query, key), whole, strict=True):
        np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_broken_rows_and_columns_have_nan_values_and_no_others(rows):
    random = np.random.default_rng(rows)
    x = random.normal(size=(1, rows, 23)).astype(np.float32)
    weight = random.normal(size=(23, 3, 4)).astype(np.float32)
    project = jax.jit(exact_projection)
    whole = np.asarray(project(x, weight))
    for broken in (np.nan, np.inf, -np.inf):
        column = weight.copy()
        column[7, 1, 2] = broken
        values = np.array(project(x, column))
        assert np.isnan(values[:, :, 1, 2]).all()
        values[:, :, 1, 2] = whole[:, :, 1, 2]
        np.testing.assert_array_equal(values, whole)
        row = x.copy()
        row[0, -1, 5] = broken
        values = np.asarray(project(row, weight))
        assert np.isnan(values[0, -1]).all()
        np.testing.assert_array_equal(values[0, :-1], whole[0, :-1])


@float32_products
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("tokens", [(1, 1), (1, 2), (3, 1)])
def test_products_are_rounded_once(dtype, tokens):
    """Of a single token too, whose terms XLA would round one by one."""
    random = np.random.default_rng(len(tokens))
    heads = jnp.asarray(random.normal(size=(*tokens, 7, 31)), dtype)
    weight = jnp.asarray(random.normal(size=(7, 31, 13)), dtype)
    products = [(linear(heads, weight, axes=2), "bthd,hdm->btm", heads, weight)]
    products.append((linear(heads, weight[0]), "bthd,dm->bthm", heads, weight[0]))
    for found, subscripts, left, right in products:
        exact = np.einsum(subscripts, np.asarray(left, np.float64), np.asarray(right, np.float64))
        assert (found.shape, found.dtype) == (exact.shape, dtype)
        terms = np.einsum(subscripts, abs(np.asarray(left, np.float64)), abs(np.asarray(right, np.float64)))
        rounding = jnp.finfo(dtype).eps / 2 * abs(exact) + 3e-7 * terms
        assert (abs(np.asarray(found, np.float64) - exact) <= rounding).all()


def test_a_single_token_in_half_precision_is_a_matrix_product():
    lowered = jax.jit(linear).lower(jnp.ones((1, 1, 23), jnp.bfloat16), jnp.ones((23, 5), jnp.bfloat16)).as_text()
    assert "tensor<2x1x23xbf16>, tensor<23x5xbf16>" in lowered


def test_equal_tokens_have_equal_gates_in_any_chunk():
    """The gate's exp and softplus too: elementwise code must not depend on the shape either."""
    layer, norm = trained(make("dma")), nn.RMSNorm(M)
    rows = jnp.asarray(np.random.default_rng(8).normal(size=(11, M)), jnp.float32)
    tokens = np.random.default_rng(9).integers(0, 11, (3, 61))
    gates = nnx.jit(lambda layer, x: layer.gates(norm(x)))
    whole = np.asarray(gates(layer, rows[tokens]))
    table = {token: whole[tokens == token] for token in range(11)}
    for token, seen in table.items():
        assert len(np.unique(seen, axis=0)) == 1, f"token {token} has several gates in one pass"
    for batch, length in ((1, 1), (1, 2), (2, 7), (3, 16), (1, 32)):
        np.testing.assert_array_equal(gates(layer, rows[tokens[:batch, :length]]), whole[:batch, :length])


def test_gate_of_a_broken_value_is_nan_and_leaves_other_rows_alone():
    rows = np.random.default_rng(0).normal(size=(1, 5, 7)).astype(np.float32)
    weight = jnp.ones((2, 7))
    whole = np.asarray(exact_row_products(jnp.asarray(rows), weight))
    rows[0, 2, 3], rows[0, 4, 0] = np.nan, np.inf
    broken = np.asarray(exact_row_products(jnp.asarray(rows), weight))
    assert np.isnan(broken[0, [2, 4]]).all()
    np.testing.assert_array_equal(broken[0, [0, 1, 3]], whole[0, [0, 1, 3]])


def test_gate_memory_grows_with_the_rows_alone():
    rows, weight = jnp.zeros((1, 2048, 512)), jnp.zeros((8, 512))
    step = jax.jit(jax.value_and_grad(lambda r, w: exact_row_products(r, w).sum(), argnums=(0, 1)))
    memory = step.lower(rows, weight).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * rows.size * 4


@pytest.mark.parametrize("kind", ["dma", "swa", "mha"])
def test_packed_documents_are_separate_ones(kind):
    layer, x = trained(make(kind)), jnp.asarray(inputs())
    packed = np.asarray(run(layer, x, jnp.asarray(SEGMENTS)))
    alone = run(layer, jnp.stack([x[0, :8], x[0, 8:16]]))
    np.testing.assert_allclose(packed[0, :16].reshape(2, 8, M), alone, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(packed[0, 16:], 0)
    louder = x.at[0, 2].add(1000.0)
    np.testing.assert_array_equal(run(layer, louder, jnp.asarray(SEGMENTS))[0, 8:], packed[0, 8:])


def test_bfloat16_computes_in_bfloat16_with_float32_parameters_and_gates():
    layer = trained(make("dma", dtype=jnp.bfloat16))
    x = jnp.asarray(inputs())
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float32")}
    out = run(layer, x)
    assert out.dtype == jnp.bfloat16
    assert layer.gates(x).dtype == jnp.float32
    wide = run(trained(make("dma")), x)
    assert float(jnp.abs(out.astype(jnp.float32) - wide).mean()) < 0.02 * float(jnp.abs(wide).mean()) + 0.01


def test_rms_norm_is_its_equation_and_float32_inside():
    norm = nn.RMSNorm(M, eps=1e-3)
    norm.weight[...] = jnp.linspace(-1, 2, M)
    x = inputs()
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-3) * np.linspace(-1, 2, M)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=2e-6, atol=1e-6)
    # The squares of these overflow float16.
    large = norm(jnp.full((1, M), 6e4, jnp.float16))
    assert large.dtype == jnp.float16
    np.testing.assert_allclose(large[0], np.linspace(-1, 2, M), rtol=2e-3, atol=1e-3)


@float32_products
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_norm_before_projections_has_the_values_and_slopes_of_its_equation(dtype):
    # A row of zeros, and one of so little that eps is most of its mean square, and of its heads'.
    x = jnp.asarray(inputs()).at[0, 3].set(0).at[1, 5].multiply(1e-3).astype(dtype)
    norm, of_query, of_key = (nn.RMSNorm(size, eps=eps) for size, eps in ((M, 1e-3), (D, 2e-3), (D, 5e-4)))
    for seed, each in enumerate((norm, of_query, of_key)):
        each.weight[...] = jax.random.uniform(jax.random.key(seed), each.weight.shape, minval=-1, maxval=2)
    shapes = ((M, H, D), (M, K, D), (M, K, D), (M, 31), (M, 31), (M, 7))
    head_norms = (of_query, of_key, None, None, None, None)
    weights = [0.3 * jax.random.normal(jax.random.key(9 + i), shape).astype(dtype) for i, shape in enumerate(shapes)]

    def equation(x, norm, head_norms, weights):
        def normed(x, layer, eps):
            return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps) * layer

        out = [jnp.tensordot(normed(x, norm, 1e-3), weight, 1) for weight in weights]
        return (normed(out[0], head_norms[0], 2e-3), normed(out[1], head_norms[1], 5e-4), *out[2:])

    def pulled(function, *operands):
        out, pull = jax.vjp(function, *operands)
        cotangents = [np.random.default_rng(70 + i).normal(size=y.shape) for i, y in enumerate(out)]
        return out, *pull(tuple(jnp.asarray(d, y.dtype) for d, y in zip(cotangents, out, strict=True)))

    def ours(x, norm, head_norms, weights):
        return norm.project(x, *map(Projection, weights, head_norms, [i == 2 for i in range(len(weights))]))

    got = jax.tree.leaves(jax.jit(functools.partial(pulled, ours))(x, norm, head_norms, weights))
    values = jax.tree.leaves(jax.jit(ours)(x, norm, head_norms, weights))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (x, norm, head_norms, weights))
        plain = wide[0], wide[1].weight[...], [n if n is None else n.weight[...] for n in wide[2]], wide[3]
        expected = jax.tree.leaves(pulled(equation, *plain))
        assert expected[0].dtype == np.float64
    assert len(got) == len(expected)
    tolerance = 2e-5 if dtype == jnp.float32 else 2e-2
    for index, (left, right) in enumerate(zip(got, expected, strict=True)):
        for ours_here in [left, *values[index : index + 1]]:
            bound = tolerance * np.abs(right).max()
            np.testing.assert_allclose(np.asarray(ours_here, np.float64), right, rtol=tolerance, atol=bound)


def test_rope_turns_pairs_and_depends_on_distance_alone():
    q, k = (jnp.asarray(np.random.default_rng(s).normal(size=(1, 1, 1, D)), jnp.float32) for s in (0, 1))

    def product(query_at, key_at):
        turned = (nn.apply_rope(x, jnp.full((1, 1), at), theta=50.0) for x, at in ((q, query_at), (k, key_at)))
        return float(jnp.sum(next(turned) * next(turned)))

    assert product(11, 4) == pytest.approx(product(107, 100), abs=1e-5)
    assert abs(product(11, 4) - product(11, 5)) > 1e-3
    np.testing.assert_allclose(nn.apply_rope(q, jnp.zeros((1, 1), jnp.int32)), q, atol=1e-7)
    with pytest.raises(ValueError, match="head_dim must be even"):
        nn.apply_rope(q[..., :7], jnp.zeros((1, 1), jnp.int32))


@float32_products
def test_swiglu_is_its_equation():
    mlp = nn.SwiGLU(M, 31, init_std=0.3, rngs=nnx.Rngs(1))
    x = inputs().astype(np.float64)
    gate, up, down = (
        np.asarray(w[...], np.float64) for w in (mlp.gate_projection, mlp.up_projection, mlp.down_projection)
    )
    hidden = x @ gate
    expected = (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), expected, rtol=2e-5, atol=2e-5)


def moe(experts=49, chosen=5, **changes):
    return nn.CDMoE(M, 29, experts, chosen, init_std=0.3, rngs=nnx.Rngs(2), **changes)


def moe_reference(layer, x, segments):
    """CDMoE one token at a time, all expert scores written out."""
    router = np.asarray(layer.router[...], np.float64)
    down, up = (np.asarray(w[...], np.float64) for w in (layer.expert_down, layer.expert_up))
    out = np.asarray(layer.shared(jnp.asarray(x)), np.float64)
    experts, side = down.shape[0], router.shape[-1]
    counts, mean = np.zeros(experts), np.zeros(experts)
    for b, t in np.ndindex(*x.shape[:2]):
        row = x[b, t].astype(np.float64)
        z = np.einsum("m,msk->sk", row, router)
        scores = np.array([z[0, e // side] + z[1, e % side] for e in range(experts)])
        best = np.argsort(-scores)[: layer.chosen]
        gates = np.exp(scores[best] - scores[best].max())
        gates /= gates.sum()
        for e, g in zip(best, gates, strict=True):
            neuron = down[e] @ row
            out[b, t] += g * neuron / (1 + np.exp(-neuron)) * up[e]
        if segments[b, t]:
            counts[best] += 1
            mean += np.exp(scores) / np.exp(scores).sum()
    tokens = (segments != 0).sum()
    return out, experts * np.sum(counts / (tokens * layer.chosen) * mean / tokens)


@pytest.mark.parametrize(("experts", "chosen"), [(49, 5), (9, 9), (16, 7), (1, 1)])
def test_cdmoe_is_a_loop_over_tokens(experts, chosen):
    layer, x = moe(experts, chosen), inputs()
    expected, balance = moe_reference(layer, x, SEGMENTS)
    out, auxiliary = run(layer, jnp.asarray(x), jnp.asarray(SEGMENTS))
    np.testing.assert_allclose(out, expected, rtol=3e-5, atol=3e-5)
    assert float(auxiliary) == pytest.approx(balance, rel=1e-5)
    broken, again = run(layer, jnp.where(jnp.asarray(SEGMENTS)[..., None], x, jnp.nan), jnp.asarray(SEGMENTS))
    np.testing.assert_array_equal(again, auxiliary)
    np.testing.assert_array_equal(np.where(SEGMENTS[..., None], broken, 0), np.where(SEGMENTS[..., None], out, 0))


def test_cdmoe_keeps_its_types_where_float64_is_on():
    layer, x = moe(), jnp.asarray(inputs())
    with jax.enable_x64(True):
        for segments in (None, jnp.asarray(SEGMENTS)):
            out, auxiliary = jax.eval_shape(layer, x, segments)
            assert (out.dtype, auxiliary.dtype) == (jnp.float32, jnp.float32)


def test_cdmoe_in_chunks_is_cdmoe_at_once(monkeypatch):
    layer, x = moe(), jnp.asarray(inputs())

    def total(layer, x):
        out, auxiliary = layer(x, jnp.asarray(SEGMENTS))
        return jnp.sum(jnp.sin(out)) + auxiliary, out

    whole = nnx.jit(nnx.value_and_grad(total, argnums=(0, 1), has_aux=True))(layer, x)
    monkeypatch.setattr("dmattn_jax.nn.moe.GATHERED_ELEMENTS", 4 * layer.chosen * M * B)
    cut = nnx.jit(nnx.value_and_grad(total, argnums=(0, 1), has_aux=True))(layer, x)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_cdmoe_balance_loss_is_one_when_uniform_and_falls_by_its_gradient():
    layer, x = moe(), jnp.asarray(inputs())
    layer.router[...] *= 3
    before, slope = nnx.jit(nnx.value_and_grad(lambda layer: layer(x)[1]))(layer)
    assert float(before) > 1.2
    assert np.abs(slope["router"][...]).max() > 0
    layer.router[...] -= 0.5 * slope["router"][...]
    assert float(run(layer, x)[1]) < float(before)
    layer.router[...] = jnp.zeros_like(layer.router[...])
    # Uniform probabilities: whatever the choices, Σ f · P · E = Σ f = 1.
    assert float(run(layer, x)[1]) == pytest.approx(1, rel=1e-6)


def test_cdmoe_gathers_a_bounded_number_of_rows():
    layer = nn.CDMoE(64, 32, 1024, 32, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def loss(state, x):
        out, auxiliary = nnx.merge(graph, state)(x)
        return out.sum() + auxiliary

    x = jnp.zeros((1, 16384, 64))
    memory = jax.jit(jax.grad(loss)).lower(state, x).compile().memory_analysis()
    # All rows at once would be 16384 · 32 · 64 floats, 134 MB, several times over.
    assert memory.temp_size_in_bytes < 100 * 2**20


@float32_products
@pytest.mark.parametrize("kind", ["dma", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("swa", "mha"))])
def test_layer_runs_in_jit_grad_scan_and_remat(kind):
    x = jnp.asarray(inputs())
    layers = [trained(make(kind, rngs=nnx.Rngs(seed))) for seed in range(3)]
    stacked = nnx.merge(nnx.split(layers[0])[0], jax.tree.map(lambda *l: jnp.stack(l), *map(nnx.state, layers)))

    def one_by_one(layers, x):
        for layer in layers:
            x = x + layer(x)
        return jnp.sum(jnp.square(x))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    @nnx.remat
    def body(x, layer):
        return x + layer(x)

    value, gradient = nnx.jit(nnx.value_and_grad(lambda stacked, x: jnp.sum(jnp.square(body(x, stacked)))))(stacked, x)
    expected, slopes = nnx.jit(nnx.value_and_grad(one_by_one))(nnx.List(layers), x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    separate = [slopes[index] for index in range(3)]
    for path, leaf in nnx.to_flat_state(gradient):
        parts = np.stack([np.asarray(dict(nnx.to_flat_state(part))[path][...]) for part in separate])
        np.testing.assert_allclose(leaf[...], parts, rtol=2e-4, atol=2e-4 * np.abs(parts).max(), err_msg=str(path))


@pytest.mark.slow
def test_layer_runs_inside_linen():
    class Linen(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            options = {"hidden_size": M, "num_heads": H, "num_kv_heads": K, "head_dim": D, "window": T}
            return nnx.bridge.to_linen(nn.DynamicMaskAttention, **options, name="attention")(x)

    x = jnp.asarray(inputs())
    variables = Linen().init(jax.random.key(0), x)
    weights = flax.linen.unbox(variables)["params"]["attention"]
    layer = nn.DynamicMaskAttention(M, H, K, D, window=T, rngs=nnx.Rngs(0))
    nnx.update(layer, jax.tree.map(jnp.asarray, weights))
    np.testing.assert_allclose(jax.jit(Linen().apply)(variables, x), run(layer, x), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(jnp.square(Linen().apply(v, x)))))(variables)
    assert float(jnp.abs(flax.linen.unbox(gradient)["params"]["attention"]["gate"]["A"]).min()) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 4}, "num_heads must be a multiple of num_kv_heads, got num_heads=6, num_kv_heads=4"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"window": 0}, "window must be >= 1, got 0"),
        ({"window": (3, 5)}, "expected 3 values, got 2"),
        ({"gate_activation": "tanh"}, "gate_activation must be 'exp' or 'linear', got 'tanh'"),
    ],
)
def test_layer_refuses_what_cannot_work(changes, message):
    options = {"hidden_size": M, "num_heads": H, "num_kv_heads": K, "head_dim": D, "window": WINDOW} | changes
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        nn.DynamicMaskAttention(**options, rngs=nnx.Rngs(0))


def test_cdmoe_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="num_experts must be a square number >= 1, got 50: use 49"):
        moe(experts=50)
    with pytest.raises(ValueError, match="num_experts_per_token must be in 1 … 49, got 50"):
        moe(chosen=50)
