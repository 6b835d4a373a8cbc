"""How long programs take a device: not how fast this machine starts them, nor how soon it learns that they are done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

IN_FLIGHT = 10
"""Calls of the shorter of two queues, and programs of their head start: XLA lets 32 wait for a GPU."""


def measure(programs: Sequence[tuple[jax.stages.Compiled, list[jax.Array]]], repeats: int) -> list[list[float]]:
    """Milliseconds that a call of each program with its arguments takes the device, per repeat.

    A repeat queues calls for about 50 ms. Programs take turns: a device that grows warm in between is as warm for all
    of them. On a GPU calls wait in the queue until all of them are there, so that what is timed is the device, not how
    fast this machine starts kernels, which takes longer than many a small one.
    """
    device = head_start()
    plans = []
    for compiled, arguments in programs:
        jax.block_until_ready(compiled(*arguments))
        alone = seconds_of(lambda compiled=compiled, arguments=arguments: compiled(*arguments))
        calls = max(1, int(0.05 / max(alone, 1e-6)))
        most = IN_FLIGHT if device else 200
        plans.append((min(most, calls), min(10, -(-calls // most)) if device else 1))
    times: list[list[float]] = [[] for _ in programs]
    for _ in range(repeats):
        for (compiled, arguments), (calls, rounds), own in zip(programs, plans, times, strict=True):

            def call(count: int, compiled=compiled, arguments=arguments) -> Any:
                for _ in range(count):
                    result = compiled(*arguments)
                return result

            # What a round returns is let go, or the next program runs beside its results.
            if device:
                own.append(sum(device.seconds_each(call, calls) for _ in range(rounds)) / rounds * 1e3)
            else:
                own.append(seconds_of(lambda call=call, calls=calls: call(calls)) / calls * 1e3)
    return times


@cache
def head_start() -> HeadStart | None:
    """The one of this process, where there is a GPU: making it takes a compilation."""
    return HeadStart() if jax.default_backend() == "gpu" else None


def seconds_of(call: Callable[[], Any]) -> float:
    """From the first call until all are done."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


class Queue(NamedTuple):
    """Calls behind a head start. seconds: until all are done; queued: of it until all wait; hidden: whether the head
    start was still running then."""

    seconds: float
    queued: float
    hidden: bool


class HeadStart:
    """Work that keeps a GPU busy for as long as it takes to queue calls behind it."""

    def __init__(self) -> None:
        self.matrix = jnp.zeros((8192, 8192), jnp.bfloat16)
        self.multiply = jax.jit(jnp.dot).lower(self.matrix, self.matrix).compile()
        self._busy(1)
        one, three = (seconds_of(lambda products=products: self._busy(products)) for products in (1, 3))
        self.product_seconds = (three - one) / 2

    def _busy(self, products: int) -> jax.Array:
        for _ in range(products):
            done = self.multiply(self.matrix, self.matrix)
        return done

    def seconds_each(self, call: Callable[[int], Any], calls: int) -> float:
        """Seconds that the device takes for each of call(n)'s n calls.

        From two queues, one of twice as many calls, behind equal head starts: what a queue takes beside its calls,
        until this machine learns of its end, is in both. (Seen from the end of the head start, of which it learns late
        too, ten calls of 10 µs were over before the clock began.) One long call is timed beside its head start's own
        length. A program that waits for the device itself, as loops of XLA's do, is not queued faster than it runs
        however long the head start: it is timed without one.
        """
        products = 2
        while products <= IN_FLIGHT:
            queues = [self._behind(products, call, count) for count in ((calls, 2 * calls) if calls > 1 else (1,))]
            if all(queue.hidden for queue in queues):
                if calls == 1:
                    return queues[0].seconds - products * self.product_seconds
                return (queues[1].seconds - queues[0].seconds) / calls
            products = max(2 * products, math.ceil(1.5 * max(queue.queued for queue in queues) / self.product_seconds))
        return seconds_of(lambda: call(calls)) / calls

    def _behind(self, products: int, call: Callable[[int], Any], count: int) -> Queue:
        begin = time.perf_counter()
        busy = self._busy(products)
        result = call(count)
        queued, hidden = time.perf_counter() - begin, not busy.is_ready()
        jax.block_until_ready(result)
        return Queue(time.perf_counter() - begin, queued, hidden)
