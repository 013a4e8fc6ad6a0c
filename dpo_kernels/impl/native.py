"""The C++ implementation for the CPU: the tile kernels and path E of `csrc/cpu`.

Dimensions: N labelled rows, V vocabulary size, n rows and v vocabulary entries of one tile. Matrix products stay with
the libraries that PyTorch brings; between them each tile is read once, and written once where it changes.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import dpo_kernels._native as _native
from dpo_kernels.impl import pairs, positions
from dpo_kernels.impl.blocks import spans
from dpo_kernels.impl.fold import CompiledFold, Fold, stats_numbers
from dpo_kernels.impl.interface import (
    Columns,
    FoundRows,
    GradPositions,
    GradRows,
    Labels,
    LogitTransform,
    Rows,
    accumulate_dtype,
)
from dpo_kernels.impl.positions import at_rows, labelled_rows, spread, unlabelled_rows
from dpo_kernels.impl.products import scale_ as scale_

TILE_BYTES = 8 * 2**20
# Of a fold's state, in fp64, and of a label.
NUMBER_BYTES = 8


def description() -> str:
    threads = f"{torch.get_num_threads()} threads" if HAS_THREADS else "one thread: this PyTorch has no OpenMP runtime"
    return f"available: {_native.isa()} kernels, {threads}, fp32 products by {products_by()}"


def tile_bytes(device: torch.device) -> int:
    return TILE_BYTES


def _borrow_openmp() -> bool:
    """Hands the OpenMP runtime that PyTorch uses to the kernels; False where it has none."""
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    # what the whole process sees, as PyTorch does: a preloaded runtime comes before the one PyTorch is linked with
    library = ctypes.CDLL(None)
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not all(hasattr(library, name) for name in names) and torch_cpu.exists():
        library = ctypes.CDLL(str(torch_cpu))  # loaded already; its symbols and those of what it is linked with
    if not all(hasattr(library, name) for name in names):
        return False
    _native.set_openmp(*(ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names))
    return True


HAS_THREADS = _borrow_openmp()


def operand(t: Tensor, compute_dtype: torch.dtype) -> Tensor:
    if t.dtype == compute_dtype and compute_dtype.itemsize >= 4:
        return t
    return t.to(compute_dtype).to(accumulate_dtype(compute_dtype))


def _onednn_is_faster() -> bool:
    """MKL, behind `torch.mm`, leaves AVX-512 unused on processors that are not Intel's. oneDNN, which PyTorch brings
    for half precision, uses it, and takes half the time for the same fp32 products."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not _native.is_intel()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


ONEDNN_IS_FASTER = _onednn_is_faster()


# Multiply-adds of a product below which oneDNN's calls take longer than what it saves.
SMALL_PRODUCT = 2**22


def products_by(multiply_adds: float = math.inf) -> str:
    """The library that multiplies fp32 matrices; of a product of so many multiply-adds."""
    by_onednn = ONEDNN_IS_FASTER and multiply_adds >= SMALL_PRODUCT and torch.backends.mkldnn.enabled
    return "oneDNN" if by_onednn else "torch.mm"


# oneDNN sums its products in longer chains than MKL does, and what a logit loses to that reaches every gradient.
MAX_TERMS = 256


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    if a.dtype != torch.float32 or products_by(a.numel() * b.shape[1]) != "oneDNN":
        return torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    # a [n, k] row-major, b [k, m] either way; with any other strides oneDNN takes its slow reference code
    if accumulate or b.is_contiguous():
        ab = _onednn(_row_major(a), b.t() if b.is_contiguous() else b.t().contiguous())
        return out.add_(ab) if accumulate else ab
    first, *rest = spans(a.shape[1], MAX_TERMS)
    ab = _onednn_terms(a, b, first)
    for terms in rest:
        ab = torch.add(ab, _onednn_terms(a, b, terms), out=out)
    return ab


def _onednn_terms(a: Tensor, b: Tensor, terms: slice) -> Tensor:
    return _onednn(a[:, terms].contiguous(), b[terms].t().contiguous())


def _onednn(a: Tensor, w: Tensor) -> Tensor:
    """a [n, k] @ w [m, k]^T."""
    return torch.ops.mkldnn._linear_pointwise(a, w, None, "none", [], "")


