"""Root-mean-square normalisation, alone and in front of projections."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dmattn_jax.nn.exact import exact_mean_square, exact_projection
from dmattn_jax.nn.linear import linear
from dmattn_jax.nn.rope import turn
from dmattn_jax.partitioning import axis_size, parameter
from pallas_kernels.gpu import MOSAIC_GPU
from pallas_kernels.gpu import head_gradients as hopper

Rotation = tuple[Float[Array, "b T N"], Float[Array, "b T N"]]
"""What `nn.rope.rotation` makes of positions."""


class RMSNorm(nnx.Module):
    """x / √(mean(x²) + eps) · weight over the last axis; float32 inside, the input's dtype outside.

    A row's bits do not depend on the other rows: see `dmattn_jax.nn.exact`.
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float = 1e-6,
        axis: str | None = "embed",
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        """size: of the last axis; axis: its logical name; the weight starts at 1, so rngs is not drawn from."""
        self.weight = parameter(jnp.ones(size, param_dtype), (axis,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*n M"]) -> Float[Array, "*n M"]:
        return _apply(x, _inverse_rms(x, exact_mean_square, self.eps), self.weight[...])

    def project(
        self, x: Float[Array, "*n M"], *projections: Projection, rotation: Rotation | None = None
    ) -> tuple[Float[Array, "*n ..."], ...]:
        """This norm's output for x times the weight of each projection, in x's dtype; one array for each.

        rotation: of heads that have a norm, after it; no gradient goes there. The values are those of norm, products,
        norms of heads and `turn` one after the other. The gradient makes fewer passes over what it reads.
        """
        plans = tuple(_Plan(p.exact, None if p.head_norm is None else p.head_norm.eps) for p in projections)
        weights = tuple(p.weight for p in projections)
        head_weights = tuple(None if p.head_norm is None else p.head_norm.weight[...] for p in projections)
        return _project(plans, self.eps, x, self.weight[...], weights, head_weights, rotation)


def normed_together(*parts: tuple[Float[Array, "B T h D"], RMSNorm]) -> list[Float[Array, "B T h D"]]:
    """Heads with norms of one eps each: the same bits, and for a single token one pass over all of them."""
    if parts[0][0].shape[1] > 1:
        return [norm(heads) for heads, norm in parts]
    heads = jnp.concatenate([heads for heads, _ in parts], axis=2)
    weight = jnp.concatenate([jnp.broadcast_to(norm.weight[...], heads.shape[2:]) for heads, norm in parts])
    (eps,) = {norm.eps for _, norm in parts}
    normed = _apply(heads, _inverse_rms(heads, exact_mean_square, eps), weight)
    return jnp.split(normed, np.cumsum([heads.shape[2] for heads, _ in parts])[:-1], axis=2)


class Projection(NamedTuple):
    """What `RMSNorm.project` multiplies with."""

    weight: Float[Array, "M ..."]
    """[M, F], or [M, H, D] for heads; of x's dtype."""
    head_norm: RMSNorm | None = None
    """Of the last axis, applied to the product."""
    exact: bool = False
    """Whether the product is `exact_projection`, of [B, T, M] and [M, H, D]."""


class _Plan(NamedTuple):
    """A projection without its arrays."""

    exact: bool
    eps: float | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _project(plans, eps, x, weight, weights, head_weights, rotation):
    normed = _apply(x, _inverse_rms(x, exact_mean_square, eps), weight)
    out = []
    for plan, matrix, head_weight in zip(plans, weights, head_weights, strict=True):
        product = exact_projection(normed, matrix) if plan.exact else linear(normed, matrix)
        if plan.eps is not None:
            scale = _inverse_rms(product, exact_mean_square, plan.eps)
            product = _turned(_apply(product, scale, head_weight), rotation)
        out.append(product)
    return tuple(out)


def _turned(heads, rotation):
    return heads if rotation is None else turn(heads, *rotation)


def _forward(plans, eps, x, weight, weights, head_weights, rotation):
    # As under differentiation everywhere, no second pass must agree: ordinary means and products.
    scale = _inverse_rms(x, _mean_square, eps)
    normed = _apply(x, scale, weight)
    products, head_scales, out = [], [], []
    for plan, matrix, head_weight in zip(plans, weights, head_weights, strict=True):
        product = jnp.tensordot(normed, matrix, 1)
        head_scale = None if plan.eps is None else _inverse_rms(product, _mean_square, plan.eps)
        products.append(product)
        head_scales.append(head_scale)
        out.append(product if head_scale is None else _turned(_apply(product, head_scale, head_weight), rotation))
    return tuple(out), (x, scale, weight, weights, head_weights, rotation, tuple(products), tuple(head_scales))


def _backward(plans, eps, saved, cotangents):
    """With n = x·s·w the gradient of x is s·(w·∂n − x·s·Σ n·∂n / M): a sum over the row before anything else.

    But n is read by products alone. ∂n = Σ ∂y Wᵀ over all y = n W, and so Σ n·∂n = Σ y·∂y, which is summed where ∂y is
    made: no pass over x and ∂n for it. Where y goes into a norm of its own, which takes the size of y away, Σ y·∂y is
    the little that eps leaves: Σ z·∂z of that norm's output z, which its own gradient sums, times
    eps / (mean(y²) + eps).
    """
    x, scale, weight, weights, head_weights, rotation, products, head_scales = saved
    normed, rows = _apply(x, scale, weight), x.ndim - 1
    dots, d_normed, d_weights, d_head_weights = [], [], [], []
    plain: dict[tuple[int, ...], list[jax.Array]] = {}
    for plan, matrix, head_weight, product, head_scale, d in zip(
        plans, weights, head_weights, products, head_scales, cotangents, strict=True
    ):
        d_head_weight = None
        if head_scale is None:
            plain.setdefault(d.shape, []).append(_wide(product) * _wide(d))
        else:
            d, d_head_weight, dot = _head_gradients(product, head_scale, head_weight, rotation, d, plan.eps)
            dots.append(dot)
        trailing = tuple(range(rows, d.ndim))
        d_normed.append(jnp.tensordot(d, matrix, (trailing, tuple(range(1, matrix.ndim)))))
        d_weights.append(jnp.tensordot(normed, d, (tuple(range(rows)),) * 2))
        d_head_weights.append(d_head_weight)
    with jax.named_scope("norm"):
        # Added before they are summed: one reduction of products of one shape is one kernel with what makes them.
        dots += [jnp.sum(_sum(terms), axis=tuple(range(rows, len(shape)))) for shape, terms in plain.items()]
        d_x, d_weight = _gradients(x, scale, weight, _sum(map(_wide, d_normed)), _sum(dots)[..., None])
    return d_x, d_weight, tuple(d_weights), tuple(d_head_weights), None


_project.defvjp(_forward, _backward)


@jax.named_scope("norm")
def _head_gradients(heads, scale, weight, rotation, d, eps):
    """∂heads and ∂weight for the cotangent d of heads that were normed and turned, and Σ heads · ∂heads of each row."""
    if rotation is not None:
        cos, sin = rotation
        if _kernel_takes(heads):
            d_heads, d_weight, dot = hopper.head_gradients(heads, d, cos, sin, weight, eps=eps)
            return d_heads, d_weight.astype(weight.dtype), dot
        d = turn(d, cos, -sin)
    d = _wide(d)
    dot = jnp.sum(d * _wide(weight) * _wide(heads) * scale, axis=-1, keepdims=True)
    rest = jnp.sum(dot * eps * scale**2, axis=(-2, -1))
    return *_gradients(heads, scale, weight, d, dot), rest


def _kernel_takes(heads):
    whole = axis_size("batch") * axis_size("heads") == 1
    return whole and MOSAIC_GPU.unavailable() is None and hopper.unsupported(heads.shape, heads.dtype) is None


def _gradients(x, scale, weight, d, dot):
    """∂x and ∂weight of a norm whose output has the cotangent d; dot: its sum with the output over the last axis."""
    unit = _wide(x) * scale
    d_x = scale * (d * _wide(weight) - unit * dot / x.shape[-1])
    d_weight = jnp.sum(d * unit, axis=tuple(range(x.ndim - 1)))
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


@jax.named_scope("norm")
def _inverse_rms(x, mean_square, eps):
    scale = jax.lax.rsqrt(mean_square(_wide(x)) + eps)
    if x.ndim == 4:
        # Of heads, whose rotation follows: it reads x and the scale, where XLA would write and read x normed as
        # float32 in between.
        scale = jax.lax.optimization_barrier(scale)
    return scale


@jax.named_scope("norm")
def _apply(x, scale, weight):
    return (_wide(x) * scale * _wide(weight)).astype(x.dtype)


def _sum(terms):
    return functools.reduce(jnp.add, terms)


def _mean_square(x):
    return jnp.mean(jnp.square(x), axis=-1, keepdims=True)


def _wide(x):
    return x.astype(jnp.float32)
