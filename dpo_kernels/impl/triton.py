"""The Triton implementation: tile kernels and path E. A row is read once from memory, and written at most once.

Dimensions: S sequences, T positions, N labelled rows, V vocabulary size, n rows and v vocabulary entries of one tile. A
program has BLOCK_N rows, or in the gradients a block of them: every sum has one order, and nothing needs atomics.
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
from dpo_kernels.impl.interface import Columns, GradRows, LinearLogps, LogitTransform, Rows, accumulate_dtype
from dpo_kernels.impl.products import operand as operand
from dpo_kernels.impl.products import out_tile as out_tile
from dpo_kernels.impl.products import product as product
from dpo_kernels.impl.products import zero_rows_ as zero_rows_
from dpo_kernels.impl.triton_exponentials import exponential_rows as exponential_rows
from dpo_kernels.impl.triton_exponentials import padded_rows as padded_rows
from dpo_kernels.impl.triton_exponentials import takes_exponentials as takes_exponentials
from dpo_kernels.impl.triton_math import exp, one_minus_exp, to_logits, transform_constants
from dpo_kernels.impl.triton_rows import linear_token_logps as linear_token_logps
from dpo_kernels.impl.triton_sequences import sum_tokens as sum_tokens
from dpo_kernels.impl.triton_sequences import sum_tokens_bwd as sum_tokens_bwd

exponentials = triton_exponentials.Exponentials
TILE_BYTES = 128 * 2**20
BLOCK_N, MAX_BLOCK_V, MAX_BLOCK_H = 1, 4096, 1024

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
def _offset(n, inside, sequence_ptr, position_ptr, stride_s, stride_t, GATHER: tl.constexpr):
    """Where rows begin: those of a tile, or of the logits [S, T, V]."""
    if GATHER:
        s = tl.load(sequence_ptr + n, mask=inside, other=0)
        return s * stride_s + tl.load(position_ptr + n, mask=inside, other=0) * stride_t
    return n * stride_t


# Triton compiles a kernel anew for every pattern of what is a multiple of 16, or 1: left out is what changes from tile
# to tile and makes no load wider.
@triton.jit(
    do_not_specialize=["start", "N", "stride_field"],
    do_not_specialize_on_alignment=["y_ptr", "sequence_ptr", "position_ptr", "state_ptr", "argmax_ptr"],
)
def fold_fwd_kernel(
    a_ptr, out_ptr, bias_ptr, y_ptr, sequence_ptr, position_ptr, state_ptr, argmax_ptr, sums_ptr,
    stride_as, stride_at, stride_av, stride_on, stride_field, stride_sums, start, N, V, H,
    ACC: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, HAS_BIAS: tl.constexpr, GATHER: tl.constexpr,
    STATS: tl.constexpr, WRITE_EXP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = n < N
    row_ptr = a_ptr + _offset(n, is_row, sequence_ptr, position_ptr, stride_as, stride_at, GATHER)
    label = (tl.load(y_ptr + n, mask=is_row, other=0) - start).to(tl.int32)
    state = state_ptr + n
    old_top = tl.load(state, mask=is_row, other=0.0).to(ACC)
    top = old_top
    total = tl.load(state + SUM * stride_field, mask=is_row, other=0.0)
    if STATS:
        sum_z = tl.load(state + SUM_Z * stride_field, mask=is_row, other=0.0)
        sum_ez = tl.load(state + SUM_EZ * stride_field, mask=is_row, other=0.0)
        sum_sq = tl.load(state + SUM_SQ * stride_field, mask=is_row, other=0.0)
        argmax = tl.full([BLOCK_N], -1, tl.int32)  # none in this tile

    has_label = is_row & (label >= 0) & (label < V)
    at_label = _load(row_ptr, label, has_label, stride_av, bias_ptr, ACC, HAS_BIAS)
    target, label_slope = to_logits(at_label, INNER, OUTER)
    tl.store(state + TARGET * stride_field, target, mask=has_label)
    tl.store(state + LABEL_SLOPE * stride_field, label_slope, mask=has_label)

    for first in range(0, V, BLOCK_V):
        columns = (first + tl.arange(0, BLOCK_V))[None, :]
        inside = is_row[:, None] & (columns < V)
        z, _ = to_logits(_load(row_ptr[:, None], columns, inside, stride_av, bias_ptr, ACC, HAS_BIAS), INNER, OUTER)
        if STATS:
            sum_z += tl.sum(z, axis=1)  # 0 behind the last entry
        beside = tl.where(inside & (columns != label[:, None]), z, float("-inf"))
        block_top = tl.max(beside, axis=1)
        new_top = tl.maximum(top, block_top)
        rescale = tl.exp(top - new_top).to(tl.float64)
        shifted = beside - new_top[:, None]
        e = exp(shifted)
        if STATS:
            place = tl.min(tl.where(beside == block_top[:, None], columns, V), axis=1)  # of equal ones the first
            argmax = tl.where(block_top > top, place, argmax)
            # exp has reached 0 long before -1e4, and 0 times -inf, or the first maximum's distance, is to be 0
            sum_ez = (sum_ez + total * tl.maximum(top - new_top, -1e4)) * rescale
            sum_ez += tl.sum(e * tl.maximum(shifted, -1e4), axis=1)
            sum_sq = sum_sq * rescale * rescale + tl.sum(e * e, axis=1)
        total = total * rescale + tl.sum(e, axis=1)
        top = new_top

    if WRITE_EXP:
        out_row_ptr = (out_ptr + n * stride_on)[:, None]
        for first in range(0, V, BLOCK_V):  # from the cache
            columns = (first + tl.arange(0, BLOCK_V))[None, :]
            inside = is_row[:, None] & (columns < V)
            z, slope = to_logits(
                _load(row_ptr[:, None], columns, inside, stride_av, bias_ptr, ACC, HAS_BIAS), INNER, OUTER
            )
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
    tl.store(state + SUM * stride_field, total, mask=is_row)
    if STATS:
        tl.store(state + SUM_Z * stride_field, sum_z, mask=is_row)
        tl.store(state + SUM_EZ * stride_field, sum_ez, mask=is_row)
        tl.store(state + SUM_SQ * stride_field, sum_sq, mask=is_row)
        tl.store(argmax_ptr + n, start + argmax, mask=is_row & (argmax >= 0))


@triton.jit(
    do_not_specialize=["start", "N", "stride_norm"],
    do_not_specialize_on_alignment=[
        "y_ptr", "sequence_ptr", "position_ptr", "norm_ptr", "logp_ptr", "g_ptr", "value_ptr"
    ],
)  # fmt: skip
def dlogits_bwd_kernel(
    a_ptr, out_ptr, bias_ptr, y_ptr, sequence_ptr, position_ptr, norm_ptr, logp_ptr, g_ptr, value_ptr,
    stride_as, stride_at, stride_av, stride_os, stride_ot, stride_ov, stride_norm, start, N, V,
    ACC: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, SLOPE: tl.constexpr, HAS_BIAS: tl.constexpr,
    GATHER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Of a tile: 0 at the label, whose entry goes to `value`. Of logits (GATHER): all of the gradient."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = n < N
    block = tl.program_id(1)
    row_ptr = a_ptr + _offset(n, is_row, sequence_ptr, position_ptr, stride_as, stride_at, GATHER)
    out_row_ptr = out_ptr + _offset(n, is_row, sequence_ptr, position_ptr, stride_os, stride_ot, GATHER)
    label = (tl.load(y_ptr + n, mask=is_row, other=0) - start).to(tl.int32)
    shift = tl.load(norm_ptr + n, mask=is_row, other=0.0)
    g = tl.load(g_ptr + n, mask=is_row, other=0.0) * SLOPE
    factor = -g / tl.load(norm_ptr + stride_norm + n, mask=is_row, other=1.0)
    own = g * one_minus_exp(tl.load(logp_ptr + n, mask=is_row, other=0.0))

    columns = (block * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
    inside = is_row[:, None] & (columns < V)
    z, slope = to_logits(_load(row_ptr[:, None], columns, inside, stride_av, bias_ptr, ACC, HAS_BIAS), INNER, OUTER)
    d = exp(z - shift[:, None]) * factor[:, None] * slope
    is_label = columns == label[:, None]
    own_entry = own[:, None] * slope
    if GATHER:
        d = tl.where(is_label, own_entry, d)
    else:
        d = tl.where(is_label, 0.0, d)
        has_label = (label >= 0) & (label < V)
        # by the block that the label is in, or by the first one
        writes = is_row & tl.where(has_label, label // BLOCK_V == block, block == 0)
        tl.store(value_ptr + n, tl.sum(tl.where(is_label & inside, own_entry, 0.0), axis=1), mask=writes)
    tl.store(out_row_ptr[:, None] + columns.to(tl.int64) * stride_ov, d.to(out_ptr.dtype.element_ty), mask=inside)


def _launch(dtype: torch.dtype, v: int) -> dict[str, Any]:
    block = min(triton.next_power_of_2(v), MAX_BLOCK_V)
    acc = tl.float64 if accumulate_dtype(dtype) == torch.float64 else tl.float32
    return {"ACC": acc, "BLOCK_N": BLOCK_N, "BLOCK_V": block, "num_warps": 8 if block > 1024 else 4}


def _run(kernel: Any, grid: tuple[int, ...], where: Tensor, *args: Any, **constants: Any) -> None:
    """On the device of `where`, which need not be the current one."""
    with torch.cuda.device_of(where):
        kernel[grid](*args, **constants)


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
    if n:
        _run(
            fold_fwd_kernel, (triton.cdiv(n, BLOCK_N),), a,
            a, out, columns.bias, y, None, None, state, argmax, sums,
            0, v, 1, v, state.stride(0), stride_sums, columns.start, n, v, h,
            **transform_constants(transform), HAS_BIAS=columns.bias is not None, GATHER=False, STATS=bool(fold.names),
            WRITE_EXP=sums is not None, BLOCK_H=min(triton.next_power_of_2(max(h, 1)), MAX_BLOCK_H),
            **_launch(a.dtype, v),
        )  # fmt: skip


def dlogits(a: Tensor, out: Tensor, of: GradRows, columns: Columns, transform: LogitTransform) -> Tensor:
    n, v = a.shape
    assert a.is_contiguous() and out.is_contiguous() and out.shape == a.shape and of.norm.stride(1) == 1
    norm, (y, logp, g) = of.norm, (t.contiguous() for t in (of.y, of.logp, of.g))
    value = torch.empty_like(logp)
    if n:
        launch = _launch(a.dtype, v)
        _run(
            dlogits_bwd_kernel, (triton.cdiv(n, BLOCK_N), triton.cdiv(v, launch["BLOCK_V"])), a,
            a, out, columns.bias, y, None, None, norm, logp, g, value,
            0, v, 1, 0, v, 1, norm.stride(0), columns.start, n, v,
            **transform_constants(transform), SLOPE=transform.slope, HAS_BIAS=columns.bias is not None, GATHER=False,
            **launch,
        )  # fmt: skip
    return value


def logps_fwd(logits: Tensor, rows: Rows, y: Tensor, *, stats: Sequence[str] = ()) -> LinearLogps:
    acc, v = accumulate_dtype(logits.dtype), logits.shape[-1]
    fold = new_fold(y, acc, stats)
    sequence, position = (t.contiguous() for t in rows)
    if y.shape[0]:
        _run(
            fold_fwd_kernel, (triton.cdiv(y.shape[0], BLOCK_N),), logits,
            logits, None, None, fold.y, sequence, position, fold.state, fold.argmax, None,
            *logits.stride(), 0, fold.state.stride(0), 0, 0, y.shape[0], v, 0,
            **transform_constants(LogitTransform()), HAS_BIAS=False, GATHER=True, STATS=bool(stats), WRITE_EXP=False,
            BLOCK_H=1, **_launch(logits.dtype, v),
        )  # fmt: skip
    return LinearLogps(*fold.finish(v, acc), None)


def logps_bwd_(logits: Tensor, rows: Rows, of: GradRows, out: Tensor) -> None:
    assert out.dtype == logits.dtype and out.shape == logits.shape
    acc, v = accumulate_dtype(logits.dtype), logits.shape[-1]
    y, norm, logp, g = (t.contiguous() if t is of.y else t.to(acc).contiguous() for t in of)
    sequence, position = (t.contiguous() for t in rows)
    if y.shape[0]:
        launch = _launch(logits.dtype, v)
        _run(
            dlogits_bwd_kernel, (triton.cdiv(y.shape[0], BLOCK_N), triton.cdiv(v, launch["BLOCK_V"])), logits,
            logits, out, None, y, sequence, position, norm, logp, g, None,
            *logits.stride(), *out.stride(), norm.stride(0), 0, y.shape[0], v,
            **transform_constants(LogitTransform()), SLOPE=1.0, HAS_BIAS=False, GATHER=True, **launch,
        )  # fmt: skip
