"""The plain PyTorch implementation: right on every device, and the reading copy of the tile kernels.

Dimensions: N labelled rows, V vocabulary size, n rows and v vocabulary entries of one tile, K statistics. Every
temporary tensor is at most a tile; a few live at a time: two, and four under a softcap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_kernels.impl.blocks import spans
from dpo_kernels.impl.fold import Fold
from dpo_kernels.impl.interface import (
    Columns,
    GradPositions,
    GradRows,
    Labels,
    LogitTransform,
    Rows,
    accumulate_dtype,
)
from dpo_kernels.impl.positions import at_rows, labelled_rows, spread, unlabelled_rows
from dpo_kernels.impl.products import operand as operand
from dpo_kernels.impl.products import out_tile as out_tile
from dpo_kernels.impl.products import product as product
from dpo_kernels.impl.products import put_labels_ as put_labels_
from dpo_kernels.impl.products import scale_ as scale_

CPU_TILE_BYTES = 16 * 2**20
DEVICE_TILE_BYTES = 128 * 2**20


def description() -> str:
    return "available"


def tile_bytes(device: torch.device) -> int:
    return CPU_TILE_BYTES if device.type == "cpu" else DEVICE_TILE_BYTES


def new_fold(y: Tensor, dtype: torch.dtype, stats: Sequence[str]) -> Fold:
    return Fold(y, dtype, stats)


def linear_fold_(
    fold: Fold, x: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, compute_dtype: torch.dtype
) -> bool:
    return False


def takes_exponentials(x_dtype: torch.dtype, weight: Tensor, compute_dtype: torch.dtype) -> bool:
    return False


def _transform_(
    a: Tensor, bias: Tensor | None, transform: LogitTransform, with_slope: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Products x.W to logits, in place; and where asked for, under a softcap, 1 - tanh^2: the part of dz/da that
    differs from entry to entry. As 1 / cosh^2 it keeps its digits where tanh has reached 1."""
    scale, cap, temperature = transform
    if bias is not None:
        a.add_(bias)
    if cap is None:
        return (a if transform.slope == 1.0 else a.mul_(transform.slope)), None
    a.mul_(scale / cap)
    slope = torch.cosh(a).reciprocal_().square_() if with_slope else None
    return a.tanh_().mul_(cap / temperature), slope


