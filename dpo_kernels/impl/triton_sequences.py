"""Sums over the tokens of sequences, and what they are differentiated to, on Triton.

Dimensions: S sequences of T positions. A program has a sequence, and goes through it from left to right in blocks of
BLOCK_T: every sum has one order. The backward has a program for each block.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.impl.triton_math import run

BLOCK_T = 1024


@triton.jit
def _weights(weight_ptr, s, t, stride_s, stride_t, is_labelled):
    """0 at ignored positions, whatever they hold."""
    return tl.load(weight_ptr + s * stride_s + t * stride_t, mask=is_labelled, other=0.0)


@triton.jit(
    do_not_specialize=["ignore_index", "T", "stride_ps", "stride_ys", "stride_ws"],
    do_not_specialize_on_alignment=["logp_ptr", "y_ptr", "weight_ptr", "sum_ptr", "count_ptr"],
)
def sum_tokens_fwd_kernel(
    logp_ptr, y_ptr, weight_ptr, sum_ptr, count_ptr,
    stride_ps, stride_pt, stride_ys, stride_yt, stride_ws, stride_wt, ignore_index, T,
    HAS_WEIGHTS: tl.constexpr, MEAN: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_T], tl.float64)
    count = tl.zeros([BLOCK_T], tl.int32)
    for first in range(0, T, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T).to(tl.int64)
        inside = t < T
        y = tl.load(y_ptr + s * stride_ys + t * stride_yt, mask=inside, other=0)
        is_labelled = inside & (y != ignore_index)
        logp = tl.load(logp_ptr + s * stride_ps + t * stride_pt, mask=inside, other=0.0)
        if HAS_WEIGHTS:
            logp *= _weights(weight_ptr, s, t, stride_ws, stride_wt, is_labelled)
        total += logp.to(tl.float64)
        count += is_labelled.to(tl.int32)
    found, labelled = tl.sum(total, axis=0), tl.sum(count, axis=0)
    if MEAN:
        found /= tl.maximum(labelled, 1)
    tl.store(sum_ptr + s, found.to(sum_ptr.dtype.element_ty))
    tl.store(count_ptr + s, labelled.to(tl.int64))


@triton.jit(
    do_not_specialize=["ignore_index", "T", "stride_gs", "stride_ps", "stride_ys", "stride_ws"],
    do_not_specialize_on_alignment=[
        "g_ptr", "logp_ptr", "y_ptr", "weight_ptr", "count_ptr", "dlogp_ptr", "dweight_ptr"
    ],
)  # fmt: skip
def sum_tokens_bwd_kernel(
    g_ptr, logp_ptr, y_ptr, weight_ptr, count_ptr, dlogp_ptr, dweight_ptr,
    stride_gs, stride_ps, stride_pt, stride_ys, stride_yt, stride_ws, stride_wt, ignore_index, T,
    HAS_WEIGHTS: tl.constexpr, MEAN: tl.constexpr, NEED_DWEIGHT: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < T
    g = tl.load(g_ptr + s * stride_gs)
    if MEAN:
        g /= tl.maximum(tl.load(count_ptr + s), 1).to(g.dtype)
    dlogp = tl.zeros([BLOCK_T], dlogp_ptr.dtype.element_ty) + g
    if HAS_WEIGHTS:
        y = tl.load(y_ptr + s * stride_ys + t * stride_yt, mask=inside, other=0)
        is_labelled = inside & (y != ignore_index)
        dlogp *= _weights(weight_ptr, s, t, stride_ws, stride_wt, is_labelled)
        if NEED_DWEIGHT:
            logp = tl.load(logp_ptr + s * stride_ps + t * stride_pt, mask=is_labelled, other=0.0)
            tl.store(dweight_ptr + s * T + t, tl.where(is_labelled, g * logp, 0.0), mask=inside)
    tl.store(dlogp_ptr + s * T + t, dlogp, mask=inside)


def _strides(weights: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if weights is None else weights.stride()


def sum_tokens(
    token_logps: Tensor, labels: Tensor, ignore_index: int, weights: Tensor | None, mean: bool
) -> tuple[Tensor, Tensor]:
    sequences, length = labels.shape
    logps = token_logps.new_empty(sequences)
    num_tokens = labels.new_empty(sequences)
    if sequences:
        run(
            sum_tokens_fwd_kernel, (sequences,), labels,
            token_logps, labels, weights, logps, num_tokens,
            *token_logps.stride(), *labels.stride(), *_strides(weights), ignore_index, length,
            HAS_WEIGHTS=weights is not None, MEAN=mean, BLOCK_T=BLOCK_T,
        )  # fmt: skip
    return logps, num_tokens


def sum_tokens_bwd(
    grad: Tensor,
    token_logps: Tensor,
    labels: Tensor,
    ignore_index: int,
    weights: Tensor | None,
    num_tokens: Tensor,
    mean: bool,
    need_dweights: bool,
) -> tuple[Tensor, Tensor]:
    sequences, length = labels.shape
    dlogps = token_logps.new_empty(labels.shape)
    dweights = token_logps.new_empty(labels.shape if need_dweights else 0)
    if labels.numel():
        run(
            sum_tokens_bwd_kernel, (sequences, triton.cdiv(length, BLOCK_T)), labels,
            grad, token_logps, labels, weights, num_tokens, dlogps, dweights,
            *grad.stride(), *token_logps.stride(), *labels.stride(), *_strides(weights), ignore_index, length,
            HAS_WEIGHTS=weights is not None, MEAN=mean, NEED_DWEIGHT=need_dweights, BLOCK_T=BLOCK_T,
        )  # fmt: skip
    return dlogps, dweights
