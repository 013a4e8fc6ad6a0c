"""Path A in one Triton kernel: a matrix product whose epilogue folds each tile of logits, which is never stored.

Dimensions: N labelled rows, H hidden size, V vocabulary size. The vocabulary is split so that few rows, too, give every
multiprocessor work; a split leaves its own maximum and sums for each row, and a second kernel puts these together,
always in the same order, and finishes the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.impl.fold import Fold
from dpo_kernels.impl.interface import LogitTransform
from dpo_kernels.impl.triton_math import huge, log1p, shift_by, stats_constants, to_logits, transform_constants
from dpo_kernels.impl.waves import PLANNED
from dpo_kernels.impl.waves import splits_of as splits_of

BLOCK_N, BLOCK_H = 128, 64
MAX_ROWS = 256  # of x or W in a block
NUM_WARPS, NUM_STAGES = 8, 3


def block_v(stats: bool, softcap: bool, hopper: bool) -> int:
    """What registers hold beside the sums of statistics and a softcap; only Hopper's tensor cores leave many free."""
    return max(64, (256 if hopper else 128) // (2 if stats else 1) // (2 if softcap else 1))


JOIN_ROWS, JOIN_SPLITS = 32, 32
# As fp32 has it, so that what it does to logits in fp32 is undone in fp64.
LOG2_E = tl.constexpr(torch.tensor(math.log2(math.e), dtype=torch.float32).item())
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
# What a split leaves of a row: the maximum of the entries beside the label, the label's x.W + b, sums, and the maximum
# of the entries before the label.
TOP, LABEL, SUM, SUM_Z, SUM_EZ, SUM_SQ, TOP_BEFORE = (tl.constexpr(field) for field in range(7))
FIELDS, STATS_FIELDS = 3, 7


@triton.jit
def columns_of_split(V, BLOCK_V: tl.constexpr):
    """Where this program's columns begin and end. Splits differ by one block at most, the longer ones come first."""
    split, splits, blocks = tl.program_id(1), tl.num_programs(1), tl.cdiv(V, BLOCK_V)
    begin = split * (blocks // splits) + tl.minimum(split, blocks % splits)
    end = begin + blocks // splits + (split < blocks % splits).to(tl.int32)
    return begin * BLOCK_V, tl.minimum(end * BLOCK_V, V)


@triton.jit
def products(
    x_block_ptr, w_block_ptr, bias_ptr, stride_xn, stride_wv, is_row, columns, inside, H,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """x.W + b of a block of rows and one of columns. `x_block_ptr`: to the first row, or [BLOCK_N, 1] to each of them
    beside a stride of 0."""
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
        inside = columns < V
        w_block_ptr = w_ptr + tl.cast(start, tl.int64) * stride_wv
        a = products(
            x_block_ptr, w_block_ptr, bias_ptr, stride_xn, stride_wv, is_row, columns, inside, H,
            HAS_BIAS, BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip

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
    if STATS:
        tl.store(part_ptr + SUM_Z * stride_field + place, sum_z, mask=is_row)
        tl.store(part_ptr + SUM_EZ * stride_field + place, sum_ez, mask=is_row)
        tl.store(part_ptr + SUM_SQ * stride_field + place, sum_sq, mask=is_row)
        tl.store(part_ptr + TOP_BEFORE * stride_field + place, top_before, mask=is_row)


@triton.jit(
    do_not_specialize=["N", "V", "splits", "stride_stats"],
    do_not_specialize_on_alignment=["part_ptr", "place_ptr", "logp_ptr", "norm_ptr", "stats_ptr", "broken_ptr"],
)
def linear_join_kernel(
    part_ptr, place_ptr, logp_ptr, norm_ptr, stats_ptr, broken_ptr, N, V, splits, stride_stats,
    INNER: tl.constexpr, OUTER: tl.constexpr, STATS: tl.constexpr,
    ENTROPY: tl.constexpr, IS_TOP1: tl.constexpr, MEAN_LOGIT: tl.constexpr, SUM_SQ_PROBS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """What the splits have of each row, put together as `Fold.finish` does, in fp64. To logp and stats a
    row goes at its place, or without places one after the other. `broken` becomes 1 where the label's own x.W + b is
    not finite, as it never is of hidden states that are not."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = n < N
    stride_field = splits.to(tl.int64) * N
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    at_label = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)[:, None]
        inside = (split < splits) & is_row[None, :]
        at = part_ptr + split.to(tl.int64) * N + n[None, :]
        top = tl.maximum(top, tl.max(tl.load(at + TOP * stride_field, mask=inside, other=LOWEST), axis=0))
        at_label += tl.sum(tl.load(at + LABEL * stride_field, mask=inside, other=0.0), axis=0)  # 0 in all but one
    shift = _shift(top).to(tl.float64)
    total = tl.zeros([BLOCK_N], tl.float64)
    if STATS:
        top_before = tl.full([BLOCK_N], LOWEST, tl.float32)
        sum_z = tl.zeros([BLOCK_N], tl.float64)
        sum_ez = tl.zeros([BLOCK_N], tl.float64)
        sum_sq = tl.zeros([BLOCK_N], tl.float64)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)[:, None]
        inside = (split < splits) & is_row[None, :]
        at = part_ptr + split.to(tl.int64) * N + n[None, :]
        own = _shift(tl.load(at + TOP * stride_field, mask=inside, other=LOWEST)).to(tl.float64)
        factor = tl.exp2(own - shift[None, :])
        mass = tl.load(at + SUM * stride_field, mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(mass * factor, axis=0)
        if STATS:
            z_before = tl.load(at + TOP_BEFORE * stride_field, mask=inside, other=LOWEST)
            top_before = tl.maximum(top_before, tl.max(z_before, axis=0))
            sum_z += tl.sum(tl.load(at + SUM_Z * stride_field, mask=inside, other=0.0).to(tl.float64), axis=0)
            ez = tl.load(at + SUM_EZ * stride_field, mask=inside, other=0.0).to(tl.float64)
            sum_ez += tl.sum((ez + mass * (own - shift[None, :])) * factor, axis=0)
            sq = tl.load(at + SUM_SQ * stride_field, mask=inside, other=0.0).to(tl.float64)
            sum_sq += tl.sum(sq * factor * factor, axis=0)

    # from here on in nats
    shift = shift / LOG2_E
    target_z, _ = to_logits(at_label, INNER, OUTER)
    target = target_z.to(tl.float64)
    lead = target - shift
    logp = tl.where(
        lead > 0, -log1p(total * tl.exp(-tl.maximum(lead, 0.0))), lead - tl.log(total + tl.exp(tl.minimum(lead, 0.0)))
    )
    if broken_ptr is not None:  # all that write write the same
        tl.store(broken_ptr + n * 0, 1, mask=is_row & ((at_label - at_label) != 0.0))
    place = n if place_ptr is None else tl.load(place_ptr + n, mask=is_row, other=0)
    tl.store(logp_ptr + place, logp.to(tl.float32), mask=is_row)
    if norm_ptr is not None or STATS:
        largest = tl.maximum(shift, target)
        near = total * tl.exp(shift - largest) + tl.exp(target - largest)
    if norm_ptr is not None:
        tl.store(norm_ptr + n, largest.to(tl.float32), mask=is_row)
        tl.store(norm_ptr + N + n, near.to(tl.float32), mask=is_row)
    if STATS:
        at = stats_ptr + place
        stride_stats = tl.cast(stride_stats, tl.int64)
        others, log_prob_of_shift = tl.exp(shift - largest) / near, (shift - largest) - tl.log(near)
        if ENTROPY is not None:  # -sum p log p: the label's term, and the others' with z = shift + (z - shift)
            own_term = tl.where(logp == float("-inf"), 0.0, -tl.exp(logp) * logp)
            value = own_term - others * (sum_ez / LOG2_E + total * log_prob_of_shift)
            tl.store(at + ENTROPY * stride_stats, value.to(tl.float32), mask=is_row)
        if IS_TOP1 is not None:  # the first of equal entries is
            is_top = (target_z > top) | ((target_z == top) & (target_z > top_before))
            tl.store(at + IS_TOP1 * stride_stats, is_top.to(tl.float32), mask=is_row)
        if MEAN_LOGIT is not None:
            tl.store(at + MEAN_LOGIT * stride_stats, (sum_z / V).to(tl.float32), mask=is_row)
        if SUM_SQ_PROBS is not None:
            a, b = tl.log(sum_sq) + 2 * log_prob_of_shift, 2 * logp
            high = tl.maximum(a, b)
            value = high + tl.log(tl.exp(a - high) + tl.exp(b - high))
            tl.store(at + SUM_SQ_PROBS * stride_stats, value.to(tl.float32), mask=is_row)


def _machine(device: torch.device) -> tuple[bool, int]:
    """Whether it is a Hopper GPU, and its number of multiprocessors. A plan without its GPU is one for an H200."""
    if device.type == "cpu":  # Triton's interpreter
        return False, 4
    if not torch.cuda.is_available():
        return True, PLANNED
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
        and not t.is_neg()
        for t in (x, weight)
    )


class LinearFold(Fold):
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


def join_splits(
    part: Tensor,
    logp: Tensor,
    stats: Tensor,
    v: int,
    transform: LogitTransform,
    names: Sequence[str],
    *,
    places: Tensor | None = None,
    norm: Tensor | None = None,
    broken: Tensor | None = None,
) -> None:
    """Finishes the rows of `part` [fields, splits, N]: what is known of each goes to `logp` [...] and, if it is among
    the `names`, to `stats` [K, ...], row after row or to the rows' places [N] there. `norm` [2, N]: see `LinearLogps`.
    `broken` []: see `TokenLogps`."""
    _, splits, n = part.shape
    with torch.cuda.device_of(part):
        linear_join_kernel[(triton.cdiv(n, JOIN_ROWS),)](
            part, places, logp, norm, stats, broken, n, v, splits, logp.numel(), **transform_constants(transform),
            STATS=bool(names), **stats_constants(names),
            BLOCK_N=JOIN_ROWS, BLOCK_SPLITS=JOIN_SPLITS, num_warps=8,
        )  # fmt: skip
