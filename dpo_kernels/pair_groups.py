"""The plan of path C: labelled rows group by group, in parts of whole groups whose logits fit in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.comparisons import Comparisons
from dpo_kernels.dispatch import load
from dpo_kernels.impl import paths
from dpo_kernels.impl.interface import Rows


class Group(NamedTuple):
    rows: slice  # of the rows in group-major order
    of: slice  # of the groups of sequences that are compared


def group_major(rows: Rows, comparisons: Comparisons) -> Rows:
    """Rows sorted by group, then by sequence, chosen first where it is a pair, then by position."""
    order = torch.argsort(comparisons.order(rows.sequence), stable=True)
    return Rows(rows.sequence[order], rows.position[order])


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
) -> list[Group] | None:
    """Whole pairs, or larger groups, in parts whose logits, or `exponentials` in their place, fit in `chunk_bytes`;
    None if that cannot be, or there are no rows. `dweight`: the head's weight gets a gradient, in whose memory some of
    them are kept."""
    n, k = rows.sequence.shape[0], load(family)
    if n == 0 or chunk_bytes == 0:
        return None
    kept = paths.kept_bytes(k, n, weight, dtype, exponentials, dweight)
    if kept.buffer <= chunk_bytes:
        return [Group(slice(0, n), slice(0, comparisons.groups))]
    if dweight and weight.dtype != dtype:
        chunk_bytes -= weight.numel() * dtype.itemsize
    budget = chunk_bytes // kept.of_row
    if exponentials:  # so many have room with what lies behind the last of them
        budget -= budget % k.padded_rows(1)
    sizes = torch.bincount(comparisons.group_of(rows.sequence), minlength=comparisons.groups).tolist()
    if max(sizes) > budget:
        return None
    groups, first_row, first, size = [], 0, 0, 0
    for group, more in enumerate([*sizes, budget + 1]):
        if size + more > budget:
            if size:
                groups.append(Group(slice(first_row, first_row + size), slice(first, group)))
            first_row, first, size = first_row + size, group, 0
        size += more
    return groups
