"""Which positions carry a label: everything before the head drops the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_kernels.impl.interface import Rows
from dpo_kernels.impl.positions import labelled_rows as labelled_rows
from dpo_kernels.options import is_finite


def shift_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Hugging Face labels [S, T] (labels[s, t] is the token at t) to predicted ones (labels[s, t] follows t)."""
    sequences, length = labels.shape
    return torch.cat([labels[:, 1:], labels.new_full((sequences, min(1, length)), ignore_index)], dim=1)


def check_finite(x: Tensor, rows: Rows, waits: bool) -> None:
    """Raises `ValueError`, naming sequence and position, for hidden states x [N, H] of `rows` that are not finite.

    On an accelerator it looks only if that `waits` for the device anyway."""
    if x.numel() == 0 or (x.device.type != "cpu" and not waits):
        return
    if is_finite(x):
        return
    broken = torch.nonzero(~x.isfinite().all(1))[:, 0]
    s, t = rows.sequence[broken[0]].item(), rows.position[broken[0]].item()
    raise ValueError(
        f"hidden: expected finite values at labelled positions, got NaN or infinity for sequence {s}, position {t} "
        f"({len(broken)} such position(s))"
    )


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


class GatherSlots(torch.autograd.Function):
    """hidden [R, T, H] to the rows [N, H] in slots [N] of its flat [R T]. A slot may be taken several times, as that of
    a prompt's end by all responses to it: the backward adds, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.shape = hidden.shape
        return hidden.reshape(-1, hidden.shape[-1])[slots]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        dhidden = grads[0].new_zeros(ctx.shape)
        flat = dhidden.view(-1, ctx.shape[-1])
        if flat.device.type == "cpu":  # index_put_ takes one number after the other there
            flat.index_add_(0, slots, grads[0])
        else:  # index_add_ adds in any order elsewhere
            flat.index_put_((slots,), grads[0], accumulate=True)
        return dhidden, None


def rows_of(hidden: Tensor, rows: Rows, predictors: Tensor | None) -> Tensor:
    """[N, H] what predicts the labels at `rows`: hidden states [S, T, H] there, or what lies where `predictors` say."""
    if predictors is None:
        return GatherRows.apply(hidden, *rows)
    return GatherSlots.apply(hidden, predictors[rows.sequence, rows.position])


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
