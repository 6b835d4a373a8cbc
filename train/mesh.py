"""The device mesh (data, fsdp, tensor), and which device holds which piece of what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dmattn_jax.models.config import DogeConfig
from dmattn_jax.partitioning import logical_to_spec, parameter_sharding
from train.config import MeshConfig
from train.errors import MeshError

AXES = ("data", "fsdp", "tensor")


def resolve_mesh(config: MeshConfig, device_count: int) -> tuple[int, int, int]:
    """Sizes of (data, fsdp, tensor); −1 takes what the others leave of `device_count`.

    Raises MeshError when the sizes do not fit the devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    named = dict(zip(AXES, sizes, strict=True))
    for name, size in named.items():
        if size < 1 and size != -1:
            raise MeshError(f"mesh.{name} must be >= 1, or -1 for what is left, got {size}")
    if sizes.count(-1) > 1:
        raise MeshError(f"at most one mesh axis can be -1, got {named}")
    known = math.prod(size for size in sizes if size != -1)
    if known > device_count:
        raise MeshError(f"the mesh {named} needs {known} devices, and this run sees {device_count}")
    if -1 in sizes:
        if device_count % known:
            raise MeshError(f"{device_count} devices cannot be divided by {known} for the mesh {named}")
        sizes[sizes.index(-1)] = device_count // known
    return sizes[0], sizes[1], sizes[2]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """One mesh over the first data·fsdp·tensor devices. Raises MeshError as `resolve_mesh`."""
    devices = jax.devices() if devices is None else devices
    sizes = resolve_mesh(config, len(devices))
    count = math.prod(sizes)
    if jax.process_count() > 1 and count != len(devices):
        raise MeshError(f"with several processes the mesh must use all {len(devices)} devices, got {sizes}")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:count])


def batch_shards(mesh: Mesh) -> int:
    """Pieces into which the batch axis is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, accumulate: int, shards: int) -> None:
    """Raises MeshError when `batch_size` sequences cannot be cut into microbatches and over the devices."""
    if accumulate < 1:
        raise MeshError(f"accumulate must be >= 1, got {accumulate}")
    pieces = accumulate * shards
    if batch_size < 1 or batch_size % pieces:
        fitting = max(1, round(batch_size / pieces)) * pieces
        raise MeshError(
            f"batch_size {batch_size} cannot be split into {accumulate} microbatches over {shards} devices "
            f"(mesh data x fsdp): take a multiple of {pieces}, for example --batch-size {fitting}, or fewer devices"
        )


def undivided_heads(model: DogeConfig, tensor: int) -> str | None:
    """What it costs when the tensor axis does not divide the kv heads, which attention is split by; else None."""
    if model.num_kv_heads % max(tensor, 1) == 0:
        return None
    return (
        f"mesh.tensor {tensor} does not divide model.num_kv_heads {model.num_kv_heads}: each of those devices computes "
        "all of the attention, and only the rest is shared; --mesh.fsdp shares both"
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of every [batch, time] array."""
    return NamedSharding(mesh, logical_to_spec(("batch", None)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(
    axes: Mapping[str, tuple[str | None, ...]], shapes: Mapping[str, Any], mesh: Mesh
) -> dict[str, NamedSharding]:
    """The NamedSharding of every parameter from its logical axis names."""
    return {name: parameter_sharding(logical, shapes[name].shape, mesh) for name, logical in axes.items()}


def like_parameters(tree: Any, parameters: Mapping[str, NamedSharding], mesh: Mesh, shapes: Mapping[str, Any]) -> Any:
    """Shardings for a tree that repeats the parameter dict (optimizer moments): a leaf whose last key is a
    parameter's name, and which has its shape, is placed like it; all others (counters) are replicated."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = str(getattr(path[-1], "key", "")) if path else ""
        if name in parameters and leaf.shape == shapes[name].shape:
            return parameters[name]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, tree)


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows as one array over all processes' devices, cut along the batch axis."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(array))
        for name, array in batch.items()
    }
