"""What the two consumer warpgroups of the key gradients do, in one of two ways.

`consume_halves`: each has half of the tile's keys and all four products of them.
`consume_products`: both have the same 64 keys; one makes weights and dv, the other makes dk and dbias from weights that
it is handed through shared memory. A warpgroup's sum then is one gradient, which is what registers hold of wide heads,
and still no product is made twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.masks import visible
from pallas_kernels.gpu.pipeline import load_as, load_vector
from pallas_kernels.powers_of_two import LOG2E

KEYS = 64
"""Keys of one warpgroup's products."""

Look = Callable[[Any, tuple[int, ...]], Any]
"""(meta of the keys, shape [keys, queries]) -> which queries see which keys, or None where all do."""


class Streams(NamedTuple):
    """Query tiles in flight [stages, block_q, D], their statistics, and the barriers of arrival and release.

    Statistics go to registers, so they are released after the product that needs them (`pipeline.produce`).
    """

    query: Any
    dout: Any
    stats: Any
    q_full: Any
    do_full: Any
    stats_full: Any
    q_free: Any
    do_free: Any
    stats_free: Any


class Part(NamedTuple):
    """Steps below `end`. first_query(step) -> its first query, relative to the epoch."""

    end: Any
    first_query: Callable[[Any], Any]


class Steps(NamedTuple):
    """The parts of a walk: steps that need no mask, those whose queries all come after the keys' first positions, and
    the rest."""

    whole: Part
    begun: Part
    rest: Part


class Program(NamedTuple):
    """One tile of keys, whose first row is `first`.

    keys(rows) -> keys, values and meta in global memory; gradients(rows, columns), bias_gradient(rows) -> where results
    go. tiles, loaded: shared memory of keys, values and meta, and the barriers of their arrival. passage, bias: shared
    memory through which results leave.
    """

    keys: Callable[[Any], tuple[Any, Any, Any]]
    gradients: Callable[[Any, Any], Any]
    bias_gradient: Callable[[Any], Any]
    first: Any
    tiles: tuple[Any, Any, Any]
    loaded: Any
    passage: Any
    bias: Any
    streams: Streams
    steps: Steps


def consume_halves(program: Program, thread: Any, scale: float) -> None:
    """Threads 0 and 1 alike, of tiles of 128 keys."""
    plgpu.set_max_registers(240, action="increase")
    streams, steps, loaded = program.streams, program.steps, program.loaded
    stages, _, dim = streams.query.shape
    dtype = streams.query.dtype
    at = pl.ds(program.first + thread * KEYS, KEYS)
    k_tile, v_tile, meta_tile = (each.at[thread] for each in program.tiles)
    for n, (source, target) in enumerate(zip(program.keys(at), (k_tile, v_tile, meta_tile), strict=True)):
        plgpu.copy_gmem_to_smem(source, target, loaded.at[2 * n + thread])
    for n in range(3):
        plgpu.barrier_wait(loaded.at[2 * n + thread])
    by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    bias = load_vector(meta_tile.at[0], by_row)

    def step(number, carry, look):
        dkey, dvalue, dbias = carry
        slot = lax.rem(number, jnp.int32(stages))
        plgpu.barrier_wait(streams.q_full.at[slot])
        scores = _product(k_tile, streams.query.at[slot])
        shape = scores.shape
        plgpu.barrier_wait(streams.stats_full.at[slot])
        shift, inverse, delta = (load_vector(streams.stats.at[slot, n], by_column) for n in range(3))
        scores = scores * (scale * LOG2E) + lax.broadcast_in_dim(bias, shape, [0])
        scores = scores - lax.broadcast_in_dim(shift, shape, [1])
        sees = look(meta_tile, shape)
        weights = jnp.exp2(scores) * lax.broadcast_in_dim(inverse, shape, [1])
        # Last of all, so that a query whose normalizer is NaN reaches only the keys it sees.
        weights = _masked(weights, sees)
        plgpu.barrier_wait(streams.do_full.at[slot])
        low = weights.astype(dtype)

        def both(refs):
            value_acc, weight_acc = refs
            plgpu.wgmma(value_acc, low, streams.dout.at[slot])
            plgpu.wgmma(weight_acc, v_tile, streams.dout.at[slot].transpose((1, 0)))

        dvalue, dweights = pl.run_state(both)((plgpu.ACC.init(dvalue), plgpu.ACC.init(_zeros(*shape))))
        plgpu.barrier_arrive(streams.do_free.at[slot])
        dscores = weights * (dweights - lax.broadcast_in_dim(delta, shape, [1]))
        dscores = _masked(dscores, sees)
        dbias = dbias + dscores.sum(axis=1)
        dkey = _add_product(dkey, dscores.astype(dtype), streams.query.at[slot])
        plgpu.barrier_arrive(streams.stats_free.at[slot])
        plgpu.barrier_arrive(streams.q_free.at[slot])
        return dkey, dvalue, dbias

    start = (_zeros(KEYS, dim), _zeros(KEYS, dim), _zero_per_key())
    dkey, dvalue, dbias = _for_each_step(steps, step, start)
    out_tile, bias_tile = program.passage.at[thread], program.bias.at[thread]
    bias_tile[...] = dbias
    out_tile[...] = (dkey * scale).astype(out_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile, program.gradients(at, pl.ds(0, dim)))
    plgpu.copy_smem_to_gmem(bias_tile, program.bias_gradient(at))
    plgpu.wait_smem_to_gmem(0)
    out_tile[...] = dvalue.astype(out_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile, program.gradients(at, pl.ds(dim, dim)))
    plgpu.wait_smem_to_gmem(0)


