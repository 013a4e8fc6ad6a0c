"""The eager oracle: the textbook computation, with the whole logits, in any precision. For tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


def eager_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """[S, T, V] logits in the dtype of the inputs."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def eager_token_logps(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """[S, T] log-probabilities of the labels, in fp32 or better as trainers compute them; 0 at ignored positions."""
    labelled = labels != ignore_index
    logits = logits if logits.dtype == torch.float64 else logits.float()
    picked = logits.log_softmax(-1).gather(-1, labels.masked_fill(~labelled, 0)[..., None])[..., 0]
    return picked.masked_fill(~labelled, 0.0)


def eager_stats(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> dict[str, Tensor]:
    """The four statistics [S, T] of `linear_sequence_logps`."""
    logp = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    labelled = labels != ignore_index
    stats = {
        "entropy": torch.special.entr(logp.exp()).sum(-1),
        "mean_logit": logits.to(logp.dtype).mean(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
    }
    stats = {name: value.masked_fill(~labelled, 0.0) for name, value in stats.items()}
    return {**stats, "is_top1": (logits.argmax(-1) == labels) & labelled}
