"""Which model maps were recorded on: a digest of its configuration and weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx


def fingerprint(model: Any) -> str:
    """A hex digest of `model.config` and every parameter's name, shape and bytes as bfloat16, so that the same weights
    loaded in another type are the same model. Leaves pass the host singly."""
    digest = hashlib.blake2b(digest_size=16)
    fields = {"kind": type(model).__name__, **dataclasses.asdict(model.config)}
    # How a model is computed does not change what it is.
    for name in ("dtype", "param_dtype", "remat", "unroll_layers"):
        fields.pop(name, None)
    digest.update(json.dumps(fields, sort_keys=True, default=repr).encode())
    leaves = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    for name in sorted(leaves):
        array = np.ascontiguousarray(np.asarray(leaves[name][...]).astype(ml_dtypes.bfloat16))
        digest.update(f"{name} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
