"""Compiles programs for TPUs that are not there, a JSON line of each: `python tpu_programs.py WHAT TOPOLOGY …`.

A process of its own, because the TPU compiler is configured by the environment before JAX starts.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from dmattn_jax.attention import dynamic_mask_attention
from pallas_kernels.patterns import Patterns, Places, pattern_attention
from pallas_kernels.tpu.config import compiling_for

KERNELS = "tpu_custom_call"


def topology_devices(name: str) -> list:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def report(topology: str, compiled, **more) -> None:
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    print(
        json.dumps(
            {
                "topology": topology,
                "kernels": text.count(f'custom_call_target="{KERNELS}"'),
                **{f"{name}s": text.count(f" {name}(") for name in ("scatter", "gather", "sort")},
                "temporary": memory.temp_size_in_bytes,
                "arguments": memory.argument_size_in_bytes,
                **more,
            }
        ),
        flush=True,
    )


def attention(
    name: str,
    length: int,
    *,
    dim: int = 128,
    dtype: str = "bfloat16",
    window: int | tuple[int, ...] = 1024,
    heads: tuple[int, int] = (32, 8),
) -> None:
    """Forward and backward of packed documents, gates to gradients. heads: of queries and of keys."""
    device = topology_devices(name)[0]

    def both(query, key, value, gate, ids, cotangent):
        def attend(*arrays):
            return dynamic_mask_attention(*arrays, window=window, segment_ids=ids, implementation="mosaic_tpu")

        out, pull = jax.vjp(attend, query, key, value, gate)
        return out, pull(cotangent)

    query = jax.ShapeDtypeStruct((1, length, heads[0], dim), dtype)
    key = jax.ShapeDtypeStruct((1, length, heads[1], dim), dtype)
    gate = jax.ShapeDtypeStruct((1, length, heads[1]), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    sharding = jax.sharding.SingleDeviceSharding(device)
    with compiling_for(device.device_kind):
        traced = jax.jit(both, in_shardings=sharding, out_shardings=sharding).trace(query, key, key, gate, ids, query)
    report(name, traced.lower().compile(), length=length, dim=dim, dtype=dtype, window=window, heads=heads)


def patterns(name: str, length: int, heads: tuple[int, int], dim: int, side: int, dtype: str) -> None:
    """Pattern attention of one row, with maps of `side` positions and as many distances and columns."""
    device = topology_devices(name)[0]
    shape = jax.ShapeDtypeStruct

    def attend(query, key, value, inside, diagonals, verticals, columns):
        order = jnp.arange(length, dtype=jnp.int32)[None]
        places = Places(order, jnp.zeros_like(order))
        masks = Patterns(inside, diagonals, verticals, columns, reach=side)
        return pattern_attention(query, key, value, masks, places, places, scale=1.0, implementation="mosaic_tpu")

    arguments = (
        *(shape((1, length, count, dim), dtype) for count in (heads[0], heads[1], heads[1])),
        shape((heads[0], side, side), bool),
        *(shape((heads[0], side), bool),) * 2,
        shape((heads[1], side // 4), jnp.int32),
    )
    sharding = jax.sharding.SingleDeviceSharding(device)
    with compiling_for(device.device_kind):
        traced = jax.jit(attend, in_shardings=sharding, out_shardings=sharding).trace(*arguments)
    report(name, traced.lower().compile(), length=length, heads=heads, dim=dim, side=side, dtype=dtype)


def training(name: str, preset: str, tensor: int) -> None:
    """A whole training step of a preset on four chips, fsdp × tensor."""
    from configs import PRESETS
    from train.config import MeshConfig
    from train.plan import compile_step

    devices = topology_devices(name)[:4]
    preset_config = PRESETS[preset]
    config = replace(
        preset_config,
        model=replace(preset_config.model, remat=True),
        batch_size=32,
        mesh=MeshConfig(data=1, fsdp=4 // tensor, tensor=tensor),
    )
    with compiling_for(devices[0].device_kind):
        plan, compiled = compile_step(config, devices)
    report(name, compiled, preset=preset, parameters=plan.parameters, optimizer=plan.optimizer, batch=plan.batch_size)


if __name__ == "__main__":
    what, topology, *rest = sys.argv[1:]
    if what == "attention":
        for length in rest or ["32768"]:
            attention(topology, int(length))
    elif what == "shapes":
        for dim, dtype in ((64, "bfloat16"), (96, "float32"), (256, "bfloat16")):
            attention(topology, 4096, dim=dim, dtype=dtype, window=512)
        # Unequal windows, lengths that nothing divides, and groups larger than a tile.
        attention(topology, 3001, window=(1, 300, 5000, 777), heads=(8, 4))
        attention(topology, 2053, window=300, heads=(32, 1))
    elif what == "patterns":
        patterns(topology, 8192, (9, 3), 64, 512, "bfloat16")
        patterns(topology, 32768, (32, 8), 128, 1024, "bfloat16")
        patterns(topology, 65536, (32, 8), 128, 1024, "bfloat16")
        patterns(topology, 1000, (8, 1), 96, 200, "float32")
    elif what == "windows":
        for window in map(int, rest):
            attention(topology, window + 8192, window=window, heads=(4, 1))
    else:
        training(topology, rest[0], int(rest[1]))
