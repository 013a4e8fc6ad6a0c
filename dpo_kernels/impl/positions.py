"""Which of the positions [S, T] carry a label: found, checked, and what belongs to them taken out and put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.impl.interface import FoundRows, Labels, Rows

DO_NOT_FIT = "num_labelled does not fit the labels, or a label lies outside the vocabulary"
# What kernels that find rows write of each, see `FoundRows`; and what they note for the host: how many there are,
# whether these and all labels and predictors are as they should be, and `FoundRows.broken`.
ROW_FIELDS = 5
COUNT, FITS, BROKEN = range(3)
NOTES = 3
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Kernels count in 32 bits.
MOST_POSITIONS = 2**30


class Search(NamedTuple):
    """For labelled rows, see `interface.TileKernels.find_rows`."""

    labels: Tensor  # [S, T]
    vocab_size: int
    ignore_index: int
    shift: bool
    num_labelled: int | None
    predictors: Tensor | None
    slots: int

    @property
    def expected(self) -> int:
        return -1 if self.num_labelled is None else int(self.num_labelled)

    @property
    def asserts(self) -> bool:
        """Whether the kernel itself stops where something is wrong, for no host looks at its notes."""
        return self.num_labelled is not None and self.labels.device.type == "cuda"


def search(launch: Callable[[Search, FoundRows, Tensor], None], of: Search, stats: int) -> FoundRows | None:
    """What `launch(of, found, notes)`, a kernel, finds: it writes all of `found`, whose table has room for as many rows
    as there may be, and `notes` [NOTES]."""
    labels, positions = of.labels, of.labels.numel()
    if not 0 < positions < MOST_POSITIONS or of.slots >= 2 * MOST_POSITIONS or labels.dtype not in LABEL_DTYPES:
        return None
    if of.predictors is not None and (of.shift or of.predictors.dtype != torch.int64):
        return None
    most = positions if of.num_labelled is None else min(of.expected, positions)
    table = labels.new_empty(ROW_FIELDS, most, dtype=torch.int64)
    notes = table.new_empty(NOTES)
    token_logps = table.new_empty(labels.shape, dtype=torch.float32)
    found = FoundRows(table, token_logps, token_logps.new_empty(stats, *labels.shape), notes[BROKEN])
    predictors = None if of.predictors is None else of.predictors.resolve_neg()
    launch(of._replace(labels=labels.resolve_neg(), predictors=predictors), found, notes)
    if of.asserts:
        return found
    count, fits, _ = notes.tolist()
    return found._replace(table=table[:, :count]) if fits else None


def labelled_rows(labels: Tensor, vocab_size: int, ignore_index: int, num_labelled: int | None = None) -> Rows:
    """The labelled positions of [S, T] in row-major order, checked.

    With `num_labelled` given, a CUDA device is not waited for, and a wrong count or a label outside the vocabulary
    trips an assertion on the device instead of the errors below.

    Raises:
        ValueError: a label outside [0, vocab_size), with its sequence and position, or a `num_labelled` that does not
            fit the labels.
    """
    labelled = labels != ignore_index
    outside = labelled & ((labels < 0) | (labels >= vocab_size))
    if num_labelled is not None and labels.device.type == "cuda":
        torch._assert_async((labelled.sum() == num_labelled) & ~outside.any(), DO_NOT_FIT)
        return Rows(*torch.nonzero_static(labelled, size=num_labelled).unbind(1))

    rows = Rows(*torch.nonzero(labelled).unbind(1))
    if outside.any():
        s, t = torch.nonzero(outside)[0].tolist()
        raise ValueError(
            f"labels: expected values in [0, {vocab_size}) or ignore_index={ignore_index}, got {labels[s, t].item()} "
            f"for sequence {s}, position {t} ({int(outside.sum())} such label(s))"
        )
    if num_labelled is not None and num_labelled != len(rows.sequence):
        raise ValueError(
            f"num_labelled: expected {len(rows.sequence)}, the number of predicted labels, got {num_labelled}"
        )
    return rows


def unlabelled_rows(labels: Tensor, ignore_index: int, num_labelled: int) -> Rows:
    """The other positions, for which a device is not waited for either; `num_labelled` is right."""
    unlabelled = labels == ignore_index
    if labels.device.type == "cuda":
        return Rows(*torch.nonzero_static(unlabelled, size=labels.numel() - num_labelled).unbind(1))
    return Rows(*torch.nonzero(unlabelled).unbind(1))


def check_labels(fit: Tensor, labels: Labels, vocab_size: int) -> None:
    """For kernels that have looked at every label themselves: `fit` [] says whether all are in the vocabulary, and as
    many as they should be. If not, raises the errors of `labelled_rows`, or trips its assertion."""
    y, ignore_index, num_labelled = labels
    if num_labelled is not None and y.device.type == "cuda":
        torch._assert_async(fit, DO_NOT_FIT)
    elif not fit.item():
        labelled_rows(y, vocab_size, ignore_index, num_labelled)


def at_rows(t: Tensor, rows: Rows) -> Tensor:
    """[..., S, T] to [..., N]."""
    return t[..., rows.sequence, rows.position]


def spread(values: Tensor, rows: Rows, shape: torch.Size) -> Tensor:
    """[..., N] to [..., S, T], 0 elsewhere."""
    out = values.new_zeros(*values.shape[:-1], *shape)
    out[..., rows.sequence, rows.position] = values
    return out
