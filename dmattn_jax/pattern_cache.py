"""The bounded decoding cache of pattern attention: a ring of the last keys within reach, and the columns."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from dmattn_jax.cache import token_positions
from pallas_kernels.patterns import Kept, Places


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PatternCache:
    """Position p lies in slot p mod W of the ring while it is among the last W; column v of a kv head in slot v.

    No query to come can see anything else: W is the patterns' reach. length: tokens appended so far, per row.
    """

    keys: Float[Array, "B K W D"]
    values: Float[Array, "B K W D"]
    column_keys: Float[Array, "B K V D"]
    column_values: Float[Array, "B K V D"]
    length: Int32[Array, " B"]

    @staticmethod
    def create(
        batch: int,
        reach: int,
        columns: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_length: int,
        dtype: DTypeLike = jnp.float32,
    ) -> PatternCache:
        """An empty cache. No more slots than max_length tokens can fill. Raises: ValueError when max_length < 1."""
        if max_length < 1:
            raise ValueError(f"max_length must be >= 1, got {max_length}")
        ring, kept = ((batch, num_kv_heads, slots, head_dim) for slots in (min(reach, max_length), columns))
        return PatternCache(
            jnp.zeros(ring, dtype),
            jnp.zeros(ring, dtype),
            jnp.zeros(kept, dtype),
            jnp.zeros(kept, dtype),
            jnp.zeros(batch, jnp.int32),
        )

    def joined(
        self, key: Float[Array, "B T K D"], value: Float[Array, "B T K D"], places: Places
    ) -> tuple[Float[Array, "B S K D"], Float[Array, "B S K D"], Places]:
        """The ring followed by the chunk, S = W + T, and where each stands."""
        slots = self.keys.shape[2]
        slot = jnp.arange(slots, dtype=jnp.int32)
        last = self.length[:, None] - 1
        position = last - (last - slot) % slots
        ring = Places(jnp.maximum(position, 0), jnp.where(position < 0, -1, 0))
        keys, values = (
            jnp.concatenate([jnp.moveaxis(held, 1, 2), chunk.astype(held.dtype)], axis=1)
            for held, chunk in ((self.keys, key), (self.values, value))
        )
        return keys, values, Places(*(jnp.concatenate(pair, axis=1) for pair in zip(ring, places, strict=True)))

    def append(
        self,
        key: Float[Array, "B T K D"],
        value: Float[Array, "B T K D"],
        token: Bool[Array, "B T"],
        columns: Int32[Array, "K V"],
    ) -> PatternCache:
        """The cache after a chunk; token: False marks padding, which takes no position."""
        slots, kept = self.keys.shape[2], columns.shape[1]
        position = token_positions(self.length, token)
        length = self.length + token.sum(axis=1, dtype=jnp.int32)
        # Of a chunk longer than the ring the last tokens alone stay.
        stays = token & (position >= (length - slots)[:, None])
        slot = jnp.where(stays, position % slots, slots)
        row = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None]
        at = (row, slice(None), slot)
        # Slot of each token in its kv head's columns, found by bisection: they rise, unused places last.
        sorted_columns = jnp.where(columns < 0, jnp.iinfo(jnp.int32).max, columns)
        found = jax.vmap(lambda own: jnp.searchsorted(own, position).astype(jnp.int32), out_axes=1)(sorted_columns)
        head = jnp.arange(columns.shape[0], dtype=jnp.int32)[None, :, None]
        is_column = sorted_columns[head, jnp.minimum(found, kept - 1)] == position[:, None]
        column_slot = jnp.where(is_column & token[:, None], found, kept)

        def both(ring: jax.Array, column: jax.Array, chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
            chunk = chunk.astype(ring.dtype)
            by_head = jnp.moveaxis(chunk, 1, 2)
            return (
                ring.at[at].set(chunk, mode="drop"),
                column.at[row[..., None], head, column_slot].set(by_head, mode="drop"),
            )

        keys, column_keys = both(self.keys, self.column_keys, key)
        values, column_values = both(self.values, self.column_values, value)
        return PatternCache(keys, values, column_keys, column_values, length)

    def kept(self, columns: Int32[Array, "K V"], dtype: DTypeLike) -> Kept:
        """The columns that the documents have reached."""
        reached = (columns >= 0) & (columns < self.length[:, None, None])
        return Kept(self.column_keys.astype(dtype), self.column_values.astype(dtype), jnp.where(reached, 0, -1))
