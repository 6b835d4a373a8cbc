"""How often each loop of the TPU kernels runs, for a random and a rising gate."""

from __future__ import annotations

from typing import Any

from benchmarks.tpu_programs import Shape, sizes_for


def count_visits(options: Shape) -> dict[str, int]:
    """How often each loop runs: the same selection, lists and bounds as a run has, on a random gate."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dmattn_jax.documents import document_bounds
    from dmattn_jax.layout import lay_out
    from dmattn_jax.selection import choose_keys
    from pallas_kernels.tpu.backward_key import WIDE
    from pallas_kernels.tpu.config import LANES
    from pallas_kernels.tpu.stream import tile_ranges

    sizes = sizes_for(options)
    heads, length = options.kv_heads, options.length
    gate = jnp.asarray(np.random.default_rng(0).standard_normal((1, heads, length)), jnp.float32)

    @jax.jit
    def lay(gate):
        choice = choose_keys(gate, (options.window,) * heads, document_bounds(None, 1, length), causal=True)
        return lay_out(choice, queries=length, window=options.window, blocks=sizes)

    intervals = lay(gate)
    lists = intervals.lists
    assert lists is not None
    epochs, capacity = lists.index.shape[2:]
    index = np.asarray(lists.index)
    first = np.arange(epochs)[:, None] * sizes.epoch

    def relative(array):
        there = np.take_along_axis(np.asarray(array)[:, :, None], np.minimum(index, length - 1), axis=3) - first
        return np.where(index < length, np.clip(there, 0, sizes.epoch), 0).reshape(heads, epochs, -1, LANES)

    start, end = relative(intervals.start), relative(intervals.end)
    kinds = ("whole", "masked pair", "masked single")
    counts = dict.fromkeys([*kinds, *(f"key {kind}" for kind in kinds)], 0)
    for begin in range(0, sizes.epoch, sizes.block_q):
        last = begin + sizes.block_q - 1
        meets = (start.min(-1) <= last) & (end.max(-1) > begin)
        whole = (start.max(-1) <= begin) & (end.min(-1) > last)
        for prefix, width in (("", sizes.wide // LANES), ("key ", WIDE // LANES)):
            wide = whole.reshape(heads, epochs, -1, width).all(-1)
            rest = meets & ~np.repeat(wide, width, axis=-1)
            pairs = rest.reshape(heads, epochs, -1, 2)
            counts[f"{prefix}whole"] += int(wide.sum())
            counts[f"{prefix}masked pair"] += int(pairs.all(-1).sum())
            counts[f"{prefix}masked single"] += int((pairs[..., 0] != pairs[..., 1]).sum())

    def moved(label, slots, low, high):
        ranges = np.asarray(tile_ranges(slots, low, high))
        tiles = np.maximum(ranges[..., 1, :] - ranges[..., 0, :], 0)
        return {f"{label} pair": int((tiles // 2).sum()), label: int((tiles % 2).sum())}

    own = lists.entry_slot.reshape(1, heads, epochs, sizes.epoch)
    rising = np.broadcast_to(np.arange(length), gate.shape[1:])
    chosen = {
        f"{label}: {name}": count
        for label, gates, listed in (
            ("select", np.asarray(gate)[0], index[0]),
            # Every key enters and is seen: the most there can be to compare.
            ("select, rising gate", rising, np.zeros_like(index[0])),
        )
        for name, count in count_comparisons(gates, listed, lists.carried, options.window, sizes.epoch).items()
    }
    carry = moved("carry", lists.next_slot, 0, lists.carried)
    enter = moved("enter", own, lists.carried, capacity)
    return chosen | counts | {"query tiles": heads * length // sizes.block_q, "epochs": heads * epochs} | carry | enter


def count_comparisons(gate: Any, index: Any, carried: int, window: int, epoch: int) -> dict[str, int]:
    """How often the loops of the two kernels run that choose keys: gate [K, N] without ties, index [K, E, C]."""
    import numpy as np

    from pallas_kernels.tpu.choosing import ROWS, compared_at_once
    from pallas_kernels.tpu.config import LANES

    heads, length = gate.shape
    epochs, wide = length // epoch, compared_at_once(carried)
    names = ("row", "turn", "in turn: carried", "in turn: entered", "tile", "safe", "carried", "entered", "ask")
    counts = dict.fromkeys(names, 0)
    for row, number in np.ndindex(heads, epochs):
        first = number * epoch
        until = gate[row, : first + 1]
        least = np.partition(until, -window)[-window] if until.size >= window else -np.inf
        enters = first + np.flatnonzero(gate[row, first : first + epoch] >= least)
        counts["row"] += 1
        for tile, at in enumerate(range(0, enters.size, LANES)):
            own = enters[at : at + LANES]
            # As the kernel asks: 128 positions without a gap, each above all before it.
            rises = (np.diff(gate[row, own]) >= 0).all() and gate[row, own[0]] >= gate[row, : own[0] + 1].max()
            counts["turn"] += 1
            if own.size == LANES and own[-1] - own[0] == LANES - 1 and rises and window >= LANES:
                counts["in turn: carried"] += carried // wide
                counts["in turn: entered"] += tile
                continue
            safe = int(np.clip((window - at - own.size) // wide, 0, carried // wide))
            counts["tile"] += 1
            counts["safe"] += safe
            counts["carried"] += carried // wide - safe
            counts["entered"] += tile
        counts["ask"] += -(-int((index[row, number, carried:] < length).sum()) // LANES)
    steps = -(-heads // ROWS) * epochs
    of_all = dict.fromkeys(("close up", "settle", "spread"), steps)
    return counts | {"own": counts["tile"], "next": counts["turn"], "let in": counts["turn"]} | of_all
