"""The bounded caches hold exactly what attention can see, however the tokens come in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmattn_jax import cache as cache_module
from dmattn_jax import nn
from dmattn_jax.cache import DenseCache, WindowCache
from dmattn_jax.oracle import visible_keys_oracle
from pallas_kernels.order import sortable

B, K, D, N = 2, 3, 5, 29
WINDOWS = (7, 1, 11)


def gates(kind: str) -> np.ndarray:
    random = np.random.default_rng(5)
    noise = random.normal(size=(B, N, K)).astype(np.float32)
    ramp = np.broadcast_to(np.arange(N, dtype=np.float32)[:, None], (B, N, K))
    kinds = {
        "random": noise,
        "tied": np.zeros_like(noise),
        "few": np.round(noise),
        "rising": ramp.copy(),
        "falling": -ramp,
        "refused": np.where(random.random((B, N, K)) < 0.4, -np.inf, noise).astype(np.float32),
    }
    return kinds[kind]


def rows(seed=0) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(seed)
    return tuple(jnp.asarray(random.normal(size=(B, N, K, D)), jnp.float32) for _ in range(2))


def held(cache: WindowCache, row: int, head: int) -> list[int]:
    position = np.asarray(cache.position[row, head])
    return sorted(position[position >= 0].tolist())


def check_content(cache: WindowCache, gate, key, value, length: int) -> None:
    """Every slot holds the key, value and gate of its position, and the positions are the oracle's."""
    visible = np.asarray(visible_keys_oracle(jnp.asarray(gate), WINDOWS))
    for b, k in np.ndindex(B, K):
        wanted = np.flatnonzero(visible[b, k, length - 1]).tolist() if length else []
        assert held(cache, b, k) == wanted, f"row {b}, head {k}, after {length} tokens"
        for slot, position in enumerate(np.asarray(cache.position[b, k])):
            if position >= 0:
                assert slot < WINDOWS[k]
                np.testing.assert_array_equal(cache.keys[b, k, slot], key[b, position, k])
                np.testing.assert_array_equal(cache.values[b, k, slot], value[b, position, k])
                assert cache.gate[b, k, slot] == gate[b, position, k]
            else:
                assert cache.gate[b, k, slot] == -np.inf


KINDS = ["random", "tied", "few", "rising", "falling", "refused"]


@pytest.fixture(params=[0, 6], ids=["exact", "spare"])
def _spare_slots(request, monkeypatch):
    """As on devices whose kernel takes slots in multiples of some number."""
    monkeypatch.setattr(cache_module, "room_for", lambda keys, *_: keys + request.param)


@pytest.mark.usefixtures("_spare_slots")
@pytest.mark.parametrize("kind", KINDS)
def test_slots_are_the_visible_keys_at_every_step(kind):
    gate, (key, value) = gates(kind), rows()
    cache = WindowCache.create(B, WINDOWS, K, D)
    append = jax.jit(WindowCache.append)
    token = jnp.ones((B, 1), bool)
    for i in range(N):
        cache = append(cache, key[:, i : i + 1], value[:, i : i + 1], jnp.asarray(gate[:, i : i + 1]), token)
        check_content(cache, gate, key, value, i + 1)
    np.testing.assert_array_equal(cache.length, N)


@pytest.mark.usefixtures("_spare_slots")
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_leave_what_single_tokens_leave(kind):
    gate, (key, value) = gates(kind), rows()
    append = jax.jit(WindowCache.append)
    cache, start = WindowCache.create(B, WINDOWS, K, D), 0
    for size in (13, 1, 2, 13):
        chunk = slice(start, start + size)
        token = jnp.ones((B, size), bool)
        cache = append(cache, key[:, chunk], value[:, chunk], jnp.asarray(gate[:, chunk]), token)
        start += size
        check_content(cache, gate, key, value, start)


@pytest.mark.usefixtures("_spare_slots")
@pytest.mark.parametrize("last", [2**24 + 9, 2**31 - 1])
def test_positions_up_to_the_greatest_are_as_good_as_any(last):
    """Where float32 no longer knows every position, and to the end of int32: ties still go to the later key."""
    gate, (key, value) = gates("few"), rows()
    append = jax.jit(WindowCache.append)
    near = WindowCache.create(B, WINDOWS, K, D)
    far = dataclasses.replace(near, length=near.length + (last - N))
    for chunk in (slice(0, 7), *(slice(i, i + 1) for i in range(7, N))):
        token = jnp.ones((B, chunk.stop - chunk.start), bool)
        near, far = (
            append(cache, key[:, chunk], value[:, chunk], jnp.asarray(gate[:, chunk]), token) for cache in (near, far)
        )
    np.testing.assert_array_equal(far.length, last)
    np.testing.assert_array_equal(far.position, jnp.where(near.position >= 0, near.position + (last - N), -1))
    for name in ("keys", "values", "gate"):
        np.testing.assert_array_equal(getattr(far, name), getattr(near, name))


