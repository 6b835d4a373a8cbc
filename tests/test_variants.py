"""Latent and native sparse attention against their recipes, written out in NumPy float64 one query at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmattn_jax import nn
from dmattn_jax.nn import block_attention

pytestmark = pytest.mark.usefixtures("float32_products")

B, T, M, H, K, C = 2, 41, 19, 6, 3, 7
D = {"mla": 12, "nsa": 10}
BLOCK, SELECTED, COUNT, WINDOW = 3, 6, 2, (5, 3, 7)
# Documents that end inside a block and at its end, one shorter than any block, padding inside and at the end.
SEGMENTS = np.array([[1] * 25 + [2] * 12 + [0] * 4, [3] * 2 + [0] + [1] * 9 + [0] * 2 + [1] * 9 + [2] * 18], np.int32)
KINDS = ("mla", "nsa")


def make(kind, **changes):
    sizes = {"hidden_size": M, "num_heads": H, "head_dim": D[kind], "latent_dim": C, "init_std": 0.3}
    if kind == "nsa":
        sizes |= {"num_kv_heads": K, "window": WINDOW, "compression_block": BLOCK, "selection_block": SELECTED}
        sizes |= {"selected_blocks": COUNT}
    kinds = {"mla": nn.MultiHeadLatentAttention, "nsa": nn.NativeSparseAttention}
    layer = kinds[kind](**sizes | changes, rngs=nnx.Rngs(5))
    if layer.qk_norm:
        layer.query_norm.weight[...] = jnp.linspace(0.5, 1.5, layer.query_norm.weight.size)
        layer.key_norm.weight[...] = jnp.linspace(1.7, 0.6, layer.key_norm.weight.size)
    if kind == "nsa":
        # Gates of all branches, as after training.
        layer.branch[...] = jnp.asarray(np.random.default_rng(2).normal(size=layer.branch.shape), jnp.float32)
    return layer


def inputs(seed=0, length=T) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(B, length, M)).astype(np.float32)


@nnx.jit
def run(layer, x, segment_ids=None):
    return layer(x, segment_ids)


@nnx.jit
def decode(layer, x, cache, segment_ids=None):
    return layer.decode(x, cache, segment_ids)


def normed(rows, weight):
    return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6) * weight


def rotated(rows):
    """Rows of one document [t, …, D] by their position; half-split."""
    out, size = np.empty_like(rows), rows.shape[-1]
    for t in range(len(rows)):
        for i in range(size // 2):
            a = t * 10_000.0 ** (-2 * i / size)
            u, v = rows[t, ..., i], rows[t, ..., i + size // 2]
            out[t, ..., i] = u * math.cos(a) - v * math.sin(a)
            out[t, ..., i + size // 2] = v * math.cos(a) + u * math.sin(a)
    return out


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def latent_document(w, x):
    """[t, M] -> [t, M]"""
    head_dim = D["mla"]
    latent = normed(x @ w["compress"], w["latent_norm/weight"])
    q = normed(np.einsum("tm,mhd->thd", x, w["query"]), w["query_norm/weight"])
    shared = np.repeat((x @ w["rope_key"])[:, None], H, axis=1)
    k = normed(np.concatenate([np.einsum("tc,chd->thd", latent, w["key"]), shared], -1), w["key_norm/weight"])
    q, k = (np.concatenate([rows[..., :head_dim], rotated(rows[..., head_dim:])], -1) for rows in (q, k))
    v = np.einsum("tc,chd->thd", latent, w["value"])
    out = np.zeros((len(x), H, head_dim))
    for h in range(H):
        for i in range(len(x)):
            out[i, h] = softmax(k[: i + 1, h] @ q[i, h] / math.sqrt(1.5 * head_dim)) @ v[: i + 1, h]
    return np.einsum("thd,hdm->tm", out, w["out"])


def sparse_document(w, x):
    head_dim, group = D["nsa"], H // K
    q = normed(np.einsum("tm,mhd->thd", x, w["query"]), w["query_norm/weight"])
    k = normed(np.einsum("tm,mhd->thd", x, w["key"]), w["key_norm/weight"])
    v = np.einsum("tm,mhd->thd", x, w["value"])
    gate = 1 / (1 + np.exp(-(np.einsum("tm,mnh->tnh", x, w["branch"]) + w["branch_bias"])))
    q_turned, k_turned = rotated(q), rotated(k)
    out = np.zeros((len(x), H, head_dim))
    for kv in range(K):
        rows = {0: [w["memory"][0, kv]], 1: [w["memory"][1, kv]]}
        for block in range(len(x) // BLOCK):
            for which, source in ((0, k), (1, v)):
                flat = (source[block * BLOCK : (block + 1) * BLOCK, kv] + w["block_position"][which]).reshape(-1)
                hidden = np.maximum(flat @ w["compress_in"][which].reshape(BLOCK * head_dim, C), 0)
                rows[which].append(hidden @ w["compress_out"][which])
        for i in range(len(x)):
            ended = (i + 1) // BLOCK
            heads = range(kv * group, (kv + 1) * group)
            logits = [np.array(rows[0][: ended + 1]) @ q[i, h] / math.sqrt(head_dim) for h in heads]
            importance = np.mean(logits, axis=0)[1:]
            per = SELECTED // BLOCK
            past = range(i // SELECTED)
            score = [importance[block * per : (block + 1) * per].mean() for block in past]
            blocks = [*sorted(past, key=lambda block: -score[block])[:COUNT], i // SELECTED]
            chosen = [j for block in blocks for j in range(block * SELECTED, (block + 1) * SELECTED) if j <= i]
            near = range(max(0, i - WINDOW[kv] + 1), i + 1)
            for h, compressed in zip(heads, logits, strict=True):
                branches = [softmax(compressed) @ np.array(rows[1][: ended + 1])]
                branches += [
                    softmax(k_turned[list(keys), kv] @ q_turned[i, h] / math.sqrt(head_dim)) @ v[list(keys), kv]
                    for keys in (chosen, near)
                ]
                out[i, h] = sum(gate[i, n, h] * branch for n, branch in enumerate(branches))
    return np.einsum("thd,hdm->tm", out, w["out"])


def reference(kind, layer, x, segments) -> np.ndarray:
    w = {"/".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(layer))}
    document = latent_document if kind == "mla" else sparse_document
    out = np.zeros(x.shape)
    for b in range(len(x)):
        for identity in set(segments[b].tolist()) - {0}:
            # Padding inside a document has no position in it.
            here = np.flatnonzero(segments[b] == identity)
            out[b, here] = document(w, x[b, here].astype(np.float64))
    return out


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("packed", [False, True])
def test_layer_is_its_recipe(kind, packed):
    layer, x = make(kind), inputs()
    segments = SEGMENTS if packed else np.ones((B, T), np.int32)
    out = run(layer, jnp.asarray(x), jnp.asarray(segments) if packed else None)
    np.testing.assert_allclose(out, reference(kind, layer, x, segments), rtol=3e-5, atol=3e-5)


def test_gradients_are_the_slopes_of_the_recipe(kind):
    layer, x, segments = make(kind), inputs(), SEGMENTS
    cotangent = inputs(seed=1).astype(np.float64)

    def loss(layer, x):
        return jnp.sum(layer(x, jnp.asarray(segments)) * cotangent.astype(np.float32))

    gradients, dx = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(layer, jnp.asarray(x))
    graph, state = nnx.split(layer)
    flat = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state)] + [x.astype(np.float64)]
    slopes = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradients)] + [np.asarray(dx, np.float64)]
    random, treedef = np.random.default_rng(3), jax.tree.structure(state)

    def value(leaves):
        moved = nnx.merge(graph, jax.tree.unflatten(treedef, leaves[:-1]))
        return np.sum(reference(kind, moved, leaves[-1], segments) * cotangent)

    for index, leaf in enumerate(flat):
        direction = random.normal(size=leaf.shape)
        direction /= np.linalg.norm(direction)
        step = 1e-6 * max(1, np.linalg.norm(leaf))
        ends = [value([l + s * step * direction if i == index else l for i, l in enumerate(flat)]) for s in (1, -1)]
        numeric = (ends[0] - ends[1]) / (2 * step)
        scale = max(np.linalg.norm(slopes[index]), 1)
        assert abs(numeric - np.sum(slopes[index] * direction)) < 2e-4 * scale, f"leaf {index} of {treedef}"


def test_later_tokens_change_no_earlier_output(kind):
    layer, x = make(kind), inputs()
    before = np.asarray(run(layer, jnp.asarray(x)))
    for cut in (1, BLOCK, SELECTED, 2 * SELECTED - 1, 29, T - 1):
        changed = x.copy()
        changed[:, cut:] = 3 * inputs(seed=9)[:, cut:]
        after = np.asarray(run(layer, jnp.asarray(changed)))
        np.testing.assert_array_equal(after[:, :cut], before[:, :cut])
        assert (after[:, cut:] != before[:, cut:]).any()


def test_documents_and_padding_do_not_leak(kind):
    layer, segments = make(kind), jnp.asarray(SEGMENTS)
    x = jnp.asarray(inputs())
    before = np.asarray(run(layer, x, segments))
    np.testing.assert_array_equal(before[np.asarray(segments) == 0], 0)
    padding = jnp.where((segments == 0)[..., None], jnp.nan, x)
    np.testing.assert_array_equal(run(layer, padding, segments), before)
    louder = x.at[0, 2].add(1000.0)
    np.testing.assert_array_equal(run(layer, louder, segments)[0, 25:], before[0, 25:])


@pytest.mark.parametrize("splits", [(SELECTED, 23), pytest.param(range(1, T), marks=pytest.mark.slow)])
def test_prefill_and_decoding_at_every_split_is_the_whole_pass(kind, splits):
    layer, x = make(kind), jnp.asarray(inputs())
    whole = np.asarray(run(layer, x))
    cache, steps = layer.init_cache(B, T), []
    for i in range(T):
        out, cache = decode(layer, x[:, i : i + 1], cache)
        steps.append(out)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), whole, atol=1e-5)
    empty = layer.init_cache(B, T)
    for split in splits:
        # Padded to one length, so that one program serves every split; the padding of one row comes first.
        head, cache = decode(layer, x, empty, jnp.asarray(np.arange(T) < split, jnp.int32)[None].repeat(B, 0))
        late = np.arange(T) >= split
        rest = jnp.asarray(np.stack([late, np.roll(late, -split)]), jnp.int32)
        tail, after = decode(layer, jnp.stack([x[0], jnp.roll(x[1], -split, axis=0)]), cache, rest)
        np.testing.assert_allclose(head[:, :split], whole[:, :split], atol=1e-5, err_msg=f"split {split}")
        np.testing.assert_allclose(tail[0, split:], whole[0, split:], atol=1e-5, err_msg=f"split {split}")
        np.testing.assert_allclose(tail[1, : T - split], whole[1, split:], atol=1e-5, err_msg=f"split {split}")
        np.testing.assert_array_equal(tail[0, :split], 0)
        np.testing.assert_array_equal(after.length, T)


def test_a_cache_can_be_donated(kind):
    """No array is in it twice."""
    layer = make(kind)
    step = jax.jit(lambda layer, x, cache: nnx.merge(*layer).decode(x, cache), donate_argnums=2)
    out, cache = step(nnx.split(layer), jnp.asarray(inputs()), layer.init_cache(B, T))
    np.testing.assert_allclose(out, run(layer, jnp.asarray(inputs())), atol=1e-5)
    assert cache.length.tolist() == [T, T]


def test_latent_cache_holds_the_latent_row_and_the_shared_key_alone():
    cache = make("mla").init_cache(B, T)
    assert sum(leaf.size for leaf in jax.tree.leaves(cache)) == B * T * (C + D["mla"] // 2) + B


def test_latent_attention_without_rotation_or_norms_is_plain_dense_attention():
    layer, x = make("mla", rope_theta=None, qk_norm=False), inputs()
    turned = np.asarray(run(layer, jnp.asarray(x[:, ::-1])))
    assert not hasattr(layer, "query_norm")
    # Without positions the last query sees a set: its order does not matter.
    shuffled = x[:, [*np.random.default_rng(0).permutation(T - 1), T - 1]]
    last = run(layer, jnp.asarray(shuffled))[:, -1]
    np.testing.assert_allclose(last, run(layer, jnp.asarray(x))[:, -1], atol=1e-5)
    assert np.abs(turned[:, -1] - np.asarray(last)).max() > 1e-3


def test_native_sparse_starts_as_mostly_a_sliding_window():
    layer = nn.NativeSparseAttention(M, H, K, D["nsa"], latent_dim=C, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.branch[...], 0)
    np.testing.assert_array_equal(layer.branch_bias[...], np.repeat([[-2.0], [-2.0], [2.0]], H, axis=1))
    sizes = (layer.compression_block, layer.selection_block, layer.selected_blocks, set(layer.windows))
    assert sizes == (32, 64, 16, {512})


@pytest.mark.slow
@pytest.mark.parametrize(
    "cut", [{"CHUNK_ELEMENTS": 7 * B * H * T}, {"SHORTEST_PART": 9}, {"SHORTEST_PART": 2, "PARTS": T // 2}]
)
def test_native_sparse_in_pieces_is_native_sparse_at_once(monkeypatch, cut):
    """In the last case pieces are shorter than a block of either kind."""
    layer, x = make("nsa"), jnp.asarray(inputs())

    def total(layer, x):
        out = layer(x, jnp.asarray(SEGMENTS))
        return jnp.sum(jnp.sin(out)), out

    whole = nnx.jit(nnx.value_and_grad(total, argnums=(0, 1), has_aux=True))(layer, x)
    for name, value in cut.items():
        monkeypatch.setattr(block_attention, name, value)
    pieces = nnx.jit(nnx.value_and_grad(total, argnums=(0, 1), has_aux=True))(layer, x)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_native_sparse_training_memory_grows_with_the_length_alone(monkeypatch):
    monkeypatch.setattr(block_attention, "CHUNK_ELEMENTS", 2**16)
    layer = nn.NativeSparseAttention(16, 2, 1, 16, latent_dim=4, window=64, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def memory(length):
        x = jax.ShapeDtypeStruct((1, length, 16), jnp.float32)
        gradient = jax.jit(jax.grad(lambda state, x: jnp.square(nnx.merge(graph, state)(x)).sum()))
        return gradient.lower(state, x).compile().memory_analysis().temp_size_in_bytes

    # A T×T array of one byte would be 67 MB at 8,192.
    short, long = memory(2048), memory(8192)
    assert long < 4.5 * short
    assert long < 60 * 2**20


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mla", {"head_dim": 6}, "head_dim must be a multiple of 4"),
        ("mla", {"latent_dim": 0}, "latent_dim must be >= 1, got 0"),
        ("nsa", {"selection_block": 7}, "selection_block must be a multiple of compression_block, got 7 and 3"),
        ("nsa", {"selected_blocks": 0}, "selected_blocks must be an int >= 1, got 0"),
        ("nsa", {"num_kv_heads": 4}, "num_heads must be a multiple of num_kv_heads"),
        ("nsa", {"window": 0}, "window must be >= 1, got 0"),
    ],
)
def test_layer_refuses_what_cannot_work(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **changes)


@pytest.mark.slow
def test_bfloat16_stays_near_float32(kind):
    x = jnp.asarray(inputs())
    half, wide = run(make(kind, dtype=jnp.bfloat16), x), run(make(kind), x)
    assert half.dtype == jnp.bfloat16
    error = jnp.sort(jnp.abs(half.astype(jnp.float32) - wide).reshape(-1))
    # A rounded importance may select another block for a few queries; most stay.
    assert float(error[: int(0.9 * error.size)].max()) < 0.1 * float(jnp.abs(wide).mean())
