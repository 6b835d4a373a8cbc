"""The model as a flat dict of named arrays: what the optimizer, the checkpoints and the shardings speak of."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from dmattn_jax.models.config import DogeConfig
from dmattn_jax.models.doge import DogeForCausalLM

_NEVER_DECAYS = re.compile(r"(^|\.)(gate\.(A|delta)|\w*_bias)$")


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model without arrays. Names are the module path joined by dots: `layers.0.attention.query`."""

    config: Any
    """What the model is made of, such as a DogeConfig."""
    make: Callable[[nnx.Rngs], Any]
    """A model with fresh parameters."""
    graph: nnx.GraphDef[Any]
    variables: Mapping[str, tuple[tuple[Any, ...], nnx.Variable[Any]]]

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Name -> shape and dtype."""
        return {name: variable.get_value() for name, (_, variable) in self.variables.items()}

    @property
    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """Name -> logical axis names; () where a parameter has none (it is then on every device)."""
        return {
            name: tuple(variable.get_metadata("out_sharding", None) or ())
            for name, (_, variable) in self.variables.items()
        }

    def decay_mask(self) -> dict[str, bool]:
        """Name -> whether weight decay applies."""
        axes = self.axes
        return {name: decays(name, shape.ndim - ("layers" in axes[name])) for name, shape in self.shapes.items()}

    def merge(self, params: Mapping[str, Any]) -> Any:
        """The model with these arrays (or tracers). A name that is missing is a KeyError."""
        state = nnx.from_flat_state(
            [(path, variable.replace(params[name])) for name, (path, variable) in self.variables.items()]
        )
        return nnx.merge(self.graph, state)

    def initialize(self, seed: int) -> dict[str, jax.Array]:
        """Fresh arrays. Traceable: under `jax.jit` with out_shardings each device makes only its own piece."""
        flat = nnx.to_flat_state(nnx.state(self.make(nnx.Rngs(seed)), nnx.Param))
        return {_join(path): variable.get_value() for path, variable in flat}


def _join(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)


def decays(name: str, dimensions: int) -> bool:
    """Matrices decay, embeddings among them. Vectors do not: norms, biases, residual scales, the gate's A. Neither
    does the gate's Δ, though a matrix: pulling it to 0 pulls every key's importance to a tie; nor a bias per head."""
    return dimensions >= 2 and _NEVER_DECAYS.search(name) is None


def make_skeleton(config: DogeConfig) -> Skeleton:
    """The structure of `DogeForCausalLM(config)`."""
    return skeleton_of(config, lambda rngs: DogeForCausalLM(config, rngs=rngs))


def skeleton_of(config: Any, make: Callable[[nnx.Rngs], Any]) -> Skeleton:
    """A model's structure, by abstract evaluation: nothing is allocated."""
    # not nnx.eval_shape: under an active mesh it takes the logical axis names for mesh axes
    graph, params = jax.eval_shape(lambda: nnx.split(make(nnx.Rngs(0))))
    flat = nnx.to_flat_state(params)
    return Skeleton(config, make, graph, {_join(path): (path, variable) for path, variable in flat})
