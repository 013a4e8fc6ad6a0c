"""The algorithms B to D where no logits are stored, but 16-bit numbers that come of them, as the product x.W^T leaves
the registers.

Dimensions: N labelled rows, H hidden size, V vocabulary size, n rows of one block or group, v entries of one part of
the vocabulary, K statistics. Exponentials lie as [V, n], two bytes each.

Path B's exponentials are operands: one product over all of the vocabulary takes a block of rows as it is. Path C's
become dlogits on their way into products, or in one pass before, and one product over all rows of a chunk is dW. Path
D's product writes dlogits at once, [v, N] of a block of the vocabulary; so does path C's of entries whose exponentials
have no room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.impl.blocks import ALIGNED, spans
from dpo_kernels.impl.interface import (
    Exponentials,
    FoundRows,
    GradRows,
    LinearLogps,
    LogitTransform,
    Recomputed,
    TileKernels,
)

# Vocabulary entries that dW is ahead of the exponentials in its memory, or those of one shift where these are more: no
# product of a block of dW has fewer.
DW_COLUMNS = 512
# A shift of exponentials, in fp32.
SHIFT_BYTES = 4


class Kept(NamedTuple):
    """What path C keeps of a group's rows until it is known what these weigh, in bytes."""

    of_row: int
    buffer: int
    """For n rows in one group, beside what is kept in the memory of dW."""


def kept_bytes(k: TileKernels, n: int, weight: Tensor, dweight: bool, stored: int | None = None) -> Kept:
    """Of n rows, and of the whole vocabulary or its first `stored` entries; `dweight`: there is a dW."""
    v = weight.shape[0] if stored is None else stored
    kept = kept_columns(k, n, weight) if dweight else 0
    columns, e = k.shift_columns(weight.device), weight.dtype.itemsize
    whole, parts = (SHIFT_BYTES * sum(math.ceil(size / columns) for size in part_sizes(v, each)) for each in (0, kept))
    return Kept(v * e + whole, k.padded_rows(n) * ((v - kept) * e + parts))


def stored_columns(k: TileKernels, n: int, weight: Tensor, dweight: bool, chunk_bytes: int) -> int:
    """Of how many vocabulary entries, the first ones, the exponentials of n rows in one group are stored where there is
    no room for all: those in the memory of dW, and so many that the `kept_bytes` are `chunk_bytes` at most. 0 where
    the buffer is smaller than what path D would take for dlogits, which those of the other entries go through."""
    v, h = weight.shape
    kept, step = kept_columns(k, n, weight) if dweight else 0, k.shift_columns(weight.device)
    room = int(chunk_bytes) // k.padded_rows(n) - SHIFT_BYTES * math.ceil(kept / step)
    buffer = max(0, room) // (step * weight.dtype.itemsize + SHIFT_BYTES) * step
    rest = v - kept - buffer
    return kept + buffer if buffer >= min(rest, k.recomputed_columns(n, rest, h, weight.device)) else 0


def part_sizes(v: int, kept: int, stored: int | None = None) -> list[int]:
    """Vocabulary entries of each part that there is: those whose exponentials are kept in the memory of dW, those of a
    buffer, and with `stored` of both the rest."""
    stored = v if stored is None else stored
    return [size for size in (kept, stored - kept, v - stored) if size]


def _sweep(
    k: TileKernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    transform: LogitTransform,
    stats: Sequence[str],
    with_dhidden: bool,
) -> tuple[Exponentials, Tensor | None]:
    """Path B's, of all rows, and the sums [N, H] of exponentials times W. A block of rows has all of the vocabulary,
    and so one product with W."""
    (n, h), v = x.shape, weight.shape[0]
    rows = k.exponential_rows(n, v, h, x.device)
    sweep = k.exponentials(x, weight, bias, y, transform, stats, rows, part_sizes(v, 0), packed=False)
    if not with_dhidden:
        for span in spans(n, rows):
            sweep.write(span, None)
        return sweep, None
    sums = x.new_empty(n, h, dtype=torch.float32)
    buffer = weight.new_empty(v, k.padded_rows(rows))
    for span in spans(n, rows):
        e = buffer[:, : span.stop - span.start]
        sweep.write(span, [e])
        k.product(e.t(), weight, sums[span])
    return sweep, sums


