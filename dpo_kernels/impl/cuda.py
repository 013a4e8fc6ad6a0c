"""The CUDA implementation: the tile kernels, path E and Hopper's fused forward of `csrc/cuda`.

Dimensions: N labelled rows, H hidden size, V vocabulary size, K requested statistics, n rows and v vocabulary entries
of one tile. Kernels go to the current stream of their tensors' device, and nothing here waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import dpo_kernels._cuda as _cuda
from dpo_kernels.impl import cuda_exponentials, cuda_linear, cuda_positions
from dpo_kernels.impl.cuda_exponentials import exponential_rows as exponential_rows
from dpo_kernels.impl.cuda_exponentials import recomputed_columns as recomputed_columns
from dpo_kernels.impl.cuda_exponentials import shift_columns as shift_columns
from dpo_kernels.impl.cuda_exponentials import takes_exponentials as takes_exponentials
from dpo_kernels.impl.cuda_linear import address as _address
from dpo_kernels.impl.cuda_linear import matrix as _matrix
from dpo_kernels.impl.cuda_linear import native as _transform
from dpo_kernels.impl.cuda_linear import stream as _stream
from dpo_kernels.impl.cuda_linear import type_name as _type
from dpo_kernels.impl.exponentials import padded_rows as padded_rows
from dpo_kernels.impl.fold import CompiledFold, Fold, LazyFold, stats_numbers
from dpo_kernels.impl.interface import (
    Columns,
    GradPositions,
    GradRows,
    Labels,
    LogitTransform,
    accumulate_dtype,
)
from dpo_kernels.impl.positions import check_labels
from dpo_kernels.impl.products import operand as operand
from dpo_kernels.impl.products import product as product
from dpo_kernels.impl.products import put_labels_ as put_labels_

exponentials = cuda_exponentials.Exponentials
recomputed = cuda_exponentials.Recomputed
find_rows, gather_rows, put_rows = cuda_positions.find_rows, cuda_positions.gather_rows, cuda_positions.put_rows
linear_token_logps = cuda_positions.linear_token_logps
compare, sum_rows = cuda_positions.compare, cuda_positions.sum_rows
_positions = cuda_positions.of_positions

TILE_BYTES = 128 * 2**20


def description() -> str:
    return "available: compiled CUDA kernels"


def has_fused_forward(device: torch.device) -> bool:
    """Whether path A in half precision can be one kernel instead of products of tiles: on Hopper."""
    return cuda_linear._machine(device)[0]


def tile_bytes(device: torch.device) -> int:
    return TILE_BYTES


def out_tile(a: Tensor, dtype: torch.dtype) -> Tensor:
    if a.dtype == dtype:
        return a
    n, v = a.shape
    if v % 8 or a.data_ptr() % 16:  # rows that are not read in whole pieces of 16 bytes cannot be overwritten
        return torch.empty_like(a, dtype=dtype)
    return a.view(dtype)[:, :v]  # the first half of each row


class CudaFold(LazyFold, CompiledFold):
    """A fold that is finished by one kernel: on a GPU, thirty on [N] would take as long as a tenth of path E."""

    in_one_kernel: tuple[cuda_linear.Sums, LogitTransform] | None = None

    def finish(self, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if self.in_one_kernel is not None:
            assert dtype == torch.float32
            sums, transform = self.in_one_kernel
            return sums.join(vocab_size, transform, self.names)
        self.logp, self.norm, values = self.empty_results(dtype)
        with torch.cuda.device_of(self.y):
            _cuda.finish(
                _type(self.logp), _state(self), _address(self.y), self.y.shape[0], vocab_size,
                stats_numbers(self.names), _address(self.logp), _address(self.norm), _address(values), _stream(self.y),
            )  # fmt: skip
        return self.logp, self.norm, values


def new_fold(y: Tensor, dtype: torch.dtype, stats: Sequence[str]) -> Fold:
    return CudaFold(y.contiguous(), torch.float64, stats)


def _state(fold: Fold, rows: slice = slice(None)) -> _cuda.FoldState:
    state, argmax = fold.state[:, rows], fold.argmax[rows]
    return _cuda.FoldState(_address(state), state.stride(0), _address(argmax))


def _tile(a: Tensor, y: Tensor, columns: Columns, transform: LogitTransform) -> _cuda.Tile:
    assert a.dtype in (torch.float32, torch.float64)
    assert a.is_contiguous() and y.is_contiguous() and y.dtype == torch.int64 and y.shape[0] == a.shape[0]
    assert columns.bias is None or columns.bias.is_contiguous() and columns.bias.dtype == a.dtype
    n, v = a.shape
    return _cuda.Tile(_address(a), n, v, columns.start, _address(y), _address(columns.bias), _transform(transform))


def linear_fold_(
    fold: Fold, x: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, compute_dtype: torch.dtype
) -> bool:
    if not (x.shape[0] and cuda_linear.can_fold(x, weight, compute_dtype)):
        return False
    assert isinstance(fold, CudaFold)
    bias = cuda_linear.rounded_bias(bias, compute_dtype)
    sums = cuda_linear.fold(x, weight, bias, fold.y, transform, bool(fold.names))
    fold.in_one_kernel = sums, transform
    return True


def fold_(fold: Fold, a: Tensor, rows: slice, columns: Columns, transform: LogitTransform, keep: bool) -> None:
    _fold_tile(fold, a, a, rows, columns, transform, None)


def fold_exp_(
    fold: Fold, a: Tensor, out: Tensor, rows: slice, columns: Columns, transform: LogitTransform, sums: Tensor
) -> None:
    assert out.stride(1) == 1 and out.shape == a.shape
    assert sums.stride(1) == 1 and sums.shape[0] == a.shape[0] and sums.dtype == a.dtype
    _fold_tile(fold, a, out, rows, columns, transform, sums)


def _fold_tile(
    fold: Fold, a: Tensor, out: Tensor, rows: slice, columns: Columns, transform: LogitTransform, sums: Tensor | None
) -> None:
    with torch.cuda.device_of(a):
        _cuda.fold(
            _type(a),
            _tile(a, fold.y[rows], columns, transform),
            _state(fold, rows),
            _type(out),
            _matrix(out),
            _cuda.Matrix(0, 0, 0, 0) if sums is None else _matrix(sums),
            bool(fold.names),
            _stream(a),
        )


def _contiguous(of: GradRows, dtype: torch.dtype) -> GradRows:
    """To be bound to a name: an address alone keeps no copy alive."""
    y, norm, logp, g = of
    norm = norm.to(dtype)
    rows = norm if norm.stride(1) == 1 else norm.contiguous()
    return GradRows(y.contiguous(), rows, logp.to(dtype).contiguous(), g.to(dtype).contiguous())


def _grad_rows(of: GradRows) -> _cuda.GradRows:
    return _cuda.GradRows(_address(of.norm), of.norm.stride(0), _address(of.logp), _address(of.g))


def dlogits(a: Tensor, out: Tensor, of: GradRows, columns: Columns, transform: LogitTransform) -> Tensor:
    of = _contiguous(of, a.dtype)
    value = torch.empty_like(of.logp)
    assert out.stride(1) == 1 and out.shape == a.shape
    with torch.cuda.device_of(a):
        _cuda.dlogits(
            _type(a), _tile(a, of.y, columns, transform), _type(out), _matrix(out), _grad_rows(of), _address(value),
            _stream(a),
        )  # fmt: skip
    return value


def _logits(logits: Tensor) -> _cuda.LogitsRows:
    return _cuda.LogitsRows(_address(logits), *logits.stride())


def _labels(labels: Tensor, ignore_index: int) -> _cuda.Labels:
    assert labels.dtype == torch.int64
    (stride_s, stride_t), (sequences, length) = labels.stride(), labels.shape
    return _cuda.Labels(_address(labels), stride_s, stride_t, sequences, length, ignore_index)


def scale_(t: Tensor, factor: Tensor) -> None:
    assert t.is_contiguous() and factor.ndim == 0
    factor = factor.to(accumulate_dtype(t.dtype))  # to a name: an address alone keeps no copy alive
    if t.numel():
        with torch.cuda.device_of(t):
            _cuda.scale(_type(t), _matrix(t.view(-1, t.shape[-1])), _address(factor), _stream(t))


def logps_fwd(logits: Tensor, labels: Labels, *, stats: Sequence[str] = ()) -> tuple[Tensor, Tensor, Tensor]:
    y, acc, v = labels.y, accumulate_dtype(logits.dtype), logits.shape[-1]
    logp, norm, values = (logits.new_empty(*lead, *y.shape, dtype=acc) for lead in ((), (2,), (len(stats),)))
    fit = y.new_empty((), dtype=torch.int32)
    with torch.cuda.device_of(logits):
        _cuda.logits_fwd(
            _type(logits), _logits(logits), _labels(y, labels.ignore_index), v,
            -1 if labels.num_labelled is None else labels.num_labelled, stats_numbers(stats),
            _address(logp), _address(norm), _address(values), _address(fit), _stream(logits),
        )  # fmt: skip
    check_labels(fit, labels, v)
    return logp, norm, values


def logps_bwd_(logits: Tensor, labels: Labels, of: GradPositions, out: Tensor) -> None:
    assert out.dtype == logits.dtype and out.shape == logits.shape
    norm, logp, g = of.norm.contiguous(), of.logp.contiguous(), of.g
    assert norm.dtype == logp.dtype == g.dtype == accumulate_dtype(logits.dtype)
    with torch.cuda.device_of(logits):
        _cuda.logits_bwd(
            _type(logits), _logits(logits), _logits(out), _labels(labels.y, labels.ignore_index), logits.shape[-1],
            _address(norm), _address(logp), _positions(g), _stream(logits),
        )  # fmt: skip


def sum_tokens(
    token_logps: Tensor, labels: Tensor, ignore_index: int, weights: Tensor | None, mean: bool
) -> tuple[Tensor, Tensor]:
    assert weights is None or weights.dtype == token_logps.dtype
    logps, num_tokens = token_logps.new_empty(labels.shape[0]), labels.new_empty(labels.shape[0])
    with torch.cuda.device_of(labels):
        _cuda.sum_tokens(
            _type(token_logps), _positions(token_logps), _labels(labels, ignore_index), _positions(weights), mean,
            _address(logps), _address(num_tokens), _stream(labels),
        )  # fmt: skip
    return logps, num_tokens


def sum_tokens_bwd(
    grad: Tensor,
    token_logps: Tensor,
    labels: Tensor,
    ignore_index: int,
    weights: Tensor | None,
    num_tokens: Tensor,
    mean: bool,
    need_dweights: bool,
) -> tuple[Tensor, Tensor]:
    assert grad.dtype == token_logps.dtype
    dlogps = token_logps.new_empty(labels.shape)
    dweights = token_logps.new_empty(labels.shape if need_dweights else 0)
    with torch.cuda.device_of(labels):
        _cuda.sum_tokens_bwd(
            _type(token_logps), _address(grad), grad.stride(0), _positions(token_logps), _labels(labels, ignore_index),
            _positions(weights), _address(num_tokens) if mean else 0, _address(dlogps),
            _address(dweights) if need_dweights else 0, _stream(labels),
        )  # fmt: skip
    return dlogps, dweights
