"""What paths B, C and D of heads in bf16 are made of on Hopper GPUs: the product's epilogue writes exponentials, or the
gradient of the logits; and the kernels between the products of these. See csrc/README.md.

Dimensions: N labelled rows, n of them in a block; H hidden size, V vocabulary size, v entries of a part of it; K
statistics. What is written lies as [v, n]: the entries of a row of memory are rows of x.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dpo_kernels._cuda as _cuda
from dpo_kernels.impl import cuda_linear, waves
from dpo_kernels.impl.cuda_linear import Sums, address, matrix, stream
from dpo_kernels.impl.exponentials import DLOGITS_BYTES, EXP_BYTES, FAR, FIRST_COLUMNS, padded_rows
from dpo_kernels.impl.interface import FoundRows, GradRows, LogitTransform
from dpo_kernels.impl.products import LONG_SUM


def takes_exponentials(x_dtype: torch.dtype, weight: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether there is such a product for rows x of this dtype and weight [V, H]: with rows that can be made dense."""
    bf16 = x_dtype == weight.dtype == compute_dtype == torch.bfloat16
    hopper, _ = cuda_linear._machine(weight.device)
    v, h = weight.shape
    return bf16 and hopper and v > 0 and h % 8 == 0 and cuda_linear.can_be_copied_in_boxes(weight, compute_dtype)


def exponential_rows(n: int, v: int, h: int, device: torch.device) -> int:
    """How many rows of exponentials path B has at a time."""
    _, multiprocessors = cuda_linear._machine(device)
    return waves.rows_at_a_time(n, v, h, multiprocessors, EXP_BYTES, _cuda.CLUSTER_BLOCKS)


def recomputed_columns(n: int, v: int, h: int, device: torch.device) -> int:
    """How many vocabulary entries of the gradient of n rows path D has at a time."""
    _, multiprocessors = cuda_linear._machine(device)
    return waves.columns_at_a_time(n, v, h, multiprocessors, DLOGITS_BYTES, _cuda.CLUSTER_BLOCKS)


def shift_columns(device: torch.device) -> int:
    """How many entries of the vocabulary share a shift of packed exponentials."""
    return _cuda.BLOCK_COLUMNS


def _dense(x: Tensor) -> Tensor:
    return x if cuda_linear.can_be_copied_in_boxes(x, x.dtype) else x.resolve_neg().contiguous()


def _dhidden(sums: Tensor, weight: Tensor, y: Tensor, scale: Tensor | None, label: Tensor, out: Tensor) -> Tensor:
    """scale (sums + label W_y), or without a scale; sums and out [N, H] may be the same."""
    assert sums.is_contiguous() and out.is_contiguous() and sums.dtype == torch.float32
    with torch.cuda.device_of(sums):
        _cuda.dhidden(
            cuda_linear.type_name(out), matrix(sums), matrix(weight), address(y), address(scale), address(label),
            address(out), stream(sums),
        )  # fmt: skip
    return out


class _Part(NamedTuple):
    """Entries of the vocabulary whose exponentials lie in one tensor."""

    first: int
    weight: Tensor  # [v, H]
    bias: Tensor | None  # [v]
    splits: int
    first_split: int
    first_block: int  # of columns


