"""The original implementation of DPO, and the losses of trainers whose interface descends from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpo_kernels.compat.arguments import renamed
from dpo_kernels.logps import sequence_logps
from dpo_kernels.losses import PreferenceLoss, dpo_loss

# What the arguments of `dpo_loss` are called here.
NAMES = {
    "chosen_logps": "policy_chosen_logps",
    "rejected_logps": "policy_rejected_logps",
    "ref_chosen_logps": "reference_chosen_logps",
    "ref_rejected_logps": "reference_rejected_logps",
}


def get_batch_logps(logits: Tensor, labels: Tensor, average_log_prob: bool = False) -> Tensor:
    """Log-probabilities of responses from logits, as in the original implementation of DPO (`_get_batch_logps`).

    Where a trainer still holds hidden states, `linear_sequence_logps` with shift=True gives the same without logits.

    Args:
        logits: [S, T, V] floating point; logits[s, t] predict labels[s, t + 1].
        labels: [S, T] integers in [0, V), or -100 on prompt and padding.
        average_log_prob: the average over labelled tokens instead of the sum.

    Returns:
        [S] fp32 (fp64 for fp64 logits) in nats; 0 where nothing is labelled. The log-sum-exp is in fp32 for logits of
        lower precision too, which need not be cast first.
    """
    return sequence_logps(logits, labels, shift=True, reduction="mean" if average_log_prob else "sum").logps


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    ipo: bool = False,
    reference_free: bool = False,
) -> PreferenceLoss:
    """The loss of the original implementation of DPO, on log-probabilities [B] summed over the responses.

        h = (policy_chosen_logps - policy_rejected_logps) - (reference_chosen_logps - reference_rejected_logps)
        losses = -(1 - label_smoothing) * log sigmoid(beta * h) - label_smoothing * log sigmoid(-beta * h)

    Args:
        beta: strength of the leash to the reference.
        label_smoothing: in [0, 0.5), the assumed share of pairs whose labels are swapped (conservative DPO).
        ipo: losses = (h - 1 / (2 * beta))^2 instead (arXiv 2310.12036, Eq. 17), which knows no label smoothing. Unlike
            "ipo" of `dpo_kernels.losses` it does not divide by the lengths.
        reference_free: the reference's difference in h is 0; the rewards still subtract what is given.

    Returns:
        PreferenceLoss(losses [B], chosen_rewards [B], rejected_rewards [B]) in fp32 (fp64 where an input is); rewards
        are beta * (policy - reference), detached.
    """
    policy = (policy_chosen_logps, policy_rejected_logps)
    reference = (reference_chosen_logps, reference_rejected_logps)
    options: dict[str, Any] = {"beta": beta, "loss_type": "cdpo", "label_smoothing": label_smoothing}
    if ipo:
        one = torch.ones_like(policy_chosen_logps)  # as a length: sums stay sums
        options = {"beta": beta, "loss_type": "ipo", "chosen_lengths": one, "rejected_lengths": one}
    out = renamed(NAMES, dpo_loss, *policy, *reference, **options)
    if reference_free:
        nothing = torch.zeros_like(reference_chosen_logps)
        return out._replace(losses=dpo_loss(*policy, nothing, nothing, **options).losses)
    return out


class OpenRLHFDPOLoss(nn.Module):
    """`DPOLoss` of OpenRLHF: `preference_loss` with the mean of the losses."""

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.ipo = ipo

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [B] to loss [], chosen_rewards [B], rejected_rewards [B]."""
        losses, chosen_rewards, rejected_rewards = preference_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            self.beta,
            self.label_smoothing,
            self.ipo,
        )
        return losses.mean(), chosen_rewards, rejected_rewards


class TorchtuneDPOLoss(nn.Module):
    """`DPOLoss` of torchtune: `preference_loss` on what its recipes hold."""

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.beta = beta
        self.label_smoothing = label_smoothing

    def forward(
        self,
        policy_chosen_logps: Any,
        policy_rejected_logps: Any,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
    ) -> PreferenceLoss:
        """
        Args:
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps: [B], as in
                torchtune's releases. Or, as in its sources after 0.6, two objects by position, of the policy and of the
                reference, with chosen_logps [B] and rejected_logps [B], as `ChosenRejectedOutputs` has.

        Returns:
            losses [B], chosen_rewards [B], rejected_rewards [B].
        """
        logps: Any = policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
        if not all(isinstance(each, Tensor) for each in logps):
            policy, reference, *rest = logps
            is_pair = [hasattr(each, "chosen_logps") and hasattr(each, "rejected_logps") for each in logps[:2]]
            if not all(is_pair) or rest != [None, None]:
                raise ValueError(
                    "policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps: "
                    "expected four tensors, or two objects with chosen_logps and rejected_logps, got "
                    f"{', '.join(type(each).__name__ for each in logps)}"
                )
            logps = policy.chosen_logps, policy.rejected_logps, reference.chosen_logps, reference.rejected_logps
        chosen, rejected, ref_chosen, ref_rejected = logps
        return preference_loss(chosen, rejected, ref_chosen, ref_rejected, self.beta, self.label_smoothing)
