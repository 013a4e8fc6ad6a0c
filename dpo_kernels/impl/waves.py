"""Shapes of products that leave few multiprocessors without work.

Dimensions: N labelled rows, n of them in a block; H hidden size, V vocabulary size, v entries in a block of it.

A product is computed in tiles of 128 x 256, one a multiprocessor at a time: a library's (cuBLAS, of large operands) and
those whose epilogue is ours alike. So its time is a whole number of *rounds*, tiles that the busiest multiprocessor
computes. Times are counted in multiply-adds of one multiprocessor.
"""

from __future__ import annotations

import functools

TILE_ROWS, TILE_COLUMNS = 128, 256
TILE = TILE_ROWS * TILE_COLUMNS
# What a program of ours does before its first product and after its last, in blocks of columns.
START = 0.05
# Fewer rows read W so often that memory is busy for more than a fifth of the products' time.
MIN_ROWS = 1024
# Of choices whose time differs by less, the one that takes less memory.
NEARLY = 0.01
# Columns of a block of the vocabulary are a multiple of this.
ALIGNED = 64
# A byte that is read or written takes the time of so many multiply-adds: 790 TFLOP/s and 4.3 TB/s, an H200.
PER_BYTE = 92
# Multiprocessors of the GPU that a plan is for where there is none to ask: an H200.
PLANNED = 132
# Of the second-level cache: what x and W may fill, beside what is written through it.
CACHE_SHARE = 0.9


