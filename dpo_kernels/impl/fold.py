"""What a sweep over the vocabulary remembers of each row, and what follows from it at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from dpo_kernels.options import Stat


class Fold:
    """Running statistics of N rows over vocabulary blocks, the label's entry held apart.

    The label never takes part in a row's running maximum m and sum s = sum_{v != y} exp(z_v - m). Then

        logp = -log1p(s exp(m - z_y)) where z_y > m        1 - p_y = -expm1(logp)

    keep their digits where the model is sure of the label, which is where DPO spends its time and where z_y - lse
    cancels. The tile kernels of an implementation update the fields below; `finish` reads them.
    """

    FIELDS = ("max", "target", "label_slope", "sum", "sum_z", "sum_ez", "sum_sq")

    def __init__(self, y: Tensor, dtype: torch.dtype, stats: Sequence[str]):
        self.y, self.names = y, tuple(stats)
        self.state = y.new_empty(len(self.FIELDS), *y.shape, dtype=dtype)
        """[7, N]: the fields, which are attributes too: views of it, made when one is first asked for."""
        self.argmax = y.new_empty(y.shape)
        """[N] int64: where the maximum is, the first of equal ones; kept for "is_top1" alone."""
        self.begin()

    def __getattr__(self, name: str) -> Any:
        if name not in self.FIELDS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.__dict__.update(zip(self.FIELDS, self.state.unbind(), strict=True))
        return self.__dict__[name]

    def begin(self) -> None:
        """Of no entries."""
        self.state.zero_()
        # finite, so that a block of -inf alone leaves no inf - inf; in fp32, which holds the logits of all but fp64
        self.max.fill_(torch.finfo(torch.float32).min)
        self.target.fill_(-math.inf)  # z_y
        self.label_slope.fill_(1.0)  # the softcap's part of dz/da at the label: 1 without one
        self.argmax.fill_(-1)

    def merge_(self, later: Fold) -> None:
        """Takes in what another sweep remembers of the same rows, over entries that come later in the vocabulary, with
        `argmax` counted alike. `later` is brought to the joint maximum."""
        is_later = later.max > self.max
        joint = torch.maximum(self.max, later.max)
        self._rescale_(joint)
        later._rescale_(joint)
        self.argmax.copy_(torch.where(is_later, later.argmax, self.argmax))
        # where the label is not, these are -inf and 1, and no slope exceeds 1
        self.target.copy_(torch.maximum(self.target, later.target))
        self.label_slope.copy_(torch.minimum(self.label_slope, later.label_slope))
        for mine, other in ((self.sum, later.sum), (self.sum_z, later.sum_z), (self.sum_ez, later.sum_ez)):
            mine.add_(other)
        self.sum_sq.add_(later.sum_sq)

    def _rescale_(self, maximum: Tensor) -> None:
        factor = torch.exp(self.max - maximum)
        # clamped: of no entries the maximum is the least number there is, and 0 times the difference is to be 0
        self.sum_ez.add_(self.sum * (self.max - maximum).clamp(min=-1e4)).mul_(factor)
        self.sum.mul_(factor)
        self.sum_sq.mul_(factor.square())
        self.max.copy_(maximum)

    def finish(self, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """logp [N], norm [2, N] and the statistics [K, N], in `dtype`; see `LinearLogps`."""
        lead = self.target - self.max
        self.logp = torch.where(
            lead > 0, -torch.log1p(self.sum * torch.exp(-lead)), lead - torch.log(self.sum + torch.exp(lead))
        )
        shift = torch.maximum(self.max, self.target)
        total = self.sum * torch.exp(self.max - shift) + torch.exp(self.target - shift)
        self.others = torch.exp(self.max - shift) / total
        """[N]: what exp(z - max) is multiplied by to be a probability."""
        log_prob_of_max = (self.max - shift) - total.log()
        values = []
        for name in self.names:
            if name == "entropy":
                # -sum p log p: the label's term, and the others' with z = max + (z - max)
                own = torch.where(self.logp == -math.inf, 0.0, -self.logp.exp() * self.logp)
                values.append(own - self.others * (self.sum_ez + self.sum * log_prob_of_max))
            elif name == "is_top1":
                # argmax takes the first of equal entries
                first = (self.target == self.max) & (self.y < self.argmax)
                values.append(((self.target > self.max) | first).to(self.max.dtype))
            elif name == "mean_logit":
                values.append(self.sum_z / vocab_size)
            else:
                values.append(torch.logaddexp(self.sum_sq.log() + 2 * log_prob_of_max, 2 * self.logp))
        stats = torch.stack(values) if values else self.max.new_empty(0, *self.max.shape)
        return self.logp.to(dtype), torch.stack([shift, total]).to(dtype), stats.to(dtype)


def stats_numbers(names: Sequence[str]) -> list[int]:
    """Of statistics, in `csrc/finish.h`."""
    return [get_args(Stat).index(name) for name in names]


class LazyFold(Fold):
    """A fold whose state comes to be when it is first asked for, so that nothing is launched for one that is finished
    without tiles."""

    def __init__(self, y: Tensor, dtype: torch.dtype, stats: Sequence[str]):
        self.y, self.names, self._dtype = y, tuple(stats), dtype

    def __getattr__(self, name: str) -> Any:
        if name not in ("state", "argmax"):
            return super().__getattr__(name)
        super().__init__(self.y, self._dtype, self.names)
        return self.__dict__[name]


class CompiledFold(Fold):
    """A fold that compiled code finishes."""

    norm: Tensor

    def empty_results(self, dtype: torch.dtype) -> list[Tensor]:
        """logp [N], norm [2, N] and the statistics [K, N], to be written."""
        n = self.y.shape[0]
        return [self.state.new_empty(shape, dtype=dtype) for shape in ((n,), (2, n), (len(self.names), n))]

    @property
    def others(self) -> Tensor:
        shift, total = self.norm.double()
        return torch.exp(self.max - shift) / total
