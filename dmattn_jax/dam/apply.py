"""A frozen dense model with its attention replaced by masks."""

from __future__ import annotations

from flax import nnx

from dmattn_jax.dam.capture import check_dense
from dmattn_jax.dam.errors import DamError
from dmattn_jax.dam.fingerprint import fingerprint
from dmattn_jax.dam.masks import Masks, check_shape
from dmattn_jax.models.decoder import CausalDecoder
from dmattn_jax.nn.pattern_attention import PatternAttention


def apply_masks(model: CausalDecoder, masks: Masks, granule: int = 1) -> CausalDecoder:
    """The model with every layer's dense attention replaced by its masks; parameters are shared, not copied.

    It scores and generates like any other, with caches that hold `reach` tokens and the columns, and no more. It has
    no gradient. granule: vectors and reach are filled up to multiples of it, so that masks of like sizes share
    compiled programs, for as many more slots in a cache.

    Raises: DamError where the model is not dense, or the masks are of another model or shape.
    """
    check_dense(model)
    check_shape(masks, model.config.num_layers, model.config.num_heads)
    if masks.model and masks.model != (own := fingerprint(model)):
        raise DamError(
            f"the masks are of another model (fingerprint {masks.model}, this one has {own}): capture this model"
        )
    masked = nnx.merge(*nnx.split(model))
    masked.blocks.attention = PatternAttention(
        masked.blocks.attention, masks.patterns(model.config.num_kv_heads, granule)
    )
    return masked
