"""An online softmax in base 2 over blocks of keys (FlashAttention, arXiv 2205.14135), its state in VMEM."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.tpu.tiles import NN, fold_lanes, product
from pallas_kernels.tpu.vmem import LANES


class OnlineSoftmax(NamedTuple):
    """References to the scratch of R query rows. largest: the same number in all lanes; total: a part in each lane."""

    largest: Any
    total: Any
    weighted: Any

    @staticmethod
    def scratch(rows: int, dim: int) -> list[pltpu.VMEM]:
        return [pltpu.VMEM((rows, width), jnp.float32) for width in (LANES, LANES, dim)]

    def start(self) -> None:
        self.largest[...] = jnp.full_like(self.largest, -jnp.inf)
        self.total[...] = jnp.zeros_like(self.total)
        self.weighted[...] = jnp.zeros_like(self.weighted)

    def add(self, scores: Float[Array, "R n"], values: Float[Array, "n D"]) -> None:
        """One more block; scores in base 2, −∞ where masked."""
        before = self.largest[...]
        new = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        # −∞ − −∞ is NaN: a row that has seen nothing yet keeps a finite reference.
        reference = jnp.where(new == -jnp.inf, 0.0, new)
        weights = jnp.exp2(scores - jnp.tile(reference, (1, scores.shape[1] // LANES)))
        rescale = jnp.exp2(before - reference)
        self.largest[...] = new
        # Summed over lanes only once, at the end: sums across lanes are dear.
        self.total[...] = self.total[...] * rescale + fold_lanes(weights)
        added = product(weights.astype(values.dtype), values, NN)
        self.weighted[...] = self.weighted[...] * _lanes(rescale, added.shape[1]) + added

    def finish(self) -> tuple[Float[Array, "R D"], Float[Array, "R 128"], Float[Array, "R 128"]]:
        """The output, and in all lanes of a row its shift and its total; 0, 0 and 0 for a row that has seen nothing."""
        sums = jnp.broadcast_to(self.total[...].sum(axis=1, keepdims=True), self.total.shape)
        divisor = jnp.where(sums == 0.0, 1.0, sums)
        out = self.weighted[...] / _lanes(divisor, self.weighted.shape[1])
        return out, jnp.where(self.largest[...] == -jnp.inf, 0.0, self.largest[...]), sums


def _lanes(column: Float[Array, "R 128"], dim: int) -> Float[Array, "R D"]:
    """A number a row, standing in all lanes, widened or cut to `dim` of them."""
    return jnp.tile(column, (1, -(-dim // LANES)))[:, :dim]
