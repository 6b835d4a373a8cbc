"""What every interval-attention kernel computes, in which shapes, and with which promises.

Interval attention is softmax attention whose mask is one interval of query positions per key:

    logit[b, h, t, s] = scale · query[b, t, h]·key[b, s, k] + bias[b, s, k]   if start[b, k, s] <= p < end[b, k, s]
                        −∞                                                    otherwise
    out[b, t, h]      = Σ_s softmax_s(logit) · value[b, s, k]

with k = h // (H/K) the kv head of query head h, and p = S − T + t the position of query t: queries are the
last T of S positions. Sliding windows, dense causal attention, packed documents and dynamic masks are all
choices of `start` and `end`.

Promises, for every implementation, forward and backward:

- No array of T×S elements, in any pass. Temporary memory is linear in T + S.
- A query that no key is visible to gives out 0 and no gradient.
- Products accumulate in float32 (float64 for float64 inputs); the bias is added in that type.
- Results do not depend on what masked places hold, NaN included. A key row with a non-finite key or value,
  or a bias of NaN or +inf, makes NaN of the queries that see it and of nothing else; gradients stay clean in
  documents that hold no such row. Kernels may count a bfloat16 key or value of 2^100 or more as not finite. A query or
  a cotangent of an output that is not finite may make NaN of the gradients of any key.
- The same inputs give bitwise the same outputs.

Axis letters: B batch, T query time, S key time, H query heads, K kv heads, G = H/K, D head dim, E epochs,
C epoch capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


@dataclass(frozen=True)
class EpochLists:
    """The keys alive in each epoch of `epoch_size` consecutive queries, as lists of rows of the key array.

    Slots [0, carried) of a list hold keys from before the epoch, those that outlive it first, in order of
    falling expiry; slots [carried, C) hold the keys that enter in the epoch and are ever visible, by position.
    Every key stands at most once in a list, so sums over slots never collide.

    index[b, k, e, c]: row of the key in slot c; >= S where the slot is empty.
    next_slot[b, k, e, c]: slot of the same key in epoch e + 1; C where it does not live on.
    entry_slot[b, k, s]: slot of key s in the first epoch whose list holds it; C where none does. That epoch is
      the one of the key's own position, or epoch 0 for keys before the first query.
    """

    index: Int32[Array, "B K E C"]
    next_slot: Int32[Array, "B K E C"]
    entry_slot: Int32[Array, "B K S"]
    epoch_size: int
    carried: int


jax.tree_util.register_dataclass(
    EpochLists, data_fields=["index", "next_slot", "entry_slot"], meta_fields=["epoch_size", "carried"]
)


@dataclass(frozen=True)
class Intervals:
    """Query positions each key is visible to: [start, end), empty where end <= start.

    lists: the same fact by epochs of queries, or None for the identity layout, in which every block of queries
    looks through all keys in their own order and skips the blocks that it cannot see.
    starts_at_key: whether start[b, k, s] is s everywhere, as without a look ahead: bounds of blocks need not be sought.
    ends_with_row: whether end[b, k, s] is S wherever bias[b, s, k] is not −inf, as without documents in a window of S.
    """

    start: Int32[Array, "B K S"]
    end: Int32[Array, "B K S"]
    lists: EpochLists | None = None
    starts_at_key: bool = False
    ends_with_row: bool = False


jax.tree_util.register_dataclass(
    Intervals, data_fields=["start", "end", "lists"], meta_fields=["starts_at_key", "ends_with_row"]
)


class Normalizer(NamedTuple):
    """What turns logits into weights: softmax(logit) = exp(logit − shift) / total; total 0 where nothing is visible.

    Kept apart rather than as shift + log(total): a gate is an exponential and may be large, and a log-sum-exp
    near 10⁴ in float32 would leave every recomputed weight wrong by a thousandth.
    """

    shift: Float[Array, "B T H"]
    total: Float[Array, "B T H"]

    @property
    def lse(self) -> Float[Array, "B T H"]:
        """log Σ_s exp(logit); −∞ for a query that sees no key."""
        return self.shift + jnp.log(self.total)


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """How a kernel cuts its work; each implementation adds its own tiles and derives them from the shape
    (`block_sizes`).

    epoch: queries that share one list of keys. granule: the first part of every list, and so each list, is a multiple
    of this many slots.
    """

    epoch: int
    granule: int = 1

    def __post_init__(self) -> None:
        check_sizes(self)


def check_sizes(sizes: Any) -> None:
    """Raises: ValueError that names an int field of the record which is below 1, or is no int."""
    for field in fields(sizes):
        size = getattr(sizes, field.name)
        if field.type in ("int", int) and (not isinstance(size, int) or size < 1):
            raise ValueError(f"{field.name} must be an int >= 1, got {size!r}")


@runtime_checkable
class Forward(Protocol):
    """(query [B,T,H,D], key, value [B,S,K,D], bias [B,S,K], intervals) -> out [B,T,H,D], normalizer."""

    def __call__(
        self,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B S K D"],
        value: Float[Array, "B S K D"],
        bias: Float[Array, "B S K"],
        intervals: Intervals,
        *,
        scale: float,
        blocks: BlockSizes,
    ) -> tuple[Float[Array, "B T H D"], Normalizer]: ...


@runtime_checkable
class Backward(Protocol):
    """The forward's inputs and outputs and the cotangent of `out` -> gradients of query, key, value, bias."""

    def __call__(
        self,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B S K D"],
        value: Float[Array, "B S K D"],
        bias: Float[Array, "B S K"],
        intervals: Intervals,
        out: Float[Array, "B T H D"],
        normalizer: Normalizer,
        dout: Float[Array, "B T H D"],
        *,
        scale: float,
        blocks: BlockSizes,
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K D"], Float[Array, "B S K"]]: ...


@runtime_checkable
class Select(Protocol):
    """From gates to intervals, for dynamic masks: key j is visible from j on, until `windows[k]` keys of its document
    are above it by (gate, position).

    gate: −inf at padding and wherever a key is never visible; NaN ranks above +inf, −0 ties with 0. start, end: the
    bounds of each position's document; None where a row is one document. Queries are the last of the positions. `lists`
    where they are shorter than the row of keys, which is where max(windows) + blocks.epoch < S. None for shapes that it
    does not take.
    """

    def __call__(
        self,
        gate: Float[Array, "B K S"],
        windows: tuple[int, ...],
        start: Int32[Array, "B S"] | None,
        end: Int32[Array, "B S"] | None,
        *,
        queries: int,
        blocks: BlockSizes,
    ) -> Intervals | None: ...


def document_ends(
    start: Int32[Array, "B S"] | None, end: Int32[Array, "B S"] | None, batch: int, length: int
) -> tuple[Int32[Array, "B S"], Int32[Array, "B S"]]:
    """Bounds as `Select` takes them, for all positions."""
    whole = jnp.zeros((batch, length), jnp.int32)
    return (whole if start is None else start), (whole + length if end is None else end)


@dataclass(frozen=True)
class Implementation:
    """A forward and a backward for one kind of device.

    block_sizes(queries, keys, window, head_dim, dtype): sizes for a shape; `window` is the largest of the heads'.
    unavailable(): None where it runs on this machine, else the reason in words, as `explain` prints it.
    unsupported(dtype, head_dim): None where it takes such queries, else the reason in words.
    select: how this device chooses keys and lays them out, where it has a faster way than the portable one.
    limits(): what is left to the portable functions, or is done in a slower way, a line each, as `explain` prints it.
    """

    name: str
    forward: Forward
    backward: Backward
    block_sizes: Callable[[int, int, int, int, jnp.dtype], BlockSizes]
    unavailable: Callable[[], str | None]
    unsupported: Callable[[jnp.dtype, int], str | None]
    select: Select | None = None
    limits: Callable[[], list[str]] = list
