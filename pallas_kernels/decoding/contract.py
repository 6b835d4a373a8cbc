"""What one step of decoding with a bounded cache computes, in which shapes, and with which promises.

A cache holds, for each row and kv head, W slots: a key, a value, its gate and its position, in no particular order; a
slot at position −1 is empty, has gate −inf and holds zeros. A step inserts one key: in an empty slot, or in the place
of the least (gate, position); a key that is weaker than all that a full head holds is itself dropped. Then the step's
query attends to all that is held:

    logit[b, h, s] = scale · query[b, h]·keys[b, k, s] + gate[b, k, s]      k = h // (H/K)
    out[b, h]      = Σ_s softmax_s(logit) · values[b, k, s]

Promises, for every implementation:

- A head that holds nothing gives out 0.
- Products accumulate in float32 (float64 for float64 inputs); the gate is added in that type.
- What evicted keys and values were does not matter, NaN included; a NaN gate ranks above +inf.
- The same inputs give bitwise the same outputs.

Axis letters: B batch, H query heads, K kv heads, G = H/K, W slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

EMPTY = -1
"""The position of a slot that holds nothing."""


class Slots(NamedTuple):
    """What is held."""

    keys: Float[Array, "B K W D"]
    values: Float[Array, "B K W D"]
    gate: Float[Array, "B K W"]
    position: Int32[Array, "B K W"]


@runtime_checkable
class Step(Protocol):
    """-> out, and the slots after it.

    key, value, gate: of the new token; a gate of −inf never enters (padding). position: the new token's, greater than
    all that are held. windows: how many slots each kv head may use; the others stay empty.
    """

    def __call__(
        self,
        query: Float[Array, "B H D"],
        key: Float[Array, "B K D"],
        value: Float[Array, "B K D"],
        gate: Float[Array, "B K"],
        position: Int32[Array, " B"],
        slots: Slots,
        *,
        windows: tuple[int, ...],
        scale: float,
    ) -> tuple[Float[Array, "B H D"], Slots]: ...


@dataclass(frozen=True)
class Implementation:
    """A step for one kind of device.

    unavailable(): None where it runs on this machine, else the reason in words.
    unsupported(query, slots): None where it takes such arrays, else the reason in words.
    granule(head_dim, dtype): slots of such keys come in multiples of it.
    limits(): what is left to the portable step, a line each, as `explain` prints it.
    """

    name: str
    step: Step
    unavailable: Callable[[], str | None]
    unsupported: Callable[[Array, Slots], str | None]
    granule: Callable[[int, DTypeLike], int] = lambda head_dim, dtype: 1
    limits: Callable[[], list[str]] = list
