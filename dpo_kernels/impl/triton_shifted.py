"""Path B's kernel of heads in bf16: a matrix product whose epilogue writes exponentials, which are an operand as they
are.

Dimensions: N labelled rows, H hidden size, V vocabulary size, or entries of a part of it. What is written lies as
[V, N]: the entries of a row of memory are rows of x. An exponential is e = 2^(z log2(e) - shift), a number in bf16, and
a row has one shift.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dpo_kernels.impl.triton_join import (
    FLOOR,
    LABEL,
    LOG2_E,
    LOWEST,
    SHIFT,
    SUM,
    SUM_EZ,
    SUM_SQ,
    SUM_Z,
    TOP,
    TOP_BEFORE,
)
from dpo_kernels.impl.triton_linear import add_bias, afresh, columns_of_split, pieces_of, products
from dpo_kernels.impl.triton_math import to_logits


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
    FAR: tl.constexpr, SQUARED: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Path B's: exponentials times the softcap's part of dz/da, 0 at the label, are written to e [V, N], of the first
    `stored` rows; a shift is a logit here. AGAIN: of blocks with a row whose largest logit is far above its shift,
    with this largest logit in its place; most programs find none among theirs, and are done."""
    PIECE_V: tl.constexpr = BLOCK_V // PIECES
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
    stride_field = tl.cast(stride_field, tl.int64)
    own_split = tl.cast(first_split + tl.program_id(1), tl.int64) * stride_split
    tl.store(part_ptr + (own_split + SHIFT * stride_field) + rows, shift, mask=is_row)  # now: later registers are full
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    at_label = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    if STATS:
        top_before = tl.full([BLOCK_N], LOWEST, tl.float32)
        sum_z = tl.zeros([BLOCK_N], tl.float32)
        sum_ez = tl.zeros([BLOCK_N], tl.float32)
        sum_sq = tl.zeros([BLOCK_N], tl.float32)

    for start in range(begin, end, BLOCK_V):
        all_inside = start + tl.arange(0, BLOCK_V) < V
        # Afresh, or compilers compare `start` with labels in int64, too.
        wide_start = tl.cast(afresh(start, start), tl.int64)
        w_block_ptr = w_ptr + wide_start * stride_wv
        a = products(
            x_block_ptr, w_block_ptr, stride_xn, stride_wv, is_row, all_inside, start, H, BLOCK_N, BLOCK_V, BLOCK_H
        )
        of_block = pieces_of(a, BLOCK_N, BLOCK_V, PIECES)
        for i in tl.static_range(PIECES):  # registers do not hold what all of it becomes
            if start + i * PIECE_V < V:  # a branch also keeps what is computed of one piece apart from the next
                columns = start + i * PIECE_V + tl.arange(0, PIECE_V)
                of_piece = add_bias(of_block[i], bias_ptr, columns, V, HAS_BIAS)
                z, slope = to_logits(of_piece, INNER, OUTER)
                v, inside = columns[None, :], (columns < V)[None, :]
                is_label = (v == label) & inside
                at_label += tl.sum(tl.where(is_label, of_piece, 0.0), axis=1)  # of one block alone
                if STATS:
                    sum_z += tl.sum(tl.where(inside, z, 0.0), axis=1)
                    before = tl.where(inside & (v < label), z, float("-inf"))
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
                e_block_ptr = e_ptr + (wide_start + i * PIECE_V) * stride_ev
                e_place = rows[:, None] + tl.arange(0, PIECE_V)[None, :] * stride_ev
                tl.store(e_block_ptr + e_place, e.to(e_ptr.dtype.element_ty), mask=is_written[:, None] & inside)

    at = part_ptr + own_split + rows
    if not AGAIN:
        tl.store(at + TOP * stride_field, top, mask=is_row)
        tl.store(at + LABEL * stride_field, at_label, mask=is_row)
        if STATS:
            tl.store(at + TOP_BEFORE * stride_field, top_before, mask=is_row)
            tl.store(at + SUM_Z * stride_field, sum_z, mask=is_row)
    tl.store(at + SUM * stride_field, total, mask=is_row)
    if STATS:
        tl.store(at + SUM_EZ * stride_field, sum_ez, mask=is_row)
        tl.store(at + SUM_SQ * stride_field, sum_sq, mask=is_row)
