"""What an implementation of the fused log-probabilities provides. Implementations never import one another.

Dimensions: N labelled rows, H hidden size, V vocabulary size, K requested statistics. Every tensor that an
implementation receives is compacted: row n has a label in [0, V).

An implementation is a module with these functions (`torch.py` is the one to read first):

    linear_logps_fwd      paths A and B: hidden rows to log-probabilities, with the gradient of each if asked for
    linear_logps_bwd      path D: the gradients, with each tile of logits computed again
    linear_logps_grouped  path C: log-probabilities and gradients in one pass over groups of rows
    logps_fwd, logps_bwd_ path E: from logits that exist already
"""

from __future__ import annotations

from typing import NamedTuple

import torch

STATS = ("entropy", "is_top1", "mean_logit", "log_sum_sq_probs")


class LogitTransform(NamedTuple):
    """z = softcap(scale * a) / temperature with softcap(u) = cap * tanh(u / cap), for a = x.W + b."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def slope(self) -> float:
        """dz/da at a = 0; elsewhere softcap multiplies it by 1 - tanh(scale * a / cap)^2."""
        return self.scale / self.temperature


class Rows(NamedTuple):
    """Where the labelled positions lie in [S, T]."""

    sequence: torch.Tensor  # [N] int64
    position: torch.Tensor  # [N] int64


class LinearLogps(NamedTuple):
    """What a pass over the vocabulary leaves for each row, in fp32 (fp64 for fp64 inputs)."""

    logp: torch.Tensor  # [N]
    # [2, N]: a shift c near the largest logit, and sum_v exp(z_v - c). Apart, because lse = c + log(sum) in one number
    # rounds at the size of c, and every probability with it.
    norm: torch.Tensor
    stats: torch.Tensor  # [K, N], in the order asked for
    dhidden: torch.Tensor | None  # [N, H] d logp_n / d x_n, same dtype as logp


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, sums and log-probabilities: fp32, or fp64 for fp64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32
