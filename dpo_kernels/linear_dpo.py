"""The fused op: hidden states in, DPO loss out, with the fewest matrix products that its gradients allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.dispatch import choose, load
from dpo_kernels.impl import paths
from dpo_kernels.impl.interface import LogitTransform, Rows, accumulate_dtype
from dpo_kernels.logps import (
    check_linear_inputs,
    check_num_labelled,
    check_stats,
    linear_compute_dtype,
    linear_sequence_logps,
    named_stats,
    prepare_labels,
    sum_tokens,
)
from dpo_kernels.losses import (
    BATCH_LOSSES,
    PreferenceLoss,
    dpo_loss,
    length_desensitized_weights,
    validate_dpo_options,
    wpo_weights,
)
from dpo_kernels.ops import refuse_second_derivative
from dpo_kernels.rows import GatherRows, ScatterRows, check_finite, labelled_rows

DEFAULT_CHUNK_BYTES = 2**30


class LinearDPOOutput(NamedTuple):
    """The loss of B pairs, S = 2B sequences. Only `loss` carries a gradient. fp32 (fp64 for fp64 inputs)."""

    loss: Tensor
    """[] mean of `losses`."""
    losses: Tensor
    """[B]"""
    logps: Tensor
    """[S] log-probability of each response in nats, length-desensitized where `ld_alpha` is given."""
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
    loss_type: str | Sequence[str]
    loss_weights: Sequence[float] | None
    label_smoothing: float
    f_divergence: str
    f_alpha: float
    discopop_tau: float
    ld_alpha: float | None
    use_weighting: bool
    mean_chosen_length: Tensor | float | None
    ignore_index: int
    wanted_stats: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def stats(self) -> list[str]:
        """What was asked for, and what the loss itself needs."""
        needed = ["log_sum_sq_probs"] if self.use_weighting and "log_sum_sq_probs" not in self.wanted_stats else []
        return [*self.wanted_stats, *needed]


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
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    discopop_tau: float = 0.05,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    mean_chosen_length: Tensor | float | None = None,
    stats: Sequence[str] = (),
    num_labelled: int | None = None,
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> LinearDPOOutput:
    """DPO loss (arXiv 2305.18290, Eq. 7, and its variants) straight from hidden states, without the `[S, T, V]` logits.

    Equivalent to `dpo_loss` on the log-probabilities of `linear_sequence_logps`, averaged over the pairs; see there for
    the formulas. What differs is the work, counted in matrix products of [N, H] by [H, V] for N labelled positions:

    - nothing requires a gradient: 1;
    - the head (`weight`, `bias`) is frozen: 2;
    - the head is trained: 3. Whole pairs are taken in groups whose logits fit in `chunk_bytes`, and all gradients are
      formed in the forward and kept until the backward multiplies them by the incoming one: a second backward is an
      error, and bf16 gradients round a second time unless that factor is a power of two. Several groups make a CUDA
      device wait for their sizes;
    - the head is trained and the loss is not a mean over pairs ("aot", "aot_unpaired"), or a single pair exceeds
      `chunk_bytes`, or the products are in fp16 (whose gradients must be formed after the loss scale), or the call is
      being compiled: 4, within a few tiles of memory.

    Args:
        hidden: [S, T, H] floating point; rows 0..B-1 chosen, B..2B-1 rejected. hidden[s, t] predicts labels[s, t].
        weight: [V, H], same dtype as `hidden` (any under autocast).
        labels: [S, T] integers in [0, V), or `ignore_index` on prompt and padding.
        ref_logps: [S] log-probabilities of the same responses under the reference model, in nats; with `ld_alpha`,
            length-desensitized alike.
        bias, logit_scale, softcap, temperature, ignore_index, shift, stats, num_labelled, impl: as in
            `linear_sequence_logps`.
        beta, loss_type, loss_weights, label_smoothing, f_divergence, f_alpha, discopop_tau: as in `dpo_loss`.
        ld_alpha: in [0, 1]: weight of the tokens beyond the shorter response's length (LD-DPO, arXiv 2409.06411).
        use_weighting: weigh each pair by how likely the policy makes it (WPO, arXiv 2406.11827, Eq. 2).
        mean_chosen_length: for "sft" on a part of a larger batch: the mean number of chosen tokens in all of it. These
            pairs' own if None.
        chunk_bytes: what the logits of one group, and a dW accumulator in fp32 where the head is of lower precision and
            there are several groups, may take together; 1 GiB if None. A single group keeps the logits of H rows (H / 2
            in half precision) in the memory of dW instead. 0 always takes the path of 4 products.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value; a label outside the vocabulary or a hidden
            state that is not finite, with its sequence and position.
    """
    check_linear_inputs(hidden, weight, labels, bias, logit_scale, softcap, temperature)
    check_num_labelled(num_labelled)
    check_stats(stats)
    _check_pairs(hidden, ref_logps, chunk_bytes)
    options = _LossOptions(
        beta, loss_type, loss_weights, label_smoothing, f_divergence, f_alpha, discopop_tau, ld_alpha, use_weighting,
        mean_chosen_length, ignore_index, tuple(stats),
    )  # fmt: skip
    checked = options._asdict()
    del checked["mean_chosen_length"], checked["ignore_index"], checked["wanted_stats"]
    validate_dpo_options(**checked)
    impl = choose(impl, hidden.device)
    compute_dtype = linear_compute_dtype(hidden, weight)
    ref_logps = ref_logps.detach().to(accumulate_dtype(compute_dtype))
    labels, _ = prepare_labels(labels, None, ignore_index, shift)
    transform = LogitTransform(float(logit_scale), softcap, float(temperature))

    head_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if (
        torch.is_grad_enabled()
        and head_trained
        and torch.float16 not in (compute_dtype, weight.dtype, hidden.dtype)
        and not BATCH_LOSSES.intersection(options.names)
        and not torch.compiler.is_compiling()
    ):
        rows = labelled_rows(labels, weight.shape[0], ignore_index, num_labelled)
        budget = DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes
        groups = _plan_groups(rows, labels, weight, accumulate_dtype(compute_dtype), budget, impl)
        if groups is not None:
            rows = _pair_major(rows, labels.shape[0] // 2)
            x = GatherRows.apply(hidden, *rows)
            check_finite(x.detach(), rows, waits=num_labelled is None)
            grouped = _Grouped(rows, labels, ref_logps, groups, transform, compute_dtype, options, impl)
            found = _GroupedLoss.apply(x, weight, bias, grouped)
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
        impl=impl,
    )
    for_wpo = out.stats["log_sum_sq_probs"] if use_weighting else None
    loss, logps = _pair_losses(out.token_logps, for_wpo, labels, ref_logps, options)
    return LinearDPOOutput(
        loss.losses.mean(),
        loss.losses.detach(),
        logps.detach(),
        out.num_tokens,
        loss.chosen_rewards,
        loss.rejected_rewards,
        {name: out.stats[name] for name in stats},
    )


def transform_options(transform: LogitTransform) -> dict[str, Any]:
    return {"logit_scale": transform.scale, "softcap": transform.softcap, "temperature": transform.temperature}


def _check_pairs(hidden: Tensor, ref_logps: Tensor, chunk_bytes: int | None) -> None:
    sequences = hidden.shape[0]
    if sequences == 0 or sequences % 2:
        raise ValueError(f"hidden: expected an even number of sequences, chosen then rejected, got {sequences}")
    if not isinstance(ref_logps, Tensor):
        raise ValueError(f"ref_logps: expected a tensor, got {type(ref_logps).__name__}")
    if ref_logps.shape != (sequences,):
        raise ValueError(f"ref_logps: expected shape [{sequences}], got {tuple(ref_logps.shape)}")
    if not ref_logps.is_floating_point():
        raise ValueError(f"ref_logps: expected a floating point dtype, got {ref_logps.dtype}")
    if ref_logps.device != hidden.device:
        raise ValueError(f"ref_logps: expected device {hidden.device}, that of hidden, got {ref_logps.device}")
    if chunk_bytes is not None and not chunk_bytes >= 0:
        raise ValueError(f"chunk_bytes: expected None or a number of bytes >= 0, got {chunk_bytes}")


def _pair_losses(
    token_logps: Tensor,
    log_sum_sq_probs: Tensor | None,
    labels: Tensor,
    ref_logps: Tensor,
    options: _LossOptions,
) -> tuple[PreferenceLoss, Tensor]:
    """Losses of b pairs from [2b, T] token log-probabilities, chosen first; and the log-probabilities [2b] they use."""
    plain = sum_tokens(token_logps)
    logps = plain
    if options.ld_alpha is not None:
        weights = length_desensitized_weights(labels, options.ld_alpha, ignore_index=options.ignore_index)
        logps = sum_tokens(token_logps * weights.to(token_logps.dtype))
    pair_weights = None
    if log_sum_sq_probs is not None:
        pair_weights = wpo_weights(token_logps, log_sum_sq_probs, labels, ignore_index=options.ignore_index)
    lengths = (labels != options.ignore_index).sum(1)
    loss = dpo_loss(
        *logps.chunk(2),
        *ref_logps.chunk(2),
        beta=options.beta,
        loss_type=options.loss_type,
        loss_weights=options.loss_weights,
        label_smoothing=options.label_smoothing,
        f_divergence=options.f_divergence,
        f_alpha=options.f_alpha,
        discopop_tau=options.discopop_tau,
        chosen_lengths=lengths.chunk(2)[0],
        rejected_lengths=lengths.chunk(2)[1],
        mean_chosen_length=options.mean_chosen_length,
        sft_chosen_logps=plain.chunk(2)[0],
        pair_weights=pair_weights,
    )
    return loss, logps


class _Group(NamedTuple):
    rows: slice  # of the rows in pair-major order
    pairs: slice


def _pair_major(rows: Rows, pairs: int) -> Rows:
    """Rows sorted by pair, chosen before rejected, then by position."""
    order = torch.argsort(rows.sequence % pairs * 2 + rows.sequence // pairs, stable=True)
    return Rows(rows.sequence[order], rows.position[order])


def _plan_groups(
    rows: Rows, labels: Tensor, weight: Tensor, dtype: torch.dtype, chunk_bytes: int, impl: str
) -> list[_Group] | None:
    """Whole pairs in groups whose logits fit in `chunk_bytes`; None if that cannot be, or there is nothing to group."""
    n, pairs = rows.sequence.shape[0], labels.shape[0] // 2
    row_bytes = weight.shape[0] * dtype.itemsize
    if n == 0 or chunk_bytes == 0:
        return None
    free = paths.rows_kept_in_dw(load(impl), n, weight, dtype) if weight.requires_grad else 0
    if (n - free) * row_bytes <= chunk_bytes:
        return [_Group(slice(0, n), slice(0, pairs))]
    if weight.requires_grad and weight.dtype != dtype:
        chunk_bytes -= weight.numel() * dtype.itemsize
    budget = chunk_bytes // row_bytes
    sizes = torch.bincount(rows.sequence % pairs, minlength=pairs).tolist()
    if max(sizes) > budget:
        return None
    groups, first_row, first_pair, size = [], 0, 0, 0
    for pair, more in enumerate([*sizes, budget + 1]):
        if size + more > budget:
            if size:
                groups.append(_Group(slice(first_row, first_row + size), slice(first_pair, pair)))
            first_row, first_pair, size = first_row + size, pair, 0
        size += more
    return groups


class _Grouped(NamedTuple):
    """What path C needs beside its differentiable inputs."""

    rows: Rows
    labels: Tensor
    ref_logps: Tensor
    groups: list[_Group]
    transform: LogitTransform
    compute_dtype: torch.dtype
    options: _LossOptions
    impl: str


class _GroupedLoss(torch.autograd.Function):
    """Path C. The loss is a mean over pairs, so what each row weighs in it is known as soon as its pair's logits are,
    and the gradients are formed while these are at hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, g: _Grouped) -> tuple[Tensor, ...]:
        sequences, length = g.labels.shape
        pairs = sequences // 2
        y = g.labels[g.rows.sequence, g.rows.position]
        num_tokens = (g.labels != g.options.ignore_index).sum(1)
        options = g.options
        if options.mean_chosen_length is None:
            options = options._replace(mean_chosen_length=num_tokens[:pairs].sum() / pairs)
        # A pair without labelled tokens is in no group's rows, but in a group's pairs: groups cover all pairs.
        losses, chosen_rewards, rejected_rewards = x.new_empty(3, pairs, dtype=g.ref_logps.dtype)
        logps = losses.new_empty(sequences)
        table = x.new_zeros(len(options.wanted_stats), sequences, length, dtype=g.ref_logps.dtype)

        of_wpo = options.stats.index("log_sum_sq_probs") if options.use_weighting else 0

        def coefficients(i: int, row_logps: Tensor, stats: Tensor) -> Tensor:
            rows, of = g.groups[i]
            both = [of, slice(of.start + pairs, of.stop + pairs)]
            size = of.stop - of.start
            sequence, position = g.rows.sequence[rows], g.rows.position[rows]
            table[:, sequence, position] = stats[: len(table)].to(table.dtype)
            local = sequence % pairs - of.start + sequence // pairs * size
            shape = torch.Size((2 * size, length))
            # hooks of the caller's, such as a checkpoint's, are for what the backward needs: this graph ends here
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                leaf = row_logps.detach().requires_grad_()
                loss, group_logps = _pair_losses(
                    ScatterRows.apply(leaf, local, position, shape),
                    ScatterRows.apply(stats[of_wpo], local, position, shape) if options.use_weighting else None,
                    torch.cat([g.labels[s] for s in both]),
                    torch.cat([g.ref_logps[s] for s in both]),
                    options,
                )
                (dlogp,) = torch.autograd.grad(loss.losses.sum() / pairs, leaf)
            losses[of], chosen_rewards[of], rejected_rewards[of] = (t.detach() for t in loss)
            for s, part in zip(both, group_logps.detach().chunk(2), strict=True):
                logps[s] = part
            return dlogp

        with torch.autocast(x.device.type, enabled=False):
            ctx.grads = paths.linear_logps_grouped(
                load(g.impl),
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
            )
        ctx.mark_non_differentiable(losses, logps, num_tokens, chosen_rewards, rejected_rewards, table)
        ctx.set_materialize_grads(False)
        return losses.mean(), losses, logps, num_tokens, chosen_rewards, rejected_rewards, table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
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
