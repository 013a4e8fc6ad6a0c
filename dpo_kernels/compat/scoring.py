"""What Liger's classes have in common: scores of policy and reference, and the outputs beside the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_kernels.compat.arguments import renamed
from dpo_kernels.impl.interface import accumulate_dtype
from dpo_kernels.linear_dpo import linear_dpo_loss
from dpo_kernels.logps import check_labels, linear_sequence_logps, sum_over_vocabulary
from dpo_kernels.losses import LISTWISE_LOSSES, dpo_loss, validate_dpo_options

LossAndOutputs = tuple[Tensor, tuple[Tensor, ...]]

# What the arguments of this package's functions are called in Liger.
POLICY_NAMES = {"hidden": "_input", "weight": "lin_weight", "labels": "target", "loss_weights": "alpha"}
REFERENCE_NAMES = {"hidden": "ref_input", "weight": "ref_weight", "labels": "target", "bias": "ref_bias"}
# Losses on averaged log-probabilities that are a loss of `LOSSES` on sums, which takes three products instead of four.
ON_AVERAGES = {"sigmoid": "sigmoid_norm", "sigmoid_norm": "sigmoid_norm", "ipo": "ipo", "sft": "sft"}


def check_options(
    beta: float,
    alpha: float = 1.0,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
) -> None:
    if loss_type in LISTWISE_LOSSES:
        raise ValueError(f"loss_type: expected a loss of pairs, got {loss_type!r}, which of pairs is 'sigmoid'")
    renamed(
        POLICY_NAMES,
        validate_dpo_options,
        beta=beta,
        loss_type=(loss_type,),
        loss_weights=(alpha,),
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
    )


def check_sequences(_input: Tensor, target: Tensor, *, paired: bool = True) -> int:
    """The number of sequences."""
    renamed(POLICY_NAMES, check_labels, _input, target, "_input", "[2B, T, H]" if paired else "[S, T, H]")
    sequences = target.shape[0]
    if sequences == 0 or (paired and sequences % 2):
        expected = "an even number of sequences, chosen then rejected" if paired else "at least one sequence"
        raise ValueError(f"_input: expected {expected}, got {sequences}")
    return sequences


def zero_logps(_input: Tensor) -> Tensor:
    """[S], the log-probabilities of no reference."""
    return _input.new_zeros(_input.shape[0], dtype=accumulate_dtype(_input.dtype))


def reference_logps(
    ref_input: Tensor | None,
    ref_weight: Tensor | None,
    target: Tensor,
    ref_bias: Tensor | None,
    *,
    ignore_index: int,
    average: bool,
) -> Tensor:
    """[S], without gradient."""
    with torch.no_grad():
        return renamed(
            REFERENCE_NAMES,
            linear_sequence_logps,
            ref_input,
            ref_weight,
            target,
            bias=ref_bias,
            ignore_index=ignore_index,
            reduction="mean" if average else "sum",
        ).logps


def pair_loss(
    _input: Tensor,
    lin_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ref_logps: Tensor,
    *,
    ignore_index: int,
    average: bool,
    alpha: float | None,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    discopop_tau: float = 0.05,
) -> LossAndOutputs:
    """DPO with an NLL term (none where `alpha` is None), and the seven outputs of `LigerFusedLinearDPOLoss`.

    `average`: on log-probabilities averaged over tokens, which those of the reference, `ref_logps` [2B], then are too.
    """
    on_sums = ON_AVERAGES.get(loss_type) if average else loss_type
    names = (on_sums or loss_type,)
    options: dict[str, Any] = {
        "loss_type": names if alpha is None else (*names, "sft"),
        "loss_weights": (1.0,) if alpha is None else (1.0, alpha),
        "beta": beta,
        "label_smoothing": label_smoothing,
        "discopop_tau": discopop_tau,
    }
    head: dict[str, Any] = {"bias": bias, "ignore_index": ignore_index}
    num_tokens = (target != ignore_index).sum(1)
    lengths = num_tokens.clamp(min=1)
    chosen_tokens = num_tokens.chunk(2)[0]

    if on_sums is not None:
        ref_sums = ref_logps * lengths if average else ref_logps
        out = renamed(POLICY_NAMES, linear_dpo_loss, _input, lin_weight, target, ref_sums, **options, **head)
        loss, sums = out.loss, out.logps.detach()
    else:
        sums = renamed(POLICY_NAMES, linear_sequence_logps, _input, lin_weight, target, **head).logps
        loss = dpo_loss(
            *(sums / lengths).chunk(2),
            *ref_logps.chunk(2),
            mean_chosen_length=chosen_tokens.sum() / len(chosen_tokens),
            sft_chosen_logps=sums.chunk(2)[0],
            **options,
        ).losses.mean()
        sums = sums.detach()

    logps = sums / lengths if average else sums
    nll = sums.new_zeros(())
    if alpha is not None:
        nll = -sums.chunk(2)[0].sum() / chosen_tokens.sum().clamp(min=1)
    rewards = (beta * (logps - ref_logps)).chunk(2)
    return loss, (*pair_outputs(logps, nll, _input, lin_weight, bias), *rewards)


def pair_outputs(
    logps: Tensor, nll: Tensor, _input: Tensor, lin_weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """chosen_logps [B], rejected_logps [B], chosen_logits_mean [], rejected_logits_mean [], nll_loss []."""
    logits_means = logit_sums(_input, lin_weight, bias).view(2, -1).mean(1) / (_input.shape[1] * lin_weight.shape[0])
    return (*logps.chunk(2), *logits_means, nll)


@torch.no_grad()
def logit_sums(_input: Tensor, lin_weight: Tensor, bias: Tensor | None) -> Tensor:
    """[S] sum of all T * V logits x.W_v + b_v of each sequence, which is (sum of x).(sum of W_v) + T * (sum of b_v)."""
    dtype = accumulate_dtype(_input.dtype)
    weight_sum, bias_sum = sum_over_vocabulary(lin_weight, bias, dtype)
    return (torch.stack([x.sum(0, dtype=dtype) for x in _input]) * weight_sum).sum(1) + _input.shape[1] * bias_sum
