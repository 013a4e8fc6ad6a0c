"""The fused op: hidden states in, DPO loss out, with the fewest matrix products that its gradients allow."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor

from dpo_kernels.comparisons import Comparisons, Groups, comparisons_of
from dpo_kernels.dispatch import check_impl, check_runs
from dpo_kernels.grouped_loss import Given, Grouped, GroupedLoss, LossSettings, pair_losses, pair_tables
from dpo_kernels.impl.interface import LogitTransform, accumulate_dtype
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
)
from dpo_kernels.losses import (
    BATCH_LOSSES,
    LISTWISE_LOSSES,
    check_finite_logps,
    loss_names,
    validate_dpo_options,
)
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
from dpo_kernels.pair_groups import group_major, plan_groups
from dpo_kernels.parallel import Head, head_here, is_dtensor
from dpo_kernels.rows import check_finite, find_rows, rows_of
from dpo_kernels.sequence_parallel import check_parts, in_step, of_operands, ranks_of

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


@in_step
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
    sequence_group: ProcessGroup | None = None,
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
      make a CUDA device wait for their sizes. Exponentials that do not fit are computed again, at the cost of their
      share of a product;
    - the head is trained and the loss is not a mean over pairs ("aot", "aot_unpaired"), or the logits of a single pair
      exceed `chunk_bytes` (of exponentials: too few of them fit), or the products are in fp16 (whose gradients must be
      formed after the loss scale), or the call is being compiled, or something beside the loss is `differentiable`: 4,
      within a few tiles of memory.

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
        sequence_group: as in `linear_sequence_logps`: all of [S, T] are a rank's own, what is [S], [B] or [G] and all
            options are the same on all ranks, and so are the results but `stats`. All losses and options are those of
            whole sequences; for `ld_alpha` alone ranks have consecutive positions, in their order. Path C takes the
            same parts on all ranks, which fit on each of them.
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
            in half precision; on a GPU of all its rows or none) in the memory of dW instead. 0 always takes the path of
            4 products. Of kernels that store exponentials in bf16 it is these: half as many bytes, and of nearly H rows
            in the memory of dW. Where those of all rows and vocabulary entries do not fit, nor, faster, those of
            several groups, as many entries as do are stored: between 3 and 4 products; none, where there is less room
            than for 256 MiB of them.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value; a label outside the vocabulary or a hidden
            state that is not finite, with its sequence and position; on the CPU a reference or a head that is not.
        TypeError: an argument that there is not; the message says what to write instead.
        RuntimeError: a transform of `torch.func`; in the backward, a gradient that this call does not have.
    """
    refuse_transforms(hidden, weight, bias, labels, ref_logps, token_weights, pair_weights, lengths)
    ranks = ranks_of(sequence_group)
    check_parts(ranks, shift, weight, group)
    head = Head(weight, bias, None)  # as `head_here` says without ranks, before all options are named for these
    if group is not None or is_dtensor(weight) or is_dtensor(bias):
        head = head_here(
            hidden, weight, labels, bias, group, logit_scale=logit_scale, softcap=softcap, temperature=temperature,
            ignore_index=ignore_index, shift=shift, beta=beta, loss_type=loss_type, loss_weights=loss_weights,
            label_smoothing=label_smoothing, f_divergence=f_divergence, f_alpha=f_alpha, discopop_tau=discopop_tau,
            rpo_alpha=rpo_alpha, ld_alpha=ld_alpha, use_weighting=use_weighting, mean_chosen_length=mean_chosen_length,
            pairs=pairs, token_weights=token_weights, pair_weights=pair_weights, lengths=lengths, ref_logps=ref_logps,
            differentiable=differentiable, stats=stats, chunk_bytes=chunk_bytes, predictors=predictors,
        )  # fmt: skip
    weight, bias = head.weight, head.bias
    check_linear_inputs(hidden, weight, labels, bias, logit_scale, softcap, temperature, predictors, head.is_sharded)
    check_stats(stats)
    check_differentiable(differentiable)
    check_switches(ignore_index, shift=shift, use_weighting=use_weighting, check_hidden=check_hidden)
    check_num_labelled(num_labelled, labels, shift)
    check_predictors(predictors, shift)
    comparisons = comparisons_of(pairs, labels.shape[0], hidden.device)
    _check_reference(labels, ref_logps)
    check_chunk_bytes(chunk_bytes)
    check_weights("token_weights", token_weights, hidden, tuple(labels.shape))
    check_weights("lengths", lengths, hidden, (labels.shape[0],))
    options = LossSettings(
        beta, loss_type, loss_weights, label_smoothing, f_divergence, f_alpha, discopop_tau, rpo_alpha, ld_alpha,
        use_weighting, mean_chosen_length, ignore_index, tuple(dict.fromkeys(stats)),
    )  # fmt: skip
    validate_dpo_options(
        beta=beta, loss_type=loss_type, loss_weights=loss_weights, label_smoothing=label_smoothing,
        f_divergence=f_divergence, f_alpha=f_alpha, discopop_tau=discopop_tau, rpo_alpha=rpo_alpha, ld_alpha=ld_alpha,
        use_weighting=use_weighting,
    )  # fmt: skip
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
    given = Given(
        labels, None, ref_logps.detach().to(dtype), token_weights, lengths, shares, comparisons, listwise,
        losses, whole=None,
    )  # fmt: skip
    if check_hidden and is_at_hand(ref_logps):
        present = given.present()  # the numbers of others are nobody's
        numbers = ref_logps if present is None else ref_logps.masked_fill(~present, 0)
        check_finite_logps("ref_logps", numbers, "sequence")
    rows, family = None, head.family(impl, "C", compute_dtype)
    wanted = (hidden, labels, head.vocab, ignore_index, num_labelled, predictors, len(options.wanted_stats))
    if ranks is not None:
        rows = find_rows(family, *wanted)
        if check_hidden:
            check_finite(rows_of(hidden.detach(), rows), rows, waits)
        whole = ranks.agree(
            labels != ignore_index,
            **of_operands(hidden, weight, bias, logit_scale, softcap, temperature),
            ref_logps=ref_logps,
            **options._replace(wanted_stats=())._asdict(),
            pairs=pairs,
            pair_weights=pair_weights,
            lengths=lengths,
            differentiable=sorted(differentiable),
            chunk_bytes=chunk_bytes,
            impl=f"{family} in {compute_dtype}",
        )
        given = given._replace(num_tokens=whole.num_tokens, whole=whole)
    if mean_chosen_length is None and "sft" in options.names:
        given = given.counted(ignore_index)
        options = options._replace(mean_chosen_length=given.mean_chosen_length())
    cap = None if softcap is None else float(softcap)
    transform = LogitTransform(float(logit_scale), cap, float(temperature))

    head_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    dtypes = compute_dtype, weight.dtype, hidden.dtype
    if torch.is_grad_enabled() and head_trained and not differentiable and takes_groups(options.names, dtypes):
        if rows is None:
            rows = find_rows(family, *wanted)
        budget = DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes
        counts = None if ranks is None else ranks.counts
        exponentials = ranks is None and head.takes_exponentials(family, hidden.dtype, compute_dtype)
        groups = plan_groups(
            rows.at, comparisons, head.planned, dtype, budget, family,
            dweight=weight.requires_grad, exponentials=exponentials, counts=counts,
        )  # fmt: skip
        if groups is not None:
            rows = group_major(rows, comparisons, groups)
            x = rows.copy(hidden.detach())
            if check_hidden and ranks is None:  # else it was before they agreed
                check_finite(x, rows, waits)
            tables = rows.tables(labels.shape, len(options.wanted_stats), given.ref_logps)
            pairs_of_kernel = pair_tables(given, options, family, tables[0])
            if pairs_of_kernel is None:
                given = given.counted(ignore_index)
            grouped = Grouped(
                x, rows, given, groups, transform, compute_dtype, options, family, exponentials, head.shards, *tables,
                pairs_of_kernel,
            )  # fmt: skip
            loss, losses, logps, chosen, rejected = GroupedLoss.apply(hidden, weight, bias, grouped)
            if check_hidden:
                check_head_is_finite(logps, head)
            of_tokens = named_stats(options.wanted_stats, tables[1])
            num_tokens = given.num_tokens if pairs_of_kernel is None else pairs_of_kernel.num_tokens
            assert num_tokens is not None
            return LinearDPOOutput(loss, losses, logps, num_tokens, chosen, rejected, of_tokens)

    out = linear_sequence_logps(
        hidden,
        weight,
        labels,
        bias=bias,
        **transform_options(transform),
        ignore_index=ignore_index,
        stats=options.stats,
        num_labelled=num_labelled,
        check_hidden=check_hidden and ranks is None,
        predictors=predictors,
        group=head.shards,
        impl=impl,
    )
    given = given.counted(ignore_index)
    assert given.num_tokens is not None
    for_wpo = out.stats["log_sum_sq_probs"] if use_weighting else None
    loss, logps = pair_losses(out.token_logps, for_wpo, given._replace(shares=None), options)
    counted = loss if shares is None else pair_losses(out.token_logps, for_wpo, given, options)[0]
    if check_hidden and ranks is not None:  # of whole sequences, so that all ranks see it
        check_head_is_finite(logps.detach(), head)
    return LinearDPOOutput(
        given.mean(counted.losses),
        loss.losses,
        logps,
        given.num_tokens,
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


def _check_comparisons(comparisons: Comparisons, options: LossSettings) -> None:
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
