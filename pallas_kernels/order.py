"""Gates as integers: one order for every comparison of gates, ties and non-finite values included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

NOTHING = jnp.iinfo(jnp.int32).min
"""The order of a place that holds no key: below every gate."""
TAKEN = jnp.iinfo(jnp.int32).max
"""The order of a place that no key may have: above every gate."""


def sortable(gate: Float[Array, "*n"]) -> Int32[Array, "*n"]:
    """Integers in the order of float32 gates: −inf least, −0 equal to 0, NaN (either sign) above +inf.

    NOTHING and TAKEN are left free.
    """
    gate = jnp.where(gate == 0, 0.0, gate.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(gate, jnp.int32)
    order = jnp.where(bits < 0, jnp.iinfo(jnp.int32).min - bits - 1, bits)
    # Not the number first: in a Mosaic GPU kernel the choice would be unsigned, and compared so from there on.
    return jnp.where(gate == gate, order, TAKEN - 1)


def order_of(gate: Float[Array, "*n"]) -> Int32[Array, "*n"]:
    """`sortable`, and NOTHING for −inf: a key that is never visible holds no place."""
    return jnp.where(gate != -jnp.inf, sortable(gate), NOTHING)
