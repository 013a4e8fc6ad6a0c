"""Path A of all positions on Triton: labelled rows are found by a kernel, read where they lie among the hidden states,
and written where they lie among the positions.

Dimensions: S sequences, T positions, P = S T of them in all, N labelled ones, K statistics; R sequences of U hidden
states, which are S and T but for `predictors`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.impl import triton_linear
from dpo_kernels.impl.interface import LogitTransform, TokenLogps

BLOCK_P, NUM_WARPS = 4096, 16
# What is noted for the host: N, whether it and all labels are as they should be, and `TokenLogps.broken`.
COUNT, FITS, BROKEN = (tl.constexpr(field) for field in range(3))
NOTES = 3


@triton.jit
def _labels(
    labels_ptr, predictors_ptr, p, stride_ls, stride_lt, stride_ps, stride_pt, T, P, V, slots, ignore_index,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """Of positions p: the label, `ignore_index` where there is none; where the hidden state lies; whether one of these
    cannot be."""
    s, t = (p // T).to(tl.int64), (p % T).to(tl.int64)
    inside = (p < P) & (t + SHIFT < T)
    label = tl.load(labels_ptr + s * stride_ls + (t + SHIFT) * stride_lt, mask=inside, other=0)
    is_row = inside & (label != ignore_index)
    wrong = is_row & ((label < 0) | (label >= V))
    if predictors_ptr is None:
        slot = p.to(tl.int64)
    else:
        slot = tl.load(predictors_ptr + s * stride_ps + t * stride_pt, mask=is_row, other=0)
        wrong = wrong | (is_row & ((slot < 0) | (slot >= slots)))
    return label, is_row, slot, wrong


@triton.jit(
    do_not_specialize=["T", "P", "V", "slots", "ignore_index", "expected", "stride_rows", "stride_ls", "stride_ps"],
    do_not_specialize_on_alignment=["labels_ptr", "predictors_ptr", "logp_ptr", "stats_ptr"],
)
def rows_kernel(
    labels_ptr, predictors_ptr, rows_ptr, logp_ptr, stats_ptr, notes_ptr,
    stride_ls, stride_lt, stride_ps, stride_pt, stride_rows, T, P, V, slots, ignore_index, expected,
    SHIFT: tl.constexpr, STATS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Places, labels and slots of the labelled rows, in the order of positions, go to `rows`, 0 to logp [P] and stats
    [STATS, P] at the other positions. Each program counts the rows before its own by itself: that is nothing beside
    what is computed of them."""
    program = tl.program_id(0)
    within = tl.arange(0, BLOCK_P)
    before = tl.zeros([BLOCK_P], tl.int32)
    any_wrong = tl.zeros([BLOCK_P], tl.int32)
    for first in range(0, program * BLOCK_P, BLOCK_P):
        _, is_row, _, wrong = _labels(
            labels_ptr, predictors_ptr, first + within, stride_ls, stride_lt, stride_ps, stride_pt, T, P, V, slots,
            ignore_index, SHIFT,
        )  # fmt: skip
        before += is_row.to(tl.int32)
        any_wrong |= wrong.to(tl.int32)
    p = program * BLOCK_P + within
    label, is_row, slot, wrong = _labels(
        labels_ptr, predictors_ptr, p, stride_ls, stride_lt, stride_ps, stride_pt, T, P, V, slots, ignore_index, SHIFT
    )
    first_row = tl.sum(before)
    n = first_row + tl.cumsum(is_row.to(tl.int32), axis=0) - 1
    is_kept = is_row & (n < stride_rows)
    tl.store(rows_ptr + n, p.to(tl.int64), mask=is_kept)
    tl.store(rows_ptr + stride_rows + n, label.to(tl.int64), mask=is_kept)
    if predictors_ptr is not None:
        tl.store(rows_ptr + 2 * stride_rows.to(tl.int64) + n, slot, mask=is_kept)
    ignored = (p < P) & (is_row == 0)
    tl.store(logp_ptr + p, 0.0, mask=ignored)
    for each in tl.static_range(STATS):
        tl.store(stats_ptr + each * P.to(tl.int64) + p, 0.0, mask=ignored)
    if program == tl.num_programs(0) - 1:
        count = first_row + tl.sum(is_row.to(tl.int32))
        some_wrong = tl.max(any_wrong | wrong.to(tl.int32))
        fits = (some_wrong == 0) & ((expected < 0) | (count == expected))
        tl.store(notes_ptr + COUNT, count.to(tl.int64))
        tl.store(notes_ptr + FITS, fits.to(tl.int64))
        tl.store(notes_ptr + BROKEN, 0)


def _can_take(hidden: Tensor, weight: Tensor, labels: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether each row can be copied to shared memory as it is, see `triton_linear.can_take`, and there are any."""
    return (
        triton_linear.can_take(weight, weight, compute_dtype)
        and hidden.dtype == compute_dtype
        and hidden.stride(2) == 1
        and hidden.stride(0) % 16 == hidden.stride(1) % 16 == hidden.data_ptr() % 16 == 0
        and not hidden.is_neg()
        and 0 < labels.numel() < 2**31 - BLOCK_P
    )


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
    """See `interface.TileKernels`."""
    if not _can_take(hidden, weight, labels, compute_dtype):
        return None
    if predictors is not None and (shift or predictors.dtype != torch.int64):
        return None
    (s, t), v = labels.shape, weight.shape[0]
    waits = num_labelled is None or hidden.device.type == "cpu"
    most = labels.numel() if num_labelled is None else min(int(num_labelled), labels.numel())
    rows = labels.new_empty(2 if predictors is None else 3, most, dtype=torch.int64)
    token_logps = hidden.new_empty(s, t, dtype=torch.float32)
    values = token_logps.new_empty(len(stats), s, t)
    notes = rows.new_empty(NOTES)
    of_predictors = (0, 0) if predictors is None else predictors.stride()
    with torch.cuda.device_of(hidden):
        rows_kernel[(triton.cdiv(s * t, BLOCK_P),)](
            labels, predictors, rows, token_logps, values, notes, *labels.stride(), *of_predictors, most, t, s * t, v,
            hidden.shape[0] * hidden.shape[1], ignore_index, -1 if num_labelled is None else int(num_labelled),
            SHIFT=int(shift), STATS=len(stats), BLOCK_P=BLOCK_P, num_warps=NUM_WARPS,
        )  # fmt: skip
    if waits:
        most, fits, _ = notes.tolist()
        if not fits:
            return None
    else:
        torch._assert_async(
            notes[FITS.value], "num_labelled does not fit the labels, or a label or a predictor lies outside"
        )
    if most:
        places, y, *slots = rows[:, :most]
        part = triton_linear.fold_splits(hidden, slots[0] if slots else places, y, weight, bias, transform, bool(stats))
        triton_linear.join_splits(
            part, token_logps, values, v, transform, stats, places=places, broken=notes[BROKEN.value]
        )
    return TokenLogps(token_logps, values, notes[BROKEN.value])
