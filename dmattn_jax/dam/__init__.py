"""Dynamic Attention Masks (arXiv 2506.11104) for frozen decoders: capture → amplify → match → extend → attend."""

from dmattn_jax.dam.amplify import AMPLIFIERS, amplify
from dmattn_jax.dam.apply import apply_masks
from dmattn_jax.dam.capture import Maps, capture
from dmattn_jax.dam.errors import DamError
from dmattn_jax.dam.files import load_maps, load_masks, save_maps, save_masks
from dmattn_jax.dam.fingerprint import fingerprint
from dmattn_jax.dam.masks import Masks, windows_and_sinks
from dmattn_jax.dam.match import MatchConfig, match

__all__ = [
    "AMPLIFIERS",
    "DamError",
    "Maps",
    "Masks",
    "MatchConfig",
    "amplify",
    "apply_masks",
    "capture",
    "fingerprint",
    "load_maps",
    "load_masks",
    "match",
    "save_maps",
    "save_masks",
    "windows_and_sinks",
]
