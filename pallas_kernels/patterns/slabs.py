"""What the Hopper kernel reads of patterns: masks of tiles as words of 32 bits, and which tiles meet which.

All of it is XLA. Tiles are 128 × 128. A tile that diagonals cross looks the same wherever it stands, so there is one
mask for each distance between tiles; the tiles of the map have one each. Columns are taken out of the diagonals' tiles
and come gathered, so no pair counts twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.gpu.ranked import bits_of
from pallas_kernels.patterns.contract import Patterns

TILE = 128
HALF = TILE // 2
WORDS = TILE // 32
"""Words of a tile's row: bit b of word m is key 32·m + b."""
NEVER = jnp.iinfo(jnp.int32).max


@dataclass(frozen=True)
class Visits:
    """What a tile of queries visits, in this order: tiles that it sees whole, tiles with a mask, gathered columns.

    near: tiles of queries that the map reaches; they visit all keys up to their own tile. masks [.., half of the
    queries, word, query]: of the near tiles (query tile · near + key tile), then of each distance between tiles.
    back: per head the distances that any diagonal crosses, those first that are full. runs: how many are seen whole,
    how many of the full ones there are, how many of the full ones in `back` are not, the end of those with a mask, the
    end of the columns. columns: per query head, rising, NEVER in unused places.
    """

    near: int
    masks: Int32[Array, "H n 2 W half"]
    back: Int32[Array, "H n"]
    runs: Int32[Array, "H 5 tiles"]
    columns: Int32[Array, "H V"]


