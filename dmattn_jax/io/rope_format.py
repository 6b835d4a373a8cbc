"""Rotary positions as a `config.json` describes them: θ and what stretches it."""

from __future__ import annotations

import warnings
from typing import Any

from dmattn_jax.io.errors import CheckpointFormatError
from dmattn_jax.io.json_fields import Fields
from dmattn_jax.nn.rope import LinearRope, Llama3Rope, RopeScaling, YarnRope

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
ORIGINAL = "original_max_position_embeddings"


def read_rope(fields: Fields, kinds: tuple[str, ...] = KINDS) -> tuple[float, RopeScaling | None]:
    """θ and the scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    kinds: the types that the model's family has. `dynamic` is `default` up to max_position_embeddings tokens, and
    read as such, with a warning: beyond, it turns keys otherwise with every token, which no cache can follow.
    Raises: CheckpointFormatError or ValueError naming the field.
    """
    rope = fields.rope()
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1:
        raise CheckpointFormatError(f"{rope.source}: partial_rotary_factor must be 1: rotating a part is not supported")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in kinds:
        raise CheckpointFormatError(f"{rope.source}: rope_type must be one of {', '.join(kinds)}, got {kind!r:.80}")
    if kind == "dynamic":
        length = fields.integer("max_position_embeddings", 2048)
        warnings.warn(f"{fields.source}: dynamic rotary positions are exact up to {length} tokens only", stacklevel=2)
    if kind == "linear":
        return theta, LinearRope(rope.number("factor"))
    if kind == "llama3":
        return theta, Llama3Rope(
            rope.number("factor"),
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
            rope.integer(ORIGINAL),
        )
    if kind == "yarn":
        for name in ("mscale", "mscale_all_dim"):
            if rope.content.get(name) is not None:
                raise CheckpointFormatError(f"{rope.source}: {name} is not supported: give attention_factor instead")
        original = rope.integer(ORIGINAL, None) or fields.integer(ORIGINAL, None)
        return theta, YarnRope(
            rope.number("factor"),
            original or fields.integer("max_position_embeddings"),
            rope.number("beta_fast", 32.0),
            rope.number("beta_slow", 1.0),
            rope.number("attention_factor", None),
            rope.flag("truncate", True),
        )
    return theta, None


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The fields of a `config.json`, in both spellings, for transformers before and since version 5.

    Raises: ValueError on rotary factors, which a GGUF file may have and a config.json cannot say.
    """
    kinds = {LinearRope: "linear", Llama3Rope: "llama3", YarnRope: "yarn"}
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        if type(scaling) not in kinds:
            raise ValueError(
                f"rope_scaling must be None, {', '.join(kind.__name__ for kind in kinds)} to be written in a "
                f"config.json, got {type(scaling).__name__}: a scaling by the factors of a GGUF file has no name there"
            )
        # What is None follows from the rest, there as here.
        values = {name: value for name, value in vars(scaling).items() if value is not None}
        rope = {"rope_type": kinds[type(scaling)], **values}
    return {
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": theta},
    }
