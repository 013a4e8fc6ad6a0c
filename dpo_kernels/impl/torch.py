"""The plain PyTorch implementation: right on every device, and the reading copy of the algorithms.

Dimensions: N labelled rows, H hidden size, V vocabulary size, v columns of one vocabulary block, n rows of one row
block, K statistics. A *tile* is [n, v] logits in the accumulation dtype (fp32; fp64 for fp64 operands). No tensor made
here exceeds `tile_bytes`, except the [N, H] accumulators and results, and the buffer of path C.

The label's own entry never takes part in a row's running maximum m and sum s. Then

    logp = -log1p(s exp(m - z_y)) where z_y > m        1 - p_y = -expm1(logp)

keep their digits where the model is sure of the label, which is where DPO spends its time and where z_y - lse cancels.
No tensor is larger than a tile, but a few live at a time: two, and four under a softcap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dpo_kernels.impl.interface import LinearLogps, LogitTransform, Rows, accumulate_dtype

CPU_TILE_BYTES = 16 * 2**20
DEVICE_TILE_BYTES = 128 * 2**20
# Below this many columns a matrix product wastes more than splitting the rows does.
MIN_COLUMNS = 256


def tile_bytes(device: torch.device) -> int:
    """The size in bytes that no temporary tensor of paths A, B, D and E exceeds on `device`, whatever N and V."""
    return CPU_TILE_BYTES if device.type == "cpu" else DEVICE_TILE_BYTES


def _blocks(n: int, v: int, h: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile, such that [rows, columns], [rows, H] and [columns, H] each fit in `tile_bytes`."""
    numel = tile_bytes(device) // dtype.itemsize
    rows = max(1, min(n, numel // max(h, min(v, MIN_COLUMNS))))
    return rows, max(1, min(v, numel // max(h, rows)))


def _spans(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _operand(t: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """`t` rounded to the compute dtype, held in the dtype that this device multiplies in with fp32 accumulation."""
    t = t.to(compute_dtype)
    return t if t.device.type == "cuda" else t.to(accumulate_dtype(compute_dtype))


def _mm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out (+)= a @ b without rounding the product below the dtype of `out`."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif not accumulate:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif torch.__version__ >= "2.10":
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:  # which took no fp32 `out` beside half-precision operands
        out.add_(torch.mm(a, b, out_dtype=out.dtype))


def _tile(buffer: Tensor, n: int, v: int) -> Tensor:
    return buffer[: n * v].view(n, v)


def _raw_logits_(
    z: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, block: slice, compute_dtype: torch.dtype
) -> Tensor:
    """z [n, v] = x @ w.T + bias, for the rows `w` of the weight that `block` names."""
    _mm(_operand(x, compute_dtype), w.t(), z)
    return z if bias is None else z.add_(bias[block].to(compute_dtype))


def _transform_(z: Tensor, transform: LogitTransform, with_slope: bool = False) -> tuple[Tensor, Tensor | None]:
    """Raw products x.W + b to logits, in place; and where asked for, under a softcap, 1 - tanh^2: the part of dz/da
    that differs from entry to entry. As 1 / cosh^2 it keeps its digits where tanh has reached 1."""
    scale, cap, temperature = transform
    if cap is None:
        return (z if transform.slope == 1.0 else z.mul_(transform.slope)), None
    z.mul_(scale / cap)
    slope = torch.cosh(z).reciprocal_().square_() if with_slope else None
    return z.tanh_().mul_(cap / temperature), slope


class _Fold:
    """Running statistics of N rows over vocabulary blocks, the label's entry held apart."""

    def __init__(self, y: Tensor, dtype: torch.dtype, stats: Sequence[str]):
        self.y, self.names = y, stats
        # finite, so that a block of -inf alone leaves no inf - inf
        self.max = torch.full_like(y, torch.finfo(dtype).min, dtype=dtype)
        self.target = torch.full_like(y, -math.inf, dtype=dtype)
        self.argmax = torch.full_like(y, -1)
        self.sum, self.sum_z, self.sum_ez, self.sum_sq = torch.zeros(4, *y.shape, dtype=dtype, device=y.device)

    def add_(self, z: Tensor, rows: slice, start: int) -> Tensor:
        """Takes a tile of logits for `rows` and vocabulary entries from `start` on, and leaves exp(z - max) in it, 0 at
        the label. Returns the factor [n] that brings what was accumulated before to the new maximum."""
        if "mean_logit" in self.names:
            self.sum_z[rows] += z.sum(1)
        column, inside = _label_column(self.y[rows], start, z.shape[1])
        at_label = z.gather(1, column)
        self.target[rows] = torch.where(inside, at_label, self.target[rows, None]).squeeze(1)
        z.scatter_(1, column, torch.where(inside, -math.inf, at_label))

        old_max = self.max[rows]
        block_max, block_argmax = z.max(1)
        new_max = torch.maximum(old_max, block_max)
        if "is_top1" in self.names:
            self.argmax[rows] = torch.where(block_max > old_max, block_argmax + start, self.argmax[rows])
        rescale = torch.exp(old_max - new_max)
        z.sub_(new_max[:, None]).exp_()
        if "entropy" in self.names:
            # clamped: at first old_max is the least number there is, and 0 times the difference is to be 0
            shifted = self.sum_ez[rows] + self.sum[rows] * (old_max - new_max).clamp(min=-1e4)
            self.sum_ez[rows] = shifted * rescale + torch.special.xlogy(z, z).sum(1)
        if "log_sum_sq_probs" in self.names:
            self.sum_sq[rows] = self.sum_sq[rows] * rescale.square() + z.square().sum(1)
        self.sum[rows] = self.sum[rows] * rescale + z.sum(1)
        self.max[rows] = new_max
        return rescale

    def finish(self, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """logp [N], norm [2, N] and the statistics [K, N]."""
        lead = self.target - self.max
        logp = torch.where(
            lead > 0, -torch.log1p(self.sum * torch.exp(-lead)), lead - torch.log(self.sum + torch.exp(lead))
        )
        shift = torch.maximum(self.max, self.target)
        norm = torch.stack([shift, self.sum * torch.exp(self.max - shift) + torch.exp(self.target - shift)])
        values = []
        for name in self.names:
            if name == "entropy":
                # -sum p log p: the label's term, and the others' with z = max + (z - max)
                own = torch.where(logp == -math.inf, 0.0, -logp.exp() * logp)
                values.append(own - self.others(norm) * (self.sum_ez + self.sum * self.log_prob_of_max(norm)))
            elif name == "is_top1":
                # argmax takes the first of equal entries
                first = (self.target == self.max) & (self.y < self.argmax)
                values.append(((self.target > self.max) | first).to(logp.dtype))
            elif name == "mean_logit":
                values.append(self.sum_z / vocab_size)
            else:
                values.append(torch.logaddexp(self.sum_sq.log() + 2 * self.log_prob_of_max(norm), 2 * logp))
        return logp, norm, torch.stack(values) if values else logp.new_empty(0, logp.shape[0])

    def log_prob_of_max(self, norm: Tensor) -> Tensor:
        return (self.max - norm[0]) - norm[1].log()

    def others(self, norm: Tensor) -> Tensor:
        """What exp(z - max) is multiplied by to be a probability."""
        return torch.exp(self.max - norm[0]) / norm[1]


def _label_column(y: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """[n, 1] column of each label in the block that starts at `start`, and whether it lies in it."""
    column = (y - start)[:, None]
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def _dlogits_(
    z: Tensor,
    slope: Tensor | None,
    y: Tensor,
    norm: Tensor,
    logp: Tensor,
    g: Tensor,
    start: int,
    transform: LogitTransform,
) -> tuple[Tensor, Tensor]:
    """Turns a tile of logits into -g p dz/da in place, with 0 at the labels. Returns column [n, 1] and value [n, 1] of
    the label's own entry g (1 - p_y) dz/da, 0 where the label lies in another block."""
    column, inside = _label_column(y, start, z.shape[1])
    z.sub_(norm[0, :, None]).exp_().mul_((-transform.slope * g / norm[1])[:, None])
    value = (-torch.expm1(logp) * g * transform.slope)[:, None]
    if slope is not None:
        z.mul_(slope)
        value = value * slope.gather(1, column)
    z.scatter_(1, column, z.gather(1, column).masked_fill_(inside, 0.0))
    return column, value.masked_fill(~inside, 0.0)


def _put_labels_(z: Tensor, column: Tensor, value: Tensor) -> None:
    # not scatter_add_, which adds with atomics on some devices
    z.scatter_(1, column, z.gather(1, column) + value)


def _add_label_rows_(
    dx: Tensor, weight: Tensor, y: Tensor, label: Tensor, compute_dtype: torch.dtype, rows: int
) -> None:
    """dx_n += label_n W_y, a block of rows at a time."""
    for span in _spans(y.shape[0], rows):
        dx[span].addcmul_(weight[y[span]].to(compute_dtype).to(dx.dtype), label[span, None])


def linear_logps_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    transform: LogitTransform,
    *,
    compute_dtype: torch.dtype,
    stats: Sequence[str] = (),
    with_dhidden: bool = False,
) -> LinearLogps:
    """Path A, and path B with `with_dhidden`: sum_v exp(z_v - m) dz/da W_v is accumulated with online rescaling in the
    same sweep, as attention does with keys and values W."""
    (n, h), v = x.shape, weight.shape[0]
    acc = accumulate_dtype(compute_dtype)
    rows, columns = _blocks(n, v, h, acc, x.device)
    fold = _Fold(y, acc, stats)
    expected = x.new_zeros(n, h, dtype=acc) if with_dhidden else None
    label_slope = x.new_ones(n, dtype=acc)
    buffer = x.new_empty(rows * columns, dtype=acc)
    for block in _spans(v, columns):
        w = _operand(weight[block], compute_dtype)
        for span in _spans(n, rows):
            z = _tile(buffer, x[span].shape[0], w.shape[0])
            _raw_logits_(z, x[span], w, bias, block, compute_dtype)
            _, slope = _transform_(z, transform, with_slope=expected is not None)
            rescale = fold.add_(z, span, block.start)
            if expected is None:
                continue
            if slope is not None:
                z.mul_(slope)
                column, inside = _label_column(y[span], block.start, z.shape[1])
                label_slope[span] = torch.where(inside, slope.gather(1, column), label_slope[span, None]).squeeze(1)
            _mm(z.to(w.dtype), w, expected[span].mul_(rescale[:, None]), accumulate=True)
    logp, norm, values = fold.finish(v)
    if expected is not None:
        expected.mul_((-transform.slope * fold.others(norm))[:, None])
        label = -torch.expm1(logp) * transform.slope * label_slope
        _add_label_rows_(expected, weight, y, label, compute_dtype, rows)
    return LinearLogps(logp, norm, values, expected)


class _Gradients:
    """dX, dW and db while they are summed over tiles of dlogits, all in the accumulation dtype. A dW of a lower dtype
    is summed apart and rounded once: block by block (`block_columns`), or whole where rows come in several groups."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        compute_dtype: torch.dtype,
        need: tuple[bool, bool, bool],
        block_columns: int,
    ):
        acc = accumulate_dtype(compute_dtype)
        (n, h), v = x.shape, weight.shape[0]
        self.x, self.weight, self.compute_dtype = x, weight, compute_dtype
        self.dx = x.new_zeros(n, h, dtype=acc) if need[0] else None
        self.label = x.new_zeros(n, dtype=acc)
        self.dw = weight.new_empty(v, h) if need[1] else None
        self.dw_sum = self.dw if weight.dtype == acc or not need[1] else weight.new_empty(block_columns, h, dtype=acc)
        self.db = bias.new_zeros(v, dtype=acc) if need[2] and bias is not None else None
        self.db_dtype = weight.dtype if bias is None else bias.dtype

    def add_(self, z: Tensor, label: tuple[Tensor, Tensor], w: Tensor, rows: slice, block: slice, first: bool) -> None:
        """Adds the products of one tile. The labels' entries stay out of dX, where they would be rounded at their own
        size and then cancel (`finish` adds them), and are in dW and db. `first`: nothing is in this block yet."""
        column, value = label
        if self.dx is not None:
            _mm(z.to(w.dtype), w, self.dx[rows], accumulate=True)
            self.label[rows] += value.squeeze(1)
        if self.dw_sum is not None or self.db is not None:
            _put_labels_(z, column, value)
        if self.dw_sum is not None:
            target = self.dw_sum[block] if self.dw_sum.shape[0] == self.weight.shape[0] else self.dw_sum[: z.shape[1]]
            _mm(z.to(w.dtype).t(), _operand(self.x[rows], self.compute_dtype), target, accumulate=not first)
        if self.db is not None:
            self.db[block] += z.sum(0)

    def round_block(self, block: slice) -> None:
        """Once all rows are in a block: writes it to dW."""
        if self.dw is not None and self.dw_sum is not None and self.dw_sum is not self.dw:
            whole = self.dw_sum.shape[0] == self.weight.shape[0]
            self.dw[block] = self.dw_sum[block] if whole else self.dw_sum[: block.stop - block.start]

    def finish(self, y: Tensor, rows: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Adds the labels' part of dX and gives the three, in the dtypes of what they are gradients of."""
        if self.dx is not None:
            _add_label_rows_(self.dx, self.weight, y, self.label, self.compute_dtype, rows)
            self.dx = self.dx.to(self.x.dtype)
        return self.dx, self.dw, None if self.db is None else self.db.to(self.db_dtype)


def linear_logps_bwd(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    norm: Tensor,
    logp: Tensor,
    transform: LogitTransform,
    *,
    compute_dtype: torch.dtype,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Path D: gradients of sum_n g_n logp_n with respect to x, weight and bias, those that are needed. The vocabulary
    is the outer loop, so each block of dW is summed over all rows and rounded once, straight into its place."""
    (n, h), v = x.shape, weight.shape[0]
    acc = accumulate_dtype(compute_dtype)
    rows, columns = _blocks(n, v, h, acc, x.device)
    grads = _Gradients(x, weight, bias, compute_dtype, need, columns)
    buffer = x.new_empty(rows * columns, dtype=acc)
    for block in _spans(v, columns):
        w = _operand(weight[block], compute_dtype)
        for span in _spans(n, rows):
            z = _tile(buffer, x[span].shape[0], w.shape[0])
            _raw_logits_(z, x[span], w, bias, block, compute_dtype)
            _, slope = _transform_(z, transform, with_slope=True)
            label = _dlogits_(z, slope, y[span], norm[:, span], logp[span], g[span], block.start, transform)
            grads.add_(z, label, w, span, block, first=span.start == 0)
        grads.round_block(block)
    return grads.finish(y, rows)


def linear_logps_grouped(
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Path C: the gradients of a sum over groups of rows, each product computed once. The products of one group are
    kept in a buffer [n, V] while `coefficients(i, logp [n], stats [K, n])` says what each row of group i weighs."""
    (n, h), v = x.shape, weight.shape[0]
    acc = accumulate_dtype(compute_dtype)
    largest = max((group.stop - group.start for group in groups), default=0)
    rows, columns = _blocks(largest, v, h, acc, x.device)
    grads = _Gradients(x, weight, bias, compute_dtype, need, columns if len(groups) == 1 else v)
    buffer, logits = x.new_empty(rows * columns, dtype=acc), x.new_empty(largest * v, dtype=acc)
    for i, group in enumerate(groups):
        spans = [slice(group.start + s.start, group.start + s.stop) for s in _spans(group.stop - group.start, rows)]
        fold = _Fold(y[group], acc, stats)
        z = _tile(logits, group.stop - group.start, v)
        for block in _spans(v, columns):
            w = _operand(weight[block], compute_dtype)
            for span in spans:
                local = slice(span.start - group.start, span.stop - group.start)
                part = _raw_logits_(z[local, block], x[span], w, bias, block, compute_dtype)
                tile = _tile(buffer, *part.shape).copy_(part)
                fold.add_(_transform_(tile, transform)[0], local, block.start)
        logp, norm, values = fold.finish(v)
        g = coefficients(i, logp, values)
        for block in _spans(v, columns):
            w = _operand(weight[block], compute_dtype)
            for span in spans:
                local = slice(span.start - group.start, span.stop - group.start)
                part, slope = _transform_(z[local, block], transform, with_slope=True)
                label = _dlogits_(part, slope, y[span], norm[:, local], logp[local], g[local], block.start, transform)
                grads.add_(part, label, w, span, block, first=span.start == 0)
            if group.stop == n:
                grads.round_block(block)
    return grads.finish(y, rows)


def _gather_logits(logits: Tensor, rows: Rows, span: slice, block: slice, dtype: torch.dtype) -> Tensor:
    """A tile [n, v], a copy, of the logits [S, T, V] at the labelled positions."""
    return logits[:, :, block][rows.sequence[span], rows.position[span]].to(dtype)


def _logits_blocks(n: int, v: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    numel = tile_bytes(device) // dtype.itemsize
    columns = min(v, numel)
    return max(1, min(n, numel // columns)), columns


def logps_fwd(logits: Tensor, rows: Rows, y: Tensor, *, stats: Sequence[str] = ()) -> LinearLogps:
    """Path E: one read of the labelled rows of logits [S, T, V]."""
    acc = accumulate_dtype(logits.dtype)
    v = logits.shape[-1]
    step, columns = _logits_blocks(y.shape[0], v, acc, logits.device)
    fold = _Fold(y, acc, stats)
    for span in _spans(y.shape[0], step):
        for block in _spans(v, columns):
            fold.add_(_gather_logits(logits, rows, span, block, acc), span, block.start)
    return LinearLogps(*fold.finish(v), None)


def logps_bwd_(g: Tensor, logits: Tensor, rows: Rows, y: Tensor, norm: Tensor, logp: Tensor, out: Tensor) -> None:
    """Path E: the gradient of sum_n g_n logp_n with respect to the logits, written to the labelled rows of `out`
    [S, T, V], which may be `logits`."""
    acc = accumulate_dtype(logits.dtype)
    step, columns = _logits_blocks(y.shape[0], logits.shape[-1], acc, logits.device)
    for span in _spans(y.shape[0], step):
        for block in _spans(logits.shape[-1], columns):
            z = _gather_logits(logits, rows, span, block, acc)
            label = _dlogits_(z, None, y[span], norm[:, span], logp[span], g[span], block.start, LogitTransform())
            _put_labels_(z, *label)
            out[:, :, block][rows.sequence[span], rows.position[span]] = z.to(out.dtype)
