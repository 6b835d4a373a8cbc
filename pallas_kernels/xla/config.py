"""Block sizes of the XLA implementation."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.contract import BlockSizes


@dataclass(frozen=True, kw_only=True)
class XlaBlockSizes(BlockSizes):
    """Tiles of an epoch's queries by block_k keys."""

    block_k: int


def block_sizes(queries: int, keys: int, window: int, head_dim: int, dtype: jnp.dtype) -> XlaBlockSizes:
    """Epochs as long as the window, within what keeps a logit tile small.

    An epoch's list holds window + epoch keys, so longer epochs do more arithmetic a query, shorter ones
    gather more rows a query. Tiles are epoch × block_k for every head of the batch at once: that product is
    what bounds temporary memory, so both are capped whatever the window is.
    """
    del head_dim, dtype
    epoch = min(max(64, min(_power_of_two_up_to(window), 256)), queries)
    return XlaBlockSizes(epoch=epoch, block_k=min(512, keys))


def _power_of_two_up_to(size: int) -> int:
    return 1 << (max(size, 1).bit_length() - 1)
