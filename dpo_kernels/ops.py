"""The custom operators `dpo_kernels::*`: schemas, fakes and autograd. No kernel code.

Positions are [S, T] with ignored labels left in, so that every output shape follows from the inputs' shapes and a
compiled graph needs no break; each operator compacts to the labelled rows itself.

Output tensors that were not asked for have no elements. `impl` is a family of kernels as `dispatch` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.dispatch import is_fused, load
from dpo_kernels.impl import paths
from dpo_kernels.impl.interface import GradPositions, GradRows, Labels, LogitTransform, accumulate_dtype
from dpo_kernels.impl.positions import at_rows, spread
from dpo_kernels.rows import check_finite, find_rows, hidden_gradient

# num_labelled, where it is no count
UNKNOWN = -1


def _without_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Precision is chosen by `compute_dtype`; autocast must not round a tile behind its back."""

    @wraps(fn)
    def wrapper(*args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, Tensor))
        with torch.autocast(device.type, enabled=False):
            return fn(*args)

    return wrapper


def _labels(labels: Tensor, ignore_index: int, num_labelled: int) -> Labels:
    return Labels(labels, ignore_index, None if num_labelled == UNKNOWN else num_labelled)


@_without_autocast
def linear_token_logps_impl(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    num_labelled: int,
    compute_dtype: torch.dtype,
    stats: Sequence[str],
    with_dhidden: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    known = None if num_labelled == UNKNOWN else num_labelled
    rows = find_rows(impl, hidden, labels, weight.shape[0], ignore_index, known)
    x = rows.copy(hidden)
    check_finite(x, rows, waits=known is None)
    out = paths.linear_logps_fwd(
        load(impl),
        x,
        weight,
        bias,
        rows.y,
        LogitTransform(logit_scale, softcap, temperature),
        compute_dtype=compute_dtype,
        stats=stats,
        with_dhidden=with_dhidden,
        fused=is_fused(impl),
    )
    dhidden = out.logp.new_empty(0)
    if out.dhidden is not None:
        dhidden = hidden_gradient(out.dhidden, hidden.shape, rows.at, None)
    logps, norm, values = (spread(t, rows.at, labels.shape) for t in (out.logp, out.norm, out.stats))
    return logps, norm, values, dhidden


linear_token_logps = torch.library.custom_op(
    "dpo_kernels::linear_token_logps",
    linear_token_logps_impl,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float logit_scale, float? softcap, "
    "float temperature, int ignore_index, SymInt num_labelled, ScalarType compute_dtype, str[] stats, "
    "bool with_dhidden, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
)


@linear_token_logps.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, compute_dtype, stats, with_dhidden, _ = options
    dtype = accumulate_dtype(compute_dtype)
    return (
        labels.new_empty(labels.shape, dtype=dtype),
        labels.new_empty((2, *labels.shape), dtype=dtype),
        labels.new_empty((len(stats), *labels.shape), dtype=dtype),
        labels.new_empty(hidden.shape if with_dhidden else (0,), dtype=dtype),
    )


@_without_autocast
def linear_token_logps_bwd_impl(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    norm: Tensor,
    logps: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    num_labelled: int,
    compute_dtype: torch.dtype,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    known = None if num_labelled == UNKNOWN else num_labelled
    rows = find_rows(impl, hidden, labels, weight.shape[0], ignore_index, known)
    if rows.y.shape[0] == 0:
        return (
            hidden.new_zeros(hidden.shape if need_dhidden else 0),
            weight.new_zeros(weight.shape if need_dweight else 0),
            weight.new_zeros(weight.shape[0] if need_dbias else 0),
        )
    dx, dweight, dbias = paths.linear_logps_bwd(
        load(impl),
        rows.copy(hidden),
        weight,
        bias,
        GradRows(rows.y, *(at_rows(t, rows.at) for t in (norm, logps, grad))),
        LogitTransform(logit_scale, softcap, temperature),
        compute_dtype=compute_dtype,
        need=(need_dhidden, need_dweight, need_dbias),
        fused=is_fused(impl),
    )
    dhidden = hidden.new_empty(0) if dx is None else hidden_gradient(dx, hidden.shape, rows.at, None)
    if dweight is None:
        dweight = weight.new_empty(0)
    return dhidden, dweight, weight.new_empty(0) if dbias is None else dbias


linear_token_logps_bwd = torch.library.custom_op(
    "dpo_kernels::linear_token_logps_bwd",
    linear_token_logps_bwd_impl,
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor norm, Tensor logps, "
    "float logit_scale, float? softcap, float temperature, int ignore_index, SymInt num_labelled, "
    "ScalarType compute_dtype, bool need_dhidden, bool need_dweight, bool need_dbias, str impl) "
    "-> (Tensor, Tensor, Tensor)",
)


@linear_token_logps_bwd.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_dhidden, need_dweight, need_dbias, _ = options
    return (
        hidden.new_empty(hidden.shape if need_dhidden else (0,)),
        weight.new_empty(weight.shape if need_dweight else 0),
        weight.new_empty(weight.shape[0] if need_dbias else 0),
    )


def refuse_second_derivative() -> None:
    """To be called in a backward, where gradients are recorded only if a graph of the gradients was asked for."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("dpo_kernels has no second derivatives: call backward or grad without create_graph=True")


def _linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, *scalars, _, with_dhidden, impl = inputs
    logps, norm, _, dhidden = output
    ctx.set_materialize_grads(False)
    ctx.with_dhidden, ctx.scalars, ctx.impl, ctx.dtype = with_dhidden, scalars, impl, hidden.dtype
    if with_dhidden:
        ctx.save_for_backward(dhidden)
    else:
        ctx.save_for_backward(hidden, weight, labels, bias, norm, logps)


def _linear_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * 13
    if grad is None:
        return nothing
    refuse_second_derivative()
    if ctx.with_dhidden:
        (dhidden,) = ctx.saved_tensors
        return ((dhidden * grad[..., None]).to(ctx.dtype), *nothing[1:])
    hidden, weight, labels, bias, norm, logps = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = linear_token_logps_bwd(
        grad, hidden, weight, labels, bias, norm, logps, *ctx.scalars, need[0], need[1], need[2], ctx.impl
    )
    dhidden, dweight, dbias = (g if wanted else None for g, wanted in zip(grads, need, strict=True))
    return (dhidden, dweight, None, dbias, *nothing[4:])


linear_token_logps.register_autograd(_linear_backward, setup_context=_linear_setup_context)


def token_logps_impl(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    num_labelled: int,
    stats: Sequence[str],
    inplace_backward: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return load(impl).logps_fwd(logits, _labels(labels, ignore_index, num_labelled), stats=stats)


token_logps = torch.library.custom_op(
    "dpo_kernels::token_logps",
    token_logps_impl,
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, int ignore_index, SymInt num_labelled, str[] stats, "
    "bool inplace_backward, str impl) -> (Tensor, Tensor, Tensor)",
)


@token_logps.register_fake
def _(logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, stats, _, _ = options
    dtype = accumulate_dtype(logits.dtype)
    return (
        labels.new_empty(labels.shape, dtype=dtype),
        labels.new_empty((2, *labels.shape), dtype=dtype),
        labels.new_empty((len(stats), *labels.shape), dtype=dtype),
    )


def _write_dlogits(
    out: Tensor,
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    norm: Tensor,
    logps: Tensor,
    ignore_index: int,
    num_labelled: int,
    impl: str,
) -> None:
    of = GradPositions(norm, logps, grad)
    load(impl).logps_bwd_(logits, _labels(labels, ignore_index, num_labelled), of, out)


def token_logps_bwd_impl(grad: Tensor, logits: Tensor, *options: Any) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    _write_dlogits(dlogits, grad, logits, *options)
    return dlogits


token_logps_bwd = torch.library.custom_op(
    "dpo_kernels::token_logps_bwd",
    token_logps_bwd_impl,
    mutates_args=(),
    schema="(Tensor grad, Tensor logits, Tensor labels, Tensor norm, Tensor logps, int ignore_index, "
    "SymInt num_labelled, str impl) -> Tensor",
)


@token_logps_bwd.register_fake
def _(grad: Tensor, logits: Tensor, *options: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def token_logps_bwd_inplace_impl(grad: Tensor, logits: Tensor, labels: Tensor, *options: Any) -> None:
    _write_dlogits(logits, grad, logits, labels, *options)


token_logps_bwd_ = torch.library.custom_op(
    "dpo_kernels::token_logps_bwd_",
    token_logps_bwd_inplace_impl,
    mutates_args=("logits",),
    schema="(Tensor grad, Tensor(a!) logits, Tensor labels, Tensor norm, Tensor logps, int ignore_index, "
    "SymInt num_labelled, str impl) -> ()",
)


@token_logps_bwd_.register_fake
def _(*arguments: Any) -> None:
    return None


def _logits_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, ignore_index, num_labelled, _, inplace_backward, impl = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, output[1], output[0])
    ctx.inplace_backward, ctx.scalars = inplace_backward, (ignore_index, num_labelled, impl)


def _logits_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    refuse_second_derivative()
    logits, labels, norm, logps = ctx.saved_tensors
    if ctx.inplace_backward:
        token_logps_bwd_(grad, logits, labels, norm, logps, *ctx.scalars)
        dlogits = logits
    else:
        dlogits = token_logps_bwd(grad, logits, labels, norm, logps, *ctx.scalars)
    return (dlogits, *(None,) * 6)


token_logps.register_autograd(_logits_backward, setup_context=_logits_setup_context)


def sum_tokens_impl(
    token_logps: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int, mean: bool, impl: str
) -> tuple[Tensor, Tensor]:
    return load(impl).sum_tokens(token_logps, labels, ignore_index, weights, mean)


sum_tokens = torch.library.custom_op(
    "dpo_kernels::sum_tokens",
    sum_tokens_impl,
    mutates_args=(),
    schema="(Tensor token_logps, Tensor labels, Tensor? weights, int ignore_index, bool mean, str impl) "
    "-> (Tensor, Tensor)",
)


@sum_tokens.register_fake
def _(token_logps: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return token_logps.new_empty(labels.shape[0]), labels.new_empty(labels.shape[0])


def sum_tokens_bwd_impl(
    grad: Tensor,
    token_logps: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    num_tokens: Tensor,
    ignore_index: int,
    mean: bool,
    need_dweights: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return load(impl).sum_tokens_bwd(grad, token_logps, labels, ignore_index, weights, num_tokens, mean, need_dweights)


sum_tokens_bwd = torch.library.custom_op(
    "dpo_kernels::sum_tokens_bwd",
    sum_tokens_bwd_impl,
    mutates_args=(),
    schema="(Tensor grad, Tensor token_logps, Tensor labels, Tensor? weights, Tensor num_tokens, int ignore_index, "
    "bool mean, bool need_dweights, str impl) -> (Tensor, Tensor)",
)


@sum_tokens_bwd.register_fake
def _(grad: Tensor, token_logps: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    *_, need_dweights, _ = options
    return (
        token_logps.new_empty(labels.shape),
        token_logps.new_empty(labels.shape if need_dweights else (0,)),
    )


def _sum_tokens_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    token_logps, labels, weights, ignore_index, mean, impl = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.scalars, ctx.shape = (ignore_index, mean), labels.shape
    ctx.impl = impl
    if weights is not None or mean:
        ctx.save_for_backward(token_logps, labels, weights, output[1])


def _sum_tokens_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * 6
    if grad is None:
        return nothing
    if not ctx.saved_tensors:  # a view, of which no kernel makes a copy
        return (grad[:, None].expand(ctx.shape), *nothing[1:])
    refuse_second_derivative()
    token_logps, labels, weights, num_tokens = ctx.saved_tensors
    need_dweights = weights is not None and ctx.needs_input_grad[2]
    dlogps, dweights = sum_tokens_bwd(
        grad, token_logps, labels, weights, num_tokens, *ctx.scalars, need_dweights, ctx.impl
    )
    return (dlogps, None, dweights if need_dweights else None, *nothing[3:])


sum_tokens.register_autograd(_sum_tokens_backward, setup_context=_sum_tokens_setup_context)

# The plain functions behind the operators, for tools that must see the tensors made inside.
IMPLEMENTATION_OF: dict[str, Callable[..., Any]] = {
    "dpo_kernels::linear_token_logps": linear_token_logps_impl,
    "dpo_kernels::linear_token_logps_bwd": linear_token_logps_bwd_impl,
    "dpo_kernels::token_logps": token_logps_impl,
    "dpo_kernels::token_logps_bwd": token_logps_bwd_impl,
    "dpo_kernels::token_logps_bwd_": token_logps_bwd_inplace_impl,
    "dpo_kernels::sum_tokens": sum_tokens_impl,
    "dpo_kernels::sum_tokens_bwd": sum_tokens_bwd_impl,
}
