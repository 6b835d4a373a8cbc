"""Attention by intervals: gate → lifetimes → epochs → kernel → output, and its two relatives without a gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from dmattn_jax.dispatch import choose_implementation
from dmattn_jax.documents import Documents, document_bounds
from dmattn_jax.layout import lay_out
from dmattn_jax.selection import choose_keys, last_keys
from dmattn_jax.validation import check_attention, check_segment_ids, check_window
from pallas_kernels import BlockSizes, Implementation, Intervals, interval_attention


def dynamic_mask_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    gate: Float[Array, "B S K"],
    *,
    window: int | Sequence[int],
    causal: bool = True,
    segment_ids: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """Attention over the `window` keys of largest gate, chosen anew for every query (arXiv 2508.02124v6, §3).

        out_i = Σ_j softmax_j(scale · q_i·k_j + gate_j) v_j      over the keys visible to query i

    Key j is visible to query i iff j <= i, both are tokens of one document, and gate j is among the `window`
    largest of that document up to i; the later key wins among equals. The choice carries no gradient; the gate
    learns through the bias on the keys it chose. Time is O(T·window), memory O(T + S).

    query: [B, T, H, D]; queries are the last T of the S key positions, so T < S continues a sequence.
    key, value: [B, S, K, D] of query's dtype (bfloat16, float16, float32, float64); H must be a multiple of K,
      query head h reads kv head h // (H/K). Products accumulate in float32 (float64 for float64).
    gate: [B, S, K] float32, already δ. −inf is never visible; +inf and NaN rank above all numbers and make NaN of
      the queries that see them, and of no others.
    window: an int >= 1, or one per kv head. At S or above, this is dense attention with a bias.
    causal: False makes one choice a document, of its `window` largest gates, visible to all of its queries.
    segment_ids: [B, S] int; numbers the documents of packed rows, 0 is padding: never visible, output 0.
    scale: factor on q·k; 1/√D by default.
    implementation: None takes the best that runs here (`explain()` says which), else its name. A kernel is a program
      for one device: of arrays that are split over several, call it inside `jax.shard_map`, as the layers of `nn` do
      under `jax.set_mesh`; else the compiler brings all of them to every device.

    Returns [B, T, H, D] in query's dtype; 0, with no gradient, for a query that sees no key.
    Raises: ValueError or TypeError that names the argument, before anything is traced.
    """
    check_attention(query, key, value, gate)
    batch, length, kv_heads = gate.shape
    windows = check_window(window, kv_heads)
    check_segment_ids(segment_ids, batch, length)
    documents = document_bounds(segment_ids, batch, length)
    backend = choose_implementation(implementation, query.dtype, query.shape[3])
    packed = None if segment_ids is None else documents
    token = None if packed is None else packed.token
    ranked = jnp.moveaxis(jax.lax.stop_gradient(gate), 2, 1)
    if causal:
        blocks = backend.block_sizes(query.shape[1], length, max(windows), query.shape[3], query.dtype)
        intervals = choose_intervals(ranked, windows, packed, query.shape[1], backend, blocks)
        intervals = dataclasses.replace(intervals, ends_with_row=segment_ids is None and min(windows) >= length)
        return _run(query, key, value, gate, intervals, token, scale, backend, blocks)
    choice = choose_keys(ranked, windows, documents, causal=False)
    chosen = choice.expiry > jnp.arange(length, dtype=jnp.int32)
    start = jnp.broadcast_to(documents.start[:, None], chosen.shape)
    end = jnp.where(chosen, choice.expiry, start)
    if max(windows) < length and segment_ids is None:
        # One choice for all queries: only the chosen keys, in their own order, reach the kernel. There the queries
        # are the last of fewer positions, and each key is visible to all of them.
        index = jnp.argsort(~chosen, axis=-1, stable=True)[..., : max(windows)]
        key, value, gate = (_rows(array, index) for array in (key, value, gate))
        first, last = key.shape[1] - query.shape[1], key.shape[1]
        start = jnp.full_like(index, first)
        end = jnp.where(jnp.take_along_axis(chosen, index, axis=-1), last, first)
    return _run(query, key, value, gate, Intervals(start, end), token, scale, backend)


def sliding_window_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    *,
    window: int | Sequence[int],
    segment_ids: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """Causal attention over the last `window` positions of the document, the query's own included.

    What `dynamic_mask_attention` gives while its gates are all equal, up to a constant bias; but padding amid a
    document takes places in this window. Arguments, errors and layout as there.
    """
    check_attention(query, key, value, None)
    batch, length, kv_heads = key.shape[:3]
    windows = check_window(window, kv_heads)
    check_segment_ids(segment_ids, batch, length)
    if implementation is None and segment_ids is None and len(set(windows)) == 1 and _cudnn_runs(query, key):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=scale,
            is_causal=True,
            local_window_size=None if windows[0] >= length else (windows[0] - 1, 0),
            implementation="cudnn",
        )
    documents = document_bounds(segment_ids, batch, length)
    backend = choose_implementation(implementation, query.dtype, query.shape[3])
    blocks = backend.block_sizes(query.shape[1], length, max(windows), query.shape[3], query.dtype)
    if segment_ids is None and backend.select is not None:
        # Every position is a key, so this is the choice among equal gates.
        ranked = jnp.zeros((batch, kv_heads, length), jnp.float32)
        intervals = choose_intervals(ranked, windows, None, query.shape[1], backend, blocks)
    else:
        choice = last_keys(windows, documents)
        intervals = lay_out(choice, queries=query.shape[1], window=max(windows), blocks=blocks)
    intervals = dataclasses.replace(intervals, ends_with_row=segment_ids is None and min(windows) >= length)
    gate = jnp.zeros((batch, length, kv_heads), jnp.promote_types(query.dtype, jnp.float32))
    token = None if segment_ids is None else documents.token
    return _run(query, key, value, gate, intervals, token, scale, backend, blocks)


def causal_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    *,
    segment_ids: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """Dense causal attention within documents. Arguments, errors and layout as in `dynamic_mask_attention`.

    Without documents and on a GPU whose cuDNN can, this is `jax.nn.dot_product_attention`; elsewhere the interval
    kernel with the identity layout, so that no path holds T×S logits.
    """
    check_attention(query, key, value, None)
    return sliding_window_attention(
        query,
        key,
        value,
        window=key.shape[1],
        segment_ids=segment_ids,
        scale=scale,
        implementation=implementation,
    )


@jax.named_scope("select_keys")
def choose_intervals(
    gate: Float[Array, "B K S"],
    windows: tuple[int, ...],
    documents: Documents | None,
    queries: int,
    backend: Implementation,
    blocks: BlockSizes,
) -> Intervals:
    """Intervals of the causal choice by gates, by the implementation's own means where it has any. documents: None
    where a row is one document."""
    found = None
    if backend.select is not None:
        seen, start, end = gate, None, None
        if documents is not None:
            seen, start, end = jnp.where(documents.token[:, None], gate, -jnp.inf), documents.start, documents.end
        found = backend.select(seen, windows, start, end, queries=queries, blocks=blocks)
    if found is None:
        documents = documents or document_bounds(None, gate.shape[0], gate.shape[2])
        choice = choose_keys(gate, windows, documents, causal=True)
        found = lay_out(choice, queries=queries, window=max(windows), blocks=blocks)
    return found


def _run(query, key, value, gate, intervals, token: Bool[Array, "B S"] | None, scale, backend, blocks=None):
    """Call the kernel; padding queries give 0 and get no gradient, whatever they hold."""
    queries, head_dim = query.shape[1], query.shape[3]
    if blocks is None:
        blocks = backend.block_sizes(queries, key.shape[1], key.shape[1], head_dim, query.dtype)
    looks = None
    if token is not None:
        looks = token[:, token.shape[1] - queries :, None, None]
        query = jnp.where(looks, query, 0)
    scale = head_dim**-0.5 if scale is None else float(scale)
    out = interval_attention(query, key, value, gate, intervals, backend, scale, blocks)
    return out if looks is None else jnp.where(looks, out, 0)


def _rows(array: Array, index: Int32[Array, "B K c"]) -> Array:
    """array [B, S, K, …] -> its rows index, [B, c, K, …]; differentiable."""
    index = jnp.moveaxis(index, 1, 2)
    return jnp.take_along_axis(array, index.reshape(*index.shape, *[1] * (array.ndim - 3)), axis=1)


def _cudnn_runs(query: jax.Array, key: jax.Array) -> bool:
    """Whether cuDNN's flash attention takes these shapes: half precision, T = S, head sizes in eights up to 256 on
    Hopper and later, up to 128 before. JAX differentiates it for even lengths only."""
    queries, head_dim = query.shape[1], query.shape[3]
    if queries != key.shape[1] or queries % 2 or head_dim % 8:
        return False
    if jax.default_backend() != "gpu" or query.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    device = jax.devices()[0]
    if "cuda" not in device.client.platform_version.lower() or float(device.compute_capability) < 8.0:
        return False
    return head_dim <= (256 if float(device.compute_capability) >= 9.0 else 128)
