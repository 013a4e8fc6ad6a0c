"""The fused op: hidden states in, DPO loss out, with the fewest matrix products that its gradients allow."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor

from dpo_kernels.comparisons import Comparisons, Groups, comparisons_of
from dpo_kernels.dispatch import check_impl, check_runs, load
from dpo_kernels.impl import paths
from dpo_kernels.impl.interface import LogitTransform, Rows, accumulate_dtype
from dpo_kernels.listwise import listwise_losses
from dpo_kernels.logps import (
    check_head_is_finite,
    check_linear_inputs,
    check_num_labelled,
    check_numbers,
    check_predictors,
    check_stats,
    check_switches,
    check_transform,
    linear_compute_dtype,
    linear_sequence_logps,
    named_stats,
    prepare_labels,
    refuse_transforms,
    sum_tokens,
)
from dpo_kernels.losses import (
    BATCH_LOSSES,
    LISTWISE_LOSSES,
    PreferenceLoss,
    check_finite_logps,
    length_desensitized_weights,
    loss_names,
    losses_of_pairs,
    validate_dpo_options,
    wpo_weights,
)
from dpo_kernels.ops import refuse_second_derivative
from dpo_kernels.options import (
    Differentiable,
    FDivergence,
    Impl,
    LossOptions,
    LossType,
    Stat,
    explain_unknown,
    is_at_hand,
)
from dpo_kernels.pair_groups import Group, group_major, plan_groups
from dpo_kernels.parallel import VocabularyShards, head_here
from dpo_kernels.rows import ScatterRows, check_finite, labelled_rows, rows_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DEFAULT_CHUNK_BYTES = 2**30
DIFFERENTIABLE = frozenset(get_args(Differentiable))


class LinearDPOOutput(NamedTuple):
    """The loss of B pairs among S sequences, in fp32 (fp64 for fp64 inputs). A gradient through `losses` and `logps` is
    right if it was asked for by `differentiable`, and where the path that is taken has it; else it is an error in the
    backward. None goes through the rest."""

    loss: Tensor
    """[] mean of `losses`, in which each counts as much as its weight says."""
    losses: Tensor
    """[B], unweighted; of "plackett_luce" [G], of each group."""
    logps: Tensor
    """[S] log-probability of each response in nats, its tokens weighted by `token_weights` and `ld_alpha`."""
    num_tokens: Tensor
    """[S] int64: labelled positions."""
    chosen_rewards: Tensor
    """[B] beta * (logps - ref_logps) of the chosen responses."""
    rejected_rewards: Tensor
    """[B] the same of the rejected ones."""
    stats: dict[str, Tensor]
    """{name: [S, T]} what was asked for, 0 or False at positions without a label."""


class _LossOptions(NamedTuple):
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
    def stats(self) -> list[Stat]:
        """What was asked for, and what the loss itself needs."""
        needed: Stat = "log_sum_sq_probs"
        is_missing = self.use_weighting and needed not in self.wanted_stats
        return [*self.wanted_stats, needed] if is_missing else [*self.wanted_stats]


@explain_unknown
def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    shift: bool = False,
    beta: float = 0.1,
    loss_type: LossType | Sequence[LossType] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    f_divergence: FDivergence = "reverse_kl",
    f_alpha: float = 0.5,
    discopop_tau: float = 0.05,
    rpo_alpha: float | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    mean_chosen_length: Tensor | float | None = None,
    pairs: Sequence[tuple[int, int]] | Tensor | None = None,
    token_weights: Tensor | None = None,
    pair_weights: Tensor | None = None,
    lengths: Tensor | None = None,
    differentiable: Sequence[Differentiable] = (),
    stats: Sequence[Stat] = (),
    num_labelled: int | None = None,
    chunk_bytes: int | None = None,
    check_hidden: bool = True,
    predictors: Tensor | None = None,
    group: ProcessGroup | None = None,
    impl: Impl = "auto",
) -> LinearDPOOutput:
    """DPO loss of hidden states and the labels that they predict: aligned, not shifted, unless `shift` says so.

    That of arXiv 2305.18290, Eq. 7, and its variants, straight from hidden states, without the `[S, T, V]` logits.
    Equivalent to `dpo_loss` on the log-probabilities of `linear_sequence_logps`, averaged over the pairs; see there for
    the formulas. What differs is the work, counted in matrix products of [N, H] by [H, V] for N labelled positions:

    - nothing requires a gradient: 1;
    - the head (`weight`, `bias`) is frozen: 2;
    - the head is trained: 3. Whole pairs, or groups, are taken in parts whose logits (exponentials in bf16 where
      kernels store no logits) fit in `chunk_bytes`, and all
      gradients are formed in the forward and kept until the backward multiplies them by the incoming one: a second
      backward is an error, and bf16 gradients round a second time unless that factor is a power of two. Several parts
      make a CUDA device wait for their sizes;
    - the head is trained and the loss is not a mean over pairs ("aot", "aot_unpaired"), or a single pair exceeds
      `chunk_bytes`, or the products are in fp16 (whose gradients must be formed after the loss scale), or the call is
      being compiled, or something beside the loss is `differentiable`: 4, within a few tiles of memory.

    Args:
        hidden: [S, T, H] floating point; rows 0..B-1 chosen, B..2B-1 rejected, unless `pairs` says otherwise.
            hidden[s, t] predicts labels[s, t], or what lies where `predictors` say.
        weight: [V, H], same dtype as `hidden` (any under autocast); sharded as in `linear_sequence_logps`, with one
            exchange a part in the path of 3 products.
        labels: [S, T] integers in [0, V), or `ignore_index` on prompt and padding.
        ref_logps: [S] log-probabilities of the same responses under the reference model, in nats; with `ld_alpha` or
            `token_weights`, weighted alike. For no reference, zeros.
        bias, logit_scale, softcap, temperature, ignore_index, shift, stats, num_labelled, check_hidden, predictors,
            group, impl: as in `linear_sequence_logps`.
        beta, loss_type, loss_weights, label_smoothing, f_divergence, f_alpha, discopop_tau, rpo_alpha: as in
            `dpo_loss`.
        ld_alpha: in [0, 1]: weight of the tokens beyond the shorter response's length (LD-DPO, arXiv 2409.06411).
        use_weighting: weigh each pair by how likely the policy makes it (WPO, arXiv 2406.11827, Eq. 2).
        mean_chosen_length: for "sft" on a part of a larger batch: the mean number of chosen tokens in all of it. These
            pairs' own if None. Pairs count as in the loss, by their weights.
        pairs: B times (chosen, rejected), numbers of sequences: then S is any number, and a sequence, which is
            computed once, may be in several pairs, as the answers of a ranking are. Sequences that pairs connect are a
            group, G of them in the order of their first sequences. On the host; a tensor on a device is waited for.
        token_weights: [S, T], aligned with `labels`, finite and at least 0: weight of each position's log-probability
            in that of the response. What "ipo", "sigmoid_norm" and "sft" divide by, and what `ld_alpha` and WPO count,
            are labelled positions, whatever they weigh. Positions without a label may hold anything.
        lengths: [S] what "ipo", "sigmoid_norm" and `rpo_alpha` divide by instead, in tokens. With `shift` the first
            token of a sequence has no position that predicts it, and so does not count unless it is counted here.
        pair_weights: [B], finite and at least 0: the loss is sum_b w_b losses_b / sum_b w_b, or 0 if all are 0. Weight
            0 is as good as no such pair (if its hidden states are finite), weight 2 as good as the pair twice. Not for
            "aot" and "aot_unpaired"; for "plackett_luce" [G], one a group. Through neither kind of weights does a
            gradient go.
        differentiable: "logps", "losses" or both, if a gradient is to go through these too, such as that of a term of
            one's own. (The negative log-likelihood of chosen responses costs no product more as `rpo_alpha` or "sft".)
        chunk_bytes: what the logits of one group, and a dW accumulator in fp32 where the head is of lower precision and
            there are several groups, may take together; 1 GiB if None. A single group keeps the logits of H rows (H / 2
            in half precision) in the memory of dW instead. 0 always takes the path of 4 products. Of kernels that
            store exponentials in bf16 it is these: half as many bytes, and of nearly H rows in the memory of dW.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value; a label outside the vocabulary or a hidden
            state that is not finite, with its sequence and position; on the CPU a reference or a head that is not.
        TypeError: an argument that there is not; the message says what to write instead.
        RuntimeError: a transform of `torch.func`; in the backward, a gradient that this call does not have.
    """
    refuse_transforms(hidden, weight, bias, labels, ref_logps, token_weights, pair_weights, lengths)
    head = head_here(hidden, weight, labels, bias, group)
    weight, bias = head.weight, head.bias
    check_linear_inputs(hidden, weight, labels, bias, logit_scale, softcap, temperature, predictors, head.is_sharded)
    check_num_labelled(num_labelled)
    check_stats(stats)
    check_differentiable(differentiable)
    check_switches(ignore_index, shift=shift, use_weighting=use_weighting, check_hidden=check_hidden)
    check_predictors(hidden, labels, predictors, ignore_index, shift, num_labelled is None)
    comparisons = comparisons_of(pairs, labels.shape[0], hidden.device)
    _check_reference(labels, ref_logps)
    check_chunk_bytes(chunk_bytes)
    check_weights("token_weights", token_weights, hidden, tuple(labels.shape))
    check_weights("lengths", lengths, hidden, (labels.shape[0],))
    options = _LossOptions(
        beta, loss_type, loss_weights, label_smoothing, f_divergence, f_alpha, discopop_tau, rpo_alpha, ld_alpha,
        use_weighting, mean_chosen_length, ignore_index, tuple(stats),
    )  # fmt: skip
    checked = options._asdict()
    del checked["mean_chosen_length"], checked["ignore_index"], checked["wanted_stats"]
    validate_dpo_options(**checked)
    _check_listwise(options.names, use_weighting, rpo_alpha)
    _check_comparisons(comparisons, options)
    listwise = not LISTWISE_LOSSES.isdisjoint(options.names)
    losses = comparisons.groups if listwise else comparisons.pairs
    if listwise and isinstance(pair_weights, Tensor) and tuple(pair_weights.shape) != (losses,):
        raise ValueError(f"pair_weights: expected shape [{losses}], one a group, got {list(pair_weights.shape)}")
    check_weights("pair_weights", pair_weights, hidden, (losses,))
    if pair_weights is not None and BATCH_LOSSES.intersection(options.names):
        raise ValueError(
            f"pair_weights: expected None for loss_type {loss_type!r}, which sorts the batch, so that its losses are "
            "those of ranks and not of pairs"
        )
    check_runs(impl, hidden.device)
    compute_dtype = linear_compute_dtype(hidden, weight)
    dtype = accumulate_dtype(compute_dtype)
    waits = num_labelled is None
    labels, token_weights = labels_and_weights(labels, token_weights, ignore_index, shift, dtype, waits)
    if lengths is not None:
        _check_weight_values("lengths", lengths, waits)
    shares = None
    if pair_weights is not None:
        _check_weight_values("pair_weights", pair_weights, waits)
        shares = _shares(pair_weights).to(dtype)
    given = _Given(labels, ref_logps.detach().to(dtype), token_weights, lengths, shares, comparisons, listwise, losses)
    if check_hidden and is_at_hand(ref_logps):
        present = given.present()  # the numbers of others are nobody's
        numbers = ref_logps if present is None else ref_logps.masked_fill(~present, 0)
        check_finite_logps("ref_logps", numbers, "sequence")
    if mean_chosen_length is None:
        options = options._replace(mean_chosen_length=given.mean_chosen_length(ignore_index))
    cap = None if softcap is None else float(softcap)
    transform = LogitTransform(float(logit_scale), cap, float(temperature))

    head_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    dtypes = compute_dtype, weight.dtype, hidden.dtype
    if torch.is_grad_enabled() and head_trained and not differentiable and takes_groups(options.names, dtypes):
        rows = labelled_rows(labels, head.vocab, ignore_index, num_labelled)
        budget = DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes
        family = head.family(impl, "C", compute_dtype)
        exponentials = head.takes_exponentials(family, hidden.dtype, compute_dtype)
        groups = plan_groups(
            rows, comparisons, head.planned, dtype, budget, family,
            dweight=weight.requires_grad, exponentials=exponentials,
        )  # fmt: skip
        if groups is not None:
            rows = group_major(rows, comparisons)
            x = rows_of(hidden, rows, predictors)
            if check_hidden:
                check_finite(x.detach(), rows, waits)
            grouped = _Grouped(
                rows, given, groups, transform, compute_dtype, options, family, exponentials, head.shards
            )
            found = _GroupedLoss.apply(x, weight, bias, grouped)
            if check_hidden:
                check_head_is_finite(found[2], head)
            return LinearDPOOutput._make((*found[:-1], named_stats(stats, found[-1])))

    out = linear_sequence_logps(
        hidden,
        weight,
        labels,
        bias=bias,
        **transform_options(transform),
        ignore_index=ignore_index,
        stats=options.stats,
        num_labelled=num_labelled,
        check_hidden=check_hidden,
        predictors=predictors,
        group=head.shards,
        impl=impl,
    )
    for_wpo = out.stats["log_sum_sq_probs"] if use_weighting else None
    loss, logps = _pair_losses(out.token_logps, for_wpo, given._replace(shares=None), options)
    counted = loss if shares is None else _pair_losses(out.token_logps, for_wpo, given, options)[0]
    return LinearDPOOutput(
        given.mean(counted.losses),
        loss.losses,
        logps,
        out.num_tokens,
        loss.chosen_rewards,
        loss.rejected_rewards,
        {name: out.stats[name] for name in stats},
    )


def labels_and_weights(
    labels: Tensor, token_weights: Tensor | None, ignore_index: int, shift: bool, dtype: torch.dtype, waits: bool
) -> tuple[Tensor, Tensor | None]:
    """At the positions that predict them; weights are 0 where there is no label."""
    labels, token_weights = prepare_labels(labels, token_weights, ignore_index, shift)
    if token_weights is not None:
        token_weights = token_weights.to(dtype).masked_fill(labels == ignore_index, 0)
        _check_weight_values("token_weights", token_weights, waits)
    return labels, token_weights


def takes_groups(names: Sequence[LossType], dtypes: Sequence[torch.dtype]) -> bool:
    """Whether the loss is a mean over pairs, and its gradients may be formed before the incoming one is known."""
    return BATCH_LOSSES.isdisjoint(names) and torch.float16 not in dtypes and not torch.compiler.is_compiling()


def transform_options(transform: LogitTransform) -> dict[str, Any]:
    return {"logit_scale": transform.scale, "softcap": transform.softcap, "temperature": transform.temperature}


def check_options(options: Mapping[str, Any]) -> None:
    """Raises `ValueError` for options of `linear_dpo_loss`, those that can be judged without a tensor."""
    validate_dpo_options(**{name: value for name, value in options.items() if name in LossOptions.__annotations__})
    names = loss_names(options.get("loss_type", "sigmoid"))
    _check_listwise(names, options.get("use_weighting", False), options.get("rpo_alpha"))
    of_head = {"logit_scale": 1.0, "softcap": None, "temperature": 1.0}
    check_transform(**{name: options.get(name, default) for name, default in of_head.items()})
    switches = {name: options[name] for name in ("shift", "use_weighting", "check_hidden") if name in options}
    check_switches(options.get("ignore_index", -100), **switches)
    check_differentiable(options.get("differentiable", ()))
    check_stats(options.get("stats", ()))
    check_num_labelled(options.get("num_labelled"))
    check_chunk_bytes(options.get("chunk_bytes"))
    check_impl(options.get("impl", "auto"))


def check_differentiable(differentiable: object) -> None:
    names = differentiable if isinstance(differentiable, Collection) and not isinstance(differentiable, str) else None
    if names is None or not DIFFERENTIABLE.issuperset(names):
        raise ValueError(f"differentiable: expected some of {sorted(DIFFERENTIABLE)}, got {differentiable!r}")


def check_chunk_bytes(chunk_bytes: object) -> None:
    if chunk_bytes is None:
        return
    if not isinstance(chunk_bytes, (int, float)) or isinstance(chunk_bytes, bool) or not chunk_bytes >= 0:
        raise ValueError(f"chunk_bytes: expected None or a number of bytes >= 0, got {chunk_bytes!r}")


def _check_comparisons(comparisons: Comparisons, options: _LossOptions) -> None:
    """Raises `ValueError` for what is not defined where a response is in several pairs."""
    if isinstance(comparisons, Groups) and options.ld_alpha is not None:
        raise ValueError(
            "ld_alpha: expected None with pairs, in each of which a response would have another log-probability, got "
            f"{options.ld_alpha!r}"
        )


def _check_listwise(names: Sequence[str], use_weighting: bool, rpo_alpha: float | None) -> None:
    listwise = LISTWISE_LOSSES.intersection(names)
    if listwise and (len(names) > 1 or use_weighting or rpo_alpha is not None):
        raise ValueError(
            f"loss_type: expected {min(listwise)!r} alone, without use_weighting and rpo_alpha, since it is no mean "
            f"over pairs, got {list(names)!r}, use_weighting={use_weighting!r}, rpo_alpha={rpo_alpha!r}"
        )


def _check_reference(labels: Tensor, ref_logps: Tensor) -> None:
    sequences = labels.shape[0]
    if not isinstance(ref_logps, Tensor):
        hint = "; without a reference, zeros" if ref_logps is None else ""
        raise ValueError(f"ref_logps: expected a tensor [{sequences}], got {type(ref_logps).__name__}{hint}")
    if ref_logps.shape != (sequences,):
        raise ValueError(f"ref_logps: expected shape [{sequences}], got {tuple(ref_logps.shape)}")
    if not ref_logps.is_floating_point():
        raise ValueError(f"ref_logps: expected a floating point dtype, got {ref_logps.dtype}")
    if ref_logps.device != labels.device:
        raise ValueError(f"ref_logps: expected device {labels.device}, that of hidden, got {ref_logps.device}")


def check_weights(name: str, weights: Tensor | None, hidden: Tensor, shape: tuple[int, ...]) -> None:
    if weights is None:
        return
    check_numbers(name, weights, hidden, shape)
    if weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected weights that need no gradient, since none goes through them: detach them, or put the "
            "loss together from linear_sequence_logps and dpo_loss"
        )


def _check_weight_values(name: str, weights: Tensor, waits: bool) -> None:
    """As `labelled_rows` does: on a CUDA device that is not to be waited for, and in a compiled call, by an
    assertion."""
    wrong = ~((weights >= 0) & (weights < float("inf")))  # NaN is neither
    if torch.compiler.is_compiling():
        torch._assert_async(~wrong.any(), f"{name}: expected finite numbers of at least 0")
    elif waits or weights.device.type == "cpu":
        if wrong.any():
            place = torch.nonzero(wrong)[0].tolist()
            where = ", ".join(f"{what} {i}" for what, i in zip(_PLACES[name], place, strict=True))
            raise ValueError(
                f"{name}: expected finite numbers of at least 0, got {weights[tuple(place)].item()} for {where} "
                f"({int(wrong.sum())} such weight(s))"
            )
    elif weights.device.type == "cuda":
        torch._assert_async(~wrong.any(), f"{name}: expected finite numbers of at least 0")


_PLACES = {"token_weights": ("sequence", "position"), "pair_weights": ("pair",), "lengths": ("sequence",)}


def _shares(pair_weights: Tensor) -> Tensor:
    """[B] what part of the mean each pair, or group, is: they sum to 1, or to 0 if all weights are 0."""
    weights = pair_weights.to(torch.float32 if pair_weights.device.type == "mps" else torch.float64)
    largest = weights.max()
    weights = weights / torch.where(largest > 0, largest, 1)  # whose sum is finite
    return weights / weights.sum().clamp(min=1)


class _Given(NamedTuple):
    """What is known of the responses before their log-probabilities are, positions shifted to those that predict."""

    labels: Tensor  # [S, T]
    ref_logps: Tensor  # [S]
    token_weights: Tensor | None  # [S, T], 0 where there is no label
    lengths: Tensor | None  # [S]; None: labelled positions
    shares: Tensor | None  # of `_shares`, one a loss; None: all alike
    comparisons: Comparisons
    listwise: bool  # one loss a group, else one a pair
    losses: int  # in all, where these are a part

    def losses_of(self, of: slice) -> slice | Tensor:
        """What to index losses by, to have those of some groups."""
        return of if self.listwise else self.comparisons.pairs_of(of)

    def part(self, of: slice) -> _Given:
        """The same of some groups."""
        weights, lengths = (
            None if t is None else self.comparisons.take(t, of) for t in (self.token_weights, self.lengths)
        )
        return _Given(
            self.comparisons.take(self.labels, of),
            self.comparisons.take(self.ref_logps, of),
            weights,
            lengths,
            None if self.shares is None else self.shares[self.losses_of(of)],
            self.comparisons.part(of),
            self.listwise,
            self.losses,
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

    def mean_chosen_length(self, ignore_index: int) -> Tensor:
        """[] number of labelled positions."""
        lengths, _ = self.comparisons.split((self.labels != ignore_index).sum(1).to(self.ref_logps.dtype))
        if self.shares is None or self.listwise:
            return lengths.mean()
        return torch.where(self.shares.any(), (lengths * self.shares).sum(), lengths.mean())


def response_logps(
    token_logps: Tensor, labels: Tensor, token_weights: Tensor | None, ld_alpha: float | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """[S] sums of [S, T], without and with the weights that desensitize to length. Policy and reference are summed by
    this alike: where they are one model, rewards are 0 to the bit."""
    weighted = token_logps if token_weights is None else token_logps * token_weights
    plain = sum_tokens(weighted)
    if ld_alpha is None:
        return plain, plain
    weights = length_desensitized_weights(labels, ld_alpha, ignore_index=ignore_index)
    return plain, sum_tokens(weighted * weights.to(token_logps.dtype))


def _pair_losses(
    token_logps: Tensor, log_sum_sq_probs: Tensor | None, given: _Given, options: _LossOptions
) -> tuple[PreferenceLoss, Tensor]:
    """Losses from [S, T] token log-probabilities; and the log-probabilities [S] that they use."""
    labels, split = given.labels, given.comparisons.split
    plain, logps = response_logps(token_logps, labels, given.token_weights, options.ld_alpha, options.ignore_index)
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
        wpo = wpo_weights(*tokens, ignore_index=options.ignore_index)
    lengths = (labels != options.ignore_index).sum(1) if given.lengths is None else given.lengths
    chosen_lengths, rejected_lengths = split(lengths)
    loss = losses_of_pairs(
        *split(logps),
        chosen_ref_logps,
        rejected_ref_logps,
        beta=options.beta,
        loss_type=options.loss_type,
        loss_weights=options.loss_weights,
        label_smoothing=options.label_smoothing,
        f_divergence=options.f_divergence,
        f_alpha=options.f_alpha,
        discopop_tau=options.discopop_tau,
        rpo_alpha=options.rpo_alpha,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        mean_chosen_length=options.mean_chosen_length,
        sft_chosen_logps=split(plain)[0],
        pair_weights=wpo,
    )
    return loss, logps


class _Grouped(NamedTuple):
    """What path C needs beside its differentiable inputs."""

    rows: Rows
    given: _Given
    groups: list[Group]
    transform: LogitTransform
    compute_dtype: torch.dtype
    options: _LossOptions
    family: str
    exponentials: bool
    shards: VocabularyShards | None


class _GroupedLoss(torch.autograd.Function):
    """Path C. The loss is a mean over groups, so what each row weighs in it is known as soon as its group's logits are,
    and the gradients are formed while these are at hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, g: _Grouped) -> tuple[Tensor, ...]:
        labels, ref_logps = g.given.labels, g.given.ref_logps
        sequences, length = labels.shape
        comparisons, options = g.given.comparisons, g.options
        y = labels[g.rows.sequence, g.rows.position]
        y = y if g.shards is None else y - g.shards.first
        num_tokens = (labels != options.ignore_index).sum(1)
        # A pair without labelled tokens is in no part's rows, but in a part: parts cover all pairs.
        losses = ref_logps.new_empty(g.given.losses)
        chosen_rewards, rejected_rewards = ref_logps.new_empty(2, comparisons.pairs)
        logps = losses.new_empty(sequences)
        table = x.new_zeros(len(options.wanted_stats), sequences, length, dtype=ref_logps.dtype)

        of_wpo = options.stats.index("log_sum_sq_probs") if options.use_weighting else 0

        def coefficients(i: int, row_logps: Tensor, stats: Tensor) -> Tensor:
            rows, of = g.groups[i]
            part = g.given.part(of)
            sequence, position = g.rows.sequence[rows], g.rows.position[rows]
            table[:, sequence, position] = stats[: len(table)].to(table.dtype)
            local = comparisons.local(sequence, of)
            shape = part.labels.shape
            # hooks of the caller's, such as a checkpoint's, are for what the backward needs: this graph ends here
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                leaf = row_logps.detach().requires_grad_()
                loss, group_logps = _pair_losses(
                    ScatterRows.apply(leaf, local, position, shape),
                    ScatterRows.apply(stats[of_wpo], local, position, shape) if options.use_weighting else None,
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
                shards=g.shards,
            )
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
        if grads[0].device.type == "cpu" and grads[0] == 1:  # on other devices looking would be waiting
            return (*formed, None)
        return (*(None if grad is None else grad.mul_(grads[0]) for grad in formed), None)
