"""The one custom VJP: it joins any forward of the contract to any backward."""

from __future__ import annotations

from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.contract import BlockSizes, Implementation, Intervals

RESIDUALS = "attention residuals"
"""The name of what the backward pass needs and is dear to compute again, for policies of `jax.checkpoint`."""

SCOPE = "interval_attention"
"""What profilers call both passes."""


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def interval_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    bias: Float[Array, "B S K"],
    intervals: Intervals,
    implementation: Implementation,
    scale: float,
    blocks: BlockSizes,
) -> Float[Array, "B T H D"]:
    """Attention of `contract.py` by `implementation`, differentiable in query, key, value and bias."""
    return _run(query, key, value, bias, intervals, implementation, scale, blocks)[0]


@jax.named_scope(SCOPE)
def _run(query, key, value, bias, intervals, implementation, scale, blocks):
    return implementation.forward(query, key, value, bias, intervals, scale=scale, blocks=blocks)


def _forward(query, key, value, bias, intervals, implementation, scale, blocks):
    out, normalizer = _run(query, key, value, bias, intervals, implementation, scale, blocks)
    # What a scan over layers stacks must not come from the kernel itself, or XLA runs the kernel twice: once into the
    # stack, and once for whoever else reads the output.
    out = jax.lax.optimization_barrier(out)
    intervals, out, normalizer = checkpoint_name((intervals, out, normalizer), RESIDUALS)
    return out, (query, key, value, bias, intervals, out, normalizer)


@jax.named_scope(SCOPE)
def _backward(implementation, scale, blocks, residuals, dout):
    return (*implementation.backward(*residuals, dout, scale=scale, blocks=blocks), None)


interval_attention.defvjp(_forward, _backward)
