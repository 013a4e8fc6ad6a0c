"""Log-probabilities of whole sequences, from hidden states or from logits."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dpo_kernels import ops
from dpo_kernels.dispatch import Family, check_runs, choose, is_fused, load, sums_tokens
from dpo_kernels.impl.interface import STATS, LogitTransform
from dpo_kernels.linear_rows import LinearOptions, LinearTokenLogps
from dpo_kernels.options import Impl, Reduction, Stat, explain_unknown, is_at_hand
from dpo_kernels.parallel import (
    Head,
    VocabularyShards,
    check_shards_are_finite,
    head_here,
    is_dtensor,
)
from dpo_kernels.rows import check_finite, check_places, find_rows, rows_of, shift_labels
from dpo_kernels.sequence_parallel import SequenceRanks, Whole, check_parts, described, in_step, of_operands, ranks_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NUMBERS = (*DTYPES, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Numbers of a head that are summed at a time: a sum in another dtype may convert a copy first.
SUMMED_AT_A_TIME = 2**24


class SequenceLogps(NamedTuple):
    """Log-probabilities of S sequences of T positions, in nats."""

    logps: Tensor
    """[S] fp32 (fp64 for fp64 inputs): sum or mean of `token_logps` over labelled positions, 0 if there are none."""
    num_tokens: Tensor
    """[S] int64: labelled positions."""
    token_logps: Tensor
    """[S, T], same dtype as `logps`: log-probability of each label, 0 at ignored positions."""
    stats: dict[str, Tensor]
    """[S, T] each, without gradient, 0 (False) at ignored positions."""


@in_step
@explain_unknown
def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    reduction: Reduction = "sum",
    stats: Sequence[Stat] = (),
    num_labelled: int | None = None,
    check_hidden: bool = True,
    predictors: Tensor | None = None,
    group: ProcessGroup | VocabularyShards | None = None,
    sequence_group: ProcessGroup | None = None,
    impl: Impl = "auto",
) -> SequenceLogps:
    """Log-probabilities of hidden states' labels, aligned with what predicts them, not shifted, unless `shift` says so.

    Those of a language-model head, without the `[S, T, V]` logits. Equivalent to, with every logit in fp32 (fp64 for
    fp64 inputs) whatever the input dtype::

        logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature
        token_logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        token_logps = token_logps.masked_fill(labels == ignore_index, 0)
        logps = (token_weights * token_logps).sum(-1)

    Only labelled positions are computed. Differentiable with respect to `hidden`, `weight`, `bias` and `token_weights`,
    through `logps` and `token_logps` alike. Nothing requires a gradient: one pass over the vocabulary. `weight` and
    `bias` frozen: the gradient with respect to `hidden` comes out of the same pass (2 matrix products in all).
    Otherwise the backward computes each tile of logits again (4). Temporary memory is a few tiles (at most four; on a
    GPU up to 512 MiB of exponentials, or 256 of dlogits, in their place), and
    [N, H] for N labelled positions: their hidden states, and an fp32 gradient (of all positions, under torch.compile).
    Under autocast operands are rounded to the autocast dtype, logits stay fp32. There are no second derivatives.

    Args:
        hidden: [S, T, H] floating point, need not be contiguous. hidden[s, t] predicts labels[s, t].
        weight: [V, H], same dtype as `hidden` (any under autocast). Of a DTensor that is sharded on dimension 0 each
            rank computes its own entries, and nothing is gathered: all ranks of its mesh make the call, with the same
            hidden states, labels and options, and have the same results.
        labels: [S, T] integers in [0, V), or `ignore_index`.
        bias: [V], same dtype as `weight`, and sharded alike.
        logit_scale: multiplies the products before the softcap.
        softcap: > 0, or None for none.
        temperature: > 0, divides the logits last.
        token_weights: [S, T], weight of each position's log-probability in `logps`; aligned with `labels`.
        ignore_index: label of positions that do not count.
        shift: `labels` (and `token_weights`) are not shifted: labels[s, t] is the token at position t, as Hugging Face
            models take them, and hidden[s, t] predicts labels[s, t + 1].
        reduction: "sum", or "mean" over labelled positions.
        stats: any of "entropy" (nats), "is_top1" (bool: the label is the first largest logit), "mean_logit" (over the
            vocabulary) and "log_sum_sq_probs" (log sum_v p_v^2).
        num_labelled: number of positions that count, after the shift, where the host knows it. A CUDA device is then
            not waited for: labels are checked by assertions on it, and hidden states that are not finite give
            log-probabilities that are not.
        check_hidden: False: hidden states or a head that are not finite give log-probabilities that are not, and no
            error. A compiled call looks at hidden states all the same.
        predictors: [S, T] int64, where hidden states [R, U, H] do not lie as labels do, such as in packed rows: the
            place in their flat [R U] of what predicts labels[s, t]. Several labels may have the same one, of which no
            copy is made but that of labelled rows. Without `shift`; anything where there is no label.
        group: a process group whose ranks hold consecutive entries of the vocabulary: `weight` and `bias` are then
            plain tensors [V_r, H] and [V_r], of any number of entries on each rank, or none; labels are those of the
            whole vocabulary.
        sequence_group: a process group whose ranks each have a part of every sequence (context parallel): `hidden`,
            `labels`, `token_weights`, `predictors` and `num_labelled` are of the T_r positions here, of any number.
            `logps` and `num_tokens` are those of whole sequences, the same on all ranks to the bit; `token_logps` and
            `stats` are of the part. Each rank calls backward on the same loss, and gets the gradient of `hidden` at its
            own positions, and their share of those of `weight` and `bias`, which are to be summed over the group.
            Labels are aligned before they are split: without `shift`. Beside `group`, other ranks of the same head. The
            ranks agree on what they are given in one exchange, for which an accelerator is waited for.
        impl: "auto", "torch", "cpu", "triton" or "cuda". An explicit choice is never replaced by another.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value; a label outside the vocabulary or a hidden
            state that is not finite, with its sequence and position; on the CPU a head that is not.
        TypeError: an argument that there is not; the message says what to write instead.
        RuntimeError: a transform of `torch.func`, or a sharded head or `sequence_group` within a compiled graph.
    """
    refuse_transforms(hidden, weight, bias, labels, token_weights)
    ranks = ranks_of(sequence_group)
    check_parts(ranks, shift, weight, group)
    head = head_here(
        hidden, weight, labels, bias, group, logit_scale=logit_scale, softcap=softcap, temperature=temperature,
        ignore_index=ignore_index, shift=shift, stats=stats, predictors=predictors,
    )  # fmt: skip
    weight, bias = head.weight, head.bias
    check_linear_inputs(hidden, weight, labels, bias, logit_scale, softcap, temperature, predictors, head.is_sharded)
    check_switches(ignore_index, shift=shift, check_hidden=check_hidden)
    check_reduction(labels, token_weights, reduction, stats, num_labelled, shift)
    stats = tuple(dict.fromkeys(stats))
    check_runs(impl, hidden.device)
    compute_dtype = linear_compute_dtype(hidden, weight)
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    with_dhidden = torch.is_grad_enabled() and hidden.requires_grad and not trained
    family = head.family(impl, "D" if trained else "B" if with_dhidden else "A", compute_dtype)
    cap = None if softcap is None else float(softcap)
    transform = LogitTransform(float(logit_scale), cap, float(temperature))

    weighs = torch.is_grad_enabled() and token_weights is not None and token_weights.requires_grad
    in_parts = head.is_sharded or ranks is not None or torch.compiler.is_compiling()
    if is_fused(family) and not (trained or with_dhidden or weighs or in_parts):
        found = load(family).linear_token_logps(
            hidden, weight, bias, labels, transform, compute_dtype=compute_dtype, ignore_index=ignore_index,
            shift=shift, stats=stats, num_labelled=num_labelled, predictors=predictors,
        )  # fmt: skip
        if found is not None:
            # aligned without copies: what a last position predicts is not there
            first, last = int(shift), labels.shape[1] - shift
            weights = None if token_weights is None else token_weights[:, first:]
            out = _reduce(
                found.token_logps[:, :last], labels[:, first:].long(), weights, ignore_index, reduction, stats,
                found.stats, None, {}, family,
            )  # fmt: skip
            if check_hidden and (num_labelled is None or is_at_hand(found.broken)) and found.broken.item():
                aligned, _ = prepare_labels(labels, None, ignore_index, shift)
                rows = find_rows(family, hidden, aligned, head.vocab, ignore_index, None, predictors)
                check_finite(rows_of(hidden, rows), rows, waits=True)
            if check_hidden:
                check_head_is_finite(found.token_logps, head)
            return out._replace(token_logps=found.token_logps)
    check_predictors(predictors, shift)
    labels, token_weights = prepare_labels(labels, token_weights, ignore_index, shift)
    if torch.compiler.is_compiling():
        known = ops.UNKNOWN if num_labelled is None else num_labelled
        if predictors is not None:
            check_places(hidden, labels, predictors, ignore_index, num_labelled is None)
            hidden = hidden.flatten(0, 1)[predictors.masked_fill(labels == ignore_index, 0)]
        token_logps, _, values, _ = ops.linear_token_logps(
            hidden,
            weight,
            labels,
            bias,
            *transform,
            ignore_index,
            known,
            compute_dtype,
            list(stats),
            with_dhidden,
            family,
        )
    else:
        # Rows are compacted out here where their number may decide shapes: only [N, H] is saved for the backward.
        rows = find_rows(
            family, hidden, labels, head.vocab, ignore_index, num_labelled, predictors, stats=len(stats)
        )  # fmt: skip
        of = LinearOptions(
            transform, compute_dtype, stats, with_dhidden, family, head.shards, check_hidden, num_labelled is None
        )
        y = rows.y if head.shards is None else rows.y - head.shards.first
        token_logps, values = LinearTokenLogps.apply(hidden, weight, bias, y, rows, labels.shape, of)
        if check_hidden:
            check_head_is_finite(token_logps, head)
    same = {} if ranks is None else of_operands(hidden, weight, bias, logit_scale, softcap, temperature)
    return _reduce(token_logps, labels, token_weights, ignore_index, reduction, stats, values, ranks, same, family)


@in_step
@explain_unknown
def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    reduction: Reduction = "sum",
    stats: Sequence[Stat] = (),
    inplace_backward: bool = False,
    num_labelled: int | None = None,
    sequence_group: ProcessGroup | None = None,
    impl: Impl = "auto",
) -> SequenceLogps:
    """Log-probabilities of labels from logits that exist: aligned, not shifted, unless `shift` says so.

    Equivalent to `logits.float().log_softmax(-1)`, gathered at the labels and summed over each sequence, but reads the
    labelled rows once and allocates nothing of the logits' size in the forward. Differentiable with respect to
    `logits` and `token_weights`.

    Args:
        logits: [S, T, V] floating point, need not be contiguous. logits[s, t] predicts labels[s, t].
        labels: [S, T] integers in [0, V), or `ignore_index`.
        inplace_backward: the backward overwrites `logits` with their gradient and returns that memory, so no second
            [S, T, V] tensor exists. The logits must not be used afterwards; autograd notices if its own graph does.
        token_weights, ignore_index, shift, reduction, stats, num_labelled, sequence_group, impl: as in
            `linear_sequence_logps`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, or a label outside the vocabulary, with its
            sequence and position.
        TypeError: an argument that there is not; the message says what to write instead.
        RuntimeError: a transform of `torch.func`.
    """
    refuse_transforms(logits, labels, token_weights)
    ranks = ranks_of(sequence_group)
    check_parts(ranks, shift)
    check_labels(logits, labels, "logits", "[S, T, V]")
    check_switches(ignore_index, shift=shift, inplace_backward=inplace_backward)
    check_reduction(labels, token_weights, reduction, stats, num_labelled, shift)
    stats = tuple(dict.fromkeys(stats))
    if logits.shape[2] == 0:
        raise ValueError("logits: expected at least one vocabulary entry, got none")
    if inplace_backward and any(logits.stride(i) == 0 and logits.shape[i] > 1 for i in range(3)):
        raise ValueError("inplace_backward: expected logits whose elements share no memory, got an expanded view")
    family = choose(impl, logits.device, "E", logits.dtype, logits.shape[2])
    labels, token_weights = prepare_labels(labels, token_weights, ignore_index, shift)
    known = ops.UNKNOWN if num_labelled is None else num_labelled
    token_logps, _, values = ops.token_logps(logits, labels, ignore_index, known, list(stats), inplace_backward, family)
    same = {} if ranks is None else {"logits": described(logits, f"[S, T, {logits.shape[2]}]")}
    return _reduce(token_logps, labels, token_weights, ignore_index, reduction, stats, values, ranks, same, family)


def _reduce(
    token_logps: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    reduction: str,
    stats: Sequence[str],
    values: Tensor,
    ranks: SequenceRanks | None,
    same: Mapping[str, object],
    family: Family,
) -> SequenceLogps:
    """`same`: by the argument's name, what is so on all ranks."""
    by_kernel = ranks is None and sums_tokens(family) and not _has_tangent(token_weights)
    weights = None if token_weights is None else token_weights.to(token_logps.dtype)
    if weights is not None and (is_at_hand(weights) or not by_kernel):  # whatever it holds at ignored positions
        weights = weights.masked_fill(labels == ignore_index, 0)
    if weights is not None and is_at_hand(weights) and not torch.isfinite(weights).all():
        place = torch.nonzero(~torch.isfinite(weights))[0].tolist()
        raise ValueError(
            f"token_weights: expected finite numbers, got {weights[tuple(place)].item()} for sequence {place[0]}, "
            f"position {place[1]}"
        )
    if by_kernel:
        logps, num_tokens = ops.sum_tokens(token_logps, labels, weights, ignore_index, reduction == "mean", family)
        return SequenceLogps(logps, num_tokens, token_logps, named_stats(stats, values.detach()))
    weighted = token_logps if weights is None else token_logps * weights
    labelled = labels != ignore_index
    whole = None if ranks is None else ranks.agree(labelled, reduction=reduction, **same)
    num_tokens = labelled.sum(1) if whole is None else whole.num_tokens
    logps = sum_tokens(weighted, whole)
    if reduction == "mean":
        logps = logps / num_tokens.clamp(min=1)
    return SequenceLogps(logps, num_tokens, token_logps, named_stats(stats, values.detach()))


