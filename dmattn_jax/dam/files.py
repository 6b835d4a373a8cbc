"""Maps and masks as files: safetensors for the arrays, JSON beside them for the rest. Nothing is ever unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

from dmattn_jax.dam.capture import Maps
from dmattn_jax.dam.errors import DamError
from dmattn_jax.dam.masks import Masks
from dmattn_jax.io.errors import CheckpointFormatError
from dmattn_jax.io.json_fields import Fields, read_json

MAPS, MASKS = "maps", "masks"


def save_maps(maps: Maps, folder: Path) -> None:
    """`maps.safetensors` and `maps.json` in the folder."""
    facts = {"model": maps.model, "rows": maps.rows, "tokens": maps.tokens, "length": maps.length}
    _save(folder, MAPS, {"total": maps.total, "count": maps.count}, facts)


def load_maps(folder: Path) -> Maps:
    """What `save_maps` wrote. Raises: DamError where it is missing or damaged."""
    arrays, facts = _load(folder, MAPS, {"total": (np.float32, 4), "count": (np.float32, 2)}, "capture")
    total, count = arrays["total"], arrays["count"]
    if total.shape[2:] != count.shape or count.shape[0] != count.shape[1]:
        raise DamError(f"{folder / MAPS}.safetensors: total {total.shape} and count {count.shape} do not fit")
    return Maps(total, count, facts.text("model"), facts.integer("rows"), facts.integer("tokens"))


def save_masks(masks: Masks, folder: Path, summary: dict[str, Any]) -> None:
    """`masks.safetensors` (bits, packed) and `masks.json`, with a summary, in the folder."""
    names = ("inside", "diagonals", "verticals", "fallback")
    arrays = {name: np.packbits(getattr(masks, name), axis=-1) for name in names}
    sizes = {name: getattr(masks, name).shape[-1] for name in names}
    _save(folder, MASKS, arrays, {"model": masks.model, "settings": masks.settings, "bits": sizes, "summary": summary})


def load_masks(folder: Path) -> Masks:
    """What `save_masks` wrote. Raises: DamError where it is missing or damaged."""
    wanted = {
        name: (np.uint8, rank) for name, rank in (("inside", 4), ("diagonals", 3), ("verticals", 3), ("fallback", 2))
    }
    arrays, facts = _load(folder, MASKS, wanted, "match")
    bits = facts.nested("bits") or Fields({}, facts.source)
    unpacked = {}
    for name, array in arrays.items():
        size = bits.integer(name)
        if size < 1 or -(-size // 8) != array.shape[-1]:
            raise DamError(f"{folder / MASKS}.safetensors: {name} has {array.shape[-1]} bytes for {size} bits")
        unpacked[name] = np.unpackbits(array, axis=-1, count=size).astype(bool)
    heads = unpacked["fallback"].shape
    if any(array.shape[:2] != heads for array in unpacked.values()) or len(set(unpacked["inside"].shape[2:])) != 1:
        raise DamError(f"{folder / MASKS}.safetensors: the arrays' shapes do not fit one another")
    return Masks(**unpacked, model=facts.text("model"), settings=facts.get("settings", dict, {}))


def _save(folder: Path, name: str, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    # save_file makes a file that its owner alone can read; this is as any other
    path.touch()
    mode = path.stat().st_mode
    save_file(arrays, path)
    path.chmod(mode)
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _load(
    folder: Path, name: str, wanted: dict[str, tuple[Any, int]], command: str
) -> tuple[dict[str, np.ndarray], Fields]:
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise DamError(f"{folder} has no {name}: make them with dmattn dam {command}")
    try:
        arrays = load_file(path)
        facts = Fields(read_json(folder / f"{name}.json"), str(folder / f"{name}.json"))
    except (safetensors.SafetensorError, CheckpointFormatError) as error:
        raise DamError(f"{path} cannot be read: {error}") from error
    if {key: (array.dtype.type, array.ndim) for key, array in arrays.items()} != wanted:
        raise DamError(f"{path} does not hold the arrays {', '.join(wanted)} as dmattn writes them")
    return arrays, facts
