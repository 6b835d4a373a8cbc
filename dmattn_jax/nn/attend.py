"""Attention as the layers call it: on the active device mesh, and against a decoding cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmattn_jax.attention import causal_attention, dynamic_mask_attention
from dmattn_jax.cache import DenseCache, WindowCache
from dmattn_jax.partitioning import axis_size, map_over_mesh
from pallas_kernels.decoding import decode_step
from pallas_kernels.decoding.xla import attend_slots
from pallas_kernels.patterns import Patterns, Places, pattern_attention

QUERY = ("batch", None, "heads", None)
KEY = ("batch", None, "kv_heads", None)
GATE = ("batch", None, "kv_heads")
SEGMENTS = ("batch", None)


def attend(
    function: Callable[..., jax.Array],
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    gate: Float[Array, "B S K"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    windows: Sequence[int] | None = None,
) -> Float[Array, "B T H D"]:
    """`function(query, key, value[, gate], segment_ids=[, window=])` over batch and heads of the active mesh.

    Where the mesh's tensor axis does not divide the kv heads, each of its devices attends with all of them.
    """
    heads, shards = key.shape[2], axis_size("kv_heads")
    if heads % shards:
        shards = 1
    arrays = [query, key, value]
    names: list[tuple[str | None, ...]] = [QUERY, KEY, KEY]
    if gate is not None:
        arrays, names = [*arrays, gate], [*names, GATE]
    if segment_ids is not None:
        arrays, names = [*arrays, segment_ids], [*names, SEGMENTS]

    def local(*parts: jax.Array) -> jax.Array:
        documents = parts[-1] if segment_ids is not None else None
        inputs = parts[: 3 + (gate is not None)]
        if windows is None:
            return function(*inputs, segment_ids=documents)
        own = [tuple(windows[start : start + heads // shards]) for start in range(0, heads, heads // shards)]

        def with_window(window: tuple[int, ...]) -> Callable[[], jax.Array]:
            return lambda: function(*inputs, window=window, segment_ids=documents)

        if len(set(own)) == 1:
            return with_window(own[0])()
        # Windows are static, so each device picks the program of its own heads.
        return jax.lax.switch(jax.lax.axis_index("tensor"), [with_window(window) for window in own])

    return map_over_mesh(local, arrays, names, QUERY, whole=() if shards > 1 else ("heads", "kv_heads"))


def attend_patterns(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    patterns: Patterns,
    places: Places,
) -> Float[Array, "B T H D"]:
    """Pattern attention within whole rows, over batch and heads of the active mesh as `attend` is."""
    arrays = [query, key, value, *places, patterns.inside, patterns.diagonals, patterns.verticals, patterns.columns]
    of_heads = [("heads", None, None), ("heads", None), ("heads", None), ("kv_heads", None)]

    def local(query, key, value, order, start, inside, diagonals, verticals, columns):
        places, scale = Places(order, start), query.shape[3] ** -0.5
        own = Patterns(inside, diagonals, verticals, columns, reach=patterns.reach)
        return pattern_attention(query, key, value, own, places, places, scale=scale)

    whole = ("heads", "kv_heads") if key.shape[2] % axis_size("kv_heads") else ()
    return map_over_mesh(local, arrays, [QUERY, KEY, KEY, SEGMENTS, SEGMENTS, *of_heads], QUERY, whole)


def attend_window_cache(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    gate: Float[Array, "B T K"],
    token: Bool[Array, "B T"],
    cache: WindowCache,
) -> tuple[Float[Array, "B T H D"], WindowCache]:
    """Attention of a chunk to the cache and itself, and the cache after it; padding rows give 0.

    One token attends to the slots directly: they hold what it sees, whatever the context length. A chunk runs
    dynamic-mask attention over [cache in order of position, chunk]; of a prefix only its top w can matter.
    """
    if query.shape[1] == 1:
        entering = jnp.where(token[:, :, None], gate, -jnp.inf)[:, 0]
        # Devices of a mesh share the portable step: the compiler cannot cut a kernel.
        alone = axis_size("batch") * axis_size("kv_heads") == 1
        out, held = decode_step(
            query[:, 0],
            key[:, 0],
            value[:, 0],
            entering,
            cache.length,
            cache.slots,
            windows=cache.windows,
            scale=query.shape[3] ** -0.5,
            implementation=None if alone else "xla",
        )
        return jnp.where(token[:, :, None, None], out[:, None], 0), cache.after(held, token)
    union = cache.joined(key, value, gate, token)
    slots = cache.keys.shape[2]
    documents = jnp.concatenate([jnp.ones((token.shape[0], slots), jnp.int32), token.astype(jnp.int32)], axis=1)
    keys, values = jnp.moveaxis(union.keys, 1, 2), jnp.moveaxis(union.values, 1, 2)
    out = attend(
        dynamic_mask_attention,
        query,
        keys.astype(query.dtype),
        values.astype(query.dtype),
        jnp.moveaxis(union.gate, 1, 2),
        segment_ids=documents,
        windows=cache.windows,
    )
    return out, cache.append(key, value, gate, token)


def attend_dense_cache(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    token: Bool[Array, "B T"],
    cache: DenseCache,
) -> tuple[Float[Array, "B T H D"], DenseCache]:
    """Dense causal attention of a chunk to the cache and itself, and the cache after it; padding rows give 0."""
    after = cache.append(key, value, token)
    if query.shape[1] == 1:
        keys, values = jnp.moveaxis(after.keys, 1, 2), jnp.moveaxis(after.values, 1, 2)
        visible = (after.filled & token)[:, None, :]
        bias = jnp.zeros((1, 1, 1), jnp.float32)
        return attend_slots(query[:, 0], keys, values, bias, visible, query.shape[3] ** -0.5)[:, None], after
    documents = jnp.concatenate([cache.filled, token], axis=1).astype(jnp.int32)
    keys = jnp.concatenate([cache.keys.astype(key.dtype), key], axis=1)
    values = jnp.concatenate([cache.values.astype(value.dtype), value], axis=1)
    return attend(causal_attention, query, keys, values, segment_ids=documents), after
