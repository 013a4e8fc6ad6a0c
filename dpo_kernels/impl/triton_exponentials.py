"""What paths B and C of heads in bf16 are made of on Triton: exponentials that the product's epilogue writes, and the
kernels between the products of these.

Dimensions: N labelled rows, n of them in a block; H hidden size, V vocabulary size, v entries of a part of it; K
statistics. Exponentials lie as [v, n]: the entries of a row of memory are rows of x.

An exponential has 16 bits. As an operand, in path B, it is a number in bf16. Packed, in path C, where it becomes an
entry of dlogits and is rounded then, it has no sign, 6 bits of exponent and 10 of mantissa: an eighth of bf16's error,
between 2^-32 (below is 0) and 2^32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.impl import triton_linear
from dpo_kernels.impl.interface import LogitTransform
from dpo_kernels.impl.triton_linear import LOWEST, NUM_STAGES, NUM_WARPS, products
from dpo_kernels.impl.triton_math import exp, log1p, stats_constants, to_logits, transform_constants

# No logit is more than this above its row's shift, so that exponentials, their sums and what these are divided by stay
# within what bf16 and fp32 hold, or 2^32. Rows of which one is are gone over again.
FAR, PACKED_FAR = 60.0, 20.0
# A shift is the largest of so many logits, the first ones.
FIRST_COLUMNS = 512
# Of a packed exponential: the bits of a number in fp32 that it lacks, half of its last one, and 2^-32 in what is left.
LOST_BITS: tl.constexpr = tl.constexpr(13)
HALF_BIT: tl.constexpr = tl.constexpr(1 << 12)
LEAST: tl.constexpr = tl.constexpr((127 - 32) << 10)
# A square of an exponential stays far within fp32 as one of its part 2^-40.
SQUARED: tl.constexpr = tl.constexpr(2.0**-40)
# A block of path B's exponentials takes this at most.
EXP_BYTES = 2**29
# Of the product of exponentials with W.
PRODUCT_TILE = (128, 256)
JOIN_ROWS, BLOCK_ROWS, MAX_BLOCK_H = 32, 4, 1024
DLOGITS_BLOCK_V, DLOGITS_BLOCK_N = 8, 512
# What a split leaves of a row: maxima of the entries beside the label, and of those before it; sums.
TOP, TOP_BEFORE, TARGET, LABEL_SLOPE, SUM, SUM_Z, SUM_EZ, SUM_SQ = (tl.constexpr(field) for field in range(8))
FIELDS = 8


@triton.jit
def _pack(e):
    """0 for what is below the least."""
    code = ((e.to(tl.int32, bitcast=True) + HALF_BIT) >> LOST_BITS) - LEAST
    return tl.maximum(code, 0).to(tl.int16)


@triton.jit
def _unpack(code):
    code = code.to(tl.int32) & 0xFFFF
    e = ((code + LEAST) << LOST_BITS).to(tl.float32, bitcast=True)
    return tl.where(code == 0, 0.0, e)


@triton.jit
def _halves(a, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Of the columns."""
    return tl.split(tl.permute(tl.reshape(a, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1)))


