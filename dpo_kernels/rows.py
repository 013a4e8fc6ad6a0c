"""Which positions carry a label: everything before the head drops the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.dispatch import finds_rows, load
from dpo_kernels.impl.blocks import spans
from dpo_kernels.impl.interface import FoundRows, Rows
from dpo_kernels.impl.positions import labelled_rows
from dpo_kernels.options import is_finite

# Rows of the gradient of hidden states that are scaled at a time.
PUT_ROWS = 1024


class LabelledRows(NamedTuple):
    """The labelled rows of a call, checked: in row-major order, until they are taken in another one."""

    at: Rows
    y: Tensor
    """[N] labels."""
    slots: Tensor | None
    """[N] where `predictors` say that their hidden states lie, in the flat [R U]; None: where the labels do."""
    family: str
    found: FoundRows | None
    """By a kernel of the family, which then copies hidden states too."""

    def take(self, order: Tensor) -> LabelledRows:
        if self.found is not None:
            return _of_kernel(self.found._replace(table=self.found.table[:, order]), self.family, self.slots is None)
        slots = None if self.slots is None else self.slots[order]
        return self._replace(at=Rows(*(t[order] for t in self.at)), y=self.y[order], slots=slots)

    def copy(self, hidden: Tensor) -> Tensor:
        """[N, H] the rows' hidden states, of no graph."""
        if self.found is not None:
            return load(self.family).gather_rows(hidden, self.found.slots, self.found.broken)
        if self.slots is None:
            return hidden[self.at.sequence, self.at.position]
        return hidden.reshape(-1, hidden.shape[-1])[self.slots]

    def tables(self, shape: torch.Size, stats: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """[S, T] and [stats, S, T] of the dtype of `like`, 0 where there is no label, to be written to once."""
        if self.found is not None and like.dtype == self.found.token_logps.dtype:
            return self.found.token_logps, self.found.stats
        return like.new_zeros(shape), like.new_zeros(stats, *shape)


def find_rows(
    family: str,
    hidden: Tensor,
    labels: Tensor,
    vocab_size: int,
    ignore_index: int,
    num_labelled: int | None,
    predictors: Tensor | None = None,
    stats: int = 0,
) -> LabelledRows:
    """The labelled rows of [S, T]; `stats`: how many tables there are to be.

    Raises:
        ValueError: as `labelled_rows` and `check_places` do.
    """
    if finds_rows(family):
        found = load(family).find_rows(
            labels, vocab_size, ignore_index=ignore_index, shift=False, num_labelled=num_labelled,
            predictors=predictors, slots=hidden.shape[0] * hidden.shape[1], stats=stats,
        )  # fmt: skip
        if found is not None:
            return _of_kernel(found, family, predictors is None)
    if predictors is not None:
        check_places(hidden, labels, predictors, ignore_index, num_labelled is None)
    at = labelled_rows(labels, vocab_size, ignore_index, num_labelled)
    slots = None if predictors is None else predictors[at.sequence, at.position]
    return LabelledRows(at, labels[at.sequence, at.position], slots, family, None)


def _of_kernel(found: FoundRows, family: str, in_place: bool) -> LabelledRows:
    return LabelledRows(found.rows, found.y, None if in_place else found.slots, family, found)


def check_places(hidden: Tensor, labels: Tensor, predictors: Tensor, ignore_index: int, waits: bool) -> None:
    """That predictors are places of hidden states; on a CUDA device that is not to be waited for, by an assertion."""
    places = hidden.shape[0] * hidden.shape[1]
    outside = ((predictors < 0) | (predictors >= places)) & (labels != ignore_index)
    if torch.compiler.is_compiling() or (predictors.device.type == "cuda" and not waits):
        torch._assert_async(~outside.any(), "predictors: a place outside the hidden states")
    elif outside.any():
        s, t = torch.nonzero(outside)[0].tolist()
        raise ValueError(
            f"predictors: expected places of hidden states, 0 to {places - 1}, got {predictors[s, t].item()} for "
            f"sequence {s}, position {t}"
        )


def shift_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Hugging Face labels [S, T] (labels[s, t] is the token at t) to predicted ones (labels[s, t] follows t)."""
    sequences, length = labels.shape
    return torch.cat([labels[:, 1:], labels.new_full((sequences, min(1, length)), ignore_index)], dim=1)


def check_finite(x: Tensor, rows: LabelledRows, waits: bool) -> None:
    """Raises `ValueError`, naming sequence and position, for hidden states x [N, H] of `rows` that are not finite.

    On an accelerator it looks only if that `waits` for the device anyway."""
    if x.numel() == 0 or (x.device.type != "cpu" and not waits):
        return
    if rows.found is not None:  # the kernel that copied x has looked
        if not rows.found.broken.item():
            return
    elif is_finite(x):
        return
    broken = torch.nonzero(~x.isfinite().all(1))[:, 0]
    s, t = rows.at.sequence[broken[0]].item(), rows.at.position[broken[0]].item()
    raise ValueError(
        f"hidden: expected finite values at labelled positions, got NaN or infinity for sequence {s}, position {t} "
        f"({len(broken)} such position(s))"
    )


def hidden_gradient(dx: Tensor, shape: torch.Size, at: Rows, slots: Tensor | None) -> Tensor:
    """That of hidden states [R, U, H] from dx [N, H] of their rows, which lie at positions or in `slots` of the flat
    [R U]. A slot may be that of several rows, as a prompt's end is of all responses to it: these are added in a fixed
    order."""
    dhidden = dx.new_zeros(shape)
    _put_(dhidden, dx, at, slots, slice(None))
    return dhidden


def scaled_gradient(
    rows: Tensor, g: Tensor, shape: torch.Size, dtype: torch.dtype, at: Rows, slots: Tensor | None
) -> Tensor:
    """The same of rows [N, H] times what g [S, T] holds at their positions, each number rounded once; without a copy of
    them all."""
    dhidden = rows.new_zeros(shape, dtype=dtype)
    for span in spans(rows.shape[0], PUT_ROWS):
        factor = g[at.sequence[span], at.position[span], None]
        _put_(dhidden, (rows[span] * factor).to(dtype), at, slots, span)
    return dhidden


def _put_(dhidden: Tensor, dx: Tensor, at: Rows, slots: Tensor | None, span: slice) -> None:
    """Of the rows of this span."""
    if slots is None:
        dhidden[tuple(at) if span == slice(None) else (at.sequence[span], at.position[span])] = dx
        return
    flat = dhidden.view(-1, dhidden.shape[-1])
    if flat.device.type == "cpu":  # index_put_ takes one number after the other there
        flat.index_add_(0, slots[span], dx)
    else:  # index_add_ adds in any order elsewhere
        flat.index_put_((slots[span],), dx, accumulate=True)


class GatherRows(torch.autograd.Function):
    """hidden [R, U, H] to its labelled rows [N, H], which `copy` makes of it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        sequence: Tensor,
        position: Tensor,
        slots: Tensor | None,
        copy: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(sequence, position, slots)
        ctx.shape = hidden.shape
        return copy(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        sequence, position, slots = ctx.saved_tensors
        return hidden_gradient(grads[0], ctx.shape, Rows(sequence, position), slots), None, None, None, None


def rows_of(hidden: Tensor, rows: LabelledRows) -> Tensor:
    """[N, H] the hidden states that predict the labels at `rows`."""
    return GatherRows.apply(hidden, *rows.at, rows.slots, rows.copy)
