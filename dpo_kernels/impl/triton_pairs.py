"""Sequences summed and compared in pairs on Triton.

Dimensions: S sequences of T positions, P pairs, N labelled rows.

What a row weighs is known once all of its pair is, so a single program does everything, in one launch: 12 bytes a row
or position, beside the H V products that there are of each.
"""

from __future__ import annotations

import functools
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.impl import pairs
from dpo_kernels.impl.triton_math import log1p

BLOCK_N, BLOCK_B, BLOCK_S, BLOCK_T, NUM_WARPS = 2048, 512, 32, 128, 16


@triton.jit(
    do_not_specialize=[
        "N", "T", "stride_ws", "stride_ls", "ignore_index", "PAIRS", "first", "stop", "beta", "more_beta"
    ],
    do_not_specialize_on_alignment=[
        "logp_ptr", "sequence_ptr", "position_ptr", "slope_ptr", "table_ptr", "weight_ptr", "label_ptr", "ref_ptr",
        "count_ptr", "sum_ptr", "of_sum_ptr", "loss_ptr", "chosen_ptr", "rejected_ptr", "mean_ptr",
    ],
)  # fmt: skip
def compare_kernel(
    logp_ptr, sequence_ptr, position_ptr, slope_ptr, table_ptr, weight_ptr, label_ptr, ref_ptr, count_ptr, sum_ptr,
    of_sum_ptr, loss_ptr, chosen_ptr, rejected_ptr, mean_ptr, stride_ws, stride_wt, stride_ls, stride_lt, N, T,
    ignore_index, PAIRS, first, stop, beta, more_beta,
    COMPARES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Of the pairs `first` to `stop`; unless it COMPARES, of the sequences, which are summed alone. beta is in two
    parts."""
    DTYPE: tl.constexpr = table_ptr.dtype.element_ty
    n_of = tl.arange(0, BLOCK_N)
    for begin in range(0, N, BLOCK_N):
        n = begin + n_of
        s, t = tl.load(sequence_ptr + n, mask=n < N), tl.load(position_ptr + n, mask=n < N)
        tl.store(table_ptr + s * T + t, tl.load(logp_ptr + n, mask=n < N), mask=n < N)
    tl.debug_barrier()

    count = stop - first
    sequences = 2 * count if COMPARES else count
    for begin in range(0, sequences, BLOCK_S):
        i = begin + tl.arange(0, BLOCK_S)
        s = tl.where(i < count, first + i, PAIRS + first + i - count).to(tl.int64)
        total = tl.zeros([BLOCK_S, BLOCK_T], tl.float64)
        labelled = tl.zeros([BLOCK_S, BLOCK_T], tl.int32)
        for begin_t in range(0, T, BLOCK_T):
            t = begin_t + tl.arange(0, BLOCK_T)[None, :].to(tl.int64)
            inside = (i < sequences)[:, None] & (t < T)
            logp = tl.load(table_ptr + s[:, None] * T + t, mask=inside, other=0.0)
            if weight_ptr is not None:
                logp *= tl.load(weight_ptr + s[:, None] * stride_ws + t * stride_wt, mask=inside, other=0.0)
            total += logp.to(tl.float64)
            if COMPARES:
                label = tl.load(label_ptr + s[:, None] * stride_ls + t * stride_lt, mask=inside, other=0)
                labelled += (inside & (label != ignore_index)).to(tl.int32)
        tl.store(sum_ptr + s, tl.sum(total, axis=1).to(DTYPE), mask=i < sequences)
        if COMPARES:
            tl.store(count_ptr + s, tl.sum(labelled, axis=1).to(tl.int64), mask=i < sequences)

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
    labels, ignore_index, count = None, 0, 0
    tables: list[Tensor | None] = [None, None, of.sums, *[None] * 5]
    if of.tables is not None:
        labels, ignore_index, *tables = of.tables[2:]
        count = of.tables.losses.shape[0]
    of_weights, of_labels = ((0, 0) if t is None else t.stride() for t in (of.weights, labels))
    high = struct.unpack("f", struct.pack("f", of.beta))[0]  # Triton takes numbers in fp32
    with torch.cuda.device_of(of.logps):
        compare_kernel[(1,)](
            of.logps, *of.at, of.slopes, of.token_logps, of.weights, labels, *tables, *of_weights, *of_labels,
            of.logps.shape[0], of.token_logps.shape[1], ignore_index, count, of.part.start, of.part.stop, high,
            of.beta - high, COMPARES=of.tables is not None, BLOCK_N=BLOCK_N, BLOCK_B=BLOCK_B, BLOCK_S=BLOCK_S,
            BLOCK_T=BLOCK_T, num_warps=NUM_WARPS,
        )  # fmt: skip


compare, sum_rows = functools.partial(pairs.compare, _launch), functools.partial(pairs.sum_rows, _launch)
