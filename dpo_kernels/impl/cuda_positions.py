"""Labelled rows on CUDA, found and copied together by the kernels of `csrc/cuda/positions.cu`, and summed and compared
in pairs by that of `pairs.cu`; and path A of all positions.

Dimensions: S sequences of T positions, N labelled rows, K statistics; R sequences of U hidden states of H numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

import dpo_kernels._cuda as _cuda
from dpo_kernels.impl import cuda_linear, pairs, positions
from dpo_kernels.impl.cuda_linear import address, matrix, stream, type_name
from dpo_kernels.impl.interface import FoundRows, LogitTransform, Rows, TokenLogps


def of_positions(t: Tensor | None) -> _cuda.Positions:
    return _cuda.Positions(0, 0, 0) if t is None else _cuda.Positions(address(t), *t.stride())


def _launch(of: positions.Search, found: FoundRows, notes: Tensor) -> None:
    labels, table, (s, t) = of.labels, found.table, of.labels.shape
    search = _cuda.Search(
        of_positions(labels), s, t, int(of.shift), of.ignore_index, of.vocab_size, of.expected,
        of_positions(of.predictors), of.slots, of.asserts,
    )  # fmt: skip
    with torch.cuda.device_of(labels):
        _cuda.find_rows(
            type_name(labels), search, address(table), table.shape[1], address(found.token_logps),
            address(found.stats), found.stats.shape[0], address(notes), stream(labels),
        )  # fmt: skip


def find_rows(
    labels: Tensor,
    vocab_size: int,
    *,
    ignore_index: int,
    shift: bool,
    num_labelled: int | None,
    predictors: Tensor | None,
    slots: int,
    stats: int,
) -> FoundRows | None:
    """See `interface.TileKernels`, as of the others here."""
    of = positions.Search(labels, vocab_size, ignore_index, shift, num_labelled, predictors, slots)
    return positions.search(_launch, of, stats)


def gather_rows(hidden: Tensor, slots: Tensor, broken: Tensor) -> Tensor:
    hidden, slots = hidden.resolve_neg(), slots.contiguous()
    out = hidden.new_empty(slots.shape[0], hidden.shape[2])
    with torch.cuda.device_of(hidden):
        _cuda.gather_rows(
            type_name(hidden), _cuda.LogitsRows(address(hidden), *hidden.stride()), hidden.shape[1], address(slots),
            matrix(out), address(broken), stream(hidden),
        )  # fmt: skip
    return out


def put_rows(rows: Tensor, g: Tensor, at: Rows, out: Tensor) -> None:
    assert rows.is_contiguous() and out.is_contiguous() and rows.dtype == g.dtype == torch.float32
    g = g.resolve_neg()
    with torch.cuda.device_of(rows):
        _cuda.put_rows(
            type_name(out), matrix(rows), of_positions(g), address(at.sequence), address(at.position), out.shape[1],
            address(out), stream(rows),
        )  # fmt: skip


def _compare(of: pairs.Comparison) -> None:
    begins, ends = of.at.sequence.new_empty(2, of.sums.shape[0])
    with torch.cuda.device_of(of.logps):
        _cuda.compare(type_name(of.logps), *of.compiled(_cuda), address(begins), address(ends), stream(of.logps))


compare, sum_rows = functools.partial(pairs.compare, _compare), functools.partial(pairs.sum_rows, _compare)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    transform: LogitTransform,
    *,
    compute_dtype: torch.dtype,
    ignore_index: int,
    shift: bool,
    stats: Sequence[str],
    num_labelled: int | None,
    predictors: Tensor | None,
) -> TokenLogps | None:
    rows_are_aligned = hidden.shape[2] * hidden.itemsize % 16 == 0  # of the copy
    if hidden.dtype != compute_dtype or not rows_are_aligned or not cuda_linear.can_fold(weight, weight, compute_dtype):
        return None
    found = find_rows(
        labels, weight.shape[0], ignore_index=ignore_index, shift=shift, num_labelled=num_labelled,
        predictors=predictors, slots=hidden.shape[0] * hidden.shape[1], stats=len(stats),
    )  # fmt: skip
    if found is None:
        return None
    if len(found.y):
        x = gather_rows(hidden, found.slots, found.broken)
        bias = cuda_linear.rounded_bias(bias, compute_dtype)
        sums = cuda_linear.fold(x, weight, bias, found.y, transform, bool(stats))
        sums.join_at(found, weight.shape[0], transform, stats)
    return TokenLogps(found.token_logps, found.stats, found.broken)
