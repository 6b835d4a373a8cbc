"""Which tensor of a file is which parameter of a model, and how its axes lie.

A `TensorSpec` says it once, as data; checking, reading a slice of a parameter, and writing a parameter all follow
from it. Files keep one tensor a layer, models keep the layers stacked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dmattn_jax.io.errors import CheckpointFormatError


class TensorSource(Protocol):
    """Tensors of a file or a folder, read in part."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def check_type(self, name: str) -> None:
        """Raises: CheckpointFormatError unless the tensor's numbers are of a type that can be read."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """That part of the tensor, as floating-point numbers."""
        ...

    def where(self, name: str) -> str:
        """The tensor and its file, for messages."""
        ...


@dataclass(frozen=True)
class TensorSpec:
    """One parameter and the tensor (of each layer) that holds it.

    parameter: its path in the model, joined by dots.
    tensor: the tensor's name, with `{layer}` where there is one a layer.
    sizes: of the parameter's axes, without the layers axis. There may be one axis more than the parameter has: the
        parameter's last axis cut in two, where files order its halves otherwise. That axis is always read whole.
    axes: for every axis of the tensor, the axes of `sizes` that it joins, slowest first.
    layers: how many; 0 for a parameter that is not stacked.
    """

    parameter: str
    tensor: str
    sizes: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    layers: int = 0

    @property
    def file_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[axis] for axis in group) for group in self.axes)

    def tensors(self) -> Iterator[str]:
        """The names of the tensors, in order of layers."""
        if not self.layers:
            yield self.tensor
        for layer in range(self.layers):
            yield self.tensor.format(layer=layer)


def check_tensors(specs: Sequence[TensorSpec], source: TensorSource, ignored: Iterable[str] = ()) -> None:
    """Every tensor is there, has its shape and a readable type, and none is left over but the `ignored`.

    Raises: CheckpointFormatError naming the tensor. Nothing is read.
    """
    present = set(source.names())
    expected: set[str] = set()
    for spec in specs:
        for name in spec.tensors():
            if name not in present:
                raise CheckpointFormatError(
                    f"tensor {name} of shape {list(spec.file_shape)} is missing from {source.where('')}: "
                    "the configuration asks for it"
                )
            if source.shape(name) != spec.file_shape:
                raise CheckpointFormatError(
                    f"{source.where(name)} must have shape {list(spec.file_shape)} by the configuration, "
                    f"got {list(source.shape(name))}"
                )
            source.check_type(name)
            expected.add(name)
    left = sorted(present - expected - set(ignored))
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise CheckpointFormatError(f"{source.where(left[0])}{more} has no place in a model of this configuration")


def read_parameter(spec: TensorSpec, source: TensorSource, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """The part `index` of a parameter (layers axis first where it is stacked), read from no more of the file."""
    inner = index[1:] if spec.layers else index
    part, local = _file_index(spec, inner)
    names = list(spec.tensors())
    order = [axis for group in spec.axes for axis in group]
    back = np.argsort(order)
    shape = _part_shape(local, len(inner))

    def one(name: str) -> np.ndarray:
        grouped = source.read(name, part)
        return grouped.reshape([local[axis] for axis in order]).transpose(back).reshape(shape)

    if not spec.layers:
        return one(names[0]).astype(dtype)
    chosen = names[index[0]]
    out = np.empty((len(chosen), *shape), dtype)
    for row, name in enumerate(chosen):
        out[row] = one(name)
    return out


def _file_index(spec: TensorSpec, index: tuple[slice, ...]) -> tuple[tuple[slice, ...], list[int]]:
    """The slices of the tensor that hold a part of the parameter, and the part's size along every axis of `sizes`."""
    sizes = spec.sizes
    ranges = [slice(*part.indices(size)[:2]) for part, size in zip(index, sizes, strict=False)]
    if len(sizes) > len(index):
        # the last axis, cut in two: read whole
        ranges = [*ranges[:-1], slice(0, sizes[-2]), slice(0, sizes[-1])]
    local = [part.stop - part.start for part in ranges]
    file_index = []
    for group in spec.axes:
        inner = math.prod(sizes[axis] for axis in group[1:])
        if any(local[axis] != sizes[axis] for axis in group[1:]):
            raise ValueError(f"{spec.parameter} is split along an axis that {spec.tensor} joins with another")
        file_index.append(slice(ranges[group[0]].start * inner, ranges[group[0]].stop * inner))
    return tuple(file_index), local


def _part_shape(local: Sequence[int], axes: int) -> tuple[int, ...]:
    return (*local[: axes - 1], math.prod(local[axes - 1 :]))


def written_tensors(specs: Sequence[TensorSpec], parameters: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and content of every tensor of a file, one at a time: the reverse of `read_parameter`."""
    for spec in specs:
        array = parameters[spec.parameter]
        order = list(itertools.chain.from_iterable(spec.axes))
        for layer, name in enumerate(spec.tensors()):
            one = np.asarray(array[layer] if spec.layers else array)
            yield name, np.ascontiguousarray(one.reshape(spec.sizes).transpose(order).reshape(spec.file_shape))
