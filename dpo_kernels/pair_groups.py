"""The plan of path C: labelled rows group by group, in parts of whole groups whose logits fit in memory."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.comparisons import Comparisons
from dpo_kernels.dispatch import load
from dpo_kernels.impl import exponential_paths, paths, waves
from dpo_kernels.impl.interface import Rows
from dpo_kernels.rows import LabelledRows


class Group(NamedTuple):
    rows: slice  # of the rows in group-major order
    of: slice  # of the groups of sequences that are compared
    stored: int | None = None  # of which vocabulary entries, the first ones, exponentials are stored; None: of all


def group_major(rows: LabelledRows, comparisons: Comparisons, groups: Sequence[Group]) -> LabelledRows:
    """Rows sorted by group, then by sequence, chosen first where it is a pair, then by position; those of one part as
    they are."""
    if len(groups) == 1:
        return rows
    return rows.take(torch.argsort(comparisons.order(rows.at.sequence), stable=True))


def plan_groups(
    rows: Rows,
    comparisons: Comparisons,
    weight: Tensor,
    dtype: torch.dtype,
    chunk_bytes: int,
    family: str,
    *,
    dweight: bool,
    exponentials: bool = False,
    counts: Sequence[Sequence[int]] | None = None,
) -> list[Group] | None:
    """Whole pairs, or larger groups, in parts whose logits, or `exponentials` in their place, fit in `chunk_bytes`; or
    all in one part, of whose exponentials some fit, where there are no such parts or sums over them take longer than
    computing the others again; None if none of this can be, or there are no rows. `dweight`: the head's weight gets a
    gradient, in whose memory some of them are kept. `counts`: [R][S] rows of each sequence on ranks that are to have
    the same parts, each of which fits on all of them."""
    n, k = rows.sequence.shape[0], load(family)
    of_ranks = [n] if counts is None else [sum(of_rank) for of_rank in counts]
    if max(of_ranks) == 0 or chunk_bytes == 0:
        return None
    kept = [paths.kept_bytes(k, each, weight, dtype, exponentials, dweight) for each in of_ranks]
    alone = Group(slice(0, n), slice(0, comparisons.groups))
    if max(each.buffer for each in kept) <= chunk_bytes:
        return [alone]
    sums = weight.numel() * dtype.itemsize if dweight and weight.dtype != dtype else 0
    budget = int(max(0, chunk_bytes - sums) // kept[0].of_row)
    if exponentials:  # so many have room with what lies behind the last of them
        budget -= budget % k.padded_rows(1)
    groups = _cut(rows, comparisons, budget, counts)
    if exponentials and (stored := exponential_paths.stored_columns(k, n, weight, dweight, chunk_bytes)):
        again = n * weight.shape[1] * (weight.shape[0] - stored)  # multiply-adds
        # each group reads and writes the sums of dW
        if groups is None or again < 2 * len(groups) * sums * waves.PER_BYTE:
            return [alone._replace(stored=stored)]
    return groups


def _cut(
    rows: Rows, comparisons: Comparisons, budget: int, counts: Sequence[Sequence[int]] | None
) -> list[Group] | None:
    """Parts of `budget` rows at most, on each rank; None where a group has more."""
    if budget == 0:  # the device need not be waited for
        return None
    sizes = torch.bincount(comparisons.group_of(rows.sequence), minlength=comparisons.groups).tolist()
    # [groups, R]
    sizes_of_ranks = [[size] for size in sizes] if counts is None else _of_groups(counts, comparisons, rows)
    if max(map(max, sizes_of_ranks)) > budget:
        return None
    # as few parts as fit, and these as alike as whole groups can be: the largest is as small as may be
    fewest = len(_ends(sizes_of_ranks, budget))
    budget = bisect.bisect_left(
        range(budget),
        True,
        lo=max(map(max, sizes_of_ranks)),
        key=lambda most: len(_ends(sizes_of_ranks, most)) == fewest,
    )
    groups, first_row, first = [], 0, 0
    for end in _ends(sizes_of_ranks, budget):
        stop = first_row + sum(sizes[first:end])
        groups.append(Group(slice(first_row, stop), slice(first, end)))
        first_row, first = stop, end
    return groups


def _ends(sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Where parts of consecutive groups end that have as many of the rows [groups, R] as fit on all ranks."""
    ends, filled = [], [0] * len(sizes[0])
    for group, more in enumerate(sizes):
        if max(map(operator.add, filled, more)) > budget:
            ends.append(group)
            filled = [0] * len(filled)
        filled = list(map(operator.add, filled, more))
    return [*ends, len(sizes)]


def _of_groups(counts: Sequence[Sequence[int]], comparisons: Comparisons, rows: Rows) -> list[list[int]]:
    """[R][S] of sequences to [groups, R]."""
    group_of = comparisons.group_of(torch.arange(len(counts[0]), device=rows.sequence.device))
    table = torch.tensor(counts, device=group_of.device).T
    return table.new_zeros(comparisons.groups, len(counts)).index_add_(0, group_of, table).tolist()
