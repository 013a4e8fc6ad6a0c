"""Losses from the log-probabilities of tokens, and path C, which forms their gradients while logits are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.comparisons import Comparisons, Halves
from dpo_kernels.dispatch import finds_rows, load
from dpo_kernels.impl import paths
from dpo_kernels.impl.interface import LogitTransform, PairTables, Rows, TileKernels
from dpo_kernels.listwise import listwise_losses
from dpo_kernels.logps import sum_tokens
from dpo_kernels.losses import (
    LENGTH_NORMALIZED_LOSSES,
    Pairs,
    PreferenceLoss,
    compared,
    length_desensitized_weights,
    logistic_slope,
    loss_names,
    losses_of,
    weighted_losses,
    wpo_weights,
)
from dpo_kernels.ops import refuse_second_derivative
from dpo_kernels.options import FDivergence, LossType, Stat
from dpo_kernels.pair_groups import Group
from dpo_kernels.parallel import VocabularyShards
from dpo_kernels.rows import LabelledRows, hidden_gradient
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
    def weighted(self) -> list[tuple[LossType, float]]:
        return weighted_losses(self.loss_type, self.loss_weights)

    @property
    def is_logistic(self) -> bool:
        """Whether it is DPO's own loss."""
        plain = self.f_divergence == "reverse_kl" and self.rpo_alpha is None and not self.use_weighting
        return plain and self.weighted == [("sigmoid", 1)]

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
    num_tokens: Tensor | None  # [S] int64: labelled positions; None until they are `counted`
    ref_logps: Tensor  # [S]
    token_weights: Tensor | None  # [S, T], 0 where there is no label
    lengths: Tensor | None  # [S]; None: labelled positions
    shares: Tensor | None  # of `_shares`, one a loss; None: all alike
    comparisons: Comparisons
    listwise: bool  # one loss a group, else one a pair
    losses: int  # in all, where these are a part
    whole: Whole | None  # of the sequences, if other ranks have more of them

    def counted(self, ignore_index: int) -> Given:
        return self if self.num_tokens is not None else self._replace(num_tokens=(self.labels != ignore_index).sum(1))

    def losses_of(self, of: slice) -> slice | Tensor:
        """What to index losses by, to have those of some groups."""
        return of if self.listwise else self.comparisons.pairs_of(of)

    def part(self, of: slice) -> Given:
        """The same of some groups."""
        take = self.comparisons.take
        optional = (self.num_tokens, self.token_weights, self.lengths)
        num_tokens, weights, lengths = (None if t is None else take(t, of) for t in optional)
        return Given(
            take(self.labels, of),
            num_tokens,
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

    def slopes(self, losses: Tensor) -> Tensor:
        """The gradient of this mean."""
        return losses.new_full(losses.shape, 1 / self.losses) if self.shares is None else self.shares

    def mean_chosen_length(self) -> Tensor:
        """[] number of labelled positions."""
        assert self.num_tokens is not None
        lengths, _ = self.comparisons.split(self.num_tokens.to(self.ref_logps.dtype))
        if self.shares is None or self.listwise:
            return lengths.mean()
        return torch.where(self.shares.any(), (lengths * self.shares).sum(), lengths.mean())


class ResponseWeights(NamedTuple):
    """What tokens weigh in the log-probability of their response, without and with what desensitizes to length."""

    given: Tensor | None  # [S, T], in both; None: all alike
    by_length: Tensor | None  # [S, T], in the second alone; None: all alike

    def sums(self, token_logps: Tensor, whole: Whole | None) -> tuple[Tensor, Tensor]:
        """[S] both log-probabilities from [S, T]. Policy and reference are summed by this alike: where they are one
        model, rewards are 0 to the bit."""
        weighted = token_logps if self.given is None else token_logps * self.given
        plain = sum_tokens(weighted, whole)
        return plain, plain if self.by_length is None else sum_tokens(weighted * self.by_length, whole)

    def sums_of_rows(
        self, k: TileKernels, family: str, logps: Tensor, at: Rows, token_logps: Tensor, whole: Whole | None
    ) -> tuple[Tensor, Tensor]:
        """The same from [N] of path C, which go to their positions of `token_logps`."""
        if whole is None and self.by_length is None and finds_rows(family):
            sums = k.sum_rows(logps, at, token_logps, self.given)
            return sums, sums
        token_logps[at.sequence, at.position] = logps
        return self.sums(token_logps, whole)

    def slopes(self, dplain: Tensor | None, dlogps: Tensor, at: Rows) -> Tensor:
        """[N] the gradient of rows from those [S] of both: one and the same where both are one."""
        d = dlogps.index_select(0, at.sequence)
        if self.by_length is not None:
            d = d * self.by_length[at.sequence, at.position]
            d = d if dplain is None else dplain.index_select(0, at.sequence) + d
        return d if self.given is None else d * self.given[at.sequence, at.position]


def response_weights(
    labels: Tensor,
    token_weights: Tensor | None,
    ld_alpha: float | None,
    ignore_index: int,
    whole: Whole | None,
    dtype: torch.dtype,
) -> ResponseWeights:
    if ld_alpha is None:
        return ResponseWeights(token_weights, None)
    by_length = length_desensitized_weights(labels, ld_alpha, ignore_index=ignore_index, whole=whole)
    return ResponseWeights(token_weights, by_length.to(dtype))


def pair_losses(
    token_logps: Tensor, log_sum_sq_probs: Tensor | None, given: Given, options: LossSettings
) -> tuple[PreferenceLoss, Tensor]:
    """Losses from [S, T] token log-probabilities; and the log-probabilities [S] that they use."""
    plain, logps = weights_of(given, options).sums(token_logps, given.whole)
    wpo = None if log_sum_sq_probs is None else pair_weights(token_logps, log_sum_sq_probs, given, options)
    return losses_of_logps(plain, logps, wpo, given, options)


def weights_of(given: Given, options: LossSettings) -> ResponseWeights:
    return response_weights(
        given.labels, given.token_weights, options.ld_alpha, options.ignore_index, given.whole, given.ref_logps.dtype
    )


def pair_weights(token_logps: Tensor, log_sum_sq_probs: Tensor, given: Given, options: LossSettings) -> Tensor:
    """[B] of WPO."""
    split, whole = given.comparisons.split, given.whole
    tokens = (torch.cat(split(t)) for t in (token_logps, log_sum_sq_probs, given.labels))
    of_pairs = None if whole is None else whole.of(lambda t: torch.cat(split(t)))
    return wpo_weights(*tokens, ignore_index=options.ignore_index, whole=of_pairs)


def losses_of_logps(
    plain: Tensor, logps: Tensor, wpo: Tensor | None, given: Given, options: LossSettings
) -> tuple[PreferenceLoss, Tensor]:
    """Losses from both log-probabilities [S] of `ResponseWeights`, which may be one tensor; and the second as they use
    it. `wpo`: [B] what pairs are weighed by."""
    one = plain is logps
    if (present := given.present()) is not None:  # the slope of a loss may be infinite where its weight is 0
        logps = torch.where(present, logps, logps.detach())
        plain = logps if one else torch.where(present, plain, plain.detach())
    if given.listwise:
        divergence: Any = {"f_divergence": options.f_divergence, "f_alpha": options.f_alpha}
        losses = listwise_losses(logps, given.ref_logps, given.comparisons.stages, beta=options.beta, **divergence)
        rewards = options.beta * (logps.detach() - given.ref_logps)
        return PreferenceLoss(losses, *given.comparisons.split(rewards)), logps
    return losses_of(pairs_of(plain, logps, given, options), options.weighted, wpo), logps


def pairs_of(plain: Tensor, logps: Tensor, given: Given, options: LossSettings) -> Pairs:
    split = given.comparisons.split
    lengths: tuple[Tensor | None, Tensor | None] = (None, None)
    if options.divides_by_lengths:
        in_tokens = given.num_tokens if given.lengths is None else given.lengths
        assert in_tokens is not None
        lengths = split(in_tokens)
    return compared(
        *split(logps),
        *split(given.ref_logps),
        beta=options.beta,
        losses_and_weights=options.weighted,
        label_smoothing=options.label_smoothing,
        f_divergence=options.f_divergence,
        f_alpha=options.f_alpha,
        discopop_tau=options.discopop_tau,
        rpo_alpha=options.rpo_alpha,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        mean_chosen_length=options.mean_chosen_length,
        sft_chosen_logps=None if plain is logps else split(plain)[0],
    )


def losses_and_slopes(
    plain: Tensor, logps: Tensor, wpo: Tensor | None, given: Given, options: LossSettings
) -> tuple[PreferenceLoss, Tensor | None, Tensor]:
    """The losses of some groups, of log-probabilities without a graph, and the gradients of the whole mean with respect
    to both, [S]; None of the first where the losses are of the second alone."""
    if options.is_logistic and given.shares is None:  # what autograd would do, without a graph
        pairs = pairs_of(plain, logps, given, options)
        d = options.beta * (logistic_slope(pairs.margins) * (1 / given.losses))
        return losses_of(pairs, options.weighted, None), None, given.comparisons.joined(d, -d)
    # hooks of the caller's, such as a checkpoint's, are for what the backward needs: this graph ends here
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        leaves = [t.detach().requires_grad_() for t in ([logps] if plain is logps else [plain, logps])]
        loss, _ = losses_of_logps(leaves[0], leaves[-1], wpo, given, options)
        slopes = torch.autograd.grad(loss.losses, leaves, given.slopes(loss.losses), materialize_grads=True)
    return loss._replace(losses=loss.losses.detach()), slopes[0], slopes[-1]


def pair_tables(given: Given, options: LossSettings, family: str, token_logps: Tensor) -> PairTables | None:
    """To be written by a kernel that compares pairs; None where PyTorch does that, for there is none of this loss."""
    is_plain = given.shares is None and given.whole is None and isinstance(given.comparisons, Halves)
    if not (is_plain and options.is_logistic and options.ld_alpha is None and finds_rows(family)):
        return None
    new, (s,), pairs = given.ref_logps.new_empty, given.ref_logps.shape, given.losses
    return PairTables(
        token_logps, given.token_weights, given.ref_logps, new(s, dtype=torch.int64), new(s), new(s), new(pairs),
        new(pairs), new(pairs), new(()),
    )  # fmt: skip


class Grouped(NamedTuple):
    """What path C needs beside its differentiable inputs. Parts cover all pairs: one without labelled tokens is in no
    part's rows, but in a part."""

    x: Tensor  # [N, H] hidden states of the rows
    rows: LabelledRows
    given: Given
    groups: list[Group]
    transform: LogitTransform
    compute_dtype: torch.dtype
    options: LossSettings
    family: str
    exponentials: bool  # are kept in the place of logits
    shards: VocabularyShards | None
    token_logps: Tensor  # [S, T], 0 where there is no label, to be written
    stats: Tensor  # [K, S, T] likewise, of what was asked for
    pairs: PairTables | None  # of `pair_tables`

    def joined(self, parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Losses, rewards of chosen and of rejected ones, and log-probabilities: of all groups, from those of each."""
        if len(parts) == 1:
            return parts[0]
        given, comparisons, ref_logps = self.given, self.given.comparisons, self.given.ref_logps
        losses, logps = ref_logps.new_empty(given.losses), torch.empty_like(ref_logps)
        chosen_rewards, rejected_rewards = ref_logps.new_empty(2, comparisons.pairs)
        for (_, of, _), part in zip(self.groups, parts, strict=True):
            of_pairs = comparisons.pairs_of(of)
            losses[given.losses_of(of)], chosen_rewards[of_pairs], rejected_rewards[of_pairs] = part[:3]
            comparisons.put(logps, of, part[3])
        return losses, chosen_rewards, rejected_rewards, logps


class GroupedLoss(torch.autograd.Function):
    """Path C. The loss is a mean over groups, so what each row weighs in it is known as soon as its group's logits are,
    and the gradients are formed while these are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, g: Grouped) -> tuple[Tensor, ...]:
        options, comparisons, k = g.options, g.given.comparisons, load(g.family)
        y = g.rows.y if g.shards is None else g.rows.y - g.shards.first
        parts: list[tuple[Tensor, ...]] = []

        def coefficients(i: int, row_logps: Tensor, stats: Tensor) -> Tensor:
            rows, of, _ = g.groups[i]
            part, at, token_logps = g.given, g.rows.at, g.token_logps
            if len(g.groups) > 1:
                at = Rows(at.sequence[rows], at.position[rows])
            if len(g.stats):
                g.stats[:, at.sequence, at.position] = stats[: len(g.stats)].to(g.stats.dtype)
            if g.pairs is not None:
                return k.compare(row_logps, at, g.pairs, of, options.beta)
            if len(g.groups) > 1:  # of sequences that are numbered anew
                part, at = part.part(of), at._replace(sequence=comparisons.local(at.sequence, of))
                token_logps = row_logps.new_zeros(part.labels.shape)
            weights = weights_of(part, options)
            plain, logps = weights.sums_of_rows(k, g.family, row_logps, at, token_logps, part.whole)
            wpo = None
            if options.use_weighting:
                log_sum_sq_probs = torch.zeros_like(token_logps)
                log_sum_sq_probs[at.sequence, at.position] = stats[options.stats.index("log_sum_sq_probs")]
                wpo = pair_weights(token_logps, log_sum_sq_probs, part, options)
            loss, dplain, dlogps = losses_and_slopes(plain, logps, wpo, part, options)
            parts.append((*loss, logps))
            return weights.slopes(dplain, dlogps, at)

        with _without_autocast(g.x.device.type):
            ctx.grads = paths.linear_logps_grouped(
                k,
                g.x,
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
        if (found := g.pairs) is None:
            losses, chosen_rewards, rejected_rewards, logps = g.joined(parts)
            loss = g.given.mean(losses)
        else:
            losses, logps, loss = found.losses, found.logps, found.loss
            chosen_rewards, rejected_rewards = found.chosen_rewards, found.rejected_rewards
        ctx.family, ctx.shape = g.family, hidden.shape
        ctx.places = (g.rows.at, g.rows.slots) if ctx.needs_input_grad[0] else None
        ctx.mark_non_differentiable(chosen_rewards, rejected_rewards)
        ctx.set_materialize_grads(False)
        return loss, losses, logps, chosen_rewards, rejected_rewards

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
        places, ctx.places = ctx.places, None
        # on other devices looking would be waiting
        if grads[0].device.type != "cpu" or grads[0].item() != 1:
            for grad in formed:
                if grad is not None:
                    load(ctx.family).scale_(grad, grads[0])
        dx, dweight, dbias = formed
        return None if dx is None else hidden_gradient(dx, ctx.shape, *places), dweight, dbias, None


def _without_autocast(device: str) -> AbstractContextManager[None]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
