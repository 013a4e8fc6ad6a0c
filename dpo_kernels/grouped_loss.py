"""Losses from the log-probabilities of tokens, and path C, which forms their gradients while logits are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.comparisons import Comparisons
from dpo_kernels.dispatch import load
from dpo_kernels.impl import paths
from dpo_kernels.impl.interface import LogitTransform
from dpo_kernels.listwise import listwise_losses
from dpo_kernels.logps import sum_tokens
from dpo_kernels.losses import (
    LENGTH_NORMALIZED_LOSSES,
    PreferenceLoss,
    length_desensitized_weights,
    loss_names,
    losses_of_pairs,
    weighted_losses,
    wpo_weights,
)
from dpo_kernels.ops import refuse_second_derivative
from dpo_kernels.options import FDivergence, LossType, Stat
from dpo_kernels.pair_groups import Group
from dpo_kernels.parallel import VocabularyShards
from dpo_kernels.rows import LabelledRows, ScatterRows
from dpo_kernels.sequence_parallel import Whole


class LossSettings(NamedTuple):
    beta: float
    loss_type: LossType | Sequence[LossType]
    loss_weights: Sequence[float] | None
    label_smoothing: float
    f_divergence: FDivergence
    f_alpha: float
    discopop_tau: float
    rpo_alpha: float | None
    ld_alpha: float | None
    use_weighting: bool
    mean_chosen_length: Tensor | float | None
    ignore_index: int
    wanted_stats: tuple[Stat, ...]

    @property
    def names(self) -> list[LossType]:
        return loss_names(self.loss_type)

    @property
    def divides_by_lengths(self) -> bool:
        return self.rpo_alpha is not None or not LENGTH_NORMALIZED_LOSSES.isdisjoint(self.names)

    @property
    def stats(self) -> list[Stat]:
        """What was asked for, and what the loss itself needs."""
        needed: Stat = "log_sum_sq_probs"
        is_missing = self.use_weighting and needed not in self.wanted_stats
        return [*self.wanted_stats, needed] if is_missing else [*self.wanted_stats]


class Given(NamedTuple):
    """What is known of the responses before their log-probabilities are, positions shifted to those that predict."""

    labels: Tensor  # [S, T]
    num_tokens: Tensor  # [S] int64: labelled positions
    ref_logps: Tensor  # [S]
    token_weights: Tensor | None  # [S, T], 0 where there is no label
    lengths: Tensor | None  # [S]; None: labelled positions
    shares: Tensor | None  # of `_shares`, one a loss; None: all alike
    comparisons: Comparisons
    listwise: bool  # one loss a group, else one a pair
    losses: int  # in all, where these are a part
    whole: Whole | None  # of the sequences, if other ranks have more of them

    def losses_of(self, of: slice) -> slice | Tensor:
        """What to index losses by, to have those of some groups."""
        return of if self.listwise else self.comparisons.pairs_of(of)

    def part(self, of: slice) -> Given:
        """The same of some groups."""
        take = self.comparisons.take
        weights, lengths = (None if t is None else take(t, of) for t in (self.token_weights, self.lengths))
        return Given(
            take(self.labels, of),
            take(self.num_tokens, of),
            take(self.ref_logps, of),
            weights,
            lengths,
            None if self.shares is None else self.shares[self.losses_of(of)],
            self.comparisons.part(of),
            self.listwise,
            self.losses,
            None if self.whole is None else self.whole.of(lambda t: take(t, of)),
        )

    def present(self) -> Tensor | None:
        """[S] bool: which sequences are in the mean; None: all of them."""
        if self.shares is None:
            return None
        if self.listwise:
            sequences = torch.arange(self.labels.shape[0], device=self.labels.device)
            return self.shares[self.comparisons.group_of(sequences)] > 0
        return self.comparisons.spread(self.shares) > 0

    def mean(self, losses: Tensor) -> Tensor:
        """[] what these losses are of the mean over all. Of one without weight nothing is in it, nor in the gradients
        of log-probabilities, finite or not."""
        if self.shares is None:
            return losses.sum() / self.losses
        return torch.where(self.shares > 0, losses * self.shares, 0).sum()

    def mean_chosen_length(self) -> Tensor:
        """[] number of labelled positions."""
        lengths, _ = self.comparisons.split(self.num_tokens.to(self.ref_logps.dtype))
        if self.shares is None or self.listwise:
            return lengths.mean()
        return torch.where(self.shares.any(), (lengths * self.shares).sum(), lengths.mean())


def response_logps(
    token_logps: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    ld_alpha: float | None,
    ignore_index: int,
    whole: Whole | None,
) -> tuple[Tensor, Tensor]:
    """[S] sums of [S, T], without and with the weights that desensitize to length. Policy and reference are summed by
    this alike: where they are one model, rewards are 0 to the bit."""
    weighted = token_logps if token_weights is None else token_logps * token_weights
    plain = sum_tokens(weighted, whole)
    if ld_alpha is None:
        return plain, plain
    weights = length_desensitized_weights(labels, ld_alpha, ignore_index=ignore_index, whole=whole)
    return plain, sum_tokens(weighted * weights.to(token_logps.dtype), whole)


def pair_losses(
    token_logps: Tensor, log_sum_sq_probs: Tensor | None, given: Given, options: LossSettings
) -> tuple[PreferenceLoss, Tensor]:
    """Losses from [S, T] token log-probabilities; and the log-probabilities [S] that they use."""
    labels, split, whole = given.labels, given.comparisons.split, given.whole
    plain, logps = response_logps(
        token_logps, labels, given.token_weights, options.ld_alpha, options.ignore_index, whole
    )
    if (present := given.present()) is not None:  # the slope of a loss may be infinite where its weight is 0
        plain, logps = (torch.where(present, t, t.detach()) for t in (plain, logps))
    chosen_ref_logps, rejected_ref_logps = split(given.ref_logps)
    if given.listwise:
        divergence: Any = {"f_divergence": options.f_divergence, "f_alpha": options.f_alpha}
        losses = listwise_losses(logps, given.ref_logps, given.comparisons.stages, beta=options.beta, **divergence)
        rewards = options.beta * (logps.detach() - given.ref_logps)
        return PreferenceLoss(losses, *split(rewards)), logps
    wpo = None
    if log_sum_sq_probs is not None:
        tokens = (torch.cat(split(t)) for t in (token_logps, log_sum_sq_probs, labels))
        of_pairs = None if whole is None else whole.of(lambda t: torch.cat(split(t)))
        wpo = wpo_weights(*tokens, ignore_index=options.ignore_index, whole=of_pairs)
    lengths: tuple[Tensor | None, Tensor | None] = (None, None)
    if options.divides_by_lengths:
        lengths = split(given.num_tokens if given.lengths is None else given.lengths)
    loss = losses_of_pairs(
        *split(logps),
        chosen_ref_logps,
        rejected_ref_logps,
        beta=options.beta,
        losses_and_weights=weighted_losses(options.loss_type, options.loss_weights),
        label_smoothing=options.label_smoothing,
        f_divergence=options.f_divergence,
        f_alpha=options.f_alpha,
        discopop_tau=options.discopop_tau,
        rpo_alpha=options.rpo_alpha,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        mean_chosen_length=options.mean_chosen_length,
        sft_chosen_logps=None if plain is logps else split(plain)[0],
        pair_weights=wpo,
    )
    return loss, logps


class Grouped(NamedTuple):
    """What path C needs beside its differentiable inputs."""

    rows: LabelledRows
    given: Given
    groups: list[Group]
    transform: LogitTransform
    compute_dtype: torch.dtype
    options: LossSettings
    family: str
    exponentials: bool  # are kept in the place of logits
    shards: VocabularyShards | None


class GroupedLoss(torch.autograd.Function):
    """Path C. The loss is a mean over groups, so what each row weighs in it is known as soon as its group's logits are,
    and the gradients are formed while these are at hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, g: Grouped) -> tuple[Tensor, ...]:
        labels, ref_logps = g.given.labels, g.given.ref_logps
        comparisons, options = g.given.comparisons, g.options
        y = g.rows.y if g.shards is None else g.rows.y - g.shards.first
        # A pair without labelled tokens is in no part's rows, but in a part: parts cover all pairs.
        losses = ref_logps.new_empty(g.given.losses)
        chosen_rewards, rejected_rewards = ref_logps.new_empty(2, comparisons.pairs)
        logps = losses.new_empty(labels.shape[0])
        _, table = g.rows.tables(labels.shape, len(options.wanted_stats), ref_logps)

        of_wpo = options.stats.index("log_sum_sq_probs") if options.use_weighting else 0

        def coefficients(i: int, row_logps: Tensor, stats: Tensor) -> Tensor:
            rows, of, _ = g.groups[i]
            part = g.given.part(of)
            sequence, position = (t[rows] for t in g.rows.at)
            if len(table):
                table[:, sequence, position] = stats[: len(table)].to(table.dtype)
            local = comparisons.local(sequence, of)
            shape = part.labels.shape
            # hooks of the caller's, such as a checkpoint's, are for what the backward needs: this graph ends here
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                leaf = row_logps.detach().requires_grad_()
                loss, group_logps = pair_losses(
                    ScatterRows.apply(leaf, local, position, row_logps.new_zeros(shape)),
                    ScatterRows.apply(stats[of_wpo], local, position, stats.new_zeros(shape))
                    if options.use_weighting
                    else None,
                    part,
                    options,
                )
                (dlogp,) = torch.autograd.grad(part.mean(loss.losses), leaf)
            losses[g.given.losses_of(of)] = loss.losses.detach()
            of_pairs = comparisons.pairs_of(of)
            chosen_rewards[of_pairs], rejected_rewards[of_pairs] = loss.chosen_rewards, loss.rejected_rewards
            comparisons.put(logps, of, group_logps.detach())
            return dlogp

        with torch.autocast(x.device.type, enabled=False):
            ctx.grads = paths.linear_logps_grouped(
                load(g.family),
                x.detach(),
                weight.detach(),
                None if bias is None else bias.detach(),
                y,
                g.transform,
                [group.rows for group in g.groups],
                coefficients,
                compute_dtype=g.compute_dtype,
                need=ctx.needs_input_grad[:3],
                stats=options.stats,
                exponentials=g.exponentials,
                stored=g.groups[0].stored,
                shards=g.shards,
            )
        num_tokens = g.given.num_tokens.clone()
        ctx.family = g.family
        ctx.mark_non_differentiable(num_tokens, chosen_rewards, rejected_rewards, table)
        ctx.set_materialize_grads(False)
        return g.given.mean(losses), losses, logps, num_tokens, chosen_rewards, rejected_rewards, table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        for name, grad in (("losses", grads[1]), ("logps", grads[2])):
            if grad is not None and grad.any():
                raise RuntimeError(
                    f"linear_dpo_loss: a gradient came through {name}, which this call has of the loss alone: pass "
                    f"differentiable=({name!r},), at the cost of one matrix product more, or detach {name}. The "
                    "negative log-likelihood of chosen responses is rpo_alpha or loss_type 'sft', which cost nothing"
                )
        if grads[0] is None:
            return None, None, None, None
        refuse_second_derivative()
        if ctx.grads is None:
            raise RuntimeError(
                "linear_dpo_loss: its gradients were formed in the forward and handed out by the first backward; for a "
                "second one pass chunk_bytes=0, which computes them again"
            )
        # In place: a second [V, H] would double the memory of the gradient.
        formed, ctx.grads = ctx.grads, None
        if grads[0].device.type == "cpu" and grads[0].item() == 1:  # on other devices looking would be waiting
            return (*formed, None)
        for grad in formed:
            if grad is not None:
                load(ctx.family).scale_(grad, grads[0])
        return (*formed, None)
