"""The algorithms A to D: which products are done, in which order, and where they are summed.

Dimensions: N labelled rows, H hidden size, V vocabulary size, v columns of one vocabulary block, n rows of one row
block, K statistics. A *tile* is [n, v] in the accumulation dtype (fp32; fp64 for fp64 operands). No tensor made here
exceeds `tile_bytes`, except the [N, H] accumulators and results, and the buffer of path C. What happens inside a tile,
and the matrix products, are `k`'s: the implementation's.

Where `k` can write exponentials as the product x.W^T leaves the registers, paths B, C and D have no tiles: see
`exponential_paths`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dpo_kernels.impl import exponential_paths
from dpo_kernels.impl.blocks import ALIGNED, spans
from dpo_kernels.impl.exponential_paths import Kept
from dpo_kernels.impl.interface import (
    Columns,
    GradRows,
    LinearLogps,
    LogitTransform,
    Shards,
    TileKernels,
    accumulate_dtype,
)

# Below these a matrix product wastes more than splitting the other dimension does, or than a buffer costs.
MIN_COLUMNS = 256
MIN_ROWS = 128
# Rows of W that belong to labels are gathered so many at a time.
LABEL_ROWS = 1024


def _blocks(n: int, v: int, h: int, dtype: torch.dtype, tile_bytes: int) -> tuple[int, int]:
    """Rows and columns of a tile, such that [rows, columns], [rows, H] and [columns, H] each fit in `tile_bytes`."""
    numel = tile_bytes // dtype.itemsize
    rows = max(1, min(n, numel // max(h, min(v, MIN_COLUMNS))))
    columns = max(1, numel // max(h, rows))
    if columns >= v:
        return rows, max(1, v)
    return rows, columns - columns % ALIGNED if columns > ALIGNED else columns


def _traffic_blocks(n: int, v: int, dtype: torch.dtype, tile_bytes: int) -> tuple[int, int]:
    """The same where operands are read in place, so that [rows, columns] alone must fit. A row of tiles reads W once,
    2 bytes a number, and a column of tiles reads and writes the sums [N, H], 8 bytes: least where columns = 4 rows."""
    numel = tile_bytes // dtype.itemsize
    most = max(1, math.isqrt(numel // 4))
    rows = math.ceil(n / math.ceil(n / most))
    columns = min(v, max(1, numel // rows))
    return rows, columns if columns == v or columns <= ALIGNED else columns - columns % ALIGNED


def _reads_in_place(t: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether operands of products are no copies."""
    return t.device.type == "cuda" and t.dtype == compute_dtype


def _tile(buffer: Tensor, n: int, v: int) -> Tensor:
    return _part(buffer, slice(0, n * v)).view(n, v)


def _part(t: Tensor, of: slice) -> Tensor:
    """Without a view of what is all of it: the host takes as long for one as for a small product."""
    return t if of.stop - of.start == t.shape[0] else t[of]


def _columns(bias: Tensor | None, block: slice, compute_dtype: torch.dtype) -> Columns:
    """The bias rounded to the compute dtype as every operand is."""
    if bias is None:
        return Columns(block.start, None)
    b = bias[block].to(compute_dtype).to(accumulate_dtype(compute_dtype))
    return Columns(block.start, b.resolve_neg().contiguous())


def _add_label_rows_(
    dx: Tensor, weight: Tensor, y: Tensor, label: Tensor, compute_dtype: torch.dtype, rows: int
) -> None:
    """dx_n += label_n W_y, a block of rows at a time, `rows` at most."""
    for span in spans(y.shape[0], min(rows, LABEL_ROWS)):
        w = weight[_part(y, span)].to(compute_dtype).to(dx.dtype)
        _part(dx, span).addcmul_(w, _part(label, span)[:, None])


