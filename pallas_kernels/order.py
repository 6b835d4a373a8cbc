"""Gates as integers: one order for every comparison of gates, ties and non-finite values included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def sortable(gate: Float[Array, "*n"]) -> Int32[Array, "*n"]:
    """Integers in the order of float32 gates: −inf least, −0 equal to 0, NaN (either sign) above +inf.

    The least and the greatest integer are left free, for places that hold nothing or that no key may take.
    """
    gate = jnp.where(gate == 0, 0.0, gate.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(gate, jnp.int32)
    order = jnp.where(bits < 0, jnp.iinfo(jnp.int32).min - bits - 1, bits)
    return jnp.where(jnp.isnan(gate), jnp.iinfo(jnp.int32).max - 1, order)
