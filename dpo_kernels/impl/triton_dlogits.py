"""Path D's kernel of heads in bf16: a matrix product whose epilogue writes the gradient of the logits.

Dimensions: N labelled rows, H hidden size, V entries of a part of the vocabulary. What is written lies as [V, N]: the
entries of a row of memory are rows of x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dpo_kernels.impl.triton_linear import add_bias, pieces_of, products
from dpo_kernels.impl.triton_math import LOG2_E, one_minus_exp, shift_by, to_logits


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
    inside = start + tl.arange(0, BLOCK_V) < V
    is_row = rows < N
    a = products(
        x_ptr + tl.cast(row_block, tl.int64) * BLOCK_N * stride_xn, w_ptr + tl.cast(start, tl.int64) * stride_wv,
        stride_xn, stride_wv, is_row, inside, start, H, BLOCK_N, BLOCK_V, BLOCK_H,
    )  # fmt: skip

    label = (tl.load(y_ptr + rows, mask=is_row, other=-1) - first).to(tl.int32)
    has_label = (label >= start) & (label < tl.minimum(start + BLOCK_V, V))
    some_label = tl.max(has_label.to(tl.int32), axis=0) > 0
    shift, rest = shift_by(tl.load(norm_ptr + rows, mask=is_row, other=0.0), LOG2_E)
    shift = tl.where(is_row, shift, float("inf"))
    g = tl.load(g_ptr + rows, mask=is_row, other=0.0) * SLOPE
    factor = -g * tl.exp2(-rest) / tl.load(norm_ptr + stride_norm + rows, mask=is_row, other=1.0)
    own = g * one_minus_exp(tl.load(logp_ptr + rows, mask=is_row, other=0.0))
    missing = tl.zeros([BLOCK_N], tl.float32)
    pieces = pieces_of(a, BLOCK_N, BLOCK_V, PIECES)
    for i in tl.static_range(PIECES):
        columns = start + i * PIECE_V + tl.arange(0, PIECE_V)
        z, slope = to_logits(add_bias(pieces[i], bias_ptr, columns, V, HAS_BIAS), INNER, OUTER)
        d = tl.exp2(tl.fma(z, LOG2_E, -shift[:, None])) * factor[:, None]
        if INNER is not None:
            d *= slope
        v = columns[None, :]
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