def _has_tangent(weights: Tensor | None) -> bool:
    """Of forward-mode differentiation, which PyTorch's own operators go on with."""
    if weights is None or torch.compiler.is_compiling():
        return False
    return torch.autograd.forward_ad.unpack_dual(weights).tangent is not None


def named_stats(names: Sequence[str], values: Tensor) -> dict[str, Tensor]:
    """Of the table [K, S, T] that implementations fill."""
    return {name: values[i] > 0 if name == "is_top1" else values[i] for i, name in enumerate(names)}


def sum_over_vocabulary(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """[H] and []: the logits of a hidden state x have the sum x . weight_sum + bias_sum, without being computed."""
    blocks = weight.split(max(1, SUMMED_AT_A_TIME // weight.shape[1]))
    weight_sum = torch.stack([block.sum(0, dtype=dtype) for block in blocks]).sum(0)
    return weight_sum, 0.0 if bias is None else bias.sum(dtype=dtype)


def sum_tokens(token_logps: Tensor, whole: Whole | None = None) -> Tensor:
    """[S, T] to [S], summed in fp64 where the device has it, so that a long response loses nothing; over the `whole`
    sequences, if other ranks have more of them."""
    wide = token_logps.dtype if token_logps.device.type == "mps" else torch.float64
    sums = token_logps.sum(1, dtype=wide)
    return (sums if whole is None else whole.join(sums)).to(token_logps.dtype)


def prepare_labels(
    labels: Tensor, token_weights: Tensor | None, ignore_index: int, shift: bool
) -> tuple[Tensor, Tensor | None]:
    """int64 labels and their weights, shifted to the positions that predict them."""
    labels = labels.long()
    if not shift:
        return labels, token_weights
    if token_weights is not None:
        sequences, length = labels.shape
        token_weights = torch.cat([token_weights[:, 1:], token_weights.new_zeros(sequences, min(1, length))], dim=1)
    return shift_labels(labels, ignore_index), token_weights


def linear_compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that operands of the matrix products are rounded to: autocast's where it is on, else the inputs'."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"weight: expected the dtype of hidden, {hidden.dtype}, got {weight.dtype}; cast one of them (autocast "
            "does, unless hidden is fp64)"
        )
    return hidden.dtype


def check_labels(scores: Tensor, labels: Tensor, name: str, shape: str, predictors: Tensor | None = None) -> None:
    """`scores` (hidden states or logits) and `labels` fit each other, or the latter fit `predictors`."""
    _check_tensor(name, scores)
    _check_tensor("labels", labels)
    if scores.dim() != 3:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(scores.shape)}")
    if scores.dtype not in DTYPES:
        raise ValueError(f"{name}: expected float64, float32, bfloat16 or float16, got {scores.dtype}")
    if predictors is not None:
        if labels.dim() != 2:
            raise ValueError(f"labels: expected shape [S, T], got {tuple(labels.shape)}")
        check_numbers("predictors", predictors, scores, tuple(labels.shape))
    elif labels.shape != scores.shape[:2]:
        raise ValueError(f"labels: expected shape {tuple(scores.shape[:2])} to fit {name}, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected an integer dtype, got {labels.dtype}")
    if labels.device != scores.device:
        raise ValueError(f"labels: expected device {scores.device}, that of {name}, got {labels.device}")


def check_linear_inputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    predictors: Tensor | None = None,
    sharded: bool = False,
) -> None:
    """The arguments that every function over hidden states and a head has in common. `sharded`: other ranks have
    more of the weight, and here may be none."""
    check_labels(hidden, labels, "hidden", "[S, T, H]", predictors)
    _check_tensor("weight", weight)
    if is_dtensor(weight):
        raise ValueError("weight: expected the whole head, as a plain tensor, got a DTensor")
    h, of_head = hidden.shape[2], weight.shape
    if len(of_head) == 2 and of_head[1] != h == of_head[0]:
        raise ValueError(
            f"hidden: expected hidden states [S, T, {of_head[1]}] for weight {tuple(of_head)}, got "
            f"{tuple(hidden.shape)}, which are logits: those are for sequence_logps"
        )
    if len(of_head) != 2 or of_head[1] != h:
        raise ValueError(f"weight: expected shape [V, {h}] to fit hidden, got {tuple(of_head)}")
    if of_head[0] == 0 and not sharded:
        raise ValueError("weight: expected at least one vocabulary entry, got none")
    if weight.device != hidden.device:
        raise ValueError(f"weight: expected device {hidden.device}, that of hidden, got {weight.device}")
    if bias is not None:
        _check_tensor("bias", bias)
    if bias is not None and bias.shape != of_head[:1]:
        raise ValueError(f"bias: expected shape [{of_head[0]}], got {tuple(bias.shape)}")
    if bias is not None and (bias.device, bias.dtype) != (weight.device, weight.dtype):
        raise ValueError(
            f"bias: expected device {weight.device} and dtype {weight.dtype}, those of weight, "
            f"got {bias.device} and {bias.dtype}"
        )
    if h == 0:
        raise ValueError("hidden: expected a hidden size of at least 1, got 0")
    check_transform(logit_scale, softcap, temperature)


def check_predictors(predictors: Tensor | None, shift: bool) -> None:
    """What can be said of them without a look at their values, which `find_rows` checks."""
    if predictors is None:
        return
    if shift:
        raise ValueError("shift: expected False beside predictors, which say what predicts each label, got True")
    if predictors.dtype != torch.int64:
        raise ValueError(f"predictors: expected int64, got {predictors.dtype}")


def check_transform(logit_scale: float, softcap: float | None, temperature: float) -> None:
    if not _is_number(logit_scale) or not -float("inf") < logit_scale < float("inf"):
        raise ValueError(f"logit_scale: expected a finite number, got {logit_scale!r}")
    if softcap is not None and not (_is_number(softcap) and 0 < softcap < float("inf")):
        raise ValueError(f"softcap: expected a positive number or None, got {softcap!r}")
    if not _is_number(temperature) or not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a positive number, got {temperature!r}")


def _is_number(value: object) -> bool:
    """Not a tensor: its gradient would be lost."""
    return isinstance(value, (float, numbers.Real)) and not isinstance(value, bool)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_switches(ignore_index: int, **switches: bool) -> None:
    if not isinstance(ignore_index, (int, torch.SymInt)) or isinstance(ignore_index, bool):
        raise ValueError(f"ignore_index: expected an integer, got {ignore_index!r}")
    if isinstance(ignore_index, int) and not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an integer of 64 bits, got {ignore_index!r}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected True or False, got {value!r}")


def refuse_transforms(*tensors: object) -> None:
    """Of `torch.func`, under which tensors hide what they hold: the products here are chosen by it."""
    if torch.compiler.is_compiling():
        return
    for t in tensors:
        if isinstance(t, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(t):
            raise RuntimeError(
                "dpo_kernels: expected tensors outside of torch.func's transforms (grad, vmap, jvp, jacrev), which "
                "cannot go through functions that form their own gradients: use torch.autograd.grad or backward; the "
                "losses on log-probabilities, such as dpo_loss, can be transformed"
            )


def check_head_is_finite(logps: Tensor, head: Head) -> None:
    """Raises `ValueError` where NaN among log-probabilities [n] comes from the head. It costs no wait on the CPU, and
    nothing where there is none."""
    if head.shards is not None:
        return check_shards_are_finite(logps, head)
    if not logps.is_cpu or not math.isnan(logps.detach().sum().item()):  # one NaN makes it NaN
        return
    for name, values in (("weight", head.weight), ("bias", head.bias)):
        if values is None:
            continue
        wrong = torch.nonzero(~torch.isfinite(values.detach()).reshape(len(values), -1).all(1)).flatten()
        if name == "bias":  # -inf: an entry that never is
            wrong = torch.nonzero(values.detach().isnan() | values.detach().isposinf()).flatten()
        if len(wrong):
            raise ValueError(
                f"{name}: expected finite numbers, got NaN or infinity in {len(wrong)} of {len(values)} vocabulary "
                f"entries, the first is {int(wrong[0])}"
            )


def check_num_labelled(num_labelled: int | None, labels: Tensor | None = None, shift: bool = False) -> None:
    """`labels` [S, T], where they are at hand."""
    if num_labelled is None or torch.compiler.is_compiling():
        return
    if (
        not isinstance(num_labelled, (numbers.Integral, torch.SymInt))
        or isinstance(num_labelled, bool)
        or num_labelled < 0
    ):
        raise ValueError(f"num_labelled: expected None or a count of at least 0, got {num_labelled!r}")
    positions = num_labelled if labels is None else labels.shape[0] * max(0, labels.shape[1] - shift)
    if num_labelled > positions:
        raise ValueError(
            f"num_labelled: expected at most {positions}, the number of positions that predict, got {num_labelled}"
        )


def check_numbers(name: str, weights: object, beside: Tensor, shape: tuple[int, ...]) -> None:
    """Numbers of this shape, on the device of a tensor that they belong to."""
    if not isinstance(weights, Tensor):
        raise ValueError(f"{name}: expected a tensor or None, got {type(weights).__name__}")
    if tuple(weights.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(weights.shape)}")
    if weights.dtype not in NUMBERS or weights.layout != torch.strided:
        kind = weights.dtype if weights.layout == torch.strided else weights.layout
        raise ValueError(f"{name}: expected floating-point numbers, integers or bool, dense, got {kind}")
    if weights.device != beside.device:
        raise ValueError(f"{name}: expected device {beside.device}, that of the others, got {weights.device}")


def check_reduction(
    labels: Tensor,
    token_weights: Tensor | None,
    reduction: str,
    stats: Sequence[str],
    num_labelled: int | None,
    shift: bool,
) -> None:
    check_num_labelled(num_labelled, labels, shift)
    if token_weights is not None:
        check_numbers("token_weights", token_weights, labels, tuple(labels.shape))
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
    check_stats(stats)


def check_stats(stats: Sequence[str]) -> None:
    if isinstance(stats, str) or not isinstance(stats, Sequence) or any(name not in STATS for name in stats):
        raise ValueError(f"stats: expected a sequence of names from {STATS}, got {stats!r}")
