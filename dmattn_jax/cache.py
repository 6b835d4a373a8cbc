"""Bounded decoding caches.

`WindowCache` holds exactly the keys that the dynamic mask shows: a key that has left the top w of its prefix never
returns, so w slots a head are enough for ever, and their memory and time do not grow with the context. With equal
gates it is the ring buffer of sliding-window attention. `DenseCache` holds everything, for dense attention.

Rows of a batch are documents of their own and may have unequal lengths. Keys are cached after the rotary embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32

from dmattn_jax.validation import check_window
from pallas_kernels.decoding import EMPTY, Slots, room_for
from pallas_kernels.decoding.xla import insert
from pallas_kernels.order import sortable


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WindowCache:
    """The w keys of greatest (gate, position) of each row and kv head, W slots each, in no particular order.

    A slot with position −1 is empty: its gate is −inf, its key and value 0. Slots from windows[k] on stay empty in
    head k.
    length: tokens appended so far, per row: the position of the next one.
    """

    keys: Float[Array, "B K W D"]
    values: Float[Array, "B K W D"]
    gate: Float[Array, "B K W"]
    position: Int32[Array, "B K W"]
    length: Int32[Array, " B"]
    windows: tuple[int, ...] = field(metadata={"static": True})

    @staticmethod
    def create(
        batch: int,
        window: int | Sequence[int],
        num_kv_heads: int,
        head_dim: int,
        *,
        max_length: int | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> WindowCache:
        """An empty cache of as many slots as the widest window, or as max_length tokens can fill if those are fewer;
        on some devices of up to 127 more, which stay empty (`pallas_kernels.decoding.room_for`)."""
        windows = check_window(window, num_kv_heads)
        if max_length is not None:
            windows = tuple(min(size, max(max_length, 1)) for size in windows)
        shape = (batch, num_kv_heads, room_for(max(windows), head_dim, dtype))
        return WindowCache(
            keys=jnp.zeros((*shape, head_dim), dtype),
            values=jnp.zeros((*shape, head_dim), dtype),
            gate=jnp.full(shape, -jnp.inf, jnp.float32),
            position=jnp.full(shape, EMPTY, jnp.int32),
            length=jnp.zeros(batch, jnp.int32),
            windows=windows,
        )

    @property
    def usable(self) -> Bool[Array, "K W"]:
        """Which slots belong to each head's own window."""
        return jnp.arange(self.keys.shape[2]) < jnp.asarray(self.windows, jnp.int32)[:, None]

    def sorted_by_position(self) -> WindowCache:
        """The same content with the slots in order of position, empty ones first."""
        return self._gather(jnp.argsort(self.position, axis=-1, stable=True))

    def append_one(
        self,
        key: Float[Array, "B 1 K D"],
        value: Float[Array, "B 1 K D"],
        gate: Float[Array, "B 1 K"],
        token: Bool[Array, "B 1"],
    ) -> WindowCache:
        """Append one token a row; rows with `token` False stay as they are.

        It takes an empty slot, or the place of the least (gate, position). Weaker than all that a full head
        holds, or with a gate of −inf, it is itself dropped.
        """
        entering = jnp.where(token[:, :, None], gate, -jnp.inf)
        return self.after(insert(key[:, 0], value[:, 0], entering[:, 0], self.length, self.slots, self.windows), token)

    @property
    def slots(self) -> Slots:
        """What a step of decoding reads and writes."""
        return Slots(self.keys, self.values, self.gate, self.position)

    def after(self, slots: Slots, token: Bool[Array, "B 1"]) -> WindowCache:
        """The cache that holds the slots, one step later."""
        return replace(self, **slots._asdict(), length=self.length + token[:, 0])

    def append(
        self,
        key: Float[Array, "B T K D"],
        value: Float[Array, "B T K D"],
        gate: Float[Array, "B T K"],
        token: Bool[Array, "B T"],
    ) -> WindowCache:
        """Append a chunk: the top w of what is held and what comes, as after T single appends.

        token: False marks padding, anywhere in the chunk, which takes no position and never enters.
        """
        if key.shape[1] == 1:
            return self.append_one(key, value, gate, token)
        slots = self.keys.shape[2]
        union = self.joined(key, value, gate, token)
        # Greatest (gate, position) first; ties in reverse order of position, so sort ascending and take the end.
        order = jnp.argsort(sortable(union.gate), axis=-1, stable=True)[..., ::-1][..., :slots]
        kept = union._gather(order)
        usable = self.usable & (kept.position != EMPTY)
        return replace(
            kept,
            keys=jnp.where(usable[..., None], kept.keys, 0),
            values=jnp.where(usable[..., None], kept.values, 0),
            gate=jnp.where(usable, kept.gate, -jnp.inf),
            position=jnp.where(usable, kept.position, EMPTY),
            length=self.length + token.sum(axis=1, dtype=jnp.int32),
        )

    def joined(
        self,
        key: Float[Array, "B T K D"],
        value: Float[Array, "B T K D"],
        gate: Float[Array, "B T K"],
        token: Bool[Array, "B T"],
    ) -> WindowCache:
        """What is held, in order of position, followed by the chunk: W + T slots, `length` not yet advanced."""
        held = self.sorted_by_position()
        gate = jnp.where(token[:, :, None], gate, -jnp.inf)
        position = jnp.where(jnp.isneginf(gate), EMPTY, token_positions(self.length, token)[:, :, None])

        def join(slots: jax.Array, chunk: jax.Array) -> jax.Array:
            return jnp.concatenate([slots, jnp.moveaxis(chunk, 1, 2).astype(slots.dtype)], axis=2)

        return replace(
            held,
            keys=join(held.keys, key),
            values=join(held.values, value),
            gate=join(held.gate, gate),
            position=join(held.position, position),
        )

    def _gather(self, order: Int[Array, "B K N"]) -> WindowCache:
        def take(slots: jax.Array) -> jax.Array:
            return jnp.take_along_axis(slots, order.reshape(order.shape + (1,) * (slots.ndim - 3)), axis=2)

        return replace(
            self,
            keys=take(self.keys),
            values=take(self.values),
            gate=take(self.gate),
            position=take(self.position),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseCache:
    """All keys and values of up to `S` tokens a row; position p lies in slot p. Tokens past S are lost."""

    keys: Float[Array, "B S K D"]
    values: Float[Array, "B S K D"]
    length: Int32[Array, " B"]

    @staticmethod
    def create(
        batch: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> DenseCache:
        """An empty cache for max_length tokens a row; value_dim: of its values, head_dim by default.

        Raises: ValueError when max_length < 1.
        """
        if max_length < 1:
            raise ValueError(f"max_length must be >= 1, got {max_length}")
        shape = (batch, max_length, num_kv_heads)
        keys = jnp.zeros((*shape, head_dim), dtype)
        values = jnp.zeros((*shape, head_dim if value_dim is None else value_dim), dtype)
        return DenseCache(keys, values, jnp.zeros(batch, jnp.int32))

    @property
    def filled(self) -> Bool[Array, "B S"]:
        return jnp.arange(self.keys.shape[1]) < self.length[:, None]

    def append(
        self, key: Float[Array, "B T K D"], value: Float[Array, "B T K D"], token: Bool[Array, "B T"]
    ) -> DenseCache:
        """Append a chunk; token: False marks padding, which takes no position."""
        capacity = self.keys.shape[1]
        slot = jnp.where(token, token_positions(self.length, token), capacity)
        row = jnp.arange(key.shape[0])[:, None]
        return DenseCache(
            keys=self.keys.at[row, slot].set(key.astype(self.keys.dtype), mode="drop"),
            values=self.values.at[row, slot].set(value.astype(self.values.dtype), mode="drop"),
            length=self.length + token.sum(axis=1, dtype=jnp.int32),
        )


Cache = WindowCache | DenseCache


def token_positions(length: Int32[Array, " B"], token: Bool[Array, "B T"]) -> Int32[Array, "B T"]:
    """Positions of a chunk's tokens in their document, of which `length` came before; padding gets the last one's."""
    return length[:, None] + jnp.cumsum(token, axis=1, dtype=jnp.int32) - 1
