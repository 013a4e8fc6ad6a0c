"""Sequences summed and compared in pairs on Triton.

Dimensions: S sequences of T positions, P pairs, N labelled rows.

What a row weighs is known once all of its pair is, so a single program does everything, in one launch: about 50 bytes a
row, beside the H V products that there are of each.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch
import triton
import triton.language as tl

from dpo_kernels.impl import pairs
from dpo_kernels.impl.triton_math import log1p

# Rows, pairs, and rows of as many sequences that are taken at once.
BLOCK_N, BLOCK_B, BLOCK_S, BLOCK_T, NUM_WARPS = 2048, 512, 32, 128, 16


@triton.jit(
    do_not_specialize=["N", "T", "stride_ws", "PAIRS", "first", "stop", "beta", "more_beta"],
    do_not_specialize_on_alignment=[
        "logp_ptr", "sequence_ptr", "position_ptr", "slope_ptr", "begin_ptr", "end_ptr", "table_ptr", "weight_ptr",
        "sum_ptr", "of_sum_ptr", "count_ptr", "ref_ptr", "loss_ptr", "chosen_ptr", "rejected_ptr", "mean_ptr",
    ],
)  # fmt: skip
def compare_kernel(
    logp_ptr, sequence_ptr, position_ptr, slope_ptr, begin_ptr, end_ptr, table_ptr, weight_ptr, sum_ptr, of_sum_ptr,
    count_ptr, ref_ptr, loss_ptr, chosen_ptr, rejected_ptr, mean_ptr, stride_ws, stride_wt, N, T, PAIRS, first, stop,
    beta, more_beta,
    COMPARES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Of the pairs `first` to `stop`; unless it COMPARES, of the sequences, which are summed alone. beta is in two
    parts; begin and end [S] are memory that it uses."""
    DTYPE: tl.constexpr = table_ptr.dtype.element_ty
    count = stop - first
    sequences = 2 * count if COMPARES else count
    n_of = tl.arange(0, BLOCK_N)
    for begin in range(0, sequences, BLOCK_N):  # of no rows
        i = begin + n_of
        s = tl.where(i < count, first + i, PAIRS + first + i - count).to(tl.int64)
        tl.store(begin_ptr + s, 0, mask=i < sequences)
        tl.store(end_ptr + s, 0, mask=i < sequences)
    tl.debug_barrier()
    for begin in range(0, N, BLOCK_N):
        n = begin + n_of
        s, t = tl.load(sequence_ptr + n, mask=n < N), tl.load(position_ptr + n, mask=n < N)
        before = tl.load(sequence_ptr + n - 1, mask=(n > 0) & (n < N), other=-1)
        after = tl.load(sequence_ptr + n + 1, mask=n + 1 < N, other=-1)
        tl.store(table_ptr + s * T + t, tl.load(logp_ptr + n, mask=n < N), mask=n < N)
        tl.store(begin_ptr + s, n.to(tl.int64), mask=(n < N) & (before != s))
        tl.store(end_ptr + s, n.to(tl.int64) + 1, mask=(n < N) & (after != s))
    tl.debug_barrier()

    for begin_s in range(0, sequences, BLOCK_S):
        i = begin_s + tl.arange(0, BLOCK_S)
        inside = i < sequences
        s = tl.where(i < count, first + i, PAIRS + first + i - count).to(tl.int64)
        begins, ends = tl.load(begin_ptr + s, mask=inside, other=0), tl.load(end_ptr + s, mask=inside, other=0)
        total = tl.zeros([BLOCK_S, BLOCK_T], tl.float64)
        for begin_n in range(0, tl.max(ends - begins).to(tl.int32), BLOCK_T):
            n = begins[:, None] + begin_n + tl.arange(0, BLOCK_T)[None, :]
            is_row = n < ends[:, None]
            logp = tl.load(logp_ptr + n, mask=is_row, other=0.0)
            if weight_ptr is not None:
                t = tl.load(position_ptr + n, mask=is_row, other=0)
                logp *= tl.load(weight_ptr + s[:, None] * stride_ws + t * stride_wt, mask=is_row, other=0.0)
            total += logp.to(tl.float64)
        tl.store(sum_ptr + s, tl.sum(total, axis=1).to(DTYPE), mask=inside)
        if COMPARES:
            tl.store(count_ptr + s, ends - begins, mask=inside)

    if COMPARES:
        tl.debug_barrier()
        all_beta = tl.full([], 0.0, tl.float64) + beta + more_beta
        factor = all_beta.to(DTYPE)
        b_of = tl.arange(0, BLOCK_B).to(tl.int64)
        for begin in range(first, stop, BLOCK_B):
            b = begin + b_of
            inside = b < stop
            chosen = tl.load(sum_ptr + b, mask=inside) - tl.load(ref_ptr + b, mask=inside)
            rejected = tl.load(sum_ptr + PAIRS + b, mask=inside) - tl.load(ref_ptr + PAIRS + b, mask=inside)
            h = (factor * (chosen - rejected)).to(tl.float64)
            loss = tl.where(h < 0, -h, 0.0) + log1p(tl.exp(-tl.abs(h)))
            slope = (-all_beta / (1.0 + tl.exp(h)) / PAIRS).to(DTYPE)
            tl.store(loss_ptr + b, loss.to(DTYPE), mask=inside)
            tl.store(chosen_ptr + b, factor * chosen, mask=inside)
            tl.store(rejected_ptr + b, factor * rejected, mask=inside)
            tl.store(of_sum_ptr + b, slope, mask=inside)
            tl.store(of_sum_ptr + PAIRS + b, -slope, mask=inside)
        tl.debug_barrier()
        for begin in range(0, N, BLOCK_N):
            n = begin + n_of
            s, t = tl.load(sequence_ptr + n, mask=n < N), tl.load(position_ptr + n, mask=n < N)
            slope = tl.load(of_sum_ptr + s, mask=n < N)
            if weight_ptr is not None:
                slope *= tl.load(weight_ptr + s * stride_ws + t * stride_wt, mask=n < N)
            tl.store(slope_ptr + n, slope, mask=n < N)
        if stop == PAIRS:
            total = tl.zeros([BLOCK_B], tl.float64)
            for begin in range(0, PAIRS, BLOCK_B):
                total += tl.load(loss_ptr + begin + b_of, mask=begin + b_of < PAIRS, other=0.0).to(tl.float64)
            tl.store(mean_ptr, (tl.sum(total) / PAIRS).to(DTYPE))


def _launch(of: pairs.Comparison) -> None:
    begins, ends = of.at.sequence.new_empty(2, of.sums.shape[0])
    of_weights = (0, 0) if of.weights is None else of.weights.stride()
    high = ctypes.c_float(of.beta).value  # Triton takes numbers in fp32
    with torch.cuda.device_of(of.logps):
        compare_kernel[(1,)](
            of.logps, *of.at, of.slopes, begins, ends, of.token_logps, of.weights, of.sums, *of.of_pairs(),
            *of_weights, of.logps.shape[0], of.token_logps.shape[1], of.pairs, of.part.start, of.part.stop, high,
            of.beta - high if math.isfinite(high) else 0.0, COMPARES=of.tables is not None, BLOCK_N=BLOCK_N,
            BLOCK_B=BLOCK_B, BLOCK_S=BLOCK_S, BLOCK_T=BLOCK_T, num_warps=NUM_WARPS,
        )  # fmt: skip


compare, sum_rows = functools.partial(pairs.compare, _launch), functools.partial(pairs.sum_rows, _launch)