def consume_products(program: Program, thread: Any, scale: float) -> None:
    """Threads 0 and 1, of tiles of 64 keys."""
    plgpu.set_max_registers(240, action="increase")
    pl.when(thread == 0)(lambda: _weights_and_dvalue(program, scale))
    pl.when(thread == 1)(lambda: _dkey_and_dbias(program, scale))


def _weights_and_dvalue(program: Program, scale: float) -> None:
    streams, steps, loaded, passage = program.streams, program.steps, program.loaded, program.passage
    stages, _, dim = streams.query.shape
    dtype = streams.query.dtype
    at = pl.ds(program.first, KEYS)
    keys, _, meta = program.keys(at)
    k_tile, _, meta_tile = program.tiles
    plgpu.copy_gmem_to_smem(keys, k_tile, loaded.at[_KEY])
    plgpu.copy_gmem_to_smem(meta, meta_tile, loaded.at[_META])
    plgpu.barrier_wait(loaded.at[_KEY])
    plgpu.barrier_wait(loaded.at[_META])
    by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    bias = load_vector(meta_tile.at[0], by_row)

    def step(number, dvalue, look):
        slot = lax.rem(number, jnp.int32(stages))
        plgpu.barrier_wait(streams.q_full.at[slot])
        scores = _product(k_tile, streams.query.at[slot])
        plgpu.barrier_arrive(streams.q_free.at[slot])
        shape = scores.shape
        plgpu.barrier_wait(streams.stats_full.at[slot])
        shift, inverse = (load_vector(streams.stats.at[slot, n], by_column) for n in range(2))
        scores = scores * (scale * LOG2E) + lax.broadcast_in_dim(bias, shape, [0])
        scores = scores - lax.broadcast_in_dim(shift, shape, [1])
        weights = jnp.exp2(scores) * lax.broadcast_in_dim(inverse, shape, [1])
        # Last of all, so that a query whose normalizer is NaN reaches only the keys it sees.
        weights = _masked(weights, look(meta_tile, shape))

        @pl.when(number > 0)
        def _until_taken():
            plgpu.barrier_wait(loaded.at[_TAKEN])

        passage[...] = weights
        plgpu.barrier_arrive(loaded.at[_GIVEN])
        plgpu.barrier_wait(streams.do_full.at[slot])
        dvalue = _add_product(dvalue, weights.astype(dtype), streams.dout.at[slot])
        plgpu.barrier_arrive(streams.stats_free.at[slot])
        plgpu.barrier_arrive(streams.do_free.at[slot])
        return dvalue

    dvalue = _for_each_step(steps, step, _zeros(KEYS, dim))

    @pl.when(steps.rest.end > 0)
    def _until_last_is_taken():
        plgpu.barrier_wait(loaded.at[_TAKEN])

    _write_columns(program, at, dvalue, dim)
    plgpu.barrier_arrive(loaded.at[_WRITTEN])
    plgpu.wait_smem_to_gmem(0)