def _row_major(a: Tensor) -> Tensor:
    if a.is_contiguous() or not a.t().is_contiguous():
        return a.contiguous()
    out = a.new_empty(a.shape)
    v, n = a.shape
    _native.transpose(_address(a), _address(out), n, v, torch.get_num_threads())
    return out


def out_tile(a: Tensor, dtype: torch.dtype) -> Tensor:
    assert a.dtype == dtype
    return a


class NativeFold(CompiledFold):
    """A fold that is begun and finished in one call each: the twenty operators on [N] take as long as all of a small
    head."""

    def begin(self) -> None:
        _native.begin(_state(self, 0), self.y.shape[0])

    def finish(self, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        n, threads = self.y.shape[0], torch.get_num_threads()
        self.logp, self.norm, values = self.empty_results(dtype)
        _native.finish(
            _type(self.logp), _state(self, 0), _address(self.y), n, vocab_size, stats_numbers(self.names),
            _address(self.logp), _address(self.norm), _address(values), threads,
        )  # fmt: skip
        return self.logp, self.norm, values


def new_fold(y: Tensor, dtype: torch.dtype, stats: Sequence[str]) -> Fold:
    return NativeFold(y.contiguous(), torch.float64, stats)


def linear_fold_(
    fold: Fold, x: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, compute_dtype: torch.dtype
) -> bool:
    return False


def takes_exponentials(x_dtype: torch.dtype, weight: Tensor, compute_dtype: torch.dtype) -> bool:
    return False


def _address(t: Tensor | None) -> int:
    if t is None:
        return 0
    assert t.is_cpu
    return t.data_ptr()


def _type(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _tile(a: Tensor, y: Tensor, columns: Columns, transform: LogitTransform, first: int = 0) -> _native.Tile:
    """`first`: of the labels y, the tile's first row."""
    (n, v), scale, softcap, temperature = a.shape, *transform
    assert a.dtype in (torch.float32, torch.float64)
    assert a.is_contiguous() and y.is_contiguous() and y.dtype == torch.int64 and y.shape[0] >= first + n
    assert columns.bias is None or columns.bias.is_contiguous() and columns.bias.dtype == a.dtype
    return _native.Tile(
        _address(a),
        n,
        v,
        columns.start,
        _address(y) + first * NUMBER_BYTES,
        _address(columns.bias),
        _native.Transform(scale, softcap or 0.0, temperature),
    )


def _state(fold: Fold, start: int) -> _native.FoldState:
    """Of the rows from `start` on."""
    state, argmax = fold.state, fold.argmax
    skipped = start * NUMBER_BYTES
    return _native.FoldState(_address(state) + skipped, state.stride(0), _address(argmax) + skipped)


def fold_(fold: Fold, a: Tensor, rows: slice, columns: Columns, transform: LogitTransform, keep: bool) -> None:
    _fold(fold, a, rows, columns, transform, None)


def fold_exp_(
    fold: Fold, a: Tensor, out: Tensor, rows: slice, columns: Columns, transform: LogitTransform, sums: Tensor
) -> None:
    assert out is a
    rescale = a.new_empty(a.shape[0])
    _fold(fold, a, rows, columns, transform, rescale)
    sums.mul_(rescale[:, None])


def _fold(
    fold: Fold, a: Tensor, rows: slice, columns: Columns, transform: LogitTransform, rescale: Tensor | None
) -> None:
    tile = _tile(a, fold.y, columns, transform, rows.start)
    _native.fold(_type(a), tile, _state(fold, rows.start), _address(rescale), bool(fold.names), torch.get_num_threads())


def _contiguous(of: GradRows, dtype: torch.dtype) -> GradRows:
    """To be bound to a name: an address alone keeps no copy alive."""
    return GradRows(of.y.contiguous(), *((t if t.dtype == dtype else t.to(dtype)).contiguous() for t in of[1:]))


def _norm_logp_g(of: GradRows) -> tuple[int, int, int, int]:
    return _address(of.norm), of.norm.stride(0), _address(of.logp), _address(of.g)


def dlogits(a: Tensor, out: Tensor, of: GradRows, columns: Columns, transform: LogitTransform) -> Tensor:
    of = _contiguous(of, a.dtype)
    value = torch.empty_like(of.logp)
    assert out.is_contiguous() and out.shape == a.shape and out.dtype == a.dtype
    _native.dlogits(
        _type(a),
        _tile(a, of.y, columns, transform),
        _address(out),
        *_norm_logp_g(of),
        _address(value),
        torch.get_num_threads(),
    )
    return value


def put_labels_(a: Tensor, y: Tensor, start: int, value: Tensor) -> None:
    assert value.dtype == a.dtype and value.is_contiguous()
    _native.put_labels(_type(a), _tile(a, y, Columns(start, None), LogitTransform()), _address(value))


def _logits(logits: Tensor) -> _native.LogitsRows:
    return _native.LogitsRows(_address(logits), *logits.stride())


def _rows(rows: Rows, y: Tensor, v: int) -> tuple[_native.Rows, tuple[Tensor, ...]]:
    """And the tensors that must live as long as it is used."""
    kept = rows.sequence.contiguous(), rows.position.contiguous(), y.contiguous()
    assert all(t.dtype == torch.int64 for t in kept)
    sequence, position, labels = map(_address, kept)
    return _native.Rows(sequence, position, labels, y.shape[0], v), kept


def _positions(t: Tensor | None) -> _native.Positions:
    return _native.Positions(0, 0, 0) if t is None else _native.Positions(_address(t), *t.stride())


def _find(of: positions.Search, found: FoundRows, notes: Tensor) -> None:
    labels, table, (s, t) = of.labels, found.table, of.labels.shape
    search = _native.Search(
        _positions(labels), s, t, int(of.shift), of.ignore_index, of.vocab_size, of.expected,
        _positions(of.predictors), of.slots, of.asserts,
    )  # fmt: skip
    _native.find_rows(
        _type(labels), search, _address(table), table.shape[1], _address(found.token_logps), _address(found.stats),
        found.stats.shape[0], _address(notes),
    )  # fmt: skip


def find_rows(
    labels: Tensor,
    vocab_size: int,
    *,
    ignore_index: int,
    shift: bool,
    num_labelled: int | None,
    predictors: Tensor | None,
    slots: int,
    stats: int,
) -> FoundRows | None:
    of = positions.Search(labels, vocab_size, ignore_index, shift, num_labelled, predictors, slots)
    return positions.search(_find, of, stats)


def gather_rows(hidden: Tensor, slots: Tensor, broken: Tensor) -> Tensor:
    hidden, slots = hidden.resolve_neg(), slots.contiguous()
    (n,), (_, of_sequence, h) = slots.shape, hidden.shape
    out = hidden.new_empty(n, h)
    _native.gather_rows(
        _type(hidden), _logits(hidden), of_sequence, h, _address(slots), n, _address(out), _address(broken),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _compare(of: pairs.Comparison) -> None:
    _native.compare(_type(of.logps), *of.compiled(_native))


compare, sum_rows = functools.partial(pairs.compare, _compare), functools.partial(pairs.sum_rows, _compare)


def logps_fwd(logits: Tensor, labels: Labels, *, stats: Sequence[str] = ()) -> tuple[Tensor, Tensor, Tensor]:
    acc, v = accumulate_dtype(logits.dtype), logits.shape[-1]
    rows = labelled_rows(labels.y, v, labels.ignore_index, labels.num_labelled)
    fold = new_fold(at_rows(labels.y, rows), acc, stats)
    native_rows, _kept = _rows(rows, fold.y, v)
    _native.logits_fold(
        _type(logits), _logits(logits), native_rows, _state(fold, 0), bool(stats), torch.get_num_threads()
    )
    logp, norm, values = (spread(t, rows, labels.y.shape) for t in fold.finish(v, acc))
    return logp, norm, values


def logps_bwd_(logits: Tensor, labels: Labels, of: GradPositions, out: Tensor) -> None:
    assert out.dtype == logits.dtype and out.shape == logits.shape
    acc, v = accumulate_dtype(logits.dtype), logits.shape[-1]
    rows = labelled_rows(labels.y, v, labels.ignore_index, labels.num_labelled)
    of_rows = _contiguous(GradRows(at_rows(labels.y, rows), *(at_rows(t, rows) for t in of)), acc)
    native_rows, _kept = _rows(rows, of_rows.y, v)
    _native.logits_bwd(
        _type(logits),
        _logits(logits),
        _logits(out),
        native_rows,
        *_norm_logp_g(of_rows),
        torch.get_num_threads(),
    )
    others = unlabelled_rows(labels.y, labels.ignore_index, of_rows.y.shape[0])
    out[others.sequence, others.position] = 0
