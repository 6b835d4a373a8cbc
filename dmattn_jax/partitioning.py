"""How arrays lie on a device mesh: one table from logical axis names to mesh axes.

Model code names the axes of its parameters and activations by what they mean ("embed", "kv_heads", …); only this
table knows the mesh axes ("data", "fsdp", "tensor"). Without an active mesh every function here is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("tensor",),
    "layers": (),
    "head_dim": (),
    "length": (),
    "router": (),
}
"""Mesh axes that split each logical axis; empty: never split."""


def logical_to_spec(
    names: Sequence[str | None],
    mesh_axes: Sequence[str] = MESH_AXES,
    table: dict[str, tuple[str, ...]] | None = None,
) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names (None: not split).

    Only axes in `mesh_axes` are used, so that a mesh may lack some. `table` defaults to LOGICAL_AXES.
    Raises: ValueError on an unknown name, or when one mesh axis would split two axes of the array.
    """
    table = LOGICAL_AXES if table is None else table
    entries: list[str | tuple[str, ...] | None] = []
    used: dict[str, str] = {}
    for name in names:
        if name is None:
            entries.append(None)
            continue
        if name not in table:
            raise ValueError(f"unknown logical axis {name!r}: use one of {', '.join(sorted(table))}, or None")
        axes = tuple(axis for axis in table[name] if axis in mesh_axes)
        for axis in axes:
            if axis in used:
                raise ValueError(
                    f"mesh axis {axis!r} would split both {used[axis]!r} and {name!r} of an array with axes "
                    f"{tuple(names)}: name one of them None"
                )
            used[axis] = name
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*entries)


def parameter_sharding(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """How a parameter with these logical axes lies on the mesh; () is whole on every device.

    A dimension that its mesh axes do not divide stays whole: one kv head cannot be cut over two devices, and then
    every device keeps it.
    """
    spec = logical_to_spec(names, mesh.axis_names)
    parts = [*spec, *[None] * (len(shape) - len(spec))]
    for dimension, mesh_axes in enumerate(parts):
        group = (mesh_axes,) if isinstance(mesh_axes, str) else (mesh_axes or ())
        if shape[dimension] % math.prod(mesh.shape[axis] for axis in group):
            parts[dimension] = None
    return NamedSharding(mesh, PartitionSpec(*parts))


def parameter(initial: jax.Array, names: Sequence[str | None]) -> nnx.Param:
    """A parameter that carries its logical axis names as metadata and is created unsplit, with or without a mesh.

    Flax would take the names for mesh axes and split the array at creation. Read them with
    `variable.get_metadata("out_sharding")` and turn them into mesh axes with `logical_to_spec`.
    Raises: ValueError when the number of names is not the number of axes, or a name is unknown.
    """
    if len(names) != initial.ndim:
        raise ValueError(f"names must name each axis of a parameter of shape {initial.shape}, got {tuple(names)}")
    logical_to_spec(names)
    return nnx.Param(initial, out_sharding=tuple(names), eager_sharding=False)


def active_mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh`, or None: there is none, or it has no free axis of MESH_AXES (inside a shard_map).

    Raises: ValueError on a mesh with explicit axes, in which jax would ask for the sharding of every operation.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = [axis for axis in MESH_AXES if kinds.get(axis) == AxisType.Explicit]
    if explicit:
        raise ValueError(
            f"mesh axes {explicit} are explicit: make the mesh with axis_types=(jax.sharding.AxisType.Auto,) * n"
        )
    return mesh if any(kinds.get(axis) == AxisType.Auto for axis in MESH_AXES) else None


def free_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    """The axes of MESH_AXES that the mesh has and that no surrounding shard_map has taken."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in MESH_AXES if kinds.get(axis) == AxisType.Auto)


def axis_size(name: str) -> int:
    """Over how many devices the active mesh splits a logical axis; 1 without a mesh."""
    mesh = active_mesh()
    size = 1
    if mesh is not None:
        for axis in LOGICAL_AXES[name]:
            size *= mesh.shape[axis] if axis in free_axes(mesh) else 1
    return size


def constrain(array: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Ask the compiler to lay an activation out by its logical axes; an axis that does not divide is not split.

    Outside of jit arrays stay where they are.
    """
    mesh = active_mesh()
    if mesh is None or not isinstance(array, jax.core.Tracer):
        return array
    divisible = [
        name if name is not None and size % axis_size(name) == 0 else None
        for name, size in zip(names, array.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(array, logical_to_spec(divisible, free_axes(mesh)))


def map_over_mesh(
    function: Callable[..., jax.Array],
    arrays: Sequence[jax.Array],
    names: Sequence[Sequence[str | None]],
    out_names: Sequence[str | None],
) -> jax.Array:
    """`function(*arrays)` on every device's own part of the arrays, which function must treat independently.

    Without an active mesh it is called once, on the whole. The batch is split where it divides, and otherwise
    computed whole by every device of those axes (a single prompt, say).
    """
    mesh = active_mesh()
    if mesh is None:
        return function(*arrays)
    axes = free_axes(mesh)
    batch = {
        array.shape[list(name).index("batch")] for array, name in zip(arrays, names, strict=True) if "batch" in name
    }
    split = all(size % axis_size("batch") == 0 for size in batch)

    def spec(axis_names: Sequence[str | None]) -> PartitionSpec:
        return logical_to_spec([None if name == "batch" and not split else name for name in axis_names], axes)

    # check_vma=False: the kernels' outputs carry no annotation of the mesh axes they vary over.
    return jax.shard_map(
        function,
        in_specs=tuple(spec(name) for name in names),
        out_specs=spec(out_names),
        axis_names=set(axes),
        check_vma=False,
    )(*arrays)


def normal(rngs: nnx.Rngs, shape: Sequence[int], std: float, dtype: Any) -> jax.Array:
    """N(0, std) drawn in float32, then rounded: the same numbers whatever the parameter dtype."""
    return (std * jax.random.normal(rngs.params(), tuple(shape), jnp.float32)).astype(dtype)