def linear_logps_fwd(
    k: TileKernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    transform: LogitTransform,
    stats: Sequence[str],
    with_dhidden: bool,
) -> LinearLogps:
    """Path B, or its log-probabilities alone."""
    sweep, sums = _sweep(k, x, weight, bias, y, transform, stats, with_dhidden)
    found = sweep.finish(slice(0, x.shape[0]))
    return LinearLogps(*found, None if sums is None else sweep.dhidden(sums, sums))


def linear_token_logps(
    k: TileKernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    found: FoundRows,
    transform: LogitTransform,
    stats: Sequence[str],
) -> Tensor:
    """Path B of rows that a kernel found: what is known of them goes to their places in the tables of `found`. Returns
    d logp_n / d x_n [N, H]."""
    sweep, sums = _sweep(k, x, weight, bias, found.y, transform, stats, with_dhidden=True)
    assert sums is not None
    sweep.finish_at(found)
    return sweep.dhidden(sums, sums)


def kept_columns(k: TileKernels, n: int, weight: Tensor) -> int:
    """Of how many vocabulary entries, the first ones, the exponentials of n rows are kept in the memory of dW: at its
    end, while dW is written from its beginning on, `DW_COLUMNS` ahead at least."""
    v, h = weight.shape
    kept = max(0, v - max(DW_COLUMNS, k.shift_columns(weight.device))) * h // max(k.padded_rows(n), h)
    return kept - kept % ALIGNED