def _dkey_and_dbias(program: Program, scale: float) -> None:
    streams, steps, loaded, passage = program.streams, program.steps, program.loaded, program.passage
    stages, _, dim = streams.query.shape
    dtype = streams.query.dtype
    at = pl.ds(program.first, KEYS)
    _, values, _ = program.keys(at)
    _, v_tile, meta_tile = program.tiles
    plgpu.copy_gmem_to_smem(values, v_tile, loaded.at[_VALUE])
    plgpu.barrier_wait(loaded.at[_VALUE])
    plgpu.barrier_wait(loaded.at[_META])
    by_column = plgpu.Layout.WGMMA.reduce(0)

    def step(number, carry, look):
        dkey, dbias = carry
        slot = lax.rem(number, jnp.int32(stages))
        plgpu.barrier_wait(streams.do_full.at[slot])
        dweights = _product(v_tile, streams.dout.at[slot])
        plgpu.barrier_arrive(streams.do_free.at[slot])
        shape = dweights.shape
        plgpu.barrier_wait(streams.stats_full.at[slot])
        delta = load_vector(streams.stats.at[slot, 2], by_column)
        plgpu.barrier_wait(loaded.at[_GIVEN])
        weights = load_as(passage, plgpu.Layout.WGMMA)
        plgpu.barrier_arrive(loaded.at[_TAKEN])
        dscores = weights * (dweights - lax.broadcast_in_dim(delta, shape, [1]))
        dscores = _masked(dscores, look(meta_tile, shape))
        dbias = dbias + dscores.sum(axis=1)
        plgpu.barrier_wait(streams.q_full.at[slot])
        dkey = _add_product(dkey, dscores.astype(dtype), streams.query.at[slot])
        plgpu.barrier_arrive(streams.stats_free.at[slot])
        plgpu.barrier_arrive(streams.q_free.at[slot])
        return dkey, dbias

    dkey, dbias = _for_each_step(steps, step, (_zeros(KEYS, dim), _zero_per_key()))
    plgpu.barrier_wait(loaded.at[_WRITTEN])
    program.bias[...] = dbias
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(program.bias, program.bias_gradient(at))
    _write_columns(program, at, dkey * scale, 0)
    plgpu.wait_smem_to_gmem(0)


# Barriers of `Program.loaded` where the consumers share products: arrivals, then weights given and taken, and the end
# of the first one's results.
_KEY, _VALUE, _META, _GIVEN, _TAKEN, _WRITTEN = range(6)


def _write_columns(program: Program, at: Any, sums: Any, column: int) -> None:
    """As many columns at a time as there is room for; the passage is free again when this returns."""
    passage, width = program.passage, program.passage.shape[1]
    for first in range(0, sums.shape[1], width):
        passage[...] = lax.slice(sums, (0, first), (KEYS, first + width))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(passage, program.gradients(at, pl.ds(column + first, width)))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _for_each_step(steps: Steps, step: Callable[[Any, Any, Look], Any], carry: Any) -> Any:
    first = 0
    ended, late = (partial(visible, axis=0, begun=known) for known in (True, False))
    for (end, first_query), look in zip(steps, (_all, ended, late), strict=True):

        def at(number, carry, first_query=first_query, look=look):
            return step(number, carry, lambda meta_tile, shape: look(meta_tile, shape, first_query(number)))

        carry = lax.fori_loop(first, end, at, carry)
        first = end
    return carry


def _all(meta_tile: Any, shape: tuple[int, ...], first_query: Any) -> None:
    """Every query sees every key."""


def _masked(array: Any, sees: Any) -> Any:
    """0 where a query does not see a key."""
    return array if sees is None else jnp.where(sees, array, 0.0)


def _product(left: Any, right: Any) -> Any:
    """left · rightᵀ of tiles in shared memory."""

    def multiply(acc):
        plgpu.wgmma(acc, left, right.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((left.shape[0], right.shape[0]), jnp.float32))


def _add_product(total: Any, left: Any, right: Any) -> Any:
    """total + left · right, of which only the last is in shared memory."""

    def add(acc):
        plgpu.wgmma(acc, left, right)

    return pl.run_state(add)(plgpu.ACC.init(total))


def _zeros(*shape: int) -> Any:
    return plgpu.layout_cast(jnp.full(shape, 0, jnp.float32), plgpu.Layout.WGMMA)


def _zero_per_key() -> Any:
    return plgpu.layout_cast(jnp.full((KEYS,), 0, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
