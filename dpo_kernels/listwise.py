"""The loss of whole rankings: Plackett-Luce DPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.comparisons import comparisons_of
from dpo_kernels.losses import (
    check_finite_logps,
    f_divergence_scores,
    logistic_loss,
    validate_dpo_options,
)
from dpo_kernels.options import FDivergence, explain_unknown, is_at_hand


class RankingLoss(NamedTuple):
    """losses [G], one a group, carry the gradient; rewards [S] are detached."""

    losses: Tensor
    rewards: Tensor

    @property
    def loss(self) -> Tensor:
        """[] their mean, which is what to minimise."""
        return self.losses.mean()


@explain_unknown
def plackett_luce_loss(
    logps: Tensor,
    ref_logps: Tensor,
    pairs: Sequence[tuple[int, int]] | Tensor | None = None,
    *,
    beta: float = 0.1,
    f_divergence: FDivergence = "reverse_kl",
    f_alpha: float = 0.5,
) -> RankingLoss:
    """DPO of rankings under the Plackett-Luce model. arXiv 2305.18290, Appendix A.3.

    Of a group of answers, with s = beta * (logps - ref_logps), it is

        sum_i log(1 + sum_{j: i is preferred to j} exp(s_j - s_i))

    which with all pairs of a ranking is the paper's -log prod_i exp(s_i) / sum_{j >= i} exp(s_j), with the pairs of the
    best answer alone one softmax over all (S-DPO, arXiv 2406.09215), and for two answers `dpo_loss`. Answers of
    equal rank make no pair, and do not compete.

    Args:
        logps: [S] log pi(y|x) summed over the response, in nats; any floating-point type.
        ref_logps: [S] the same under the reference, without a gradient.
        pairs: P times (preferred, other), numbers of responses; each is in one at least. None: the first half of the
            responses is preferred to the second, one by one. On the host; a tensor on a device is waited for.
        beta, f_divergence, f_alpha: as in `dpo_loss`.

    Returns:
        RankingLoss, in fp32, or fp64 where an input is. Groups are responses that pairs connect, in the order of their
        first ones; rewards are s, whatever the f-divergence.

    Raises:
        ValueError: an option outside its range, shapes that differ, what are no pairs, or, on the CPU,
            log-probabilities of the reference that are not finite.
    """
    validate_dpo_options(beta=beta, f_divergence=f_divergence, f_alpha=f_alpha)
    for name, given in (("logps", logps), ("ref_logps", ref_logps)):
        if not isinstance(given, Tensor) or given.dim() != 1 or not given.is_floating_point():
            raise ValueError(f"{name}: expected floating-point [S], got {_described(given)}")
    if logps.shape != ref_logps.shape or logps.device != ref_logps.device:
        raise ValueError(f"ref_logps: expected {_described(logps)}, as logps, got {_described(ref_logps)}")
    if is_at_hand(ref_logps):
        check_finite_logps("ref_logps", ref_logps, "response")
    comparisons = comparisons_of(pairs, logps.shape[0], logps.device, "logps")
    dtype = torch.promote_types(torch.promote_types(logps.dtype, ref_logps.dtype), torch.float32)
    logps, ref_logps = logps.to(dtype), ref_logps.detach().to(dtype)
    losses = listwise_losses(
        logps, ref_logps, comparisons.stages, beta=beta, f_divergence=f_divergence, f_alpha=f_alpha
    )
    return RankingLoss(losses, beta * (logps.detach() - ref_logps))


def listwise_losses(
    logps: Tensor,
    ref_logps: Tensor,
    stages: Sequence[Sequence[Sequence[int]]],
    *,
    beta: float,
    f_divergence: FDivergence,
    f_alpha: float,
) -> Tensor:
    """[G] of `plackett_luce_loss`. `stages` are of each group, and hold a response and all that it is preferred to."""
    scores = beta * f_divergence_scores(logps - ref_logps, f_divergence, f_alpha)
    flat = [stage for of_group in stages for stage in of_group]
    stage = _padded([stage[1:] for stage in flat], logps.device)
    best = torch.tensor([stage[0] for stage in flat], device=logps.device)
    others = torch.where(stage >= 0, scores[stage.clamp(min=0)], -torch.inf).logsumexp(1)
    of_stages = logistic_loss(scores[best] - others)  # [stages]
    number = iter(range(len(flat)))
    of_group = _padded([[next(number) for _ in each] for each in stages], logps.device)
    return torch.where(of_group >= 0, of_stages[of_group.clamp(min=0)], 0).sum(1)


def _padded(lists: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[lists, longest], -1 behind the end of each."""
    longest = max(map(len, lists))
    return torch.tensor([[*each, *[-1] * (longest - len(each))] for each in lists], device=device)


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__name__}"
    return f"{list(value.shape)} of {value.dtype} on {value.device}"
