"""What paths B, C and D of heads in bf16 are made of on Triton: the product's epilogue writes exponentials, or the
gradient of the logits; and the kernels between the products of these.

Dimensions: N labelled rows, n of them in a block; H hidden size, V vocabulary size, v entries of a part of it; K
statistics. What is written lies as [v, n]: the entries of a row of memory are rows of x.

An exponential is e = 2^(z log2 e - shift). An operand, in path B, is a number in bf16, and a row has one shift.
Packed, in path C, where it becomes an entry of dlogits and is rounded then, it is one in fp16: an eighth of bf16's
error. Each block of columns has shifts of its own, by which none is above 2^15: the sums of a row follow its maximum as
in path A, and what is summed is what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.impl import triton_linear, waves
from dpo_kernels.impl.exponentials import DLOGITS_BYTES, EXP_BYTES, FAR, FIRST_COLUMNS, padded_rows
from dpo_kernels.impl.interface import GradRows, LogitTransform
from dpo_kernels.impl.triton_linear import LOWEST, NUM_STAGES, NUM_WARPS, columns_of_split, products
from dpo_kernels.impl.triton_math import log1p, one_minus_exp, run, stats_constants, to_logits, transform_constants

# As fp32 rounds it, in fp64 too: what joins exponentials takes it back.
LOG2_E: tl.constexpr = tl.constexpr(1.4426950216293335)

# A square of path B's exponentials stays far within fp32 as one of its part 2^-40.
SQUARED = 2.0**-40
# No packed exponential is above 2^15, half of what fp16 holds.
MOST: tl.constexpr = tl.constexpr(15.0)
# The least of maxima, times log2 e too.
FLOOR: tl.constexpr = tl.constexpr(-(2.0**126))
# Columns of a block of products that become what is written at a time, in paths C and D.
PIECE_COLUMNS = 32
JOIN_ROWS, BLOCK_ROWS, MAX_BLOCK_H = 32, 4, 1024
DLOGITS_BLOCK_V, DLOGITS_BLOCK_N = 8, 512
# Blocks of rows that path D's programs take by turns before they go to the next columns: what runs at the same time
# then reads about as much of x as of W.
GROUP = 16
# What a split leaves of a row: maxima of the entries beside the label, and of those before it; its last shift; sums.
TOP, TOP_BEFORE, SHIFT, TARGET, LABEL_SLOPE, SUM, SUM_Z, SUM_EZ, SUM_SQ = (tl.constexpr(field) for field in range(9))
FIELDS = 9


@triton.jit
def _pieces(a, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, PIECES: tl.constexpr):
    """Of the columns, in their order."""
    if PIECES == 1:
        pieces = (a,)
    else:
        halves = tl.split(tl.permute(tl.reshape(a, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1)))
        first = _pieces(halves[0], BLOCK_N, BLOCK_V // 2, PIECES // 2)
        pieces = first + _pieces(halves[1], BLOCK_N, BLOCK_V // 2, PIECES // 2)
    return pieces


@triton.jit
def _packed_shift(top):
    """By which 2^MOST is the most that a logit up to `top` becomes. Rounded upwards, or large ones would overflow."""
    shift = top * LOG2_E - MOST
    return shift + tl.abs(shift) * 2.0**-22


# Each split has its own columns; `first` is where those of W begin in the vocabulary, and `first_split` the number of
# its first split, where others have earlier columns.
@triton.jit(
    do_not_specialize=["N", "first", "first_split", "splits", "stride_split", "stride_field"],
    do_not_specialize_on_alignment=["y_ptr", "shift_ptr", "part_ptr"],
)
def linear_exp_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, shift_ptr, part_ptr, e_ptr,
    stride_xn, stride_wv, stride_ev, stride_split, stride_field, N, V, H, first, first_split, stored,
    splits, INNER: tl.constexpr, OUTER: tl.constexpr, HAS_BIAS: tl.constexpr, STATS: tl.constexpr, AGAIN: tl.constexpr,
    FAR: tl.constexpr, SQUARED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Path B's: exponentials times the softcap's part of dz/da, 0 at the label, are written to e [V, N], of the first
    `stored` rows; a shift is a logit here. AGAIN: of blocks with a row whose largest logit is far above its shift,
    with this largest logit in its place; most programs find none among theirs, and are done."""
    n = tl.arange(0, BLOCK_N)
    rows = tl.program_id(0) * BLOCK_N + n
    is_row = rows < N
    x_block_ptr = x_ptr + tl.program_id(0).to(tl.int64) * BLOCK_N * stride_xn
    label = (tl.load(y_ptr + rows, mask=is_row, other=-1) - first).to(tl.int32)[:, None]
    shift = tl.load(shift_ptr + rows, mask=is_row, other=float("inf"))  # exponentials behind the last row are 0
    is_written = rows < stored
    begin, end = columns_of_split(V, BLOCK_V)
    if AGAIN:
        top = tl.full([BLOCK_N], LOWEST, tl.float32)
        for each in range(0, splits):
            own_ptr = part_ptr + TOP * tl.cast(stride_field, tl.int64) + each * tl.cast(stride_split, tl.int64)
            top = tl.maximum(top, tl.load(own_ptr + rows, mask=is_row, other=LOWEST))
        is_far = is_row & (top > shift + FAR)
        shift = tl.where(is_far, top, shift)
        some_far = tl.max(is_far.to(tl.int32), axis=0) > 0
        is_row = is_row & some_far
        end = tl.where(some_far, end, begin)
    shift = tl.maximum(shift, FLOOR) * LOG2_E
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    target = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    if INNER is not None:
        label_slope = tl.zeros([BLOCK_N], tl.float32)
    if STATS:
        top_before = tl.full([BLOCK_N], LOWEST, tl.float32)
        sum_z = tl.zeros([BLOCK_N], tl.float32)
        sum_ez = tl.zeros([BLOCK_N], tl.float32)
        sum_sq = tl.zeros([BLOCK_N], tl.float32)

    for start in range(begin, end, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < V
        w_block_ptr = w_ptr + tl.cast(start, tl.int64) * stride_wv
        a = products(
            x_block_ptr, w_block_ptr, bias_ptr, stride_xn, stride_wv, is_row, columns, inside, H,
            HAS_BIAS, BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        quarters = _pieces(a, BLOCK_N, BLOCK_V, 4)
        for quarter in tl.static_range(4):  # registers do not hold what all of it becomes
            z, slope = to_logits(quarters[quarter], INNER, OUTER)
            v = quarter * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4)
            columns, inside = (start + v)[None, :], (start + v < V)[None, :]
            is_label = (columns == label) & inside
            target += tl.sum(tl.where(is_label, z, 0.0), axis=1)  # of one block alone
            if INNER is not None:
                label_slope += tl.sum(tl.where(is_label, slope, 0.0), axis=1)
            if STATS:
                sum_z += tl.sum(tl.where(inside, z, 0.0), axis=1)
                before = tl.where(inside & (columns < label), z, float("-inf"))
                top_before = tl.maximum(top_before, tl.max(before, axis=1))
            beside = tl.where(inside & (is_label == 0), z, float("-inf"))
            top = tl.maximum(top, tl.max(beside, axis=1))
            power = tl.fma(beside, LOG2_E, -shift[:, None])
            e = tl.exp2(power)
            total += tl.sum(e, axis=1)
            if STATS:
                # 2^x has reached 0 long before -1e4, and 0 times -inf is to be 0
                sum_ez += tl.sum(e * tl.maximum(power, -1e4), axis=1)
                part = e * SQUARED
                sum_sq += tl.sum(part * part, axis=1)
            if INNER is not None:
                e = e * slope
            e_block_ptr = e_ptr + tl.cast(start + quarter * (BLOCK_V // 4), tl.int64) * stride_ev
            e_place = rows[:, None] + tl.arange(0, BLOCK_V // 4)[None, :] * stride_ev
            tl.store(e_block_ptr + e_place, e.to(e_ptr.dtype.element_ty), mask=is_written[:, None] & inside)

    stride_field = tl.cast(stride_field, tl.int64)
    at = part_ptr + tl.cast(first_split + tl.program_id(1), tl.int64) * stride_split + rows
    if not AGAIN:
        tl.store(at + TOP * stride_field, top, mask=is_row)
        tl.store(at + TARGET * stride_field, target, mask=is_row)
        if INNER is not None:
            tl.store(at + LABEL_SLOPE * stride_field, label_slope, mask=is_row)
        if STATS:
            tl.store(at + TOP_BEFORE * stride_field, top_before, mask=is_row)
            tl.store(at + SUM_Z * stride_field, sum_z, mask=is_row)
    tl.store(at + SHIFT * stride_field, shift, mask=is_row)
    tl.store(at + SUM * stride_field, total, mask=is_row)
    if STATS:
        tl.store(at + SUM_EZ * stride_field, sum_ez, mask=is_row)
        tl.store(at + SUM_SQ * stride_field, sum_sq, mask=is_row)


@triton.jit(
    do_not_specialize=["N", "first", "first_split", "first_block", "stride_split", "stride_field"],
    do_not_specialize_on_alignment=["y_ptr", "part_ptr"],
)
def linear_pack_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, shift_ptr, part_ptr, e_ptr,
    stride_xn, stride_wv, stride_ev, stride_split, stride_field, N, V, H, first, first_split, stored,
    stride_shift, first_block,
    INNER: tl.constexpr, OUTER: tl.constexpr, HAS_BIAS: tl.constexpr, STATS: tl.constexpr,
    PIECES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Path C's: packed exponentials times the softcap's part of dz/da, 0 at the label, are written to e [V, N], and the
    shifts of their blocks of columns, of the first `stored` rows. `first_block`: the number of the first of these."""
    RISES: tl.constexpr = (OUTER if INNER is None else INNER) >= 0
    # In the place of a product, what stands for an entry that is left out; where it would become a finite logit, it is
    # looked for.
    BOUNDED: tl.constexpr = INNER is not None or OUTER == 0
    LEAST: tl.constexpr = LOWEST if BOUNDED else float("-inf")
    LOW: tl.constexpr = LEAST if RISES else -LEAST
    PIECE_V: tl.constexpr = BLOCK_V // PIECES
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    is_row = rows < N
    is_written = rows < stored
    x_block_ptr = x_ptr + tl.program_id(0).to(tl.int64) * BLOCK_N * stride_xn
    label = (tl.load(y_ptr + rows, mask=is_row, other=-1) - first).to(tl.int32)
    begin, end = columns_of_split(V, BLOCK_V)
    has_entry = (label >= begin) & (label < end)
    label = tl.where(label < V, label, 2**30)  # of a later part: behind all columns, those too that are none
    top = tl.full([BLOCK_N], FLOOR, tl.float32)
    shift = _packed_shift(top)
    at_label = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    if STATS:
        top_before = tl.full([BLOCK_N], FLOOR, tl.float32)
        sum_z = tl.zeros([BLOCK_N], tl.float32)
        sum_ez = tl.zeros([BLOCK_N], tl.float32)
        sum_sq = tl.zeros([BLOCK_N], tl.float32)

    for start in range(begin, end, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        w_block_ptr = w_ptr + tl.cast(start, tl.int64) * stride_wv
        a = products(
            x_block_ptr, w_block_ptr, bias_ptr, stride_xn, stride_wv, is_row, columns, columns < V, H,
            HAS_BIAS, BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        # Few blocks have an entry that is left out: the label of a row, or what is behind the last one.
        has_label = tl.max(((label >= start) & (label < start + BLOCK_V)).to(tl.int32), axis=0)
        leaves_out = (has_label > 0) | (start + BLOCK_V > V)
        extreme = tl.full([BLOCK_N], LOWEST, tl.float32)
        extreme_before = extreme
        of_block = _pieces(a, BLOCK_N, BLOCK_V, PIECES)
        others = ()
        for i in tl.static_range(PIECES):
            other = of_block[i]
            if STATS and not BOUNDED:
                sum_z += tl.sum(other, axis=1) * OUTER  # 0 behind the last entry
            if leaves_out:
                v = start + i * PIECE_V + tl.arange(0, PIECE_V)[None, :]
                is_label = v == label[:, None]
                at_label += tl.sum(tl.where(is_label, other, 0.0), axis=1)  # of one block alone
                other = tl.where(is_label | (v >= V), LOW, other)
                if STATS:
                    rising = tl.where(v < label[:, None], other if RISES else -other, LOWEST)
                    extreme_before = tl.maximum(extreme_before, tl.max(rising, axis=1))
            extreme = tl.maximum(extreme, tl.max(other if RISES else -other, axis=1))
            others += (other,)  # type: ignore[assignment]
        block_top, _ = to_logits(extreme if RISES else -extreme, INNER, OUTER)
        if STATS:
            before = tl.where(label > start, block_top, FLOOR)
            if leaves_out:
                before, _ = to_logits(extreme_before if RISES else -extreme_before, INNER, OUTER)
                before = tl.where(extreme_before > LOWEST, before, FLOOR)
            top_before = tl.maximum(top_before, before)
        top = tl.maximum(top, block_top)
        change = shift
        shift = _packed_shift(top)
        change -= shift
        block = tl.cast(first_block + start // BLOCK_V, tl.int64)
        tl.store(shift_ptr + block * stride_shift + rows, shift, mask=is_written)
        rescale = tl.exp2(change)
        if STATS:
            # 2^x has reached 0 long before -1e4, and 0 times -inf, or the first maximum's distance, is to be 0
            sum_ez = (sum_ez + total * tl.maximum(change, -1e4)) * rescale
            sum_sq = sum_sq * rescale * rescale
        total = total * rescale
        for i in tl.static_range(PIECES):  # registers do not hold what all of it becomes
            z, slope = to_logits(others[i], INNER, OUTER)
            if BOUNDED:
                is_out = others[i] == LOW
                if STATS:
                    sum_z += tl.sum(tl.where(is_out, 0.0, z), axis=1)
                z = tl.where(is_out, float("-inf"), z)
            power = tl.fma(z, LOG2_E, -shift[:, None])
            e = tl.exp2(power)
            total += tl.sum(e, axis=1)
            if STATS:
                sum_ez += tl.sum(e * tl.maximum(power, -1e4), axis=1)
                sum_sq += tl.sum(e * e, axis=1)
            if INNER is not None:
                e = e * slope
            v = start + i * PIECE_V + tl.arange(0, PIECE_V)[None, :]
            e_block_ptr = e_ptr + tl.cast(start + i * PIECE_V, tl.int64) * stride_ev
            e_place = rows[:, None] + tl.arange(0, PIECE_V)[None, :] * stride_ev
            tl.store(e_block_ptr + e_place, e.to(e_ptr.dtype.element_ty), mask=is_written[:, None] & (v < V))

    target, label_slope = to_logits(at_label, INNER, OUTER)
    target = tl.where(has_entry, target, 0.0)
    if STATS and BOUNDED:
        sum_z += target
    stride_field = tl.cast(stride_field, tl.int64)
    at = part_ptr + tl.cast(first_split + split, tl.int64) * stride_split + rows
    tl.store(at + TOP * stride_field, top, mask=is_row)
    tl.store(at + SHIFT * stride_field, shift, mask=is_row)
    tl.store(at + TARGET * stride_field, target, mask=is_row)
    tl.store(at + SUM * stride_field, total, mask=is_row)
    if INNER is not None:
        tl.store(at + LABEL_SLOPE * stride_field, tl.where(has_entry, label_slope, 0.0), mask=is_row)
    if STATS:
        tl.store(at + TOP_BEFORE * stride_field, top_before, mask=is_row)
        tl.store(at + SUM_Z * stride_field, sum_z, mask=is_row)
        tl.store(at + SUM_EZ * stride_field, sum_ez, mask=is_row)
        tl.store(at + SUM_SQ * stride_field, sum_sq, mask=is_row)


@triton.jit(
    do_not_specialize=["N", "V", "splits", "stride_split", "stride_field", "stride_out"],
    do_not_specialize_on_alignment=[
        "part_ptr", "logp_ptr", "norm_ptr", "stats_ptr", "shift_ptr", "scale_ptr", "label_ptr"
    ],
)  # fmt: skip
def exp_join_kernel(
    part_ptr, logp_ptr, norm_ptr, stats_ptr, shift_ptr, scale_ptr, label_ptr,
    stride_split, stride_field, stride_out, N, V, splits,
    SLOPE: tl.constexpr, HAS_SLOPE: tl.constexpr, SQUARED: tl.constexpr, STATS: tl.constexpr,
    ENTROPY: tl.constexpr, IS_TOP1: tl.constexpr, MEAN_LOGIT: tl.constexpr, SUM_SQ_PROBS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the splits have of each row, put together as `Fold.finish` does, by their largest `shift`; and what its
    exponentials by this shift are multiplied by to be d logp / da: `scale`. So multiplied, `label` is the label's
    entry: minus the sum of the others, with its own part of dz/da. Sums of squares are of parts SQUARED."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = n < N
    stride_split = tl.cast(stride_split, tl.int64)
    stride_field = tl.cast(stride_field, tl.int64)
    top = tl.full([BLOCK_N], FLOOR, tl.float32)
    top_before = tl.full([BLOCK_N], FLOOR, tl.float32)
    largest_shift = tl.full([BLOCK_N], LOWEST, tl.float32)
    for split in range(0, splits):
        at = part_ptr + split * stride_split + n
        top = tl.maximum(top, tl.load(at + TOP * stride_field, mask=is_row, other=LOWEST))
        largest_shift = tl.maximum(largest_shift, tl.load(at + SHIFT * stride_field, mask=is_row, other=0.0))
        if STATS:
            top_before = tl.maximum(top_before, tl.load(at + TOP_BEFORE * stride_field, mask=is_row, other=LOWEST))
    total = tl.zeros([BLOCK_N], tl.float64)
    target = tl.zeros([BLOCK_N], tl.float64)
    slope = tl.zeros([BLOCK_N], tl.float64)
    sum_z = tl.zeros([BLOCK_N], tl.float64)
    sum_ez = tl.zeros([BLOCK_N], tl.float64)
    sum_sq = tl.zeros([BLOCK_N], tl.float64)
    for split in range(0, splits):
        at = part_ptr + split * stride_split + n
        change = (tl.load(at + SHIFT * stride_field, mask=is_row, other=0.0) - largest_shift).to(tl.float64)
        factor = tl.exp2(change)
        part_total = tl.load(at + SUM * stride_field, mask=is_row, other=0.0).to(tl.float64)
        total += part_total * factor
        target += tl.load(at + TARGET * stride_field, mask=is_row, other=0.0).to(tl.float64)  # 0 in all but one
        if HAS_SLOPE:
            slope += tl.load(at + LABEL_SLOPE * stride_field, mask=is_row, other=0.0).to(tl.float64)
        if STATS:
            sum_z += tl.load(at + SUM_Z * stride_field, mask=is_row, other=0.0).to(tl.float64)
            part_ez = tl.load(at + SUM_EZ * stride_field, mask=is_row, other=0.0).to(tl.float64)
            sum_ez += (part_ez + part_total * tl.maximum(change, -1e4)) * factor
            sum_sq += tl.load(at + SUM_SQ * stride_field, mask=is_row, other=0.0).to(tl.float64) * factor * factor
    if not HAS_SLOPE:
        slope += 1.0

    tl.store(shift_ptr + n, largest_shift, mask=is_row)
    tl.store(label_ptr + n, (-total * slope).to(tl.float32), mask=is_row)
    shift = largest_shift.to(tl.float64) / LOG2_E
    sum_ez = sum_ez / LOG2_E
    top, top_before = top.to(tl.float64), top_before.to(tl.float64)
    lead = target - shift
    mass = total + tl.exp(lead)
    logp = tl.where(lead > 0, -log1p(total * tl.exp(-tl.maximum(lead, 0.0))), lead - tl.log(mass))
    tl.store(logp_ptr + n, logp.to(tl.float32), mask=is_row)
    largest = tl.maximum(top, target)
    near = total * tl.exp(shift - largest) + tl.exp(target - largest)
    tl.store(norm_ptr + n, largest.to(tl.float32), mask=is_row)
    tl.store(norm_ptr + stride_out + n, near.to(tl.float32), mask=is_row)
    tl.store(scale_ptr + n, (-SLOPE / mass).to(tl.float32), mask=is_row)

    if STATS:
        stride_out = tl.cast(stride_out, tl.int64)
        log_mass = (largest - shift) + tl.log(near)
        if ENTROPY is not None:  # -sum p log p: the label's term, and the others' with z = shift + (z - shift)
            own = tl.where(logp == float("-inf"), 0.0, -tl.exp(logp) * logp)
            value = own - (sum_ez - total * log_mass) / mass
            tl.store(stats_ptr + ENTROPY * stride_out + n, value.to(tl.float32), mask=is_row)
        if IS_TOP1 is not None:  # the first of equal entries is
            is_top = (target > top) | ((target == top) & (target > top_before))
            tl.store(stats_ptr + IS_TOP1 * stride_out + n, is_top.to(tl.float32), mask=is_row)
        if MEAN_LOGIT is not None:
            tl.store(stats_ptr + MEAN_LOGIT * stride_out + n, (sum_z / V).to(tl.float32), mask=is_row)
        if SUM_SQ_PROBS is not None:
            a, b = tl.log(sum_sq / (SQUARED * SQUARED)) - 2 * log_mass, 2 * logp
            high = tl.maximum(a, b)
            value = high + tl.log(tl.exp(a - high) + tl.exp(b - high))
            tl.store(stats_ptr + SUM_SQ_PROBS * stride_out + n, value.to(tl.float32), mask=is_row)


@triton.jit(
    do_not_specialize=["N", "V", "first", "first_block"],
    do_not_specialize_on_alignment=["y_ptr", "g_ptr", "joint_ptr", "scale_ptr", "label_ptr", "missing_ptr"],
)
def exp_dlogits_kernel(
    e_ptr, d_ptr, y_ptr, g_ptr, shift_ptr, joint_ptr, scale_ptr, label_ptr, missing_ptr, stride_ev, stride_shift, N, V,
    first, first_block, stored, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Packed exponentials [V, N] become dlogits, in their place, the label's entry with them; `missing` is what its
    rounding leaves. A program has a block of COLUMNS, which have the same shifts; those of rows are `joint`."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = n < N
    begin = tl.program_id(0) * COLUMNS
    end = tl.minimum(begin + COLUMNS, V)
    block = tl.cast(first_block + tl.program_id(0), tl.int64)
    shift = tl.load(shift_ptr + block * stride_shift + n, mask=is_row, other=0.0)
    joint = tl.load(joint_ptr + n, mask=is_row, other=0.0)
    weight = tl.load(g_ptr + n, mask=is_row, other=0.0) * tl.load(scale_ptr + n, mask=is_row, other=0.0)
    own = weight * tl.load(label_ptr + n, mask=is_row, other=0.0)
    factor = weight * tl.exp2(shift - joint)
    label = (tl.load(y_ptr + n, mask=is_row, other=-1) - first).to(tl.int32)
    missing = own - own.to(d_ptr.dtype.element_ty).to(tl.float32)
    tl.store(missing_ptr + n, missing, mask=is_row & (label >= begin) & (label < end))
    for start in range(begin, end, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        place = tl.cast(start, tl.int64) * stride_ev + (tl.arange(0, BLOCK_V)[:, None] * stride_ev + n[None, :])
        inside = (v < end)[:, None] & (n < stored)[None, :]
        d = tl.load(e_ptr + place, mask=inside, other=0.0).to(tl.float32) * factor[None, :]
        d = tl.where(v[:, None] == label[None, :], own[None, :], d)
        tl.store(d_ptr + place, d.to(d_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["y_ptr", "scale_ptr", "label_ptr"])
def dhidden_kernel(
    sums_ptr, w_ptr, y_ptr, scale_ptr, label_ptr, out_ptr, stride_wv, N, H, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr
):
    """scale (sums + label W_y), or without a scale; sums and out [N, H] may be the same."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_row = n < N
    inside = is_row[:, None] & (h < H)[None, :]
    y = tl.load(y_ptr + n, mask=is_row, other=0)
    w = tl.load(w_ptr + y[:, None] * stride_wv + h[None, :], mask=inside, other=0.0).to(tl.float32)
    place = n[:, None] * H + h[None, :]
    label = tl.load(label_ptr + n, mask=is_row, other=0.0)[:, None]
    d = tl.load(sums_ptr + place, mask=inside, other=0.0) + label * w
    if scale_ptr is not None:
        d *= tl.load(scale_ptr + n, mask=is_row, other=0.0)[:, None]
    tl.store(out_ptr + place, d.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["N", "V", "first", "stride_norm"],
    do_not_specialize_on_alignment=["y_ptr", "norm_ptr", "logp_ptr", "g_ptr", "missing_ptr"],
)
def linear_dlogits_bwd_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, norm_ptr, logp_ptr, g_ptr, missing_ptr, d_ptr,
    stride_xn, stride_wv, stride_dv, stride_norm, N, V, H, first, stored,
    INNER: tl.constexpr, OUTER: tl.constexpr, SLOPE: tl.constexpr, HAS_BIAS: tl.constexpr, GROUP: tl.constexpr,
    PIECES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Path D's: the gradient of the logits is written to d [V, N], the label's entry with it, 0 behind the last row, of
    the first `stored` ones; `missing` is what the rounding of the label's entry leaves."""
    PIECE_V: tl.constexpr = BLOCK_V // PIECES
    of_group = GROUP * tl.cdiv(V, BLOCK_V)
    first_block = tl.program_id(0) // of_group * GROUP
    together = tl.minimum(tl.cdiv(N, BLOCK_N) - first_block, GROUP)
    row_block = first_block + tl.program_id(0) % of_group % together
    start = tl.program_id(0) % of_group // together * BLOCK_V
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = start + tl.arange(0, BLOCK_V)
    is_row = rows < N
    a = products(
        x_ptr + tl.cast(row_block, tl.int64) * BLOCK_N * stride_xn, w_ptr + tl.cast(start, tl.int64) * stride_wv,
        bias_ptr, stride_xn, stride_wv, is_row, columns, columns < V, H, HAS_BIAS, BLOCK_N, BLOCK_V, BLOCK_H,
    )  # fmt: skip

    label = (tl.load(y_ptr + rows, mask=is_row, other=-1) - first).to(tl.int32)
    has_label = (label >= start) & (label < tl.minimum(start + BLOCK_V, V))
    some_label = tl.max(has_label.to(tl.int32), axis=0) > 0
    shift = tl.load(norm_ptr + rows, mask=is_row, other=float("inf")) * LOG2_E
    g = tl.load(g_ptr + rows, mask=is_row, other=0.0) * SLOPE
    factor = -g / tl.load(norm_ptr + stride_norm + rows, mask=is_row, other=1.0)
    own = g * one_minus_exp(tl.load(logp_ptr + rows, mask=is_row, other=0.0))
    missing = tl.zeros([BLOCK_N], tl.float32)
    pieces = _pieces(a, BLOCK_N, BLOCK_V, PIECES)
    for i in tl.static_range(PIECES):
        z, slope = to_logits(pieces[i], INNER, OUTER)
        d = tl.exp2(tl.fma(z, LOG2_E, -shift[:, None])) * factor[:, None]
        if INNER is not None:
            d *= slope
        v = start + i * PIECE_V + tl.arange(0, PIECE_V)[None, :]
        if some_label:
            is_label = v == label[:, None]
            own_entry = own[:, None] * slope
            d = tl.where(is_label, own_entry, d)
            left = own_entry - own_entry.to(d_ptr.dtype.element_ty).to(tl.float32)
            missing += tl.sum(tl.where(is_label, left, 0.0), axis=1)
        d_block_ptr = d_ptr + tl.cast(start + i * PIECE_V, tl.int64) * stride_dv
        place = rows[:, None] + tl.arange(0, PIECE_V)[None, :] * stride_dv
        tl.store(d_block_ptr + place, d.to(d_ptr.dtype.element_ty), mask=(rows < stored)[:, None] & (v < V))
    tl.store(missing_ptr + rows, missing, mask=has_label)


class _Part(NamedTuple):
    """Entries of the vocabulary whose exponentials lie in one tensor."""

    first: int
    weight: Tensor  # [v, H]
    bias: Tensor | None  # [v]
    blocks: int
    first_block: int
    first_split: int
    splits: int


def takes_exponentials(x_dtype: torch.dtype, weight: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether exponentials are in range as numbers of this dtype, and rows x of it and weight [V, H] can be read."""
    bf16 = x_dtype == weight.dtype == compute_dtype == torch.bfloat16
    known = weight.device.type in ("cuda", "cpu", "meta")  # a plan has no memory
    return bf16 and known and weight.shape[0] > 0 and triton_linear.can_take(weight, weight, compute_dtype)


def _columns(device: torch.device, plain: bool) -> int:
    """Of a block: registers hold less beside a softcap's logits and their slopes."""
    hopper, _ = triton_linear._machine(device)
    return triton_linear.block_v(False, not plain, hopper)


def pieces(columns: int, softcap: bool) -> int:
    """Of so many columns: more beside a softcap's logits and their slopes."""
    return min(columns, 8 if softcap else max(1, columns // PIECE_COLUMNS))


def shift_columns(device: torch.device) -> int:
    """How many entries of the vocabulary share a shift of packed exponentials."""
    return _columns(device, True)


def exponential_rows(n: int, v: int, h: int, device: torch.device) -> int:
    """How many rows of exponentials path B has at a time."""
    _, multiprocessors = triton_linear._machine(device)
    return waves.rows_at_a_time(n, v, h, multiprocessors, EXP_BYTES)


def recomputed_columns(n: int, v: int, h: int, device: torch.device) -> int:
    """How many vocabulary entries of the gradient of n rows path D has at a time."""
    _, multiprocessors = triton_linear._machine(device)
    return waves.columns_at_a_time(n, v, h, multiprocessors, DLOGITS_BYTES)


def _readable(x: Tensor, weight: Tensor) -> Tensor:
    return x if triton_linear.can_take(x, weight, x.dtype) else x.contiguous()


def _row_blocks(rows: int) -> int:
    return triton.cdiv(rows, triton_linear.BLOCK_N)


def _constants(transform: LogitTransform, bias: Tensor | None, columns: int) -> dict[str, Any]:
    return {
        **transform_constants(transform), "HAS_BIAS": bias is not None, "BLOCK_N": triton_linear.BLOCK_N,
        "BLOCK_V": columns, "BLOCK_H": triton_linear.BLOCK_H, "num_warps": NUM_WARPS, "num_stages": NUM_STAGES,
    }  # fmt: skip


def _dhidden(sums: Tensor, weight: Tensor, y: Tensor, scale: Tensor | None, label: Tensor, out: Tensor) -> Tensor:
    (n, h), block_h = sums.shape, min(triton.next_power_of_2(sums.shape[1]), MAX_BLOCK_H)
    assert sums.is_contiguous() and out.is_contiguous()
    run(
        dhidden_kernel, (triton.cdiv(n, BLOCK_ROWS), triton.cdiv(h, block_h)), sums,
        sums, weight, y, scale, label, out, weight.stride(0), n, h, BLOCK_N=BLOCK_ROWS, BLOCK_H=block_h,
    )  # fmt: skip
    return out


class Exponentials:
    """See `interface.Exponentials`."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, transform: LogitTransform,
        stats: Sequence[str], rows: int, sizes: Sequence[int], packed: bool,
    ):  # fmt: skip
        self.x = _readable(x, weight)
        self.y, self.weight, self.transform, self.names = y.contiguous(), weight, transform, tuple(stats)
        self.packed, self.rows = packed, rows
        _, multiprocessors = triton_linear._machine(x.device)
        # The same with statistics and without: a reference, which has none, is summed as its policy is.
        self.columns = _columns(x.device, packed or transform.softcap is None)
        n, v = x.shape[0], weight.shape[0]
        bias = None if bias is None else bias.to(weight.dtype).resolve_neg().contiguous()
        self.constants = _constants(transform, bias, self.columns)
        self.parts, first, self.blocks, self.splits = list[_Part](), 0, 0, 0
        for size in sizes:
            blocks = triton.cdiv(size, self.columns)
            splits = waves.splits_of(_row_blocks(rows), blocks, multiprocessors)
            here = slice(first, first + size)
            of_bias = None if bias is None else bias[here]
            self.parts.append(_Part(first, weight[here], of_bias, blocks, self.blocks, self.splits, splits))
            first, self.blocks, self.splits = first + size, self.blocks + blocks, self.splits + splits
        assert first == v
        self.sums = x.new_empty(FIELDS, self.splits, n, dtype=torch.float32)
        self.joint, self.scale, self.label, self.missing = x.new_empty(4, n, dtype=torch.float32)
        self.shifts: Tensor | None = None  # [blocks, rows], of packed exponentials
        if not packed:
            self.shift = self._largest_of_first(bias)

    def _largest_of_first(self, bias: Tensor | None) -> Tensor:
        """[N] path B's shifts."""
        n, some = self.x.shape[0], slice(0, min(self.weight.shape[0], FIRST_COLUMNS))
        splits = triton.cdiv(some.stop, self.columns)
        found = self.x.new_empty(triton_linear.FIELDS, splits, n, dtype=torch.float32)
        run(
            triton_linear.linear_fold_fwd_kernel, (_row_blocks(n), splits), self.x,
            self.x, self.weight[some], None if bias is None else bias[some], self.y, found, None,
            self.x.stride(0), self.weight.stride(0), n, some.stop, self.x.shape[1], STATS=False, **self.constants,
        )  # fmt: skip
        return found[0].amax(0)

    def write(self, rows: slice, out: Sequence[Tensor | None] | None) -> None:
        if not self.packed:
            for again in (False, True):
                self._write(
                    linear_exp_fwd_kernel, rows, out, self.shift[rows],
                    [(self.splits,)] * len(self.parts), AGAIN=again, FAR=FAR, SQUARED=SQUARED,
                )  # fmt: skip
            return
        if out is None:
            shifts = self.x.new_empty(1, 16, dtype=torch.float32)
        else:
            if self.shifts is None:
                blocks = sum(triton.cdiv(e.shape[0], self.columns) for e in out if e is not None)
                self.shifts = self.x.new_empty(blocks, padded_rows(self.rows), dtype=torch.float32)
            shifts, out = self.shifts, [None if e is None else e.view(torch.float16) for e in out]
        of_parts = [(shifts.stride(0), part.first_block) for part in self.parts]
        count = pieces(self.columns, self.transform.softcap is not None)
        self._write(linear_pack_fwd_kernel, rows, out, shifts, of_parts, PIECES=count)

    def _write(
        self, kernel: Any, rows: slice, out: Sequence[Tensor | None] | None, shift: Tensor,
        of_parts: Sequence[tuple[int, ...]], **constants: Any,
    ) -> None:  # fmt: skip
        x, n = self.x[rows], rows.stop - rows.start
        # to where nothing is written: another kernel might round otherwise
        nowhere = x.new_empty(1, 16, dtype=torch.float16 if self.packed else x.dtype)
        places = [None] * len(self.parts) if out is None else out
        for part, place, of_part in zip(self.parts, places, of_parts, strict=True):
            e = nowhere if place is None else place
            run(
                kernel, (_row_blocks(n), part.splits), x,
                x, part.weight, part.bias, self.y[rows], shift, self.sums[:, :, rows], e,
                x.stride(0), part.weight.stride(0), e.stride(0), self.x.shape[0], self.sums.stride(0),
                n, part.weight.shape[0], x.shape[1], part.first, part.first_split,
                0 if place is None else padded_rows(n), *of_part, STATS=bool(self.names), **constants, **self.constants,
            )  # fmt: skip

    def finish(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        n = rows.stop - rows.start
        logp, norm = self.scale.new_empty(n), self.scale.new_empty(2, n)
        stats = self.scale.new_empty(len(self.names), n)
        run(
            exp_join_kernel, (triton.cdiv(n, JOIN_ROWS),), self.x,
            self.sums[:, :, rows], logp, norm, stats, self.joint[rows], self.scale[rows], self.label[rows],
            self.x.shape[0], self.sums.stride(0), n,
            n, self.weight.shape[0], self.splits,
            SLOPE=self.transform.slope, HAS_SLOPE=self.transform.softcap is not None,
            SQUARED=1.0 if self.packed else SQUARED, STATS=bool(self.names), BLOCK_N=JOIN_ROWS, num_warps=1,
            **stats_constants(self.names),
        )  # fmt: skip
        return logp, norm, stats

    def weigh(self, e: Sequence[Tensor], rows: slice, g: Tensor) -> None:
        assert self.shifts is not None
        n, g = rows.stop - rows.start, g.contiguous()
        for part, each in zip(self.parts, e, strict=False):
            run(
                exp_dlogits_kernel, (part.blocks, triton.cdiv(padded_rows(n), DLOGITS_BLOCK_N)), each,
                each.view(torch.float16), each, self.y[rows], g, self.shifts, self.joint[rows], self.scale[rows],
                self.label[rows], self.missing[rows], each.stride(0), self.shifts.stride(0), n, each.shape[0],
                part.first, part.first_block, padded_rows(n),
                COLUMNS=self.columns, BLOCK_N=DLOGITS_BLOCK_N, BLOCK_V=DLOGITS_BLOCK_V, num_warps=4,
            )  # fmt: skip

    def dhidden(self, sums: Tensor, out: Tensor) -> Tensor:
        scale, label = (None, self.missing) if self.packed else (self.scale, self.label)
        return _dhidden(sums, self.weight, self.y, scale, label, out)


class Recomputed:
    """See `interface.Recomputed`."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, of: GradRows, transform: LogitTransform,
        missing: Tensor | None = None,
    ):  # fmt: skip
        self.x, self.weight, self.transform = _readable(x, weight), weight, transform
        self.bias = None if bias is None else bias.to(weight.dtype).resolve_neg().contiguous()
        self.y, self.norm, self.logp, self.g = (t.contiguous() for t in of)
        self.missing = torch.empty_like(self.logp) if missing is None else missing
        columns = shift_columns(x.device)
        self.constants = _constants(transform, bias, columns)
        self.constants["PIECES"] = pieces(columns, transform.softcap is not None)

    def write(self, block: slice, out: Tensor) -> None:
        (n, h), v = self.x.shape, block.stop - block.start
        assert out.shape == (v, n) and out.stride() == (padded_rows(n), 1)
        weight, bias = self.weight[block], None if self.bias is None else self.bias[block]
        run(
            linear_dlogits_bwd_kernel, (_row_blocks(n) * triton.cdiv(v, self.constants["BLOCK_V"]),), self.x,
            self.x, weight, bias, self.y, self.norm, self.logp, self.g, self.missing, out,
            self.x.stride(0), weight.stride(0), out.stride(0), self.norm.stride(0), n, v, h, block.start,
            padded_rows(n), SLOPE=self.transform.slope, GROUP=GROUP, **self.constants,
        )  # fmt: skip

    def dhidden(self, sums: Tensor, out: Tensor) -> Tensor:
        return _dhidden(sums, self.weight, self.y, None, self.missing, out)