def linear_logps_fwd(
    k: TileKernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    transform: LogitTransform,
    *,
    compute_dtype: torch.dtype,
    stats: Sequence[str] = (),
    with_dhidden: bool = False,
    as_with_dhidden: bool = False,
    blocks: tuple[int, int] | None = None,
    fused: bool = False,
    shards: Shards | None = None,
) -> LinearLogps:
    """Path A, and path B with `with_dhidden`: sum_v exp(z_v - m) dz/da W_v is accumulated with online rescaling in the
    same sweep, as attention does with keys and values W. `fused`: path A in one kernel, and path B from exponentials,
    where `k` has them for these operands. `shards`: weight and bias are those of some entries, beside other ranks';
    `dhidden` is then to be summed over the ranks.

    For a reference that is to be summed as another path sums the policy: `as_with_dhidden` is path A with the
    arithmetic of path B, `blocks` says how many rows and columns a tile has, in place of our own choice."""
    (n, h), v = x.shape, weight.shape[0]
    acc = accumulate_dtype(compute_dtype)
    sweeps = n > 0 and shards is None and (with_dhidden or as_with_dhidden)
    if fused and sweeps and k.takes_exponentials(x.dtype, weight, compute_dtype):
        return exponential_paths.linear_logps_fwd(k, x, weight, bias, y, transform, stats, with_dhidden)
    rows, columns = blocks or _blocks(n, v, h, acc, k.tile_bytes(x.device))
    if n and v and blocks is None and _reads_in_place(weight, compute_dtype):
        rows, columns = _traffic_blocks(n, v, acc, k.tile_bytes(x.device))
    fold = k.new_fold(y, acc, stats)
    in_tiles = with_dhidden or as_with_dhidden or blocks is not None or shards is not None
    if fused and not in_tiles and k.linear_fold_(fold, x, weight, bias, transform, compute_dtype):
        return LinearLogps(*fold.finish(v, acc), None)
    expected = x.new_zeros(n, h if with_dhidden else 1, dtype=acc) if with_dhidden or as_with_dhidden else None
    buffer = x.new_empty(rows * columns, dtype=acc)
    for block in spans(v, columns):
        w, c = k.operand(weight[block], compute_dtype), _columns(bias, block, compute_dtype)
        for span in spans(n, rows):
            x_rows = k.operand(x[span], compute_dtype)
            a = k.product(x_rows, w.t(), _tile(buffer, x_rows.shape[0], w.shape[0]))
            if expected is None:
                k.fold_(fold, a, span, c, transform, keep=False)
            else:
                e = k.out_tile(a, w.dtype)
                k.fold_exp_(fold, a, e, span, c, transform, expected[span])
                if with_dhidden:
                    k.product(e, w, expected[span], accumulate=True)
    rescale = 1.0 if shards is None else shards.join_(fold)
    logp, norm, values = fold.finish(v if shards is None else shards.vocab, acc)
    if expected is None or not with_dhidden:
        return LinearLogps(logp, norm, values, None)
    expected.mul_((-transform.slope * fold.others * rescale).to(acc)[:, None])
    label = -torch.expm1(fold.logp) * transform.slope * fold.label_slope
    if shards is not None:
        label = label.masked_fill((y < 0) | (y >= v), 0.0)
        y = y.clamp(0, max(v - 1, 0))
    if v:
        _add_label_rows_(expected, weight, y, label.to(acc), compute_dtype, rows)
    return LinearLogps(logp, norm, values, expected)


