"""Labelled rows on Triton: found by a kernel, and copied together by another; and path A of all positions, which reads
them where they lie among the hidden states, and writes where they lie among the positions.

Dimensions: S sequences, T positions, P = S T of them in all, N labelled ones, K statistics; R sequences of U hidden
states, which are S and T but for `predictors`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.impl import positions, triton_linear
from dpo_kernels.impl.interface import FoundRows, LogitTransform, Rows, TokenLogps

BLOCK_P, NUM_WARPS = 2048, 16
MAX_BLOCK_H = 4096
# Options of a kernel whose assertions count, and that checks nothing else of its own.
WITH_ASSERTS = {"debug": True, "sanitize_overflow": False}
COUNT, FITS, BROKEN = (tl.constexpr(field) for field in (positions.COUNT, positions.FITS, positions.BROKEN))


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
    SHIFT: tl.constexpr, STATS: tl.constexpr, ASSERTS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The fields of the labelled rows, see `FoundRows`, go to `rows`, 0 to logp [P] and stats [STATS, P] at the other
    positions. Each program counts the rows before its own by itself: that is nothing beside
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
    row, stride_rows = rows_ptr + n, stride_rows.to(tl.int64)
    tl.store(row, (p // T).to(tl.int64), mask=is_kept)
    tl.store(row + stride_rows, (p % T).to(tl.int64), mask=is_kept)
    tl.store(row + 2 * stride_rows, p.to(tl.int64), mask=is_kept)
    tl.store(row + 3 * stride_rows, label.to(tl.int64), mask=is_kept)
    tl.store(row + 4 * stride_rows, slot, mask=is_kept)
    ignored = (p < P) & (is_row == 0)
    tl.store(logp_ptr + p, 0.0, mask=ignored)
    for each in tl.static_range(STATS):
        tl.store(stats_ptr + each * P.to(tl.int64) + p, 0.0, mask=ignored)
    if program == tl.num_programs(0) - 1:
        count = first_row + tl.sum(is_row.to(tl.int32))
        some_wrong = tl.max(any_wrong | wrong.to(tl.int32))
        fits = (some_wrong == 0) & ((expected < 0) | (count == expected))
        if ASSERTS:
            tl.device_assert(
                fits,
                "num_labelled does not fit the labels, or a label lies outside the vocabulary, or a predictor outside "
                "the hidden states",
            )
        tl.store(notes_ptr + COUNT, count.to(tl.int64))
        tl.store(notes_ptr + FITS, fits.to(tl.int64))
        tl.store(notes_ptr + BROKEN, 0)


@triton.jit(do_not_specialize=["U"], do_not_specialize_on_alignment=["slots_ptr", "broken_ptr"])
def gather_rows_kernel(
    hidden_ptr, slots_ptr, out_ptr, broken_ptr, stride_hr, stride_hu, stride_hh, U, H, BLOCK_H: tl.constexpr
):
    """A program has a row. All that find a number that is not finite write the same."""
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + n)
    row = hidden_ptr + slot // U * stride_hr + slot % U * stride_hu
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        x = tl.load(row + h.to(tl.int64) * stride_hh, mask=h < H, other=0.0)
        tl.store(out_ptr + n * H + h, x, mask=h < H)
        x = x.to(tl.float64) if x.dtype == tl.float64 else x.to(tl.float32)
        tl.store(broken_ptr, 1, mask=tl.max(((x - x) != 0.0).to(tl.int32)) != 0)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["g_ptr", "sequence_ptr", "position_ptr"])
def put_rows_kernel(
    rows_ptr, g_ptr, sequence_ptr, position_ptr, out_ptr, stride_gs, stride_gt, T, H, BLOCK_H: tl.constexpr
):
    """A program has a row."""
    n = tl.program_id(0).to(tl.int64)
    s, t = tl.load(sequence_ptr + n), tl.load(position_ptr + n)
    g = tl.load(g_ptr + s * stride_gs + t * stride_gt)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        x = tl.load(rows_ptr + n * H + h, mask=h < H, other=0.0) * g
        tl.store(out_ptr + (s * T + t) * H + h, x.to(out_ptr.dtype.element_ty), mask=h < H)


def _launch(of: positions.Search, found: FoundRows, notes: Tensor) -> None:
    labels, (s, t) = of.labels, of.labels.shape
    of_predictors = (0, 0) if of.predictors is None else of.predictors.stride()
    with torch.cuda.device_of(labels):
        rows_kernel[(triton.cdiv(s * t, BLOCK_P),)](
            labels, of.predictors, found.table, found.token_logps, found.stats, notes, *labels.stride(),
            *of_predictors, found.table.shape[1], t, s * t, of.vocab_size, of.slots, of.ignore_index, of.expected,
            SHIFT=int(of.shift), STATS=found.stats.shape[0], ASSERTS=of.asserts, BLOCK_P=BLOCK_P, num_warps=NUM_WARPS,
            **(WITH_ASSERTS if of.asserts else {}),
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
    hidden, slots, (n, h) = hidden.resolve_neg(), slots.contiguous(), (slots.shape[0], hidden.shape[2])
    out = hidden.new_empty(n, h)
    if n:
        with torch.cuda.device_of(hidden):
            gather_rows_kernel[(n,)](
                hidden, slots, out, broken, *hidden.stride(), hidden.shape[1], h,
                BLOCK_H=min(triton.next_power_of_2(h), MAX_BLOCK_H),
            )  # fmt: skip
    return out


def put_rows(rows: Tensor, g: Tensor, at: Rows, out: Tensor) -> None:
    assert rows.is_contiguous() and out.is_contiguous() and rows.dtype == g.dtype == torch.float32
    g, (n, h) = g.resolve_neg(), rows.shape
    if n:
        with torch.cuda.device_of(rows):
            put_rows_kernel[(n,)](
                rows, g, *at, out, *g.stride(), out.shape[1], h, BLOCK_H=min(triton.next_power_of_2(h), MAX_BLOCK_H)
            )


def _can_take(hidden: Tensor, weight: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether each row can be copied to shared memory as it is, see `triton_linear.can_take`."""
    return (
        triton_linear.can_take(weight, weight, compute_dtype)
        and hidden.dtype == compute_dtype
        and hidden.stride(2) == 1
        and hidden.stride(0) % 16 == hidden.stride(1) % 16 == hidden.data_ptr() % 16 == 0
        and not hidden.is_neg()
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
    if not _can_take(hidden, weight, compute_dtype):
        return None
    found = find_rows(
        labels, weight.shape[0], ignore_index=ignore_index, shift=shift, num_labelled=num_labelled,
        predictors=predictors, slots=hidden.shape[0] * hidden.shape[1], stats=len(stats),
    )  # fmt: skip
    if found is None:
        return None
    if len(found.y):
        part = triton_linear.fold_splits(hidden, found.slots, found.y, weight, bias, transform, bool(stats))
        triton_linear.join_splits(
            part, found.token_logps, found.stats, weight.shape[0], transform, stats, places=found.places,
            broken=found.broken,
        )  # fmt: skip
    return TokenLogps(found.token_logps, found.stats, found.broken)
