"""Path A in one Triton kernel: a matrix product whose epilogue folds each tile of logits, which is never stored.

Dimensions: N labelled rows, H hidden size, V vocabulary size. The vocabulary is split so that few rows, too, give every
multiprocessor work; a split leaves its own maximum and sums for each row, and `triton_join` puts these together, always
in the same order, and finishes the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.impl.fold import LazyFold
from dpo_kernels.impl.interface import LogitTransform
from dpo_kernels.impl.triton_join import (
    FIELDS,
    LABEL,
    LOG2_E,
    LOWEST,
    SHIFT,
    STATS_FIELDS,
    SUM,
    SUM_EZ,
    SUM_SQ,
    SUM_Z,
    TOP,
    TOP_BEFORE,
)
from dpo_kernels.impl.triton_join import join_splits as join_splits
from dpo_kernels.impl.triton_math import huge, shift_by, to_logits, transform_constants
from dpo_kernels.impl.waves import PLANNED
from dpo_kernels.impl.waves import splits_of as splits_of

BLOCK_N, BLOCK_H = 128, 64
MAX_ROWS = 256  # of x or W in a block
NUM_WARPS, NUM_STAGES = 8, 3


def block_v(stats: bool, softcap: bool, hopper: bool) -> int:
    """What registers hold beside the sums of statistics and a softcap; only Hopper's tensor cores leave many free."""
    return max(64, (256 if hopper else 128) // (2 if stats else 1) // (2 if softcap else 1))


@triton.jit
def columns_of_split(V, BLOCK_V: tl.constexpr):
    """Where this program's columns begin and end. Splits differ by one block at most, the longer ones come first."""
    split, splits, blocks = tl.program_id(1), tl.num_programs(1), tl.cdiv(V, BLOCK_V)
    begin = split * (blocks // splits) + tl.minimum(split, blocks % splits)
    end = begin + blocks // splits + (split < blocks % splits).to(tl.int32)
    return begin * BLOCK_V, tl.minimum(end * BLOCK_V, V)


@triton.jit
def afresh(value, start):
    """The value, for blocks that begin at `start`, which is never negative. Compilers do not know that: what they would
    compute of it before all blocks, and hold in registers beside each one's products, they compute in each block."""
    return tl.where(start < 0, 0, value)


@triton.jit
def products(
    x_block_ptr, w_block_ptr, stride_xn, stride_wv, is_row, inside, start, H,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """x.W of a block of rows and one of columns. `x_block_ptr`: to the first row, or [BLOCK_N, 1] to each of them
    beside a stride of 0."""
    n, v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)  # within a block, where int32 holds every offset
    H, stride_xn, stride_wv = afresh(H, start), afresh(stride_xn, start), afresh(stride_wv, start)
    a = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        x_place = n[:, None] * stride_xn + h[None, :]
        w_place = v[None, :] * stride_wv + h[:, None]
        x = tl.load(x_block_ptr + x_place, mask=is_row[:, None] & (h < H)[None, :], other=0.0)
        w = tl.load(w_block_ptr + w_place, mask=inside[None, :] & (h < H)[:, None], other=0.0)
        a = tl.dot(x, w, a)
    return a


@triton.jit
def add_bias(a, bias_ptr, columns, V, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        a += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    return a


@triton.jit
def pieces_of(a, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, PIECES: tl.constexpr):
    """Of the columns, in their order."""
    if PIECES == 1:
        pieces = (a,)
    else:
        halves = tl.split(tl.permute(tl.reshape(a, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1)))
        first = pieces_of(halves[0], BLOCK_N, BLOCK_V // 2, PIECES // 2)
        pieces = first + pieces_of(halves[1], BLOCK_N, BLOCK_V // 2, PIECES // 2)
    return pieces


@triton.jit
def _shift(top):
    """Of a row's maximum, see `shift_by`; of entries that are masked alone, far above them: they become 0."""
    shift, _ = shift_by(tl.maximum(top, -huge(tl.float32)), LOG2_E)
    return shift


# Rows of x lie in slots of hidden states [R, T, H], or without slots as [N, H].
@triton.jit(
    do_not_specialize=["N", "T"], do_not_specialize_on_alignment=["y_ptr", "slot_ptr"]
)  # fmt: skip
def linear_fold_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, part_ptr, slot_ptr, stride_xn, stride_wv, N, V, H,
    INNER: tl.constexpr, OUTER: tl.constexpr, HAS_BIAS: tl.constexpr, STATS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, stride_xr=0, T=1,
):  # fmt: skip
    # Neighbouring programs have the same columns of the vocabulary: W is read from memory about once.
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split, splits = tl.program_id(1), tl.num_programs(1)
    is_row = rows < N
    if slot_ptr is None:
        x_block_ptr = x_ptr + tl.program_id(0).to(tl.int64) * BLOCK_N * stride_xn
    else:
        slot = tl.load(slot_ptr + rows, mask=is_row, other=0)
        x_block_ptr = x_ptr + (slot // T * stride_xr + slot % T * stride_xn)[:, None]
        stride_xn = 0
    label = tl.load(y_ptr + rows, mask=is_row, other=-1).to(tl.int32)
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    at_label = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    if STATS:
        top_before = tl.full([BLOCK_N], LOWEST, tl.float32)
        sum_z = tl.zeros([BLOCK_N], tl.float32)
        sum_ez = tl.zeros([BLOCK_N], tl.float32)
        sum_sq = tl.zeros([BLOCK_N], tl.float32)

    begin, end = columns_of_split(V, BLOCK_V)
    for start in range(begin, end, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        w_block_ptr = w_ptr + tl.cast(start, tl.int64) * stride_wv
        a = products(
            x_block_ptr, w_block_ptr, stride_xn, stride_wv, is_row, columns < V, start, H, BLOCK_N, BLOCK_V, BLOCK_H
        )
        a = add_bias(a, bias_ptr, columns, V, HAS_BIAS)

        v, own = tl.arange(0, BLOCK_V)[None, :], (label - start)[:, None]
        # Masks are two thirds of the instructions, and most blocks are inside and without a row's label.
        has_label = tl.max(((own >= 0) & (own < BLOCK_V)).to(tl.int32)) > 0
        if has_label:
            at_label += tl.sum(tl.where(v == own, a, 0.0), axis=1)  # of one block alone
        z, _ = to_logits(a, INNER, OUTER)
        if STATS:
            sum_z += tl.sum(z, axis=1)  # 0 behind the last entry
        if start + BLOCK_V > V:
            z = tl.where(v < V - start, z, float("-inf"))
        if has_label:
            if STATS:
                before = tl.where(v < own, z, float("-inf"))
                top_before = tl.maximum(top_before, tl.max(before, axis=1))
            z = tl.where(v == own, float("-inf"), z)
        block_top = tl.max(z, axis=1)
        new_top = tl.maximum(top, block_top)
        shift, new_shift = _shift(top), _shift(new_top)
        rescale = tl.exp2(shift - new_shift)
        power = tl.fma(z, LOG2_E, -new_shift[:, None])
        e = tl.exp2(power)
        if STATS:
            top_before = tl.where(start + BLOCK_V <= label, tl.maximum(top_before, block_top), top_before)
            # exp2 has reached 0 long before -1e4, and 0 times -inf, or the first maximum's distance, is to be 0
            sum_ez = (sum_ez + total * tl.maximum(shift - new_shift, -1e4)) * rescale
            sum_ez += tl.sum(e * tl.maximum(power, -1e4), axis=1)
            sum_sq = sum_sq * rescale * rescale + tl.sum(e * e, axis=1)
        total = total * rescale + tl.sum(e, axis=1)
        top = new_top

    place = split.to(tl.int64) * N + rows
    stride_field = splits.to(tl.int64) * N
    tl.store(part_ptr + TOP * stride_field + place, top, mask=is_row)
    tl.store(part_ptr + LABEL * stride_field + place, at_label, mask=is_row)
    tl.store(part_ptr + SUM * stride_field + place, total, mask=is_row)
    tl.store(part_ptr + SHIFT * stride_field + place, _shift(top), mask=is_row)
    if STATS:
        tl.store(part_ptr + SUM_Z * stride_field + place, sum_z, mask=is_row)
        tl.store(part_ptr + SUM_EZ * stride_field + place, sum_ez, mask=is_row)
        tl.store(part_ptr + SUM_SQ * stride_field + place, sum_sq, mask=is_row)
        tl.store(part_ptr + TOP_BEFORE * stride_field + place, top_before, mask=is_row)


def _machine(device: torch.device) -> tuple[bool, int]:
    """Whether it is a Hopper GPU, and its number of multiprocessors. A plan without its GPU is one for an H200."""
    if device.type == "cpu":  # Triton's interpreter
        return False, 4
    if not torch.cuda.is_available():
        return True, PLANNED
    properties = torch.cuda.get_device_properties(device)
    return properties.major == 9 and not torch.version.hip, properties.multi_processor_count


def is_ampere(device: torch.device) -> bool:
    """Or Ada, with the same tensor cores."""
    on_gpu = device.type == "cuda" and torch.cuda.is_available() and not torch.version.hip
    return on_gpu and torch.cuda.get_device_capability(device)[0] == 8


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
        and not t.is_neg()
        for t in (x, weight)
    )


class LinearFold(LazyFold):
    """A fold that `linear_fold_` finishes at once."""

    finished: tuple[Tensor, Tensor, Tensor] | None = None

    def finish(self, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return super().finish(vocab_size, dtype) if self.finished is None else self.finished


def linear_fold_(fold: LinearFold, x: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> None:
    """Takes x.W^T [N, V] into `fold`, which holds nothing yet, for x and weight that `can_take` says yes to and a bias
    of their dtype."""
    n = x.shape[0]
    part = fold_splits(x, None, fold.y, weight, bias, transform, bool(fold.names))
    logp, norm, stats = (part.new_empty(*shape, n) for shape in ((), (2,), (len(fold.names),)))
    join_splits(part, logp, stats, weight.shape[0], transform, fold.names, norm=norm)
    fold.finished = logp, norm, stats


def fold_splits(
    x: Tensor,
    slots: Tensor | None,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    stats: bool,
) -> Tensor:
    """[fields, splits, N] what each part of the vocabulary leaves of rows x [N, H] with labels y [N]; or of those in
    `slots` [N] of hidden states x [R, T, H], in their flat [R T]."""
    (n,), v, h = y.shape, *weight.shape
    hopper, multiprocessors = _machine(x.device)
    columns = block_v(stats, transform.softcap is not None, hopper)
    row_blocks, column_blocks = triton.cdiv(n, BLOCK_N), triton.cdiv(v, columns)
    splits = splits_of(row_blocks, column_blocks, multiprocessors)
    part = x.new_empty(STATS_FIELDS if stats else FIELDS, splits, n, dtype=torch.float32)
    bias = None if bias is None else bias.resolve_neg().contiguous()
    of_slots = {} if slots is None else {"stride_xr": x.stride(0), "T": x.shape[1]}
    with torch.cuda.device_of(x):
        linear_fold_fwd_kernel[(row_blocks, splits)](
            x, weight, bias, y, part, slots, x.stride(-2), weight.stride(0), n, v, h,
            **transform_constants(transform), HAS_BIAS=bias is not None, STATS=stats,
            BLOCK_N=BLOCK_N, BLOCK_V=columns, BLOCK_H=BLOCK_H, **of_slots,
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    return part