# Each split has its own columns; `first` is where those of W begin in the vocabulary, and `first_split` the number of
# its first split, where others have earlier columns.
@triton.jit(
    do_not_specialize=["N", "split_blocks", "first", "first_split", "splits", "stride_split", "stride_field"],
    do_not_specialize_on_alignment=["y_ptr", "shift_ptr", "part_ptr"],
)
def linear_exp_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, shift_ptr, part_ptr, e_ptr,
    stride_xn, stride_wv, stride_ev, stride_split, stride_field, N, V, H, split_blocks, first, first_split, splits,
    stored, INNER: tl.constexpr, OUTER: tl.constexpr, HAS_BIAS: tl.constexpr, STATS: tl.constexpr, AGAIN: tl.constexpr,
    PACKED: tl.constexpr, FAR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """exp(z - shift) times the softcap's part of dz/da, 0 at the label, is written to e [V, N], of the first `stored`
    rows. AGAIN: of blocks with a row whose largest logit is far above its shift, with this largest logit in its place;
    most programs find none among theirs, and are done."""
    n = tl.arange(0, BLOCK_N)
    rows = tl.program_id(0) * BLOCK_N + n
    split = tl.program_id(1)
    is_row = rows < N
    x_block_ptr = x_ptr + tl.program_id(0).to(tl.int64) * BLOCK_N * stride_xn
    label = (tl.load(y_ptr + rows, mask=is_row, other=-1) - first).to(tl.int32)[:, None]
    shift = tl.load(shift_ptr + rows, mask=is_row, other=float("inf"))  # exponentials behind the last row are 0
    is_written = rows < stored
    begin = split * split_blocks * BLOCK_V
    end = tl.minimum(begin + split_blocks * BLOCK_V, V)
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
        first_half, second_half = _halves(a, BLOCK_N, BLOCK_V)
        quarters = _halves(first_half, BLOCK_N, BLOCK_V // 2) + _halves(second_half, BLOCK_N, BLOCK_V // 2)
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
            shifted = beside - shift[:, None]
            e = exp(shifted)
            total += tl.sum(e, axis=1)
            if STATS:
                # exp has reached 0 long before -1e4, and 0 times -inf is to be 0
                sum_ez += tl.sum(e * tl.maximum(shifted, -1e4), axis=1)
                part = e * SQUARED
                sum_sq += tl.sum(part * part, axis=1)
            if INNER is not None:
                e = e * slope
            e_block_ptr = e_ptr + tl.cast(start + quarter * (BLOCK_V // 4), tl.int64) * stride_ev
            e_place = rows[:, None] + tl.arange(0, BLOCK_V // 4)[None, :] * stride_ev
            written = _pack(e) if PACKED else e.to(e_ptr.dtype.element_ty)
            tl.store(e_block_ptr + e_place, written, mask=is_written[:, None] & inside)

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
    tl.store(at + SUM * stride_field, total, mask=is_row)
    if STATS:
        tl.store(at + SUM_EZ * stride_field, sum_ez, mask=is_row)
        tl.store(at + SUM_SQ * stride_field, sum_sq, mask=is_row)


@triton.jit(
    do_not_specialize=["N", "V", "splits", "stride_split", "stride_field", "stride_out"],
    do_not_specialize_on_alignment=[
        "part_ptr", "shift_ptr", "logp_ptr", "norm_ptr", "stats_ptr", "scale_ptr", "label_ptr"
    ],
)  # fmt: skip
def exp_join_kernel(
    part_ptr, shift_ptr, logp_ptr, norm_ptr, stats_ptr, scale_ptr, label_ptr,
    stride_split, stride_field, stride_out, N, V, splits,
    SLOPE: tl.constexpr, HAS_SLOPE: tl.constexpr, FAR: tl.constexpr, STATS: tl.constexpr,
    ENTROPY: tl.constexpr, IS_TOP1: tl.constexpr, MEAN_LOGIT: tl.constexpr, SUM_SQ_PROBS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the splits have of each row, put together as `Fold.finish` does; and what its exponentials are multiplied by
    to be d logp / da: `scale`. So multiplied, `label` is the label's entry: minus the sum of the others, with its own
    part of dz/da."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = n < N
    stride_split = tl.cast(stride_split, tl.int64)
    stride_field = tl.cast(stride_field, tl.int64)
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    top_before = tl.full([BLOCK_N], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float64)
    target = tl.zeros([BLOCK_N], tl.float64)
    slope = tl.zeros([BLOCK_N], tl.float64)
    sum_z = tl.zeros([BLOCK_N], tl.float64)
    sum_ez = tl.zeros([BLOCK_N], tl.float64)
    sum_sq = tl.zeros([BLOCK_N], tl.float64)
    for split in range(0, splits):
        at = part_ptr + split * stride_split + n
        top = tl.maximum(top, tl.load(at + TOP * stride_field, mask=is_row, other=LOWEST))
        target += tl.load(at + TARGET * stride_field, mask=is_row, other=0.0).to(tl.float64)  # 0 in all but one
        total += tl.load(at + SUM * stride_field, mask=is_row, other=0.0).to(tl.float64)
        if HAS_SLOPE:
            slope += tl.load(at + LABEL_SLOPE * stride_field, mask=is_row, other=0.0).to(tl.float64)
        if STATS:
            top_before = tl.maximum(top_before, tl.load(at + TOP_BEFORE * stride_field, mask=is_row, other=LOWEST))
            sum_z += tl.load(at + SUM_Z * stride_field, mask=is_row, other=0.0).to(tl.float64)
            sum_ez += tl.load(at + SUM_EZ * stride_field, mask=is_row, other=0.0).to(tl.float64)
            sum_sq += tl.load(at + SUM_SQ * stride_field, mask=is_row, other=0.0).to(tl.float64)
    if not HAS_SLOPE:
        slope += 1.0

    shift = tl.load(shift_ptr + n, mask=is_row, other=0.0)
    shift = tl.where(top > shift + FAR, top, shift).to(tl.float64)
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
    tl.store(label_ptr + n, (-total * slope).to(tl.float32), mask=is_row)

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
    do_not_specialize=["V", "first"],
    do_not_specialize_on_alignment=["y_ptr", "g_ptr", "scale_ptr", "label_ptr", "missing_ptr"],
)
def exp_dlogits_kernel(
    e_ptr, d_ptr, y_ptr, g_ptr, scale_ptr, label_ptr, missing_ptr, stride_ev, N, V, first, stored,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Packed exponentials [V, N] become dlogits, in their place, the label's entry with them; `missing` is what its
    rounding leaves."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_row = n < N
    label = (tl.load(y_ptr + n, mask=is_row, other=-1) - first).to(tl.int32)
    weight = tl.load(g_ptr + n, mask=is_row, other=0.0) * tl.load(scale_ptr + n, mask=is_row, other=0.0)
    own = weight * tl.load(label_ptr + n, mask=is_row, other=0.0)
    place = v.to(tl.int64)[:, None] * stride_ev + n[None, :]
    inside = (v < V)[:, None] & (n < stored)[None, :]
    is_label = (v[:, None] == label[None, :]) & (v < V)[:, None]
    d = _unpack(tl.load(e_ptr + place, mask=inside, other=0)) * weight[None, :]
    d = tl.where(is_label, own[None, :], d)
    tl.store(d_ptr + place, d.to(d_ptr.dtype.element_ty), mask=inside)
    has_label = tl.max(is_label.to(tl.int32), axis=0) > 0
    missing = own - own.to(d_ptr.dtype.element_ty).to(tl.float32)
    tl.store(missing_ptr + n, missing, mask=is_row & has_label)


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


class _Part(NamedTuple):
    """Entries of the vocabulary whose exponentials lie in one tensor."""

    first: int
    weight: Tensor  # [v, H]
    bias: Tensor | None  # [v]
    split_blocks: int
    first_split: int
    splits: int


def padded_rows(rows: int) -> int:
    """The distance of entries in memory: so that each begins where wide loads and stores like it."""
    return triton.cdiv(rows, 16) * 16


def takes_exponentials(x_dtype: torch.dtype, weight: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether exponentials are in range as numbers of this dtype, and rows x of it and weight [V, H] can be read."""
    bf16 = x_dtype == weight.dtype == compute_dtype == torch.bfloat16
    known = weight.device.type in ("cuda", "cpu", "meta")  # a plan has no memory
    return bf16 and known and weight.shape[0] > 0 and triton_linear.can_take(weight, weight, compute_dtype)


def exponential_rows(n: int, v: int, h: int, device: torch.device) -> int:
    """How many rows of exponentials path B has at a time: as many as give the product with W [V, H] a tile for each
    multiprocessor, if they fit; all blocks are alike, but for the last."""
    _, multiprocessors = triton_linear._machine(device)
    tile_n, tile_h = PRODUCT_TILE
    rows = tile_n * max(1, multiprocessors // triton.cdiv(h, tile_h))
    fit = EXP_BYTES // (2 * v)
    rows = max(16, min(rows, fit - fit % 16))
    share = triton.cdiv(n, triton.cdiv(n, rows))
    return min(rows, triton.cdiv(share, tile_n) * tile_n)


class Exponentials:
    """See `interface.Exponentials`."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, transform: LogitTransform,
        stats: Sequence[str], rows: int, sizes: Sequence[int], packed: bool,
    ):  # fmt: skip
        self.x = x if triton_linear.can_take(x, weight, x.dtype) else x.contiguous()
        self.y, self.weight, self.transform, self.names = y.contiguous(), weight, transform, tuple(stats)
        self.packed, self.far = packed, PACKED_FAR if packed else FAR
        hopper, multiprocessors = triton_linear._machine(x.device)
        # The same with statistics and without: a reference, which has none, is summed as its policy is.
        block_v = triton_linear.block_v(False, transform.softcap is not None, hopper)
        n, v = x.shape[0], weight.shape[0]
        bias = None if bias is None else bias.to(weight.dtype).contiguous()
        self.constants = {
            **transform_constants(transform), "HAS_BIAS": bias is not None, "BLOCK_N": triton_linear.BLOCK_N,
            "BLOCK_V": block_v, "BLOCK_H": triton_linear.BLOCK_H, "num_warps": NUM_WARPS, "num_stages": NUM_STAGES,
        }  # fmt: skip
        self.parts, first, self.splits = list[_Part](), 0, 0
        for size in sizes:
            blocks = triton.cdiv(size, block_v)
            busy = triton_linear.splits_of(self._row_blocks(rows), blocks, multiprocessors)
            split_blocks = triton.cdiv(blocks, busy)
            splits = triton.cdiv(blocks, split_blocks)
            here = slice(first, first + size)
            of_bias = None if bias is None else bias[here]
            self.parts.append(_Part(first, weight[here], of_bias, split_blocks, self.splits, splits))
            first, self.splits = first + size, self.splits + splits
        assert first == v
        self.sums = x.new_empty(FIELDS, self.splits, n, dtype=torch.float32)
        self.scale, self.label, self.missing = x.new_empty(3, n, dtype=torch.float32)
        some = slice(0, min(v, FIRST_COLUMNS))
        splits = triton.cdiv(some.stop, block_v)
        found = x.new_empty(triton_linear.FIELDS, splits, n, dtype=torch.float32)
        self._run(
            triton_linear.linear_fold_fwd_kernel, (self._row_blocks(n), splits),
            self.x, weight[some], None if bias is None else bias[some], self.y, found, None,
            self.x.stride(0), weight.stride(0), n, some.stop, x.shape[1], 1, STATS=False, **self.constants,
        )  # fmt: skip
        self.shift = found[0].amax(0)

    @staticmethod
    def _row_blocks(rows: int) -> int:
        return triton.cdiv(rows, triton_linear.BLOCK_N)

    def _run(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        with torch.cuda.device_of(self.x):
            kernel[grid](*args, **constants)

    def write(self, rows: slice, out: Sequence[Tensor] | None) -> None:
        x, n = self.x[rows], rows.stop - rows.start
        stored = 0 if out is None else padded_rows(n)
        # to where nothing is written: another kernel might round otherwise
        places = [x.new_empty(1, 16)] * len(self.parts) if out is None else out
        places = [e.view(torch.int16) if self.packed else e for e in places]
        for again in (False, True):
            for part, e in zip(self.parts, places, strict=True):
                self._run(
                    linear_exp_fwd_kernel, (self._row_blocks(n), part.splits),
                    x, part.weight, part.bias, self.y[rows], self.shift[rows], self.sums[:, :, rows], e,
                    x.stride(0), part.weight.stride(0), e.stride(0), self.x.shape[0], self.sums.stride(0),
                    n, part.weight.shape[0], x.shape[1], part.split_blocks, part.first, part.first_split, self.splits,
                    stored, STATS=bool(self.names), AGAIN=again, PACKED=self.packed, FAR=self.far, **self.constants,
                )  # fmt: skip

    def finish(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        n = rows.stop - rows.start
        logp, norm = self.scale.new_empty(n), self.scale.new_empty(2, n)
        stats = self.scale.new_empty(len(self.names), n)
        self._run(
            exp_join_kernel, (triton.cdiv(n, JOIN_ROWS),),
            self.sums[:, :, rows], self.shift[rows], logp, norm, stats,
            self.scale[rows], self.label[rows], self.x.shape[0], self.sums.stride(0), n,
            n, self.weight.shape[0], self.splits,
            SLOPE=self.transform.slope, HAS_SLOPE=self.transform.softcap is not None, FAR=self.far,
            STATS=bool(self.names), BLOCK_N=JOIN_ROWS, num_warps=1,
            **stats_constants(self.names),
        )  # fmt: skip
        return logp, norm, stats

    def to_dlogits_(self, e: Sequence[Tensor], rows: slice, g: Tensor) -> None:
        assert self.packed
        n, g = rows.stop - rows.start, g.contiguous()
        for part, each in zip(self.parts, e, strict=True):
            self._run(
                exp_dlogits_kernel,
                (triton.cdiv(each.shape[0], DLOGITS_BLOCK_V), triton.cdiv(padded_rows(n), DLOGITS_BLOCK_N)),
                each.view(torch.int16), each, self.y[rows], g, self.scale[rows], self.label[rows], self.missing[rows],
                each.stride(0), n, each.shape[0], part.first, padded_rows(n),
                BLOCK_N=DLOGITS_BLOCK_N, BLOCK_V=DLOGITS_BLOCK_V, num_warps=4,
            )  # fmt: skip

    def dhidden(self, sums: Tensor, out: Tensor) -> Tensor:
        (n, h), block_h = sums.shape, min(triton.next_power_of_2(sums.shape[1]), MAX_BLOCK_H)
        assert sums.is_contiguous() and out.is_contiguous()
        scale, label = (None, self.missing) if self.packed else (self.scale, self.label)
        self._run(
            dhidden_kernel, (triton.cdiv(n, BLOCK_ROWS), triton.cdiv(h, block_h)),
            sums, self.weight, self.y, scale, label, out, self.weight.stride(0), n, h,
            BLOCK_N=BLOCK_ROWS, BLOCK_H=block_h,
        )  # fmt: skip
        return out
