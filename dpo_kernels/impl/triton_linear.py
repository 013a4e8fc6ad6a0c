"""Path A in one Triton kernel: a matrix product whose epilogue folds each tile of logits, which is never stored.

Dimensions: N labelled rows, H hidden size, V vocabulary size. The vocabulary is split so that few rows, too, give every
multiprocessor work; a split leaves its own maximum and sums for each row, and these are put together at the end, always
in the same order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.impl.fold import Fold
from dpo_kernels.impl.interface import LogitTransform
from dpo_kernels.impl.triton_math import to_logits, transform_constants

BLOCK_N, BLOCK_H = 128, 64
NUM_WARPS, NUM_STAGES = 8, 3


def block_v(stats: bool, hopper: bool) -> int:
    """What registers hold beside the sums of statistics; only Hopper's tensor cores leave so many free."""
    return (256 if hopper else 128) // (2 if stats else 1)


LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
# What a split leaves of a row.
TOP, TARGET, SUM, SUM_Z, SUM_EZ, SUM_SQ = (tl.constexpr(field) for field in range(6))
FIELDS, STATS_FIELDS = 3, 6


@triton.jit
def linear_fold_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, part_ptr, argmax_ptr, N, V, H, split_columns,
    stride_xn, stride_xh, stride_wv, stride_wh, stride_field,
    INNER: tl.constexpr, OUTER: tl.constexpr, HAS_BIAS: tl.constexpr, STATS: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs have the same columns of the vocabulary: W is read from memory about once.
    n, v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)  # within a block, where int32 holds every offset
    rows = tl.program_id(0) * BLOCK_N + n
    split = tl.program_id(1)
    row_inside = rows < N
    x_block_ptr = x_ptr + tl.program_id(0).to(tl.int64) * BLOCK_N * stride_xn
    y = tl.load(y_ptr + rows, mask=row_inside, other=-1)
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    target = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    if STATS:
        sum_z = tl.zeros([BLOCK_N], tl.float32)
        sum_ez = tl.zeros([BLOCK_N], tl.float32)
        sum_sq = tl.zeros([BLOCK_N], tl.float32)
        argmax = tl.full([BLOCK_N], -1, tl.int64)

    end = tl.minimum((split + 1) * split_columns, V)
    for first in range(split * split_columns, end, BLOCK_V):
        columns = first + v
        column_inside = columns < end
        w_block_ptr = w_ptr + tl.cast(first, tl.int64) * stride_wv
        a = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for start in range(0, H, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            x_place = n[:, None] * stride_xn + h[None, :] * stride_xh
            w_place = v[None, :] * stride_wv + h[:, None] * stride_wh
            x = tl.load(x_block_ptr + x_place, mask=row_inside[:, None] & (h < H)[None, :], other=0.0)
            w = tl.load(w_block_ptr + w_place, mask=column_inside[None, :] & (h < H)[:, None], other=0.0)
            a = tl.dot(x.to(COMPUTE), w.to(COMPUTE), a)
        if HAS_BIAS:
            a += tl.load(bias_ptr + columns, mask=column_inside, other=0.0).to(COMPUTE).to(tl.float32)[None, :]

        z, _ = to_logits(a, INNER, OUTER)
        is_label = columns[None, :] == y[:, None]
        has_label = (y >= first) & (y < tl.minimum(first + BLOCK_V, end))
        target = tl.where(has_label, tl.sum(tl.where(is_label, z, 0.0), axis=1), target)
        beside = tl.where(column_inside[None, :] & (is_label == 0), z, float("-inf"))
        block_top = tl.max(beside, axis=1)
        new_top = tl.maximum(top, block_top)
        rescale = tl.exp(top - new_top)
        shifted = beside - new_top[:, None]
        e = tl.exp(shifted)
        if STATS:
            at_top = tl.where(beside == block_top[:, None], columns[None, :], V)
            argmax = tl.where(block_top > top, tl.min(at_top, axis=1).to(tl.int64), argmax)
            sum_z += tl.sum(tl.where(column_inside[None, :], z, 0.0), axis=1)
            sum_ez = (sum_ez + total * tl.maximum(top - new_top, -1e4)) * rescale
            sum_ez += tl.sum(e * tl.maximum(shifted, -1e4), axis=1)
            sum_sq = sum_sq * rescale * rescale + tl.sum(e * e, axis=1)
        total = total * rescale + tl.sum(e, axis=1)
        top = new_top

    place = split.to(tl.int64) * N + rows
    tl.store(part_ptr + TOP * stride_field + place, top, mask=row_inside)
    tl.store(part_ptr + TARGET * stride_field + place, target, mask=row_inside)
    tl.store(part_ptr + SUM * stride_field + place, total, mask=row_inside)
    if STATS:
        tl.store(part_ptr + SUM_Z * stride_field + place, sum_z, mask=row_inside)
        tl.store(part_ptr + SUM_EZ * stride_field + place, sum_ez, mask=row_inside)
        tl.store(part_ptr + SUM_SQ * stride_field + place, sum_sq, mask=row_inside)
        tl.store(argmax_ptr + place, argmax, mask=row_inside)


def splits_of(n: int, v: int, multiprocessors: int, block_v: int) -> int:
    """How many parts of the vocabulary keep the multiprocessors busiest, the fewest of equal ones."""
    row_blocks, column_blocks = math.ceil(n / BLOCK_N), math.ceil(v / block_v)

    def rounds(splits: int) -> int:
        """Blocks of columns that the busiest multiprocessor goes through."""
        return math.ceil(row_blocks * splits / multiprocessors) * math.ceil(column_blocks / splits)

    return min(range(1, min(column_blocks, 4 * multiprocessors) + 1), key=rounds)


def _machine(device: torch.device) -> tuple[bool, int]:
    """Whether it is a Hopper GPU, and its number of multiprocessors."""
    if device.type == "cpu":  # Triton's interpreter
        return False, 4
    properties = torch.cuda.get_device_properties(device)
    return properties.major == 9, properties.multi_processor_count


def linear_fold_(
    fold: Fold,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    compute_dtype: torch.dtype,
) -> None:
    """Takes x.W^T [N, V] into `fold`, which holds nothing yet. x [N, H] and weight [V, H] of any strides and dtypes are
    rounded to `compute_dtype`, bf16 or fp16, as they are read."""
    (n, h), v = x.shape, weight.shape[0]
    stats = bool(fold.names)
    hopper, multiprocessors = _machine(x.device)
    columns = block_v(stats, hopper)
    splits = splits_of(n, v, multiprocessors, columns)
    split_columns = triton.cdiv(triton.cdiv(v, columns), splits) * columns
    splits = triton.cdiv(v, split_columns)
    part = x.new_empty(STATS_FIELDS if stats else FIELDS, splits, n, dtype=torch.float32)
    argmax = torch.empty(splits if stats else 0, n, dtype=torch.int64, device=x.device)
    with torch.cuda.device_of(x):
        linear_fold_fwd_kernel[(triton.cdiv(n, BLOCK_N), splits)](
            x, weight, bias, fold.y, part, argmax, n, v, h, split_columns,
            *x.stride(), *weight.stride(), part.stride(0),
            **transform_constants(transform), HAS_BIAS=bias is not None, STATS=stats,
            COMPUTE=tl.bfloat16 if compute_dtype == torch.bfloat16 else tl.float16,
            BLOCK_N=BLOCK_N, BLOCK_V=columns, BLOCK_H=BLOCK_H, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    _join_splits(fold, part.double(), argmax)


def _join_splits(fold: Fold, part: Tensor, argmax: Tensor) -> None:
    top = part[0]
    torch.amax(top, 0, out=fold.max)
    torch.amax(part[1], 0, out=fold.target)
    factor = torch.exp(top - fold.max)
    torch.sum(part[2] * factor, 0, out=fold.sum)
    if fold.names:
        torch.sum(part[3], 0, out=fold.sum_z)
        # a split of -inf alone has a sum of 0 and the least maximum there is
        torch.sum((part[4] + part[2] * (top - fold.max).clamp(min=-1e4)) * factor, 0, out=fold.sum_ez)
        torch.sum(part[5] * factor.square(), 0, out=fold.sum_sq)
        found = (top == fold.max) & (argmax >= 0)
        first = torch.where(found, argmax, torch.iinfo(torch.int64).max).amin(0)
        fold.argmax.copy_(torch.where(found.any(0), first, -1))