def _label_column(y: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """[n, 1] column of each label in the block that starts at `start`, and whether it lies in it."""
    column = (y - start)[:, None]
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def _add_logits_(fold: Fold, z: Tensor, rows: slice, start: int) -> Tensor:
    """Takes a tile of logits for `rows` and vocabulary entries from `start` on, and leaves exp(z - max) in it, 0 at the
    label. Returns the factor [n] that brings what was accumulated before to the new maximum."""
    if "mean_logit" in fold.names:
        fold.sum_z[rows] += z.sum(1)
    column, inside = _label_column(fold.y[rows], start, z.shape[1])
    at_label = z.gather(1, column)
    fold.target[rows] = torch.where(inside, at_label, fold.target[rows, None]).squeeze(1)
    z.scatter_(1, column, torch.where(inside, -math.inf, at_label))

    old_max = fold.max[rows].clone()
    block_max, block_argmax = z.max(1)
    new_max = torch.maximum(old_max, block_max)
    if "is_top1" in fold.names:
        argmax = fold.argmax[rows]
        is_new = (block_max > old_max) | ((block_max == old_max) & (argmax < 0))
        fold.argmax[rows] = torch.where(is_new, block_argmax + start, argmax)
    rescale = torch.exp(old_max - new_max)
    z.sub_(new_max[:, None]).exp_()
    if "entropy" in fold.names:
        # clamped: at first old_max is the least number there is, and 0 times the difference is to be 0
        shifted = fold.sum_ez[rows] + fold.sum[rows] * (old_max - new_max).clamp(min=-1e4)
        fold.sum_ez[rows] = shifted * rescale + torch.special.xlogy(z, z).sum(1)
    if "log_sum_sq_probs" in fold.names:
        fold.sum_sq[rows] = fold.sum_sq[rows] * rescale.square() + z.square().sum(1)
    fold.sum[rows] = fold.sum[rows] * rescale + z.sum(1)
    fold.max[rows] = new_max
    return rescale


def fold_(fold: Fold, a: Tensor, rows: slice, columns: Columns, transform: LogitTransform, keep: bool) -> None:
    z, _ = _transform_(a.clone() if keep else a, columns.bias, transform)
    _add_logits_(fold, z, rows, columns.start)


def fold_exp_(
    fold: Fold, a: Tensor, out: Tensor, rows: slice, columns: Columns, transform: LogitTransform, sums: Tensor
) -> None:
    z, slope = _transform_(a, columns.bias, transform, with_slope=True)
    rescale = _add_logits_(fold, z, rows, columns.start)
    if slope is not None:
        z.mul_(slope)
        column, inside = _label_column(fold.y[rows], columns.start, z.shape[1])
        own = torch.where(inside, slope.gather(1, column), fold.label_slope[rows, None])
        fold.label_slope[rows] = own.squeeze(1)
    _move(z, out)
    sums.mul_(rescale[:, None])


def _move(tile: Tensor, out: Tensor) -> None:
    if out is not tile:
        out.copy_(tile)


def dlogits(a: Tensor, out: Tensor, of: GradRows, columns: Columns, transform: LogitTransform) -> Tensor:
    z, slope = _transform_(a, columns.bias, transform, with_slope=True)
    column, inside = _label_column(of.y, columns.start, z.shape[1])
    z.sub_(of.norm[0, :, None]).exp_().mul_((-transform.slope * of.g / of.norm[1])[:, None])
    value = (-torch.expm1(of.logp) * of.g * transform.slope)[:, None]
    if slope is not None:
        z.mul_(slope)
        value = value * slope.gather(1, column)
    z.scatter_(1, column, z.gather(1, column).masked_fill_(inside, 0.0))
    _move(z, out)
    return value.masked_fill(~inside, 0.0).squeeze(1)


def _gather_logits(logits: Tensor, rows: Rows, span: slice, block: slice, dtype: torch.dtype) -> Tensor:
    """A tile [n, v], a copy, of the logits [S, T, V] at the labelled positions."""
    return logits[:, :, block][rows.sequence[span], rows.position[span]].to(dtype)


def _logits_blocks(n: int, v: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    numel = tile_bytes(device) // dtype.itemsize
    columns = min(v, numel)
    return max(1, min(n, numel // columns)), columns


def logps_fwd(logits: Tensor, labels: Labels, *, stats: Sequence[str] = ()) -> tuple[Tensor, Tensor, Tensor]:
    acc, v = accumulate_dtype(logits.dtype), logits.shape[-1]
    rows = labelled_rows(labels.y, v, labels.ignore_index, labels.num_labelled)
    fold = new_fold(at_rows(labels.y, rows), acc, stats)
    n = fold.y.shape[0]
    step, columns = _logits_blocks(n, v, acc, logits.device)
    for span in spans(n, step):
        for block in spans(v, columns):
            _add_logits_(fold, _gather_logits(logits, rows, span, block, acc), span, block.start)
    logp, norm, values = (spread(t, rows, labels.y.shape) for t in fold.finish(v, acc))
    return logp, norm, values


def logps_bwd_(logits: Tensor, labels: Labels, of: GradPositions, out: Tensor) -> None:
    acc, v = accumulate_dtype(logits.dtype), logits.shape[-1]
    rows = labelled_rows(labels.y, v, labels.ignore_index, labels.num_labelled)
    of_rows = GradRows(at_rows(labels.y, rows), *(at_rows(t, rows) for t in of))
    n = of_rows.y.shape[0]
    step, columns = _logits_blocks(n, v, acc, logits.device)
    for span in spans(n, step):
        for block in spans(v, columns):
            z = _gather_logits(logits, rows, span, block, acc)
            value = dlogits(z, z, of_rows.part(span), Columns(block.start, None), LogitTransform())
            column, _ = _label_column(of_rows.y[span], block.start, z.shape[1])
            # not scatter_add_, which adds with atomics on some devices
            z.scatter_(1, column, z.gather(1, column) + value[:, None])
            out[:, :, block][rows.sequence[span], rows.position[span]] = z.to(out.dtype)
    others = unlabelled_rows(labels.y, labels.ignore_index, n)
    out[others.sequence, others.position] = 0
