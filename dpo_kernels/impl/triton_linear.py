"""Path A in one Triton kernel: a matrix product whose epilogue folds each tile of logits, which is never stored.

Dimensions: N labelled rows, H hidden size, V vocabulary size. The vocabulary is split so that few rows, too, give every
multiprocessor work; a split leaves its own maximum and sums for each row, and these are put together at the end, always
in the same order.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.impl.fold import Fold
from dpo_kernels.impl.interface import LogitTransform
from dpo_kernels.impl.triton_math import exp, to_logits, transform_constants

BLOCK_N, BLOCK_H = 128, 64
MAX_ROWS = 256  # of x or W in a block
NUM_WARPS, NUM_STAGES = 8, 3


def block_v(stats: bool, softcap: bool, hopper: bool) -> int:
    """What registers hold beside the sums of statistics and a softcap; only Hopper's tensor cores leave many free."""
    return max(64, (256 if hopper else 128) // (2 if stats else 1) // (2 if softcap else 1))


LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
# What a split leaves of a row.
TOP, TARGET, SUM, SUM_Z, SUM_EZ, SUM_SQ = (tl.constexpr(field) for field in range(6))
FIELDS, STATS_FIELDS = 3, 6


@triton.jit
def products(
    x_block_ptr, w_block_ptr, bias_ptr, stride_xn, stride_wv, is_row, columns, inside, H,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """x.W + b of a block of rows and one of columns."""
    n, v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)  # within a block, where int32 holds every offset
    a = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        x_place = n[:, None] * stride_xn + h[None, :]
        w_place = v[None, :] * stride_wv + h[:, None]
        x = tl.load(x_block_ptr + x_place, mask=is_row[:, None] & (h < H)[None, :], other=0.0)
        w = tl.load(w_block_ptr + w_place, mask=inside[None, :] & (h < H)[:, None], other=0.0)
        a = tl.dot(x, w, a)
    if HAS_BIAS:
        a += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return a


@triton.jit(do_not_specialize=["N", "split_blocks"], do_not_specialize_on_alignment=["y_ptr"])
def linear_fold_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, part_ptr, argmax_ptr, stride_xn, stride_wv, N, V, H, split_blocks,
    INNER: tl.constexpr, OUTER: tl.constexpr, HAS_BIAS: tl.constexpr, STATS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs have the same columns of the vocabulary: W is read from memory about once.
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split, splits = tl.program_id(1), tl.num_programs(1)
    is_row = rows < N
    x_block_ptr = x_ptr + tl.program_id(0).to(tl.int64) * BLOCK_N * stride_xn
    label = tl.load(y_ptr + rows, mask=is_row, other=-1).to(tl.int32)[:, None]
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    target = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    if STATS:
        sum_z = tl.zeros([BLOCK_N], tl.float32)
        sum_ez = tl.zeros([BLOCK_N], tl.float32)
        sum_sq = tl.zeros([BLOCK_N], tl.float32)
        argmax = tl.full([BLOCK_N], -1, tl.int32)

    split_columns = split_blocks * BLOCK_V
    for start in range(split * split_columns, tl.minimum((split + 1) * split_columns, V), BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < V
        w_block_ptr = w_ptr + tl.cast(start, tl.int64) * stride_wv
        a = products(
            x_block_ptr, w_block_ptr, bias_ptr, stride_xn, stride_wv, is_row, columns, inside, H,
            HAS_BIAS, BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip

        z, _ = to_logits(a, INNER, OUTER)
        columns, inside = columns[None, :], inside[None, :]
        if STATS:
            # z is 0 behind the last entry anyway, but without the mask registers spill
            sum_z += tl.sum(tl.where(inside, z, 0.0), axis=1)
        is_label = columns == label
        target += tl.sum(tl.where(is_label, z, 0.0), axis=1)  # of one block alone
        beside = tl.where(inside & (is_label == 0), z, float("-inf"))
        block_top = tl.max(beside, axis=1)
        new_top = tl.maximum(top, block_top)
        rescale = tl.exp(top - new_top)
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

    place = split.to(tl.int64) * N + rows
    stride_field = splits.to(tl.int64) * N
    tl.store(part_ptr + TOP * stride_field + place, top, mask=is_row)
    tl.store(part_ptr + TARGET * stride_field + place, target, mask=is_row)
    tl.store(part_ptr + SUM * stride_field + place, total, mask=is_row)
    if STATS:
        tl.store(part_ptr + SUM_Z * stride_field + place, sum_z, mask=is_row)
        tl.store(part_ptr + SUM_EZ * stride_field + place, sum_ez, mask=is_row)
        tl.store(part_ptr + SUM_SQ * stride_field + place, sum_sq, mask=is_row)
        tl.store(argmax_ptr + place, argmax, mask=is_row)


@functools.lru_cache
def splits_of(row_blocks: int, column_blocks: int, multiprocessors: int) -> int:
    """How many parts of the vocabulary keep the multiprocessors busiest, the fewest of equal ones."""

    def rounds(splits: int) -> int:
        """Blocks of columns that the busiest multiprocessor goes through."""
        return math.ceil(row_blocks * splits / multiprocessors) * math.ceil(column_blocks / splits)

    return min(range(1, min(column_blocks, 4 * multiprocessors) + 1), key=rounds)


def _machine(device: torch.device) -> tuple[bool, int]:
    """Whether it is a Hopper GPU, and its number of multiprocessors."""
    if device.type == "cpu":  # Triton's interpreter
        return False, 4
    properties = torch.cuda.get_device_properties(device)
    return properties.major == 9 and not torch.version.hip, properties.multi_processor_count


def can_take(x: Tensor, weight: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether x [N, H] and weight [V, H] can be copied to shared memory as they are, 16 bytes at a time: Triton
    compiles such copies for multiples of 16 elements and addresses of 16 bytes. Offsets within a block fit int32."""
    return compute_dtype in (torch.bfloat16, torch.float16) and all(
        t.dtype == compute_dtype
        and t.stride(1) == 1
        and t.shape[1] % 16 == 0
        and t.stride(0) % 16 == 0
        and t.stride(0) < 2**31 // MAX_ROWS
        and t.data_ptr() % 16 == 0
        for t in (x, weight)
    )


def linear_fold_(fold: Fold, x: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> None:
    """Takes x.W^T [N, V] into `fold`, which holds nothing yet, for x and weight that `can_take` says yes to and a bias
    of their dtype."""
    (n, h), v = x.shape, weight.shape[0]
    stats = bool(fold.names)
    hopper, multiprocessors = _machine(x.device)
    columns = block_v(stats, transform.softcap is not None, hopper)
    row_blocks, column_blocks = triton.cdiv(n, BLOCK_N), triton.cdiv(v, columns)
    split_blocks = triton.cdiv(column_blocks, splits_of(row_blocks, column_blocks, multiprocessors))
    splits = triton.cdiv(column_blocks, split_blocks)
    part = x.new_empty(STATS_FIELDS if stats else FIELDS, splits, n, dtype=torch.float32)
    argmax = fold.y.new_empty(splits if stats else 0, n)
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        linear_fold_fwd_kernel[(row_blocks, splits)](
            x, weight, bias, fold.y, part, argmax, x.stride(0), weight.stride(0), n, v, h, split_blocks,
            **transform_constants(transform), HAS_BIAS=bias is not None, STATS=stats,
            BLOCK_N=BLOCK_N, BLOCK_V=columns, BLOCK_H=BLOCK_H, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    _join_splits(fold, part.double(), argmax)


def _join_splits(fold: Fold, part: Tensor, argmax: Tensor) -> None:
    top = part[0]
    torch.amax(top, 0, out=fold.max)
    torch.sum(part[1], 0, out=fold.target)  # 0 in all splits but the label's
    factor = torch.exp(top - fold.max)
    torch.sum(part[2] * factor, 0, out=fold.sum)
    if fold.names:
        torch.sum(part[3], 0, out=fold.sum_z)
        torch.sum((part[4] + part[2] * (top - fold.max)) * factor, 0, out=fold.sum_ez)
        torch.sum(part[5] * factor.square(), 0, out=fold.sum_sq)
        # of equal ones the first
        torch.amin(torch.where(top == fold.max, argmax, torch.iinfo(torch.int64).max), 0, out=fold.argmax)