def dw_blocks(v: int, h: int, kept: int, stride: int, step: int, stored: int | None = None) -> Iterator[slice]:
    """Blocks of dW [v, h], of the `stored` exponentials, in the order in which they are written. Each ends before the
    first of the kept exponentials, `stride` apart at the end of its memory, that are still to be read, its own among
    them. Those of the kept ones begin where a shift does, of which each is of `step` entries."""
    start = 0
    while start < kept:
        stop = min(kept, (v * h - (kept - start) * stride) // h)
        if stop < kept:
            stop -= stop % step
        yield slice(start, stop)
        start = stop
    yield slice(kept, v if stored is None else stored)


class _StoredDlogits:
    """See `interface.Dlogits`: those that are where exponentials were, and operands of products as they are. Labels'
    entries are among them."""

    def __init__(self, k: TileKernels, d: Sequence[Tensor], parts: Sequence[slice], x: Tensor, weight: Tensor):
        self.k, self.d, self.parts, self.x, self.weight = k, d, parts, x, weight

    def dhidden(self, out: Tensor) -> None:
        for d, part in zip(self.d, self.parts, strict=True):
            self.k.product(d.t(), self.weight[part], out, accumulate=part.start > 0)

    def dweight(self, blocks: Iterable[slice], out: Tensor | None, dbias: Tensor | None, accumulate: bool) -> None:
        for d, part in zip(self.d, self.parts, strict=True):
            if dbias is not None:
                torch.sum(d, 1, dtype=dbias.dtype, out=dbias[part])
        if out is None:
            return
        for block in blocks:
            d, part = next(each for each in zip(self.d, self.parts, strict=True) if block.start < each[1].stop)
            rows = slice(block.start - part.start, block.stop - part.start)
            self.k.product(d[rows], self.x, out[block], accumulate=accumulate)


def linear_logps_grouped(
    k: TileKernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    transform: LogitTransform,
    groups: Sequence[slice],
    coefficients: Callable[[int, Tensor, Tensor], Tensor],
    need: tuple[bool, bool, bool],
    stats: Sequence[str],
    stored: int | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Path C: one product for dX and one for dW a group. A dW is rounded once: by its product if there is one group,
    whose exponentials then lie in its memory as far as they fit; else it is summed in fp32. A bias's gradient is
    summed group by group, and over these at the end. What is not stored comes last, when the buffer is free, as on path
    D."""
    (n, h), v = x.shape, weight.shape[0]
    stored = v if stored is None else stored
    largest, alone = max(group.stop - group.start for group in groups), len(groups) == 1
    assert alone or stored == v
    stride = k.padded_rows(largest)
    kept = kept_columns(k, largest, weight) if alone and need[1] else 0
    dw = weight.new_empty(v, h) if need[1] else None
    dw_sum = dw if alone or dw is None else torch.empty_like(dw, dtype=torch.float32)
    db = weight.new_empty(len(groups), v, dtype=torch.float32) if need[2] and bias is not None else None
    sums = x.new_empty(n, h, dtype=torch.float32) if need[0] else None
    places = [weight.new_empty(stored - kept, stride)]
    if kept and dw is not None:
        places.insert(0, dw.view(-1)[v * h - kept * stride :].view(kept, stride))
    parts = [slice(0, kept), slice(kept, stored)][-len(places) :]
    sizes = part_sizes(v, kept, stored)
    sweep = k.exponentials(x, weight, bias, y, transform, stats, largest, sizes, packed=True)
    for i, group in enumerate(groups):
        e = [place[:, : group.stop - group.start] for place in places]
        sweep.write(group, [*e, None][: len(sizes)])
        logp, norm, values = sweep.finish(group)
        g = coefficients(i, logp, values)
        dlogits = sweep.weigh(e, group, g) or _StoredDlogits(k, e, parts, x[group], weight)
        if sums is not None:
            dlogits.dhidden(sums[group])
        if dw_sum is not None or db is not None:
            blocks = parts if dw_sum is None else dw_blocks(v, h, kept, stride, k.shift_columns(x.device), stored)
            dlogits.dweight(blocks, dw_sum, None if db is None else db[i], accumulate=i > 0)
        if stored < v:
            again = k.recomputed(x, weight, bias, GradRows(y, norm, logp, g), transform, sweep.missing)
            rest = spans(v, k.recomputed_columns(n, v - stored, h, x.device), stored)
            _recompute_(k, again, rest, places[-1], x, weight, sums, dw, None if db is None else db[i])
    dx = None if sums is None else sweep.dhidden(sums, torch.empty_like(sums, dtype=x.dtype))
    if dw is not None and dw_sum is not None and dw_sum is not dw:
        dw.copy_(dw_sum)
    if db is not None and bias is not None:
        db = (db[0] if alone else db.sum(0)).to(bias.dtype)
    return dx, dw, db


def linear_logps_as_grouped(
    k: TileKernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    transform: LogitTransform,
    groups: Sequence[slice],
    dweight: bool,
    stored: int | None,
) -> Tensor:
    """See `paths.linear_logps_as_grouped`."""
    largest = max(group.stop - group.start for group in groups)
    kept = kept_columns(k, largest, weight) if len(groups) == 1 and dweight else 0
    sizes = part_sizes(weight.shape[0], kept, stored)
    sweep = k.exponentials(x, weight, bias, y, transform, (), largest, sizes, packed=True)
    for group in groups:
        sweep.write(group, None)
    return torch.cat([sweep.finish(group)[0] for group in groups])


def linear_logps_bwd(
    k: TileKernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    of: GradRows,
    transform: LogitTransform,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Path D."""
    (n, h), v = x.shape, weight.shape[0]
    columns = k.recomputed_columns(n, v, h, x.device)
    sums = x.new_empty(n, h, dtype=torch.float32) if need[0] else None
    dw = weight.new_empty(v, h) if need[1] else None
    db = weight.new_empty(v, dtype=torch.float32) if need[2] and bias is not None else None
    buffer = weight.new_empty(min(v, columns), k.padded_rows(n))
    sweep = k.recomputed(x, weight, bias, of, transform)
    _recompute_(k, sweep, spans(v, columns), buffer, x, weight, sums, dw, db)
    dx = None if sums is None else sweep.dhidden(sums, torch.empty_like(sums, dtype=x.dtype))
    return dx, dw, None if db is None or bias is None else db.to(bias.dtype)


def _recompute_(
    k: TileKernels,
    sweep: Recomputed,
    blocks: Iterable[slice],
    buffer: Tensor,
    x: Tensor,
    weight: Tensor,
    sums: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """Three products a block of the vocabulary: of dlogits of all rows, of dW, and of what they add to the sums of
    dX, if earlier entries are in these."""
    for block in blocks:
        d = buffer[: block.stop - block.start, : x.shape[0]]
        sweep.write(block, d)
        if dw is not None:
            k.product(d, x, dw[block])
        if sums is not None:
            k.product(d.t(), weight[block], sums, accumulate=block.start > 0)
        if db is not None:
            torch.sum(d, 1, dtype=db.dtype, out=db[block])
