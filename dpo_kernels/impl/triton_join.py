"""What the splits of a vocabulary leave of each row, and the Triton kernel that puts them together and finishes rows.

Dimensions: N rows, V vocabulary size; K statistics. Splits of all parts of the vocabulary lie one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.impl.interface import LogitTransform
from dpo_kernels.impl.triton_math import log1p, run, stats_constants, to_logits, transform_constants

JOIN_ROWS, JOIN_SPLITS = 32, 32
# As fp32 has it, so that what it does to logits in fp32 is undone in fp64.
LOG2_E = tl.constexpr(torch.tensor(math.log2(math.e), dtype=torch.float32).item())
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
# The least maximum of what is stored: a number times log2(e), too.
FLOOR = tl.constexpr(-(2.0**126))
# What a split leaves of a row: the maximum of the entries beside the label; the label's x.W + b, 0 in all splits but
# one; the sum of e = 2^(z log2(e) - shift) beside the label, and this shift. For statistics the sums of z, of
# e (z log2(e) - shift) and of (e `squared`)^2, and the maximum of the entries before the label.
TOP, LABEL, SUM, SHIFT, SUM_Z, SUM_EZ, SUM_SQ, TOP_BEFORE = (tl.constexpr(field) for field in range(8))
FIELDS, STATS_FIELDS = 4, 8


@triton.jit(
    do_not_specialize=["N", "V", "splits", "stride_split", "stride_field", "stride_stats"],
    do_not_specialize_on_alignment=[
        "part_ptr", "place_ptr", "logp_ptr", "norm_ptr", "stats_ptr", "broken_ptr", "shift_ptr", "scale_ptr",
        "label_ptr",
    ],
)  # fmt: skip
def join_kernel(
    part_ptr, place_ptr, logp_ptr, norm_ptr, stats_ptr, broken_ptr, shift_ptr, scale_ptr, label_ptr,
    stride_split, stride_field, stride_stats, N, V, splits,
    INNER: tl.constexpr, OUTER: tl.constexpr, SLOPE: tl.constexpr, SQUARED: tl.constexpr, STATS: tl.constexpr,
    ENTROPY: tl.constexpr, IS_TOP1: tl.constexpr, MEAN_LOGIT: tl.constexpr, SUM_SQ_PROBS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """As `Fold.finish` does it, in fp64. To logp and stats a row goes at its place, or without places one after the
    other. What is None is not written. `broken` becomes 1 where the label's own x.W + b is not finite, as it never is
    of hidden states that are not. See `Stored` for `shift`, `scale` and `label`."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = n < N
    stride_split, stride_field = tl.cast(stride_split, tl.int64), tl.cast(stride_field, tl.int64)
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    shift = tl.full([BLOCK_N], LOWEST, tl.float32)
    at_label = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)[:, None]
        inside = (split < splits) & is_row[None, :]
        at = part_ptr + split * stride_split + n[None, :]
        top = tl.maximum(top, tl.max(tl.load(at + TOP * stride_field, mask=inside, other=LOWEST), axis=0))
        shift = tl.maximum(shift, tl.max(tl.load(at + SHIFT * stride_field, mask=inside, other=LOWEST), axis=0))
        at_label += tl.sum(tl.load(at + LABEL * stride_field, mask=inside, other=0.0), axis=0)
    if shift_ptr is not None:
        tl.store(shift_ptr + n, shift, mask=is_row)
    shift = shift.to(tl.float64)
    total = tl.zeros([BLOCK_N], tl.float64)
    if STATS:
        top_before = tl.full([BLOCK_N], LOWEST, tl.float32)
        sum_z = tl.zeros([BLOCK_N], tl.float64)
        sum_ez = tl.zeros([BLOCK_N], tl.float64)
        sum_sq = tl.zeros([BLOCK_N], tl.float64)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)[:, None]
        inside = (split < splits) & is_row[None, :]
        at = part_ptr + split * stride_split + n[None, :]
        change = tl.load(at + SHIFT * stride_field, mask=inside, other=LOWEST).to(tl.float64) - shift[None, :]
        factor = tl.exp2(change)
        mass = tl.load(at + SUM * stride_field, mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(mass * factor, axis=0)
        if STATS:
            z_before = tl.load(at + TOP_BEFORE * stride_field, mask=inside, other=LOWEST)
            top_before = tl.maximum(top_before, tl.max(z_before, axis=0))
            sum_z += tl.sum(tl.load(at + SUM_Z * stride_field, mask=inside, other=0.0).to(tl.float64), axis=0)
            ez = tl.load(at + SUM_EZ * stride_field, mask=inside, other=0.0).to(tl.float64)
            sum_ez += tl.sum((ez + mass * change) * factor, axis=0)
            sq = tl.load(at + SUM_SQ * stride_field, mask=inside, other=0.0).to(tl.float64)
            sum_sq += tl.sum(sq * factor * factor, axis=0)

    # from here on in nats
    shift = shift / LOG2_E
    target_z, slope = to_logits(at_label, INNER, OUTER)
    target = target_z.to(tl.float64)
    lead = target - shift
    mass = total + tl.exp(lead)
    logp = tl.where(lead > 0, -log1p(total * tl.exp(-tl.maximum(lead, 0.0))), lead - tl.log(mass))
    if broken_ptr is not None:  # all that write write the same
        tl.store(broken_ptr + n * 0, 1, mask=is_row & ((at_label - at_label) != 0.0))
    place = n if place_ptr is None else tl.load(place_ptr + n, mask=is_row, other=0)
    tl.store(logp_ptr + place, logp.to(tl.float32), mask=is_row)
    if scale_ptr is not None:
        tl.store(scale_ptr + n, (-SLOPE / mass).to(tl.float32), mask=is_row)
        tl.store(label_ptr + n, (-total * slope).to(tl.float32), mask=is_row)
    if norm_ptr is not None or STATS:
        largest = tl.maximum(top, target_z).to(tl.float64)
        near = total * tl.exp(shift - largest) + tl.exp(target - largest)
    if norm_ptr is not None:
        tl.store(norm_ptr + n, largest.to(tl.float32), mask=is_row)
        tl.store(norm_ptr + N + n, near.to(tl.float32), mask=is_row)
    if STATS:
        at = stats_ptr + place
        stride_stats = tl.cast(stride_stats, tl.int64)
        others, log_prob_of_shift = tl.exp(shift - largest) / near, (shift - largest) - tl.log(near)
        if ENTROPY is not None:  # -sum p log p: the label's term, and the others' with z = shift + (z - shift)
            own = tl.where(logp == float("-inf"), 0.0, -tl.exp(logp) * logp)
            value = own - others * (sum_ez / LOG2_E + total * log_prob_of_shift)
            tl.store(at + ENTROPY * stride_stats, value.to(tl.float32), mask=is_row)
        if IS_TOP1 is not None:  # the first of equal entries is
            is_top = (target_z > top) | ((target_z == top) & (target_z > top_before))
            tl.store(at + IS_TOP1 * stride_stats, is_top.to(tl.float32), mask=is_row)
        if MEAN_LOGIT is not None:
            tl.store(at + MEAN_LOGIT * stride_stats, (sum_z / V).to(tl.float32), mask=is_row)
        if SUM_SQ_PROBS is not None:
            a, b = tl.log(sum_sq / (SQUARED * SQUARED)) + 2 * log_prob_of_shift, 2 * logp
            high = tl.maximum(a, b)
            value = high + tl.log(tl.exp(a - high) + tl.exp(b - high))
            tl.store(at + SUM_SQ_PROBS * stride_stats, value.to(tl.float32), mask=is_row)


class Stored(NamedTuple):
    """[N] of rows whose exponentials are stored: the largest of the splits' shifts; what exponentials by this shift are
    multiplied by to be d logp / da; and the label's entry, which is so multiplied too: minus the sum of the others,
    with its own part of dz/da."""

    shift: Tensor
    scale: Tensor
    label: Tensor


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
    stored: Stored | None = None,
    squared: float = 1.0,
) -> None:
    """Finishes the rows of `part` [fields, splits, N]: what is known of each goes to `logp` [...] and, if it is among
    the `names`, to `stats` [K, ...], row after row or to the rows' places [N] there. `norm` [2, N]: see `LinearLogps`.
    `broken` []: see `TokenLogps`."""
    _, splits, n = part.shape
    shift, scale, label = (None, None, None) if stored is None else stored
    run(
        join_kernel, (triton.cdiv(n, JOIN_ROWS),), part,
        part, places, logp, norm, stats, broken, shift, scale, label, part.stride(1), part.stride(0), logp.numel(),
        n, v, splits, **transform_constants(transform), SLOPE=transform.slope, SQUARED=squared, STATS=bool(names),
        **stats_constants(names), BLOCK_N=JOIN_ROWS, BLOCK_SPLITS=JOIN_SPLITS, num_warps=8,
    )  # fmt: skip
