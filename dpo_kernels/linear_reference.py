"""The reference's log-probabilities, computed as `linear_dpo_loss` computes the policy's, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpo_kernels.comparisons import comparisons_of
from dpo_kernels.dispatch import check_runs, is_fused, load
from dpo_kernels.grouped_loss import response_weights
from dpo_kernels.impl import paths
from dpo_kernels.impl.interface import LogitTransform, accumulate_dtype
from dpo_kernels.linear_dpo import (
    DEFAULT_CHUNK_BYTES,
    check_weights,
    labels_and_weights,
    takes_groups,
)
from dpo_kernels.logps import (
    SequenceLogps,
    check_linear_inputs,
    check_num_labelled,
    check_predictors,
    linear_compute_dtype,
)
from dpo_kernels.losses import loss_names
from dpo_kernels.options import Impl, LossType
from dpo_kernels.pair_groups import group_major, plan_groups
from dpo_kernels.parallel import head_here
from dpo_kernels.rows import check_finite, find_rows, rows_of
from dpo_kernels.sequence_parallel import check_parts, in_step, of_operands, ranks_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GRADIENTS = ("hidden", "weight", "bias")


@in_step
@torch.no_grad()
def linear_reference_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    gradients: Sequence[str],
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    shift: bool = False,
    loss_type: LossType | Sequence[LossType] = "sigmoid",
    pairs: Sequence[tuple[int, int]] | Tensor | None = None,
    ld_alpha: float | None = None,
    token_weights: Tensor | None = None,
    num_labelled: int | None = None,
    chunk_bytes: int | None = None,
    check_hidden: bool = True,
    predictors: Tensor | None = None,
    group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    impl: Impl = "auto",
) -> SequenceLogps:
    """Log-probabilities of S responses under a reference that is scored in the same step as the policy, without a
    gradient.

    A sum of floating-point numbers depends on its order, and each path of `linear_dpo_loss` has one that suits it:
    between two of them a response of thousands of tokens differs in the last digits, and with it rewards that ought to
    be 0. This takes tiles, groups and sums as the policy's call does. Where policy and reference are one model, and see
    one batch, rewards are 0 and the sigmoid loss is log 2, to the bit; in fp64 only if the policy's call
    asks neither for `differentiable` nor for statistics, with which its sums are others. What it costs is one matrix
    product, as in `linear_sequence_logps`, from which it differs by rounding.

    Args:
        hidden, weight, labels: as in `linear_dpo_loss`, of the reference.
        gradients: of which of "hidden", "weight", "bias" the policy's call forms a gradient; none where that is
            evaluated only. Where no gradient of the head is, sequences need not be pairs.
        ld_alpha, token_weights, loss_type, pairs, chunk_bytes: what the policy's call is given.
        bias, logit_scale, softcap, temperature, ignore_index, shift, num_labelled, check_hidden, predictors, group,
            sequence_group, impl: as in `linear_sequence_logps`.

    Raises:
        ValueError: as in `linear_sequence_logps`, or an unknown name in `gradients`.
    """
    ranks = ranks_of(sequence_group)
    check_parts(ranks, shift, weight, group)
    head = head_here(
        hidden, weight, labels, bias, group, logit_scale=logit_scale, softcap=softcap, temperature=temperature,
        ignore_index=ignore_index, shift=shift, gradients=gradients, pairs=pairs, chunk_bytes=chunk_bytes,
        predictors=predictors,
    )  # fmt: skip
    weight, bias = head.weight, head.bias
    check_linear_inputs(hidden, weight, labels, bias, logit_scale, softcap, temperature, predictors, head.is_sharded)
    check_predictors(predictors, shift)
    check_num_labelled(num_labelled, labels, shift)
    check_weights("token_weights", token_weights, hidden, tuple(labels.shape))
    if isinstance(gradients, str) or not set(gradients) <= set(GRADIENTS):
        raise ValueError(f"gradients: expected some of {list(GRADIENTS)}, got {gradients!r}")
    check_runs(impl, hidden.device)
    compute_dtype = linear_compute_dtype(hidden, weight)
    dtype = accumulate_dtype(compute_dtype)
    waits = num_labelled is None
    labels, token_weights = labels_and_weights(labels, token_weights, ignore_index, shift, dtype, waits)
    transform = LogitTransform(float(logit_scale), softcap, float(temperature))
    names = loss_names(loss_type)

    groups, exponentials = None, False
    of_head, dweight = {"weight", "bias"}.intersection(gradients), "weight" in gradients
    comparisons = None
    if of_head or ld_alpha is not None or pairs is not None:
        comparisons = comparisons_of(pairs, labels.shape[0], hidden.device)
    in_b = bool(gradients) and not of_head
    family = head.family(impl, "D" if of_head else "B" if in_b else "A", compute_dtype)
    rows = find_rows(family, hidden, labels, head.vocab, ignore_index, num_labelled, predictors)
    whole = None
    if ranks is not None:
        if check_hidden:
            check_finite(rows_of(hidden, rows), rows, waits)
        whole = ranks.agree(
            labels != ignore_index,
            **of_operands(hidden, weight, bias, logit_scale, softcap, temperature),
            gradients=sorted(gradients),
            loss_type=names,
            pairs=pairs,
            ld_alpha=ld_alpha,
            chunk_bytes=chunk_bytes,
            impl=f"{head.family(impl, 'C', compute_dtype)} in {compute_dtype}",
        )
    if comparisons and of_head and takes_groups(names, (compute_dtype, weight.dtype, hidden.dtype)):
        budget = DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes
        in_groups = head.family(impl, "C", compute_dtype)
        counts = None if ranks is None else ranks.counts
        exponentials = ranks is None and head.takes_exponentials(in_groups, hidden.dtype, compute_dtype)
        groups = plan_groups(
            rows.at, comparisons, head.planned, dtype, budget, in_groups,
            dweight=dweight, exponentials=exponentials, counts=counts,
        )  # fmt: skip
        family = family if groups is None else in_groups
    if groups is not None:
        assert comparisons is not None
        rows = group_major(rows, comparisons, groups)
    x, y = rows_of(hidden, rows), rows.y
    if check_hidden:
        check_finite(x, rows, waits)
    shards = head.shards
    operands = load(family), x, weight, bias, y if shards is None else y - shards.first, transform
    with torch.autocast(hidden.device.type, enabled=False):
        if groups is not None:  # path C
            of_rows = [group.rows for group in groups]
            found = paths.linear_logps_as_grouped(
                *operands, of_rows, compute_dtype=compute_dtype, dweight=dweight, exponentials=exponentials,
                stored=groups[0].stored, shards=shards,
            )  # fmt: skip
        else:  # path B, or A, which is path D's forward too
            found = paths.linear_logps_fwd(
                *operands, compute_dtype=compute_dtype, as_with_dhidden=in_b, fused=is_fused(family), shards=shards
            ).logp
    token_logps, _ = rows.tables(labels.shape, 0, found)
    weights = response_weights(labels, token_weights, ld_alpha, ignore_index, whole, token_logps.dtype)
    if groups is not None:
        _, logps = weights.sums_of_rows(load(family), family, found, rows.at, token_logps, whole)
    else:
        token_logps[rows.at.sequence, rows.at.position] = found
        _, logps = weights.sums(token_logps, whole)
    num_tokens = (labels != ignore_index).sum(1) if whole is None else whole.num_tokens
    return SequenceLogps(logps, num_tokens, token_logps, {})