def _over(size: int, of: int) -> int:
    return -(-size // of)


def product_rounds(m: int, n: int, multiprocessors: int, parts: int = 1, cluster: int = 1) -> int:
    """Of a product [m, k] x [k, n] whose sum is in so many parts that are computed side by side. `cluster`: so many
    multiprocessors are one unit, with the same columns and other rows each."""
    return _over(parts * _over(m, TILE_ROWS * cluster) * _over(n, TILE_COLUMNS), max(1, multiprocessors // cluster))


def _product_time(m: int, k: int, n: int, multiprocessors: int, parts: int, cluster: int = 1) -> float:
    time = product_rounds(m, n, multiprocessors, parts, cluster) * TILE * k / parts
    if parts > 1:  # in fp32, written and read
        time += 8 * parts * m * n * PER_BYTE / multiprocessors
    return time


@functools.lru_cache(maxsize=1024)
def sum_parts(m: int, k: int, n: int, multiprocessors: int, cluster: int = 1) -> int:
    """Into how many parts of k a product [m, k] x [k, n] is best split that has no tile for each multiprocessor, or for
    each cluster of them."""
    tiles, units = _over(m, TILE_ROWS * cluster) * _over(n, TILE_COLUMNS), max(1, multiprocessors // cluster)
    if not 0 < tiles < units:
        return 1
    choices = range(1, max(4, units // tiles) + 1)
    return min(choices, key=lambda parts: _product_time(m, k, n, multiprocessors, parts, cluster))


def product_time(m: int, k: int, n: int, multiprocessors: int, in_parts: bool = False) -> float:
    parts = sum_parts(m, k, n, multiprocessors) if in_parts else 1
    return _product_time(m, k, n, multiprocessors, parts)


def fold_rounds(groups_of_rows: int, column_blocks: int, units: int, splits: int) -> int:
    """Blocks of columns that the busiest unit goes through, in a product whose epilogue is ours: a program has a group
    of rows and one split of the vocabulary. Splits differ by one block at most, and the longer ones come first."""
    blocks, longer = divmod(column_blocks, splits)
    return blocks * _over(groups_of_rows * splits, units) + _over(groups_of_rows * longer, units)


@functools.lru_cache(maxsize=1024)
def splits_of(groups_of_rows: int, column_blocks: int, units: int) -> int:
    """How many parts of the vocabulary keep the units busiest, multiprocessors or clusters of them; the fewest of
    equal ones."""

    def time(splits: int) -> float:
        return fold_rounds(groups_of_rows, column_blocks, units, splits) + START * _over(groups_of_rows * splits, units)

    return min(range(1, min(column_blocks, 4 * units) + 1), key=time)


def fold_time(n: int, v: int, h: int, multiprocessors: int, cluster: int = 1) -> float:
    """Of a product [n, H] x [H, v] whose epilogue is ours. `cluster`: so many multiprocessors are one unit, with the
    same columns and other rows each."""
    groups, blocks, units = _over(n, TILE_ROWS * cluster), _over(v, TILE_COLUMNS), max(1, multiprocessors // cluster)
    return fold_rounds(groups, blocks, units, splits_of(groups, blocks, units)) * TILE * h


def alike(size: int, step: int, count: int) -> int:
    """The size of `count` blocks, or fewer, that are alike but for the last: a multiple of `step`."""
    return max(step, _over(_over(size, count), step) * step)


def _last(size: int, block: int) -> int:
    return size - (_over(size, block) - 1) * block


def _blocks(size: int, block: int) -> list[tuple[int, int]]:
    """(how many, of which size)."""
    return [(_over(size, block) - 1, block), (1, _last(size, block))]


def rows_time(n: int, v: int, h: int, multiprocessors: int, rows: int, cluster: int = 1) -> float:
    """Of path B: products x.W^T of `rows` rows at a time, and of their exponentials by W, a sum over V."""
    return sum(
        count * (fold_time(size, v, h, multiprocessors, cluster) + product_time(size, v, h, multiprocessors, True))
        for count, size in _blocks(n, rows)
    )


@functools.lru_cache(maxsize=1024)
def rows_at_a_time(n: int, v: int, h: int, multiprocessors: int, most_bytes: int, cluster: int = 1) -> int:
    """How many rows of exponentials [V, rows], two bytes each, path B has at a time: a multiple of 128, or of 16 where
    there are fewer, or no room for more."""
    fit = max(16, most_bytes // (2 * v) // 16 * 16)
    if min(n, fit) <= TILE_ROWS:
        return min(fit, alike(n, 16, _over(n, fit)))
    choices = {
        rows: rows_time(n, v, h, multiprocessors, rows, cluster)
        for count in range(_over(n, fit), _over(n, TILE_ROWS) + 1)
        if (rows := alike(n, TILE_ROWS, count)) <= fit
    }
    # some numbers of blocks have a small one at their end
    choices = {rows: time for rows, time in choices.items() if 2 * _last(n, rows) >= rows} or choices
    enough = (1 + NEARLY) * min(choices.values())
    least = min(MIN_ROWS, max(choices))
    found = [rows for rows, time in choices.items() if time <= enough]
    rows = min([rows for rows in found if rows >= least] or [max(found)])
    return min(rows, alike(n, 16, 1))


def columns_time(n: int, v: int, h: int, multiprocessors: int, columns: int, cluster: int = 1) -> float:
    """Of path D: products x.W^T of `columns` vocabulary entries at a time, of dlogits by W and of dlogits^T by x. The
    second is added to fp32 sums [N, H], which it reads and writes."""
    return sum(
        count
        * (
            fold_time(n, size, h, multiprocessors, cluster)
            + product_time(n, size, h, multiprocessors)
            + product_time(size, n, h, multiprocessors)
            + 8 * n * h * PER_BYTE / multiprocessors
        )
        for count, size in _blocks(v, columns)
    )


@functools.lru_cache(maxsize=1024)
def columns_at_a_time(n: int, v: int, h: int, multiprocessors: int, most_bytes: int, cluster: int = 1) -> int:
    """How many vocabulary entries a block of dlogits [v, N], two bytes each, has on path D: a multiple of 64."""
    fit = max(ALIGNED, most_bytes // (2 * alike(n, 16, 1)) // ALIGNED * ALIGNED)
    fewest = _over(v, fit)
    choices = {min(fit, alike(v, ALIGNED, count)) for count in range(fewest, 4 * fewest + 1)}
    return min(sorted(choices), key=lambda columns: columns_time(n, v, h, multiprocessors, columns, cluster))


def groups_together(groups_of_rows: int, h: int, group_rows: int, units: int, cache_bytes: int) -> int:
    """How many groups of rows are to take turns with the same columns of W, which then come from memory once for all of
    them. From one block of columns to the next a unit reads its rows of x again, and meanwhile all groups read theirs
    and `units / together` blocks of W: the most for which both fit in the second-level cache, or, where they never do,
    those that take least."""

    def size(together: int) -> int:
        return 2 * h * (together * group_rows + _over(units, together) * TILE_COLUMNS)

    choices = range(1, groups_of_rows + 1)
    fitting = [together for together in choices if size(together) <= CACHE_SHARE * cache_bytes]
    return max(fitting) if fitting else min(reversed(choices), key=size)
