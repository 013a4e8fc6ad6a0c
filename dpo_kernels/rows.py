"""Which positions carry a label: everything before the head drops the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_kernels.impl.interface import Rows


def shift_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Hugging Face labels [S, T] (labels[s, t] is the token at t) to predicted ones (labels[s, t] follows t)."""
    return torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), ignore_index)], dim=1)


def labelled_rows(
    labels: Tensor,
    vocab_size: int,
    ignore_index: int,
    *,
    num_labelled: int | None = None,
    hidden: Tensor | None = None,
) -> Rows:
    """The labelled positions of [S, T] in row-major order, checked.

    With `num_labelled` given, a CUDA device is not waited for, and a wrong count or a label outside the vocabulary
    trips an assertion on the device instead of the errors below.

    Raises:
        ValueError: a label outside [0, vocab_size), a hidden state at a labelled position that is not finite, or a
            `num_labelled` that does not fit the labels. The message names sequence and position.
    """
    labelled = labels != ignore_index
    outside = labelled & ((labels < 0) | (labels >= vocab_size))
    if num_labelled is not None and labels.device.type == "cuda":
        torch._assert_async(
            (labelled.sum() == num_labelled) & ~outside.any(),
            "num_labelled does not fit the labels, or a label lies outside the vocabulary",
        )
        return Rows(*torch.nonzero_static(labelled, size=num_labelled).unbind(1))

    # A sum reads the hidden states once and makes nothing larger than [S, T]; it is finite only if they all are.
    broken = outside if hidden is None else labelled & ~torch.isfinite(hidden.sum(-1, dtype=_sum_dtype(hidden)))
    count, num_outside, num_broken = torch.stack([labelled.sum(), outside.sum(), broken.sum()]).tolist()
    if num_outside:
        s, t = torch.nonzero(outside)[0].tolist()
        raise ValueError(
            f"labels: expected values in [0, {vocab_size}) or ignore_index={ignore_index}, got {labels[s, t].item()} "
            f"for sequence {s}, position {t} ({num_outside} such label(s))"
        )
    if num_broken:
        s, t = torch.nonzero(broken)[0].tolist()
        raise ValueError(
            f"hidden: expected finite values at labelled positions, got NaN or infinity for sequence {s}, position {t} "
            f"({num_broken} such position(s))"
        )
    if num_labelled is not None and num_labelled != count:
        raise ValueError(f"num_labelled: expected {count}, the number of predicted labels, got {num_labelled}")
    return Rows(*torch.nonzero(labelled).unbind(1))


def _sum_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


class GatherRows(torch.autograd.Function):
    """hidden [S, T, H] to its labelled rows [N, H]. No row is taken twice, so the backward writes and never adds."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(sequence, position)
        ctx.shape = hidden.shape
        return hidden[sequence, position]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        sequence, position = ctx.saved_tensors
        dhidden = grads[0].new_zeros(ctx.shape)
        dhidden[sequence, position] = grads[0]
        return dhidden, None, None


class ScatterRows(torch.autograd.Function):
    """One value a labelled row [N] to [S, T], 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sequence: Tensor, position: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(sequence, position)
        out = values.new_zeros(shape)
        out[sequence, position] = values
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sequence, position = ctx.saved_tensors
        return grads[0][sequence, position], None, None, None