class Exponentials:
    """See `interface.Exponentials`. Packed ones are fp16 with a shift for each block of columns; the others have one
    for the row, and may have to be written again."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, transform: LogitTransform,
        stats: Sequence[str], rows: int, sizes: Sequence[int], packed: bool,
    ):  # fmt: skip
        self.x, self.y, self.weight = _dense(x), y.contiguous(), weight
        self.transform, self.names, self.packed = transform, tuple(stats), packed
        n, bias = x.shape[0], cuda_linear.rounded_bias(bias, weight.dtype)
        _, self.multiprocessors = cuda_linear._machine(x.device)
        self.rows, self.parts, first, splits, blocks = rows, list[_Part](), 0, 0, 0
        for size in sizes:
            own = cuda_linear.splits_of(rows, size, self.multiprocessors)
            here = slice(first, first + size)
            self.parts.append(
                _Part(first, weight[here], None if bias is None else bias[here], own, splits, blocks)
            )  # fmt: skip
            first, splits = first + size, splits + own
            blocks += math.ceil(size / shift_columns(x.device))
        assert first == weight.shape[0]
        self.sums = Sums.empty(n, splits, bool(stats), x)
        self.top, self.scale, self.label, self.missing = x.new_empty(4, n, dtype=torch.float32)
        self.weights: Tensor | None = None  # of packed ones
        if packed:
            self.shift, self.far = x.new_empty(0, 0, dtype=torch.float32), None
        else:
            self.far = x.new_empty(n, dtype=torch.int32)
            some = weight[:FIRST_COLUMNS]
            (self.shift,) = cuda_linear.fold(self.x, some, bias, self.y, transform, False, splits=1, far=self.far).max

    def write(self, rows: slice, out: Sequence[Tensor | None] | None) -> None:
        x, y, sums = self.x[rows], self.y[rows], self.sums.of(rows).native()
        if self.packed and self.weights is None and out is not None:
            blocks = sum(math.ceil(e.shape[0] / shift_columns(x.device)) for e in out if e is not None)
            self.weights = x.new_empty(_cuda.FACTORS + blocks, padded_rows(self.rows), dtype=torch.float32)
            self.shift = self.weights[_cuda.FACTORS :]
        places: Sequence[Tensor | None] = [None] * len(self.parts) if out is None else out
        for again in (False,) if self.packed else (False, True):
            for part, e in zip(self.parts, places, strict=True):
                to = _cuda.Matrix(0, 0, 0, 0) if e is None else matrix(e)
                shift = self.shift[part.first_block :] if self.packed else self.shift[rows]
                with torch.cuda.device_of(x):
                    _cuda.linear_exp(
                        cuda_linear.product(x, part.weight, part.bias, y, part.first, self.transform, part.splits),
                        sums, part.first_split, to, self.packed, address(shift), shift.stride(0),
                        0 if self.far is None else address(self.far[rows]), FAR, again, self.sums.splits.shape[1],
                        bool(self.names), self.multiprocessors, stream(x),
                    )  # fmt: skip

    def _stored(self, rows: slice) -> dict[str, Any]:
        """What becomes known of rows with stored exponentials, and what with."""
        shift = None if self.packed else self.shift[rows]
        return {
            "shift": shift, "far": FAR, "top": self.top[rows], "scale": self.scale[rows], "label": self.label[rows],
        }  # fmt: skip

    def finish(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        return self.sums.of(rows).join(self.weight.shape[0], self.transform, self.names, **self._stored(rows))

    def finish_at(self, found: FoundRows) -> None:
        of = self._stored(slice(0, len(found.y)))
        self.sums.join_at(found, self.weight.shape[0], self.transform, self.names, **of)

    def weigh(self, e: Sequence[Tensor], rows: slice, g: Tensor) -> Dlogits:
        assert self.weights is not None
        g, weights = g.float().contiguous(), self.weights[:, : rows.stop - rows.start]
        with torch.cuda.device_of(g):
            _cuda.weigh(
                cuda_linear.native(self.transform), matrix(weights), address(self.y[rows]), address(self.top[rows]),
                address(self.scale[rows]), address(self.label[rows]), address(g), address(self.missing[rows]),
                stream(g),
            )  # fmt: skip
        return Dlogits(self, e, rows, weights)

    def dhidden(self, sums: Tensor, out: Tensor) -> Tensor:
        scale, label = (None, self.missing) if self.packed else (self.scale, self.label)
        return _dhidden(sums, self.weight, self.y, scale, label, out)


class Dlogits:
    """See `interface.Dlogits`. Exponentials are weighed while products read them, and stay what they are."""

    def __init__(self, sweep: Exponentials, e: Sequence[Tensor], rows: slice, weights: Tensor):
        self.sweep, self.e, self.x, self.weights = sweep, e, sweep.x[rows], weights

    def _weighed(self, part: _Part, e: Tensor, first: int = 0) -> _cuda.Weighed:
        """Of the entries `e` of a part, from its `first` on."""
        blocks, rest = divmod(first, shift_columns(e.device))
        assert rest == 0, "a tile of a product has one shift a row"
        return _cuda.Weighed(matrix(e), matrix(self.weights), part.first + first, part.first_block + blocks)

    def dhidden(self, out: Tensor) -> None:
        assert out.is_contiguous() and out.dtype == torch.float32 and len(self.e) <= 2
        none = _cuda.Weighed(_cuda.Matrix(0, 0, 0, 0), _cuda.Matrix(0, 0, 0, 0), 0, 0)
        of, rest = [*map(self._weighed, self.sweep.parts, self.e), none][:2]
        v, (n, h) = sum(e.shape[0] for e in self.e), out.shape
        parts = 1
        if v >= LONG_SUM:
            parts = waves.sum_parts(n, v, h, self.sweep.multiprocessors, _cuda.CLUSTER_BLOCKS)
        found = out if parts == 1 else out.new_empty(parts, n, h)
        to = _cuda.Matrix(address(found), n, h, h)
        with torch.cuda.device_of(out):
            _cuda.linear_dhidden(
                of, rest, matrix(self.sweep.weight), to, parts, self.sweep.multiprocessors, stream(out)
            )  # fmt: skip
        if parts > 1:
            torch.sum(found, 0, out=out)

    def dweight(self, blocks: Iterable[slice], out: Tensor | None, dbias: Tensor | None, accumulate: bool) -> None:
        assert out is None or out.is_contiguous() and (out.dtype == torch.float32 or not accumulate)
        for block in blocks:
            (part, e), *_ = [
                (part, e[block.start - part.first : block.stop - part.first])
                for part, e in zip(self.sweep.parts, self.e, strict=False)
                if part.first <= block.start < part.first + e.shape[0]
            ]
            assert e.shape[0] == block.stop - block.start, "a block of one part"
            to = _cuda.Matrix(0, 0, 0, 0) if out is None else matrix(out[block])
            with torch.cuda.device_of(e):
                _cuda.linear_dweight(
                    self._weighed(part, e, block.start - part.first), matrix(self.x),
                    "float32" if out is None else cuda_linear.type_name(out), to, accumulate,
                    0 if dbias is None else address(dbias[block]), self.sweep.multiprocessors, stream(e),
                )  # fmt: skip


class Recomputed:
    """See `interface.Recomputed`."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, of: GradRows, transform: LogitTransform,
        missing: Tensor | None = None,
    ):  # fmt: skip
        self.x, self.weight, self.bias, self.transform = (
            _dense(x),
            weight,
            cuda_linear.rounded_bias(bias, weight.dtype),
            transform,
        )
        y, norm, logp, g = of
        self.y, self.logp, self.g = y.contiguous(), logp.float().contiguous(), g.float().contiguous()
        self.norm = norm.float().contiguous()
        self.missing = torch.empty_like(self.logp) if missing is None else missing
        _, self.multiprocessors = cuda_linear._machine(x.device)

    def write(self, block: slice, out: Tensor) -> None:
        n, v = self.x.shape[0], block.stop - block.start
        assert out.dtype == torch.bfloat16 and out.shape == (v, n) and out.stride() == (padded_rows(n), 1)
        splits = cuda_linear.splits_of(n, v, self.multiprocessors)
        bias = None if self.bias is None else self.bias[block]
        to = _cuda.Matrix(address(out), v, padded_rows(n), out.stride(0))
        with torch.cuda.device_of(self.x):
            _cuda.linear_dlogits(
                cuda_linear.product(self.x, self.weight[block], bias, self.y, block.start, self.transform, splits), to,
                _cuda.GradRows(address(self.norm), self.norm.stride(0), address(self.logp), address(self.g)),
                address(self.missing), self.multiprocessors, stream(self.x),
            )  # fmt: skip

    def dhidden(self, sums: Tensor, out: Tensor) -> Tensor:
        return _dhidden(sums, self.weight, self.y, None, self.missing, out)
