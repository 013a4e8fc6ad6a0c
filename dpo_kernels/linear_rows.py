"""Log-probabilities of labelled rows, from hidden states: paths A, B and D as one step of autograd.

Dimensions: S sequences of T positions, N labelled rows, K statistics; R sequences of U hidden states of H numbers,
which are S and T but for predictors; V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.dispatch import is_fused, load, puts_rows
from dpo_kernels.impl import exponential_paths, paths
from dpo_kernels.impl.interface import GradRows, LogitTransform, Rows, Shards
from dpo_kernels.ops import refuse_second_derivative
from dpo_kernels.rows import LabelledRows, check_finite, hidden_gradient, scaled_gradient


class LinearOptions(NamedTuple):
    transform: LogitTransform
    compute_dtype: torch.dtype
    stats: Sequence[str]
    with_dhidden: bool
    """The head is frozen: the forward leaves the gradient of the hidden states."""
    family: str
    shards: Shards | None
    """Other ranks', with more of the vocabulary."""
    check_hidden: bool
    waits: bool
    """For the device, to check hidden states."""


class LinearTokenLogps(torch.autograd.Function):
    """hidden [R, U, H], weight [V, H], bias [V] or None and labels y [N] of `rows`, counted from the first entry of the
    weight, to log-probabilities [S, T] and statistics [K, S, T], 0 where there is no label. With `shards` these are of
    all ranks' entries, and so is the gradient of hidden states; those of weight and bias are of the entries here."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
        rows: LabelledRows,
        shape: torch.Size,
        of: LinearOptions,
    ) -> tuple[Tensor, Tensor]:
        k, x = load(of.family), rows.copy(hidden)
        if of.check_hidden:
            check_finite(x, rows, of.waits)
        # not `rows`, which hold what comes out of here
        ctx.of, ctx.shape, ctx.dtype = of, hidden.shape, hidden.dtype
        ctx.set_materialize_grads(False)
        where, found = (*rows.at, rows.slots), rows.found
        fused = is_fused(of.family) and of.shards is None
        with torch.autocast(x.device.type, enabled=False):
            if (
                of.with_dhidden
                and fused
                and found is not None
                and len(y)
                and k.takes_exponentials(x.dtype, weight, of.compute_dtype)
            ):
                dhidden = exponential_paths.linear_token_logps(k, x, weight, bias, found, of.transform, of.stats)
                ctx.save_for_backward(*where, dhidden)
                ctx.mark_non_differentiable(found.stats)
                return found.token_logps, found.stats
            out = paths.linear_logps_fwd(
                k,
                x,
                weight,
                bias,
                y,
                of.transform,
                compute_dtype=of.compute_dtype,
                stats=of.stats,
                with_dhidden=of.with_dhidden,
                fused=fused,
                shards=of.shards,
            )
        kept = (out.dhidden,) if of.with_dhidden else (x, weight, bias, y, out.norm, out.logp)
        ctx.save_for_backward(*where, *kept)
        token_logps, stats = rows.tables(shape, len(of.stats), out.logp)
        token_logps[rows.at.sequence, rows.at.position] = out.logp
        if of.stats:
            stats[:, rows.at.sequence, rows.at.position] = out.stats
        ctx.mark_non_differentiable(stats)
        return token_logps, stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing, grad, of = (None,) * 4, grads[0], ctx.of
        if grad is None:
            return (None, None, None, *nothing)
        refuse_second_derivative()
        sequence, position, slots, *kept = ctx.saved_tensors
        at, k = Rows(sequence, position), load(of.family)
        if of.with_dhidden:
            (dhidden,) = kept
            if of.shards is not None:
                dx = dhidden * grad[sequence, position, None]
                if dx.numel():
                    of.shards.start_sum(dx)()
                dx = dx.to(ctx.dtype)  # nothing in fp32 is kept beside the gradient of all positions
                return (hidden_gradient(dx, ctx.shape, at, slots), None, None, *nothing)
            if slots is None and puts_rows(of.family) and dhidden.dtype == torch.float32:
                out = dhidden.new_zeros(ctx.shape, dtype=ctx.dtype)
                k.put_rows(dhidden, grad, at, out)
            else:
                out = scaled_gradient(dhidden, grad, ctx.shape, ctx.dtype, at, slots)
            return (out, None, None, *nothing)
        x, weight, bias, y, norm, logp = kept
        need = ctx.needs_input_grad[:3]
        if y.shape[0] == 0:
            given = zip((x, weight, bias), (ctx.shape, weight.shape, weight.shape[:1]), need, strict=True)
            return (*(t.new_zeros(shape) if needed else None for t, shape, needed in given), *nothing)
        with torch.autocast(x.device.type, enabled=False):
            dx, dweight, dbias = paths.linear_logps_bwd(
                k,
                x,
                weight,
                bias,
                GradRows(y, norm, logp, grad[sequence, position]),
                of.transform,
                compute_dtype=of.compute_dtype,
                need=need,
                fused=is_fused(of.family) and of.shards is None,
                shards=of.shards,
            )
        dhidden = None if dx is None else hidden_gradient(dx, ctx.shape, at, slots)
        return (dhidden, dweight, dbias, *nothing)
