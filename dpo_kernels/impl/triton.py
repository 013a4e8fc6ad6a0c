"""The Triton implementation: tile kernels and path E. A row is read once from memory, and written at most once.

Dimensions: S sequences, T positions, N labelled rows, V vocabulary size, n rows and v vocabulary entries of one tile; K
statistics. A program has BLOCK_N rows, or in the gradients a block of them: every sum has one order, and nothing needs
atomics. A lane takes the PER entries of 16 bytes at once, and lies within a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.impl import triton_exponentials, triton_linear
from dpo_kernels.impl.fold import Fold
from dpo_kernels.impl.interface import Columns, GradPositions, GradRows, Labels, LogitTransform, accumulate_dtype
from dpo_kernels.impl.positions import check_labels
from dpo_kernels.impl.products import operand as operand
from dpo_kernels.impl.products import out_tile as out_tile
from dpo_kernels.impl.products import product as product
from dpo_kernels.impl.products import put_labels_ as put_labels_
from dpo_kernels.impl.triton_exponentials import exponential_rows as exponential_rows
from dpo_kernels.impl.triton_exponentials import padded_rows as padded_rows
from dpo_kernels.impl.triton_exponentials import recomputed_columns as recomputed_columns
from dpo_kernels.impl.triton_exponentials import shift_columns as shift_columns
from dpo_kernels.impl.triton_exponentials import takes_exponentials as takes_exponentials
from dpo_kernels.impl.triton_linear import LOWEST
from dpo_kernels.impl.triton_math import (
    LOG2_E,
    exp,
    huge,
    log1p,
    one_minus_exp,
    run,
    shift_by,
    stats_constants,
    to_logits,
    transform_constants,
)
from dpo_kernels.impl.triton_pairs import compare as compare
from dpo_kernels.impl.triton_pairs import sum_rows as sum_rows
from dpo_kernels.impl.triton_rows import find_rows as find_rows
from dpo_kernels.impl.triton_rows import gather_rows as gather_rows
from dpo_kernels.impl.triton_rows import linear_token_logps as linear_token_logps
from dpo_kernels.impl.triton_rows import put_rows as put_rows
from dpo_kernels.impl.triton_scale import scale_ as scale_
from dpo_kernels.impl.triton_sequences import sum_tokens as sum_tokens
from dpo_kernels.impl.triton_sequences import sum_tokens_bwd as sum_tokens_bwd

exponentials = triton_exponentials.Exponentials
recomputed = triton_exponentials.Recomputed
TILE_BYTES = 128 * 2**20
# A program takes 16 KiB of a row at once, or of each of its rows: so much has to be on its way from memory.
BLOCK_N, MAX_BLOCK_BYTES, MAX_BLOCK_H = 1, 2**14, 1024
CHECKED_LABELS = 1024
# Of a thread: two blocks of 8 warps have a multiprocessor together, or three, without statistics and a softcap.
# (Without a limit, assemblers choose lower ones, and spill.)
MAX_REGISTERS, FEW_REGISTERS = 128, 72

# The fields of a Fold's state that the kernels name.
SUM: tl.constexpr = tl.constexpr(3)
SUM_Z: tl.constexpr = tl.constexpr(4)
SUM_EZ: tl.constexpr = tl.constexpr(5)
SUM_SQ: tl.constexpr = tl.constexpr(6)
TARGET: tl.constexpr = tl.constexpr(1)
LABEL_SLOPE: tl.constexpr = tl.constexpr(2)


def description() -> str:
    return f"available: Triton {triton.__version__}"


def has_fused_forward(device: torch.device) -> bool:
    """Whether path A in half precision can be one kernel instead of products of tiles."""
    return device.type in ("cuda", "cpu")


def tile_bytes(device: torch.device) -> int:
    return TILE_BYTES


def new_fold(y: Tensor, dtype: torch.dtype, stats: Sequence[str]) -> Fold:
    return triton_linear.LinearFold(y.contiguous(), torch.float64, stats)


@triton.jit
def _load(row_ptr, columns, inside, stride_v, bias_ptr, ACC: tl.constexpr, HAS_BIAS: tl.constexpr):
    """x.W + b, or what logits are given."""
    a = tl.load(row_ptr + columns.to(tl.int64) * stride_v, mask=inside, other=0.0).to(ACC)
    if HAS_BIAS:
        a += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    return a


@triton.jit
def _at(ptr, n, T, stride_s, stride_t):
    """Where position n of [S, T] begins."""
    return ptr + (n // T).to(tl.int64) * stride_s + (n % T).to(tl.int64) * stride_t


@triton.jit
def _fold_lanes(
    row_ptr, is_row, label, stride_v, bias_ptr, V, unit, least,
    ACC: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, HAS_BIAS: tl.constexpr, STATS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """Of the entries beside the label that are above `least`, each lane's maximum, the sums of e = 2^(z unit - shift)
    for this maximum's shift, of z, of e (z unit - shift) and of e^2, and where the maximum is, or V."""
    LANES: tl.constexpr = BLOCK_V // PER
    top = least[:, None] + tl.zeros([BLOCK_N, LANES], ACC)
    total = tl.zeros([BLOCK_N, LANES], ACC)
    sum_z = tl.zeros([BLOCK_N, LANES], ACC)
    sum_ez = tl.zeros([BLOCK_N, LANES], ACC)
    sum_sq = tl.zeros([BLOCK_N, LANES], ACC)
    argmax = tl.full([BLOCK_N, LANES], V, tl.int32)
    lane = tl.arange(0, LANES)[None, :, None] * PER + tl.arange(0, PER)[None, None, :]
    inside_row = is_row[:, None, None]
    # blocks between which there are labels; none for what is no label
    label_block = tl.where(is_row & (label >= 0), label // BLOCK_V, -1)
    first_label, last_label = tl.min(label_block, axis=0) * BLOCK_V, tl.max(label_block, axis=0) * BLOCK_V
    some_row = tl.max(is_row.to(tl.int32), axis=0)
    shift, _ = shift_by(top, unit[:, None])

    for first in range(0, V * some_row, BLOCK_V):
        columns = first + lane
        inside = inside_row & (columns < V)
        a = _load(row_ptr[:, None, None], columns, inside, stride_v, bias_ptr, ACC, HAS_BIAS)
        z, _ = to_logits(a, INNER, OUTER)
        if STATS:
            sum_z += tl.sum(z, axis=2)  # 0 behind the last entry
        if ((first >= first_label) & (first <= last_label)) | (first + BLOCK_V > V):
            z = tl.where(inside & (columns != label[:, None, None]), z, float("-inf"))
        block_top = tl.max(z, axis=2)
        if STATS:  # of equal ones the first
            place = tl.min(tl.where(z == block_top[:, :, None], columns, V), axis=2)
            argmax = tl.where(block_top > top, place, tl.where(block_top == top, tl.minimum(argmax, place), argmax))
        top = tl.maximum(top, block_top)
        change = shift
        shift, _ = shift_by(top, unit[:, None])
        change -= shift
        rescale = tl.exp2(change)
        power = tl.fma(z, unit[:, None, None], -shift[:, :, None])
        e = tl.exp2(power)
        if STATS:
            # 2^x has reached 0 long before -1e4, and 0 times -inf, or the first maximum's distance, is to be 0
            sum_ez = (sum_ez + total * tl.maximum(change, -1e4)) * rescale
            sum_ez += tl.sum(e * tl.maximum(power, -1e4), axis=2)
            sum_sq = sum_sq * rescale * rescale + tl.sum(e * e, axis=2)
        total = total * rescale + tl.sum(e, axis=2)
    return top, total, sum_z, sum_ez, sum_sq, argmax


@triton.jit
def _fold_row(
    row_ptr, is_row, label, stride_v, bias_ptr, V,
    ACC: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, HAS_BIAS: tl.constexpr, STATS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """Of the entries beside the label: the maximum, the sum of exp(z - max), those of the statistics, and where the
    maximum is, or V. Each lane has its own maximum; at the end they are brought to the largest, and added."""
    unit, least = tl.full([BLOCK_N], LOG2_E, ACC), tl.zeros([BLOCK_N], ACC) - huge(ACC)
    zero = tl.zeros([BLOCK_N, BLOCK_V // PER], ACC)
    top, total, sum_z, sum_ez, sum_sq, argmax = zero, zero, zero, zero, zero, zero.to(tl.int32)
    goes = 1
    while goes > 0:  # once, but for rows of huge logits alone, as of those that are masked
        top, total, sum_z, sum_ez, sum_sq, argmax = _fold_lanes(
            row_ptr, is_row, label, stride_v, bias_ptr, V, unit, least,
            ACC, INNER, OUTER, HAS_BIAS, STATS, BLOCK_N, BLOCK_V, PER,
        )  # fmt: skip
        is_huge = is_row & (unit != 1.0) & (tl.abs(tl.max(top, axis=1)) >= huge(ACC))
        unit, least = tl.where(is_huge, 1.0, unit), tl.where(is_huge, LOWEST, least)
        goes = tl.max(is_huge.to(tl.int32), axis=0)

    row_top = tl.max(top, axis=1)
    apart = tl.maximum(top - row_top[:, None], -1e4)
    _, rest = shift_by(top, unit[:, None])
    factor = (tl.exp(apart) * tl.exp2(-rest)).to(tl.float64)
    sum_ez = (sum_ez - total * rest) / LOG2_E + total * apart
    sum_ez = tl.sum(sum_ez.to(tl.float64) * factor, axis=1)
    sum_sq = tl.sum(sum_sq.to(tl.float64) * factor * factor, axis=1)
    argmax = tl.min(tl.where(top == row_top[:, None], argmax, V), axis=1)
    total = tl.sum(total.to(tl.float64) * factor, axis=1)
    return row_top, total, tl.sum(sum_z.to(tl.float64), axis=1), sum_ez, sum_sq, argmax


# Triton compiles a kernel anew for every pattern of what is a multiple of 16, or 1: left out is what changes from tile
# to tile and makes no load wider.
@triton.jit(
    do_not_specialize=["start", "N", "stride_field"],
    do_not_specialize_on_alignment=["y_ptr", "state_ptr", "argmax_ptr"],
)
def fold_fwd_kernel(
    a_ptr, out_ptr, bias_ptr, y_ptr, state_ptr, argmax_ptr, sums_ptr,
    stride_an, stride_on, stride_field, stride_sums, start, N, V, H,
    ACC: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, HAS_BIAS: tl.constexpr, STATS: tl.constexpr,
    WRITE_EXP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = n < N
    row_ptr = a_ptr + n * stride_an
    label = (tl.load(y_ptr + n, mask=is_row, other=0) - start).to(tl.int32)
    has_label = is_row & (label >= 0) & (label < V)
    label = tl.where(has_label, label, -1)
    # now: between here and where they are written all threads meet
    state = state_ptr + n
    old_top = tl.load(state, mask=is_row, other=0.0).to(ACC)
    old_total = tl.load(state + SUM * stride_field, mask=is_row, other=0.0)
    if STATS:
        old_argmax = tl.load(argmax_ptr + n, mask=is_row, other=0)
        old_z = tl.load(state + SUM_Z * stride_field, mask=is_row, other=0.0)
        old_ez = tl.load(state + SUM_EZ * stride_field, mask=is_row, other=0.0)
        old_sq = tl.load(state + SUM_SQ * stride_field, mask=is_row, other=0.0)

    at_label = _load(row_ptr, label, has_label, 1, bias_ptr, ACC, HAS_BIAS)
    target, label_slope = to_logits(at_label, INNER, OUTER)
    tl.store(state + TARGET * stride_field, target, mask=has_label)
    tl.store(state + LABEL_SLOPE * stride_field, label_slope, mask=has_label)

    tile_top, total, sum_z, sum_ez, sum_sq, argmax = _fold_row(
        row_ptr, is_row, label, 1, bias_ptr, V, ACC, INNER, OUTER, HAS_BIAS, STATS, BLOCK_N, BLOCK_V, PER
    )
    top = tl.maximum(old_top, tile_top)
    old_apart, apart = tl.maximum(old_top - top, -1e4), tl.maximum(tile_top - top, -1e4)
    old_factor, factor = tl.exp(old_apart).to(tl.float64), tl.exp(apart).to(tl.float64)

    if WRITE_EXP:
        out_row_ptr = (out_ptr + n * stride_on)[:, None]
        for first in range(0, V, BLOCK_V):  # from the cache
            columns = (first + tl.arange(0, BLOCK_V))[None, :]
            inside = is_row[:, None] & (columns < V)
            z, slope = to_logits(_load(row_ptr[:, None], columns, inside, 1, bias_ptr, ACC, HAS_BIAS), INNER, OUTER)
            e = tl.where(columns == label[:, None], 0.0, exp(z - top[:, None]) * slope)
            tl.store(out_row_ptr + columns, e.to(out_ptr.dtype.element_ty), mask=inside)
        rescale = tl.exp(old_top - top)[:, None]
        sums_row_ptr = (sums_ptr + n * stride_sums)[:, None]
        for first in range(0, H, BLOCK_H):
            h = (first + tl.arange(0, BLOCK_H))[None, :]
            changed = (is_row & (top > old_top))[:, None] & (h < H)  # most rows soon keep their maximum
            sums = tl.load(sums_row_ptr + h, mask=changed, other=0.0)
            tl.store(sums_row_ptr + h, sums * rescale, mask=changed)

    tl.store(state, top, mask=is_row)
    tl.store(state + SUM * stride_field, old_total * old_factor + total * factor, mask=is_row)
    if STATS:
        tl.store(state + SUM_Z * stride_field, old_z + sum_z, mask=is_row)
        joint_ez = (old_ez + old_total * old_apart) * old_factor + (sum_ez + total * apart) * factor
        tl.store(state + SUM_EZ * stride_field, joint_ez, mask=is_row)
        joint_sq = old_sq * old_factor * old_factor + sum_sq * factor * factor
        tl.store(state + SUM_SQ * stride_field, joint_sq, mask=is_row)
        is_new = (tile_top > old_top) | ((tile_top == old_top) & (old_argmax < 0))
        tl.store(argmax_ptr + n, start + argmax, mask=is_row & is_new & (argmax < V))


@triton.jit(
    do_not_specialize=["start", "N", "stride_norm"],
    do_not_specialize_on_alignment=["y_ptr", "norm_ptr", "logp_ptr", "g_ptr", "value_ptr"],
)
def dlogits_bwd_kernel(
    a_ptr, out_ptr, bias_ptr, y_ptr, norm_ptr, logp_ptr, g_ptr, value_ptr,
    stride_an, stride_on, stride_norm, start, N, V,
    ACC: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, SLOPE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """0 at the label, whose entry goes to `value`."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = n < N
    block = tl.program_id(1)
    label = (tl.load(y_ptr + n, mask=is_row, other=0) - start).to(tl.int32)
    shift = tl.load(norm_ptr + n, mask=is_row, other=0.0)
    g = tl.load(g_ptr + n, mask=is_row, other=0.0) * SLOPE
    factor = -g / tl.load(norm_ptr + stride_norm + n, mask=is_row, other=1.0)
    own = g * one_minus_exp(tl.load(logp_ptr + n, mask=is_row, other=0.0))

    columns = (block * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
    inside = is_row[:, None] & (columns < V)
    row_ptr = (a_ptr + n * stride_an)[:, None]
    z, slope = to_logits(_load(row_ptr, columns, inside, 1, bias_ptr, ACC, HAS_BIAS), INNER, OUTER)
    is_label = columns == label[:, None]
    d = tl.where(is_label, 0.0, exp(z - shift[:, None]) * factor[:, None] * slope)
    has_label = (label >= 0) & (label < V)
    # by the block that the label is in, or by the first one
    writes = is_row & tl.where(has_label, label // BLOCK_V == block, block == 0)
    own_entry = tl.where(is_label & inside, own[:, None] * slope, 0.0)
    tl.store(value_ptr + n, tl.sum(own_entry, axis=1), mask=writes)
    tl.store((out_ptr + n * stride_on)[:, None] + columns, d.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_finished(
    top, total, target, sum_z, sum_ez, sum_sq, is_first, V, is_labelled, n, N, logp_ptr, norm_ptr, stats_ptr, in_range,
    ENTROPY: tl.constexpr, IS_TOP1: tl.constexpr, MEAN_LOGIT: tl.constexpr, SUM_SQ_PROBS: tl.constexpr,
):  # fmt: skip
    """What `Fold.finish` makes of rows, 0 where they are not labelled. Of the largest of the others and the label, the
    smaller one's exponential is all that is needed."""
    top, target = top.to(tl.float64), target.to(tl.float64)
    lead = target - top
    smaller = tl.exp(-tl.abs(lead))
    scale = tl.where(lead > 0, smaller, 1.0)
    others = total * scale
    mass = others + tl.where(lead > 0, 1.0, smaller)
    log_mass = tl.where(lead > 0, log1p(others), tl.log(mass))
    logp = tl.where(lead > 0, 0.0, lead) - log_mass
    acc = logp_ptr.dtype.element_ty
    tl.store(logp_ptr + n, tl.where(is_labelled, logp, 0.0).to(acc), mask=in_range)
    tl.store(norm_ptr + n, tl.where(is_labelled, tl.maximum(top, target), 0.0).to(acc), mask=in_range)
    tl.store(norm_ptr + N + n, tl.where(is_labelled, mass, 0.0).to(acc), mask=in_range)
    log_prob_of_top = tl.where(lead > 0, -lead, 0.0) - log_mass
    if ENTROPY is not None:
        own = tl.where(logp == float("-inf"), 0.0, -tl.exp(logp) * logp)
        value = own - scale / mass * (sum_ez + total * log_prob_of_top)
        tl.store(stats_ptr + ENTROPY * N + n, tl.where(is_labelled, value, 0.0).to(acc), mask=in_range)
    if IS_TOP1 is not None:
        is_top = is_labelled & ((lead > 0) | ((lead == 0) & is_first))
        tl.store(stats_ptr + IS_TOP1 * N + n, is_top.to(acc), mask=in_range)
    if MEAN_LOGIT is not None:
        tl.store(stats_ptr + MEAN_LOGIT * N + n, tl.where(is_labelled, sum_z / V, 0.0).to(acc), mask=in_range)
    if SUM_SQ_PROBS is not None:
        a, b = tl.log(sum_sq) + 2 * log_prob_of_top, 2 * logp
        high = tl.maximum(a, b)
        value = tl.where(high == float("-inf"), high, high + tl.log(tl.exp(a - high) + tl.exp(b - high)))
        tl.store(stats_ptr + SUM_SQ_PROBS * N + n, tl.where(is_labelled, value, 0.0).to(acc), mask=in_range)


@triton.jit(
    do_not_specialize=["ignore_index", "num_labelled", "stride_ys", "stride_yt", "T", "N"],
    do_not_specialize_on_alignment=["y_ptr", "logp_ptr", "norm_ptr", "stats_ptr", "fit_ptr"],
)
def logits_fwd_kernel(
    a_ptr, y_ptr, logp_ptr, norm_ptr, stats_ptr, fit_ptr,
    stride_as, stride_at, stride_av, stride_ys, stride_yt, ignore_index, num_labelled, T, N, V,
    ACC: tl.constexpr, STATS: tl.constexpr,
    ENTROPY: tl.constexpr, IS_TOP1: tl.constexpr, MEAN_LOGIT: tl.constexpr, SUM_SQ_PROBS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, PER: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Of N = S T positions. The first program looks whether labels fit, and has no rows."""
    if tl.program_id(0) == 0:
        labelled = tl.zeros([BLOCK_T], tl.int32)
        outside = tl.zeros([BLOCK_T], tl.int32)
        for first in range(0, N, BLOCK_T):
            n = first + tl.arange(0, BLOCK_T)
            y = tl.load(_at(y_ptr, n, T, stride_ys, stride_yt), mask=n < N, other=ignore_index)
            labelled += (y != ignore_index).to(tl.int32)
            outside += ((y != ignore_index) & ((y < 0) | (y >= V))).to(tl.int32)
        fit = (tl.sum(outside, axis=0) == 0) & ((num_labelled < 0) | (tl.sum(labelled, axis=0) == num_labelled))
        tl.store(fit_ptr, fit.to(tl.int32))

    n = (tl.program_id(0) - 1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = (n >= 0) & (n < N)
    y = tl.load(_at(y_ptr, n, T, stride_ys, stride_yt), mask=in_range, other=ignore_index)
    is_labelled = in_range & (y != ignore_index)
    has_label = is_labelled & (y >= 0) & (y < V)
    label = tl.where(has_label, y, -1).to(tl.int32)
    row_ptr = _at(a_ptr, n, T, stride_as, stride_at)
    target = tl.load(row_ptr + label.to(tl.int64) * stride_av, mask=has_label, other=0.0).to(ACC)
    top, total, sum_z, sum_ez, sum_sq, argmax = _fold_row(
        row_ptr, is_labelled, label, stride_av, None, V, ACC, None, 1.0, False, STATS, BLOCK_N, BLOCK_V, PER
    )
    _store_finished(
        top, total, target, sum_z, sum_ez, sum_sq, label < argmax, V, is_labelled, n, N, logp_ptr, norm_ptr, stats_ptr,
        in_range, ENTROPY, IS_TOP1, MEAN_LOGIT, SUM_SQ_PROBS,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "ignore_index", "stride_ys", "stride_yt", "stride_ps", "stride_pt", "stride_gs", "stride_gt", "T", "N"
    ],
    do_not_specialize_on_alignment=["y_ptr", "norm_ptr", "logp_ptr", "g_ptr"],
)  # fmt: skip
def logits_bwd_kernel(
    a_ptr, out_ptr, y_ptr, norm_ptr, logp_ptr, g_ptr,
    stride_as, stride_at, stride_av, stride_os, stride_ot, stride_ov, stride_ys, stride_yt, stride_gs, stride_gt,
    ignore_index, T, N, V, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """0 where there is no label, of which no logit is read."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = n < N
    y = tl.load(_at(y_ptr, n, T, stride_ys, stride_yt), mask=in_range, other=ignore_index)
    is_labelled = in_range & (y != ignore_index)
    shift = tl.load(norm_ptr + n, mask=is_labelled, other=0.0)
    g = tl.load(_at(g_ptr, n, T, stride_gs, stride_gt), mask=is_labelled, other=0.0)
    factor = -g / tl.load(norm_ptr + N + n, mask=is_labelled, other=1.0)
    own = g * one_minus_exp(tl.load(logp_ptr + n, mask=is_labelled, other=0.0))

    columns = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
    inside = columns < V
    at = columns.to(tl.int64)
    row_ptr = _at(a_ptr, n, T, stride_as, stride_at)[:, None]
    z = tl.load(row_ptr + at * stride_av, mask=is_labelled[:, None] & inside, other=0.0).to(ACC)
    d = tl.where(columns == y[:, None], own[:, None], exp(z - shift[:, None]) * factor[:, None])
    d = tl.where(is_labelled[:, None], d, 0.0)
    out_row_ptr = _at(out_ptr, n, T, stride_os, stride_ot)[:, None]
    tl.store(out_row_ptr + at * stride_ov, d.to(out_ptr.dtype.element_ty), mask=in_range[:, None] & inside)


def _launch(dtype: torch.dtype, v: int, registers: int = MAX_REGISTERS) -> dict[str, Any]:
    block = min(max(triton.next_power_of_2(v), _per(dtype)), MAX_BLOCK_BYTES // dtype.itemsize)
    launch = {"BLOCK_N": BLOCK_N, "BLOCK_V": block, "num_warps": 8 if block * dtype.itemsize > 2**12 else 4}
    if accumulate_dtype(dtype) == torch.float64:
        return launch | {"ACC": tl.float64}
    launch["ACC"] = tl.float32
    return launch | {"maxnreg": registers} if torch.version.cuda else launch  # other backends have no such limit


def _per(dtype: torch.dtype) -> int:
    """Entries of 16 bytes."""
    return 16 // dtype.itemsize


def linear_fold_(
    fold: Fold, x: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, compute_dtype: torch.dtype
) -> bool:
    if x.shape[0] == 0 or not triton_linear.can_take(x, weight, compute_dtype):
        return False
    assert isinstance(fold, triton_linear.LinearFold)
    triton_linear.linear_fold_(fold, x, weight, bias, transform)
    return True


def fold_(fold: Fold, a: Tensor, rows: slice, columns: Columns, transform: LogitTransform, keep: bool) -> None:
    _fold_tile(fold, a, None, rows, columns, transform, None)


def fold_exp_(
    fold: Fold, a: Tensor, out: Tensor, rows: slice, columns: Columns, transform: LogitTransform, sums: Tensor
) -> None:
    assert out.is_contiguous() and out.shape == a.shape
    assert sums.stride(1) == 1 and sums.dtype == a.dtype and sums.shape[0] == a.shape[0]
    _fold_tile(fold, a, out, rows, columns, transform, sums)


def _fold_tile(
    fold: Fold,
    a: Tensor,
    out: Tensor | None,
    rows: slice,
    columns: Columns,
    transform: LogitTransform,
    sums: Tensor | None,
) -> None:
    n, v = a.shape
    assert a.is_contiguous()
    state, argmax, y = fold.state[:, rows], fold.argmax[rows], fold.y[rows]
    stride_sums, h = (0, 0) if sums is None else (sums.stride(0), sums.shape[1])
    registers = MAX_REGISTERS if fold.names or transform.softcap is not None else FEW_REGISTERS
    if n:
        run(
            fold_fwd_kernel, (triton.cdiv(n, BLOCK_N),), a,
            a, out, columns.bias, y, state, argmax, sums,
            v, v, state.stride(0), stride_sums, columns.start, n, v, h,
            **transform_constants(transform), HAS_BIAS=columns.bias is not None, STATS=bool(fold.names),
            WRITE_EXP=sums is not None, BLOCK_H=min(triton.next_power_of_2(max(h, 1)), MAX_BLOCK_H), PER=_per(a.dtype),
            **_launch(a.dtype, v, registers),
        )  # fmt: skip


def dlogits(a: Tensor, out: Tensor, of: GradRows, columns: Columns, transform: LogitTransform) -> Tensor:
    n, v = a.shape
    assert a.is_contiguous() and out.is_contiguous() and out.shape == a.shape and of.norm.stride(1) == 1
    norm, (y, logp, g) = of.norm, (t.contiguous() for t in (of.y, of.logp, of.g))
    value = torch.empty_like(logp)
    if n:
        launch = _launch(a.dtype, v)
        run(
            dlogits_bwd_kernel, (triton.cdiv(n, BLOCK_N), triton.cdiv(v, launch["BLOCK_V"])), a,
            a, out, columns.bias, y, norm, logp, g, value, v, v, norm.stride(0), columns.start, n, v,
            **transform_constants(transform), SLOPE=transform.slope, HAS_BIAS=columns.bias is not None, **launch,
        )  # fmt: skip
    return value


def logps_fwd(logits: Tensor, labels: Labels, *, stats: Sequence[str] = ()) -> tuple[Tensor, Tensor, Tensor]:
    y, acc, v = labels.y, accumulate_dtype(logits.dtype), logits.shape[-1]
    logp, norm, values = (logits.new_empty(*lead, *y.shape, dtype=acc) for lead in ((), (2,), (len(stats),)))
    fit = y.new_empty((), dtype=torch.int32)
    launch = _launch(logits.dtype, v, MAX_REGISTERS if stats else FEW_REGISTERS)
    run(
        logits_fwd_kernel, (1 + triton.cdiv(y.numel(), BLOCK_N),), logits,
        logits, y, logp, norm, values, fit, *logits.stride(), *y.stride(), labels.ignore_index,
        -1 if labels.num_labelled is None else labels.num_labelled, max(1, y.shape[1]), y.numel(), v,
        STATS=bool(stats), **stats_constants(stats), PER=_per(logits.dtype), BLOCK_T=CHECKED_LABELS, **launch,
    )  # fmt: skip
    check_labels(fit, labels, v)
    return logp, norm, values


def logps_bwd_(logits: Tensor, labels: Labels, of: GradPositions, out: Tensor) -> None:
    assert out.dtype == logits.dtype and out.shape == logits.shape
    y, v, acc = labels.y, logits.shape[-1], accumulate_dtype(logits.dtype)
    norm, logp, g = of.norm.contiguous(), of.logp.contiguous(), of.g
    assert norm.dtype == logp.dtype == g.dtype == acc
    if y.numel():
        launch = _launch(logits.dtype, v)
        run(
            logits_bwd_kernel, (triton.cdiv(y.numel(), BLOCK_N), triton.cdiv(v, launch["BLOCK_V"])), logits,
            logits, out, y, norm, logp, g, *logits.stride(), *out.stride(), *y.stride(), *g.stride(),
            labels.ignore_index, y.shape[1], y.numel(), v, **launch,
        )  # fmt: skip