class _Gradients:
    """dX, dW and db while they are summed over tiles of dlogits, all in the accumulation dtype. A dW of a lower dtype
    is rounded once: by its product, if there is one for all rows (`one_tile`) of operands in that dtype; else it is
    summed apart, block by block (`block_columns`), or whole where rows come in several groups."""

    def __init__(
        self,
        k: TileKernels,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        compute_dtype: torch.dtype,
        need: tuple[bool, bool, bool],
        block_columns: int,
        one_tile: bool,
        shards: Shards | None,
    ):
        acc = accumulate_dtype(compute_dtype)
        (n, h), v = x.shape, weight.shape[0]
        self.k, self.x, self.weight, self.compute_dtype = k, x, weight, compute_dtype
        self.shards = shards
        self.waits: list[Callable[[], object]] = []
        self.dx = x.new_zeros(n, h, dtype=acc) if need[0] else None
        self.label = x.new_zeros(n, dtype=acc)
        self.dw = (weight.new_empty if n else weight.new_zeros)(v, h) if need[1] else None
        rounded_by_product = one_tile and k.operand(weight[:0], compute_dtype).dtype == weight.dtype
        self.dw_sum = self.dw
        if need[1] and weight.dtype != acc and not rounded_by_product:
            self.dw_sum = weight.new_empty(block_columns, h, dtype=acc)
        self.db = bias.new_zeros(v, dtype=acc) if need[2] and bias is not None else None
        self.db_dtype = weight.dtype if bias is None else bias.dtype

    def add_(self, d: Tensor, y: Tensor, value: Tensor, w: Tensor, rows: slice, block: slice, first: bool) -> None:
        """Adds the products of d, a tile of dlogits. The labels' entries stay out of dX, where they would be rounded
        at their own size and then cancel (`finish_rows` adds them), and are in dW and db. `first`: nothing is in this
        block yet."""
        if self.dx is not None:
            self.k.product(d, w, _part(self.dx, rows), accumulate=True)
            _part(self.label, rows).add_(value)
        if self.dw_sum is not None or self.db is not None:
            self.k.put_labels_(d, y, block.start, value)
        if self.dw_sum is not None:
            whole = self.dw_sum.shape[0] == self.weight.shape[0]
            target = _part(self.dw_sum, block if whole else slice(0, d.shape[1]))
            x = self.k.operand(_part(self.x, rows), self.compute_dtype)
            product = self.k.product(d.t(), x, target, accumulate=not first)
            if product is not target:
                target.copy_(product)
        if self.db is not None:
            self.db[block] += d.sum(0, dtype=self.db.dtype)

    def spare(self, block: slice) -> Tensor:
        """The memory of a block of dW, which nothing is in yet, as numbers of the accumulation dtype."""
        assert self.dw is not None
        per_number = max(1, self.label.dtype.itemsize // self.dw.dtype.itemsize)
        flat = self.dw[block].view(-1)
        flat = flat[-flat.storage_offset() % per_number :]
        return flat[: flat.numel() // per_number * per_number].view(self.label.dtype)

    def round_block(self, block: slice) -> None:
        """Once all rows are in a block: writes it to dW."""
        if self.dw is not None and self.dw_sum is not None and self.dw_sum is not self.dw:
            whole = self.dw_sum.shape[0] == self.weight.shape[0]
            self.dw[block] = self.dw_sum[block] if whole else self.dw_sum[: block.stop - block.start]

    def finish_rows(self, y: Tensor, span: slice, rows: int) -> None:
        """Adds the labels' part of these rows of dX, and begins to sum them over the ranks that share the head."""
        if self.dx is None or span.start == span.stop:
            return
        y, dx = _part(y, span), _part(self.dx, span)
        if self.shards is not None:  # the label's part is 0 where another rank has it
            y = y.clamp(0, max(self.weight.shape[0] - 1, 0))
        if self.weight.shape[0]:
            _add_label_rows_(dx, self.weight, y, _part(self.label, span), self.compute_dtype, rows)
        if self.shards is not None:
            self.waits.append(self.shards.start_sum(dx))

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three, in the dtypes of what they are gradients of."""
        for wait in self.waits:
            wait()
        if self.dx is not None:
            self.dx = self.dx.to(self.x.dtype)
        return self.dx, self.dw, None if self.db is None else self.db.to(self.db_dtype)


def linear_logps_bwd(
    k: TileKernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    of: GradRows,
    transform: LogitTransform,
    *,
    compute_dtype: torch.dtype,
    need: tuple[bool, bool, bool],
    fused: bool = False,
    shards: Shards | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Path D: gradients of sum_n g_n logp_n with respect to x, weight and bias, those that are needed. The vocabulary
    is the outer loop, so each block of dW is summed over all rows and rounded once, straight into its place. `fused`:
    without tiles of logits, where `k` has that for these operands."""
    (n, h), v = x.shape, weight.shape[0]
    if fused and n > 0 and shards is None and k.takes_exponentials(x.dtype, weight, compute_dtype):
        return exponential_paths.linear_logps_bwd(k, x, weight, bias, of, transform, need)
    acc = accumulate_dtype(compute_dtype)
    rows, columns = _blocks(n, v, h, acc, k.tile_bytes(x.device))
    grads = _Gradients(k, x, weight, bias, compute_dtype, need, columns, rows >= n, shards)
    buffer = x.new_empty(rows * columns, dtype=acc)
    for block in spans(v, columns):
        w, c = k.operand(weight[block], compute_dtype), _columns(bias, block, compute_dtype)
        for span in spans(n, rows):
            x_rows = k.operand(x[span], compute_dtype)
            a = k.product(x_rows, w.t(), _tile(buffer, x_rows.shape[0], w.shape[0]))
            d = k.out_tile(a, w.dtype)
            value = k.dlogits(a, d, of.part(span), c, transform)
            grads.add_(d, of.y[span], value, w, span, block, first=span.start == 0)
        grads.round_block(block)
    grads.finish_rows(of.y, slice(0, n), rows)
    return grads.finish()


def _grouped_blocks(k: TileKernels, n: int, weight: Tensor, acc: torch.dtype, alone: bool) -> tuple[int, int, int]:
    """Rows and columns of path C's tiles, and how many of the n rows of a group that is `alone` have their logits kept
    in the memory of dW, block by block: a block of dW, [v, H], is written when the block's logits have been read. On a
    GPU all of them or none: in slices of as many rows as fit, sums of dW go to memory and back once for each slice."""
    v, h = weight.shape
    rows, columns = _blocks(n, v, h, acc, k.tile_bytes(weight.device))
    fit = h * weight.dtype.itemsize // acc.itemsize
    if weight.dtype.itemsize < acc.itemsize:
        fit = (h - 1) * weight.dtype.itemsize // acc.itemsize  # some may be lost to alignment
    if not alone or fit < min(n, MIN_ROWS) or (weight.device.type == "cuda" and fit < n):
        return rows, columns, 0
    rows, fit = min(rows, fit), min(n, fit)
    return rows, columns, n if fit == n else fit - fit % rows


def kept_bytes(
    k: TileKernels,
    n: int,
    weight: Tensor,
    acc: torch.dtype,
    exponentials: bool,
    dweight: bool,
    stored: int | None = None,
) -> Kept:
    """Of n rows. `exponentials`: and no logits, of the whole vocabulary or its first `stored` entries; `dweight`: there
    is a dW."""
    if exponentials:
        return exponential_paths.kept_bytes(k, n, weight, dweight, stored)
    row = weight.shape[0] * acc.itemsize
    return Kept(row, (n - (_grouped_blocks(k, n, weight, acc, alone=True)[2] if dweight else 0)) * row)


def linear_logps_grouped(
    k: TileKernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    transform: LogitTransform,
    groups: Sequence[slice],
    coefficients: Callable[[int, Tensor, Tensor], Tensor],
    *,
    compute_dtype: torch.dtype,
    need: tuple[bool, bool, bool],
    stats: Sequence[str] = (),
    exponentials: bool = False,
    stored: int | None = None,
    shards: Shards | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Path C: the gradients of a sum over groups of rows, each product computed once. The products of one group, or
    `exponentials` for which `k` takes these operands, are kept, tile by tile, while `coefficients(i, logp [n], stats
    [K, n])` says what each row of group i weighs: in the memory that dW is going to take where they fit, else in a
    buffer of `kept_bytes`. With exponentials of the first `stored` vocabulary entries alone, of one group, the products
    x.W^T of the others are computed again."""
    if exponentials:
        return exponential_paths.linear_logps_grouped(
            k, x, weight, bias, y, transform, groups, coefficients, need, stats, stored
        )
    n, v = x.shape[0], weight.shape[0]
    acc = accumulate_dtype(compute_dtype)
    largest = max((group.stop - group.start for group in groups), default=0)
    alone = len(groups) == 1 and need[1]
    rows, columns, in_dw = _grouped_blocks(k, largest, weight, acc, alone)
    one_tile = len(groups) == 1 and rows >= n
    grads = _Gradients(k, x, weight, bias, compute_dtype, need, columns if len(groups) == 1 else v, one_tile, shards)
    buffer = x.new_empty((largest - in_dw) * v, dtype=acc)
    scratch = x.new_empty(in_dw * columns, dtype=k.operand(weight[:0], compute_dtype).dtype)
    for i, group in enumerate(groups):
        if group.start == group.stop:  # other ranks have rows of it, and wait for what is here
            coefficients(i, x.new_empty(0, dtype=acc), x.new_empty(len(stats), 0, dtype=acc))
            continue
        local = list(spans(group.stop - group.start, rows))
        of_x = [slice(group.start + s.start, group.start + s.stop) for s in local]
        y_group = _part(y, group)
        fold = k.new_fold(y_group, acc, stats)

        def tiles(block: slice, local: list[slice] = local) -> Iterator[Tensor]:
            """Where the products of this block's tiles are kept, one for each slice of rows."""
            width = block.stop - block.start
            for s in local:
                n_rows = s.stop - s.start
                if s.stop <= in_dw:
                    yield _tile(grads.spare(block)[s.start * width :], n_rows, width)
                else:
                    behind = (block.start * (local[-1].stop - in_dw)) + (s.start - in_dw) * width
                    yield _tile(buffer[behind:] if behind else buffer, n_rows, width)

        places = [(block, list(tiles(block))) for block in spans(v, columns)]
        for block, of_block in places:
            w, c = k.operand(_part(weight, block), compute_dtype), _columns(bias, block, compute_dtype)
            for s, span, place in zip(local, of_x, of_block, strict=True):
                a = k.product(k.operand(_part(x, span), compute_dtype), w.t(), place)
                k.fold_(fold, a, s, c, transform, keep=True)
                if a is not place:
                    place.copy_(a)
        if shards is not None:
            shards.join_(fold)
        logp, norm, values = fold.finish(v if shards is None else shards.vocab, acc)
        of = GradRows(y_group, norm, logp, coefficients(i, logp, values))
        for block, of_block in places:
            w, c = k.operand(_part(weight, block), compute_dtype), _columns(bias, block, compute_dtype)
            dlogits = []
            for s, a in zip(local, of_block, strict=True):
                kept_in_dw = s.stop <= in_dw  # where the products that d is for may write
                d = _tile(scratch[s.start * a.shape[1] :], *a.shape) if kept_in_dw else k.out_tile(a, w.dtype)
                dlogits.append((d, k.dlogits(a, d, of.part(s), c, transform)))
            for (d, value), span in zip(dlogits, of_x, strict=True):
                grads.add_(d, _part(y, span), value, w, span, block, first=span.start == 0)
            if group.stop == n:
                grads.round_block(block)
        grads.finish_rows(y, group, rows)
    return grads.finish()


def linear_logps_as_grouped(
    k: TileKernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    transform: LogitTransform,
    groups: Sequence[slice],
    *,
    compute_dtype: torch.dtype,
    dweight: bool,
    exponentials: bool = False,
    stored: int | None = None,
    shards: Shards | None = None,
) -> Tensor:
    """[N] the log-probabilities of `linear_logps_grouped` (with a gradient of `weight` or not), to the bit, in path A's
    memory: the same products of the same tiles, folded in the same order."""
    if exponentials:
        return exponential_paths.linear_logps_as_grouped(k, x, weight, bias, y, transform, groups, dweight, stored)
    largest = max((group.stop - group.start for group in groups), default=0)
    acc = accumulate_dtype(compute_dtype)
    rows, columns, _ = _grouped_blocks(k, largest, weight, acc, len(groups) == 1 and dweight)
    logps = x.new_empty(x.shape[0], dtype=acc)
    for group in groups:
        if group.start == group.stop:
            continue
        found = linear_logps_fwd(
            k,
            x[group],
            weight,
            bias,
            y[group],
            transform,
            compute_dtype=compute_dtype,
            blocks=(rows, columns),
            shards=shards,
        )
        logps[group] = found.logp
    return logps
