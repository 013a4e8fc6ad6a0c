"""The plan of path C: labelled rows pair by pair, in groups of whole pairs whose logits fit in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.dispatch import load
from dpo_kernels.impl import paths
from dpo_kernels.impl.interface import Rows


class Group(NamedTuple):
    rows: slice  # of the rows in pair-major order
    pairs: slice


def pair_major(rows: Rows, pairs: int) -> Rows:
    """Rows sorted by pair, chosen before rejected, then by position."""
    order = torch.argsort(rows.sequence % pairs * 2 + rows.sequence // pairs, stable=True)
    return Rows(rows.sequence[order], rows.position[order])


def plan_groups(
    rows: Rows, pairs: int, weight: Tensor, dtype: torch.dtype, chunk_bytes: int, family: str, *, dweight: bool
) -> list[Group] | None:
    """Whole pairs in groups whose logits fit in `chunk_bytes`; None if that cannot be, or there is nothing to group.
    `dweight`: the head's weight gets a gradient, in whose memory some logits are kept."""
    n = rows.sequence.shape[0]
    row_bytes = weight.shape[0] * dtype.itemsize
    if n == 0 or chunk_bytes == 0:
        return None
    free = paths.rows_kept_in_dw(load(family), n, weight, dtype) if dweight else 0
    if (n - free) * row_bytes <= chunk_bytes:
        return [Group(slice(0, n), slice(0, pairs))]
    if dweight and weight.dtype != dtype:
        chunk_bytes -= weight.numel() * dtype.itemsize
    budget = chunk_bytes // row_bytes
    sizes = torch.bincount(rows.sequence % pairs, minlength=pairs).tolist()
    if max(sizes) > budget:
        return None
    groups, first_row, first_pair, size = [], 0, 0, 0
    for pair, more in enumerate([*sizes, budget + 1]):
        if size + more > budget:
            if size:
                groups.append(Group(slice(first_row, first_row + size), slice(first_pair, pair)))
            first_row, first_pair, size = first_row + size, pair, 0
        size += more
    return groups
