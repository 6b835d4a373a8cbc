"""The attentions that the experiments compare, in the order and the colours of every table and figure."""

from __future__ import annotations

from dmattn_jax.models.config import AttentionKind

COLOURS: dict[AttentionKind, str] = {
    "mha": "#3d7ea6", "swa": "#8a94a6", "mla": "#6a994e", "nsa": "#8d5a97", "dma": "#f08a24",
}  # fmt: skip
VARIANTS: tuple[AttentionKind, ...] = tuple(COLOURS)