def visits(patterns: Patterns, length: int) -> Visits:
    """For rows of one document of `length` tokens, a multiple of TILE."""
    tiles = length // TILE
    near = min(-(-patterns.inside.shape[1] // TILE), tiles)
    diagonals = patterns.diagonals[:, :length]
    heads, reach = diagonals.shape
    distances = min((reach + TILE - 2) // TILE + 1, tiles)
    band = jnp.pad(diagonals, ((0, 0), (0, max(0, (distances + 1) * TILE - reach))))
    masks = jnp.concatenate([_near_masks(patterns, near), _band_masks(band, distances)], axis=1)

    before = jnp.cumsum(jnp.pad(band, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
    number = jnp.arange(distances, dtype=jnp.int32)
    low, high = jnp.maximum(number * TILE - TILE + 1, 0), (number + 1) * TILE
    bits = before[:, high] - before[:, low]
    # The tile on the diagonal is never full: half of it is the future.
    full = (bits == 2 * TILE - 1) & (number > 0)
    crossed = bits > 0
    rank = jnp.where(full, number, jnp.where(crossed, distances + number, 2 * distances))
    back = jnp.argsort(rank, axis=1).astype(jnp.int32)

    columns = _columns_of_heads(patterns, length)
    own = jnp.arange(tiles, dtype=jnp.int32)
    # Columns leave holes in the tiles of keys up to the last one.
    last = jnp.where(columns == NEVER, -1, columns).max(1, initial=-1)
    holes = (last + TILE) // TILE

    def up_to(which: Bool[Array, "H n"], limit: Int32[Array, "*H tiles"]) -> Int32[Array, "H tiles"]:
        """How many distances of a kind are at most a limit."""
        count = jnp.cumsum(jnp.pad(which, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
        at = jnp.clip(jnp.broadcast_to(limit, (heads, tiles)) + 1, 0, distances)
        return jnp.take_along_axis(count, at, axis=1)

    whole = up_to(full, own[None] - holes[:, None])
    fulls, band_end = up_to(full, own), up_to(crossed, own)
    reached = (columns[:, None, :] <= (own[:, None] + 1) * TILE - 1).sum(2, dtype=jnp.int32)
    far_runs = (whole, fulls, full.sum(1, keepdims=True, dtype=jnp.int32) - fulls, band_end,
                band_end + -(-reached // TILE))  # fmt: skip
    is_near, zero = own < near, jnp.zeros_like(own)
    near_runs = (zero, zero, zero, own + 1, own + 1)
    runs = jnp.stack([jnp.where(is_near, here, far) for here, far in zip(near_runs, far_runs, strict=True)], axis=1)
    return Visits(near, masks, back, runs.astype(jnp.int32), columns)


def biases(patterns: Patterns, seen: Visits, bias: Float[Array, "B K S"]) -> Float[Array, "B H 2 R"]:
    """What is added to logits, and the position of the key where that is compared: of the keys that the map's rows
    read [near · TILE], of all keys without the head's columns [S], and of the columns."""
    batch, kv_heads, length = bias.shape
    heads = patterns.verticals.shape[0]
    own = jnp.repeat(bias, heads // kv_heads, axis=1)
    verticals = patterns.verticals[:, :length]
    verticals = jnp.pad(verticals, ((0, 0), (0, length - verticals.shape[1])))
    band = jnp.where(verticals, -jnp.inf, own)
    used = seen.columns != NEVER
    at = jnp.where(used, seen.columns, 0)
    far = jnp.where(used, jnp.take_along_axis(own, jnp.broadcast_to(at, (batch, *at.shape)), axis=2), -jnp.inf)
    near = own[:, :, : seen.near * TILE]
    # Exact as float32 up to 2^24, as positions of the interval kernels are.
    start = jnp.where(used, seen.columns, 0).astype(jnp.float32)
    start = jnp.pad(start, ((0, 0), (seen.near * TILE + length, 0)))
    return jnp.stack(
        [jnp.concatenate([near, band, far], axis=2), jnp.broadcast_to(start, (batch, *start.shape))], axis=2
    )


def _near_masks(patterns: Patterns, near: int) -> Int32[Array, "H n 2 W half"]:
    """The rule among the first near · TILE positions."""
    heads, side = patterns.inside.shape[:2]
    length = near * TILE
    side = min(side, length)
    inside = jnp.pad(patterns.inside[:, :side, :side], ((0, 0), (0, length - side), (0, length - side)))
    row, column = jnp.arange(length)[:, None], jnp.arange(length)[None]
    if length > side:
        # Rows of the last tile that stand below the map.
        beyond = patterns.diagonals.at[:, jnp.abs(row - column)].get(mode="fill", fill_value=False)
        beyond |= patterns.verticals.at[:, column].get(mode="fill", fill_value=False)
        inside = jnp.where(row < side, inside, beyond)
    inside &= column <= row
    words = bits_of(inside.reshape(heads, near, 2, HALF, near, WORDS, 32))
    return jnp.transpose(words, (0, 1, 4, 2, 5, 3)).reshape(heads, near * near, 2, WORDS, HALF)


def _band_masks(diagonals: Bool[Array, "H R"], distances: int) -> Int32[Array, "H n 2 W half"]:
    """Of tiles n tiles apart: bit b of word m of query t is the diagonal n · TILE + t − 32 · m − b."""
    heads = diagonals.shape[0]
    line = jnp.pad(diagonals, ((0, 0), (TILE, 0)))
    # word[x]: the diagonals x, x − 1 … x − 31, for x from −TILE + 31 on.
    count = line.shape[1] - 31
    shifts = jnp.stack([line[:, 31 - b : 31 - b + count] for b in range(32)], axis=-1)
    word = bits_of(shifts)
    first = jnp.arange(distances)[:, None, None, None] * TILE + jnp.arange(2)[:, None, None] * HALF
    at = first + jnp.arange(HALF) - 32 * jnp.arange(WORDS)[:, None] + TILE - 31
    # Bits that reach below −TILE are of no diagonal: there the word is 0.
    return jnp.where(at < 0, 0, word[:, jnp.maximum(at, 0)]).reshape(heads, distances, 2, WORDS, HALF)


def _columns_of_heads(patterns: Patterns, length: int) -> Int32[Array, "H V"]:
    """Each query head's own columns, rising, in whole tiles."""
    heads, kv_heads = patterns.verticals.shape[0], patterns.columns.shape[0]
    columns = jnp.repeat(patterns.columns, heads // kv_heads, axis=0)
    columns = jnp.pad(columns, ((0, 0), (0, -columns.shape[1] % TILE)), constant_values=-1)
    own = jnp.take_along_axis(patterns.verticals, jnp.clip(columns, 0, patterns.verticals.shape[1] - 1), axis=1)
    own &= (columns >= 0) & (columns < length)
    return jnp.sort(jnp.where(own, columns, NEVER), axis=1)
