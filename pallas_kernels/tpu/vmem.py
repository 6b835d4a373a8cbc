"""What each TPU kernel keeps in VMEM: blocks that come and go (twice: one is on its way), scratch, and products' parts.

Sizes are chosen by these numbers, and the same numbers are what a kernel asks the compiler for.
"""

from __future__ import annotations

LANES, SUBLANES = 128, 8
"""Of a vector register."""


def forward_bytes(capacity: int, rows: int, dim: int, itemsize: int, wide: int) -> int:
    """`forward.attend`: rows are the query heads × positions of a tile, wide the keys of its largest product."""
    tiles = _rows_of_keys(capacity, dim, itemsize) + 2 * 2 * _array(rows, dim, itemsize) + 2 * _scalars(rows)
    scratch = 2 * _array(rows, LANES, 4) + _array(rows, dim, 4)
    return tiles + scratch + _products(rows, wide, dim, itemsize)


def dquery_bytes(capacity: int, rows: int, dim: int, itemsize: int, wide: int) -> int:
    """`backward_query.query_gradient`."""
    tiles = _rows_of_keys(capacity, dim, itemsize) + 2 * 3 * _array(rows, dim, itemsize) + 2 * _scalars(rows)
    scratch = 3 * _array(rows, LANES, 4) + _array(rows, dim, 4)
    return tiles + scratch + _products(rows, wide, dim, itemsize)


def dkey_bytes(
    capacity: int, carried: int, entering: int, rows: int, dim: int, itemsize: int, *, listed: bool, before: bool
) -> int:
    """`backward_key.key_gradients`. entering: rows written out a block. before: keys precede the first query."""
    tiles = _rows_of_keys(capacity, dim, itemsize) + 2 * 2 * _array(rows, dim, itemsize) + 2 * _scalars(rows)
    outs = 2 * (2 * _array(entering, dim, itemsize) + _scalars(entering))
    scratch = 2 * _array(capacity, dim, 4) + 4 * _array(capacity, LANES, 4)
    if listed:
        tiles += 2 * (_scalars(capacity) + _scalars(entering))
        scratch += 2 * _array(carried, dim, 4) + _array(carried, LANES, 4)
    if before:
        outs += 2 * (2 * _array(carried, dim, 4) + _scalars(carried))
    # Keys stand across products here, a pair of tiles at a time; float32 operands are cut into parts.
    logits = _array(2 * LANES, rows, 4)
    products = 6 * logits + (2 * rows + 4 * LANES) * _wide(dim) * 10 if itemsize == 4 else 4 * logits
    return tiles + outs + scratch + products


def stream_bytes(capacity: int, carried: int, entering: int, dim: int, itemsize: int, *, before: bool) -> int:
    """`stream.stream_rows`."""
    lists = _array(capacity, dim, itemsize) * 2 + _array(16, capacity, 2)
    coming = _array(entering, dim, itemsize) * 2 + _array(16, entering, 2) + _scalars(capacity) + _scalars(entering)
    first = _array(carried, dim, itemsize) * 2 + _array(16, carried, 2) if before else 0
    # Products of pairs of tiles, and their parts.
    return 3 * lists + 2 * coming + 2 * first + 8 * _array(2 * LANES, dim, 4)


def pattern_bytes(block: int, group: int, dim: int, itemsize: int) -> int:
    """`patterns.tpu`: a tile of queries, and a block of keys and one of columns with their masks."""
    rows = group * block
    tiles = 2 * (2 * _array(rows, dim, itemsize) + 4 * _array(block, dim, itemsize) + 8 * _scalars(block))
    masks = 2 * _array(rows, block, 1) + 4 * _array(rows, block, 4)
    scratch = 2 * _array(rows, LANES, 4) + _array(rows, dim, 4)
    return tiles + masks + scratch + _products(rows, block, dim, itemsize)


def choosing_bytes(carried: int, epoch: int) -> int:
    """`choosing.walk_forward`, eight rows at a time; a row of its own takes as much room as eight."""
    capacity = carried + epoch
    blocks = 2 * (3 * capacity + carried + 2 * epoch + LANES)
    scratch = 2 * carried + 5 * capacity + LANES + 5 * capacity
    moving = 12 * capacity
    return 4 * SUBLANES * (blocks + scratch + moving)


def lifetimes_bytes(carried: int, epoch: int) -> int:
    """`lifetimes.walk_back`."""
    capacity = carried + epoch
    blocks = 2 * (3 * capacity + carried + 2 * epoch)
    scratch = 2 * carried + 2 * capacity + LANES + 3 * epoch
    moving = 12 * capacity
    return 4 * SUBLANES * (blocks + scratch + moving)


def _rows_of_keys(capacity: int, dim: int, itemsize: int) -> int:
    """Keys, values, bias and spans of a block of slots, twice."""
    return 2 * (2 * _array(capacity, dim, itemsize) + 2 * _scalars(capacity))


def _products(rows: int, wide: int, dim: int, itemsize: int) -> int:
    """Logits and weights of a tile; float32 operands are cut into bfloat16 parts."""
    logits = rows * wide * 4
    if itemsize == 4:
        return 3 * logits + (rows + wide) * _wide(dim) * 10 + rows * _wide(dim) * 4
    return 3 * logits // 2 + rows * _wide(dim) * 4


def _scalars(length: int) -> int:
    """Rows of scalars: as many sublanes as a register has, whether used or not."""
    return _array(SUBLANES, length, 4)


def _array(rows: int, width: int, itemsize: int) -> int:
    return -(-rows // SUBLANES) * SUBLANES * _wide(width) * itemsize


def _wide(width: int) -> int:
    return -(-width // LANES) * LANES
