"""Path C's kernels of heads in bf16: a matrix product whose epilogue writes packed exponentials, and what makes dlogits
of them in their place.

Dimensions: N labelled rows, H hidden size, V vocabulary size, or entries of a part of it. What is written lies as
[V, N]: the entries of a row of memory are rows of x. An exponential is e = 2^(z log2(e) - shift), packed a number in
fp16: it becomes an entry of dlogits and is rounded then, and fp16 has an eighth of bf16's error. Each block of columns
has shifts of its own, by which none is above 2^MOST: the sums of a row follow its maximum as in path A, and what is
summed is what is stored.
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

# Half of what fp16 holds.
MOST: tl.constexpr = tl.constexpr(15.0)


@triton.jit
def _packed_shift(top):
    """By which 2^MOST is the most that a logit up to `top` becomes. Rounded upwards, or large ones would overflow."""
    shift = tl.fma(top, LOG2_E, -MOST)  # as multiply-adds it is the same wherever it is computed again
    return tl.fma(tl.abs(shift), 2.0**-22, shift)


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
    label = tl.where(label < V, label, 2**30)  # of a later part: behind all columns, those too that are none
    top = tl.full([BLOCK_N], FLOOR, tl.float32)
    at_label = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    if STATS:
        top_before = tl.full([BLOCK_N], FLOOR, tl.float32)
        sum_z = tl.zeros([BLOCK_N], tl.float32)
        sum_ez = tl.zeros([BLOCK_N], tl.float32)
        sum_sq = tl.zeros([BLOCK_N], tl.float32)

    for start in range(begin, end, BLOCK_V):
        inside = start + tl.arange(0, BLOCK_V) < V
        # Afresh, or compilers compare `start` with labels in int64, too.
        wide_start = tl.cast(afresh(start, start), tl.int64)
        w_block_ptr = w_ptr + wide_start * stride_wv
        a = products(
            x_block_ptr, w_block_ptr, stride_xn, stride_wv, is_row, inside, start, H, BLOCK_N, BLOCK_V, BLOCK_H
        )
        # Few blocks have an entry that is left out: the label of a row, or what is behind the last one.
        has_label = tl.max(((label >= start) & (label < start + BLOCK_V)).to(tl.int32), axis=0)
        leaves_out = (has_label > 0) | (start + BLOCK_V > V)
        extreme = tl.full([BLOCK_N], LOWEST, tl.float32)
        extreme_before = extreme
        of_block = pieces_of(a, BLOCK_N, BLOCK_V, PIECES)
        others = ()
        for i in tl.static_range(PIECES):
            columns = start + i * PIECE_V + tl.arange(0, PIECE_V)
            other = add_bias(of_block[i], bias_ptr, columns, V, HAS_BIAS)
            if STATS and not BOUNDED:
                sum_z += tl.sum(other, axis=1) * OUTER  # 0 behind the last entry
            if leaves_out:
                v = columns[None, :]
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
        change = _packed_shift(top)
        top = tl.maximum(top, block_top)
        shift = _packed_shift(top)
        change -= shift
        block = tl.cast(first_block + start // BLOCK_V, tl.int64)
        tl.store(shift_ptr + (block * stride_shift + rows), shift, mask=is_written)
        rescale = tl.exp2(change)
        if STATS:
            # 2^x has reached 0 long before -1e4, and 0 times -inf, or the first maximum's distance, is to be 0
            sum_ez = (sum_ez + total * tl.maximum(change, -1e4)) * rescale
            sum_sq = sum_sq * rescale * rescale
        total = total * rescale
        for i in tl.static_range(PIECES):  # registers do not hold what all of it becomes
            if start + i * PIECE_V < V:  # a branch also keeps what is computed of one piece apart from the next
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
                e_block_ptr = e_ptr + (wide_start + i * PIECE_V) * stride_ev
                e_place = rows[:, None] + tl.arange(0, PIECE_V)[None, :] * afresh(stride_ev, start)
                tl.store(e_block_ptr + e_place, e.to(e_ptr.dtype.element_ty), mask=is_written[:, None] & (v < V))

    if STATS and BOUNDED:
        target, _ = to_logits(at_label, INNER, OUTER)  # 0 of another split's
        sum_z += target
    stride_field = tl.cast(stride_field, tl.int64)
    at = part_ptr + tl.cast(first_split + split, tl.int64) * stride_split + rows
    tl.store(at + TOP * stride_field, top, mask=is_row)
    tl.store(at + SHIFT * stride_field, _packed_shift(top), mask=is_row)
    tl.store(at + LABEL * stride_field, at_label, mask=is_row)
    tl.store(at + SUM * stride_field, total, mask=is_row)
    if STATS:
        tl.store(at + TOP_BEFORE * stride_field, top_before, mask=is_row)
        tl.store(at + SUM_Z * stride_field, sum_z, mask=is_row)
        tl.store(at + SUM_EZ * stride_field, sum_ez, mask=is_row)
        tl.store(at + SUM_SQ * stride_field, sum_sq, mask=is_row)


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