@pytest.mark.usefixtures("_spare_slots")
def test_a_layer_decodes_in_any_chunks():
    layer = nn.DynamicMaskAttention(12, num_heads=4, num_kv_heads=2, head_dim=6, window=(3, 5), rngs=nnx.Rngs(0))
    layer.gate.A[...] = jnp.asarray([0.7, -1.3])
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 16, 12)), jnp.float32)
    cache, parts = layer.init_cache(2, 16), []
    for chunk in jnp.split(x, np.cumsum([7, 1, 1, 5, 1]), axis=1):
        out, cache = layer.decode(chunk, cache)
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), layer(x), rtol=0, atol=2e-6)


def test_padding_takes_no_place_and_rows_have_their_own_lengths():
    gate, (key, value) = gates("random"), rows()
    token = np.random.default_rng(1).random((B, N)) < 0.6
    padded = WindowCache.create(B, WINDOWS, K, D)
    # Padding carries the best gates there are: it must not matter.
    loud = jnp.where(token[:, :, None], gate, np.inf)
    for start, stop in ((0, 17), (17, 18), (18, 19), (19, N)):
        chunk = slice(start, stop)
        padded = padded.append(key[:, chunk], value[:, chunk], loud[:, chunk], jnp.asarray(token[:, chunk]))
    np.testing.assert_array_equal(padded.length, token.sum(axis=1))
    assert len(set(token.sum(axis=1))) == B
    for b in range(B):
        kept = np.flatnonzero(token[b])
        visible = np.asarray(visible_keys_oracle(jnp.asarray(gate[b : b + 1, kept]), WINDOWS))[0, :, -1]
        for k in range(K):
            assert held(padded, b, k) == np.flatnonzero(visible[k]).tolist()
            for slot, position in enumerate(np.asarray(padded.position[b, k])):
                if position >= 0:
                    np.testing.assert_array_equal(padded.keys[b, k, slot], key[b, kept[position], k])


def test_key_weaker_than_all_held_is_dropped_at_once():
    cache = WindowCache.create(1, 2, 1, 1)
    one, token = jnp.ones((1, 1, 1, 1)), jnp.ones((1, 1), bool)
    for gate in (3.0, 2.0, 1.0):
        cache = cache.append_one(one, one, jnp.full((1, 1, 1), gate), token)
    assert held(cache, 0, 0) == [0, 1]
    cache = cache.append_one(one, one, jnp.full((1, 1, 1), 2.0), token)
    assert held(cache, 0, 0) == [0, 3], "of equal gates the earlier key leaves"
    assert int(cache.length[0]) == 4


def test_gate_order_is_the_order_of_floats():
    values = np.array([-np.inf, -3e38, -1.0, -1e-40, 0.0, 1e-40, 2.0, 3e38, np.inf, np.nan], np.float32)
    ranks = np.asarray(sortable(jnp.asarray(values)), np.int64)
    assert (np.diff(ranks) >= 0).all()
    assert (np.diff(ranks)[[0, 1, 5, 6, 7, 8]] > 0).all()
    assert sortable(jnp.float32(-0.0)) == sortable(jnp.float32(0.0))
    assert sortable(-jnp.float32(np.nan)) == sortable(jnp.float32(np.nan)) < np.iinfo(np.int32).max


def test_capacity_never_exceeds_what_can_come():
    cache = WindowCache.create(1, (1000, 3), 2, D, max_length=17)
    assert cache.keys.shape == (1, 2, 17, D)
    assert cache.windows == (17, 3)


def test_dense_cache_holds_all_tokens_in_order():
    key, value = rows()
    token = np.random.default_rng(2).random((B, N)) < 0.7
    cache = DenseCache.create(B, N, K, D)
    for start, stop in ((0, 13), (13, 14), (14, N)):
        chunk = slice(start, stop)
        cache = cache.append(key[:, chunk], value[:, chunk], jnp.asarray(token[:, chunk]))
    np.testing.assert_array_equal(cache.length, token.sum(axis=1))
    for b in range(B):
        np.testing.assert_array_equal(cache.keys[b, : cache.length[b]], key[b, token[b]])
        np.testing.assert_array_equal(cache.values[b, : cache.length[b]], value[b, token[b]])
        np.testing.assert_array_equal(cache.keys[b, int(cache.length[b]) :], 0)


def test_caches_are_pytrees_with_static_windows():
    cache = WindowCache.create(B, WINDOWS, K, D)
    leaves, structure = jax.tree.flatten(cache)
    assert len(leaves) == 5
    assert jax.tree.unflatten(structure, leaves).windows == WINDOWS
    with pytest.raises(ValueError, match="max_length must be >= 1, got 0"):
        DenseCache.create(B, 0, K, D)
