"""Operands and matrix products through PyTorch, on every device: fp32 sums of products of any floating dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from dpo_kernels.impl import waves
from dpo_kernels.impl.interface import accumulate_dtype

# Sums over a vocabulary are at least so long; shorter ones are left to the library as they are.
LONG_SUM = 2**14


@contextlib.contextmanager
def _sums_in_fp32() -> Iterator[None]:
    """Partial sums of a half-precision product that is split over several blocks are not rounded before they meet."""
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(torch.backends.cuda.matmul, name) for name in names]
    try:
        for name in names:
            setattr(torch.backends.cuda.matmul, name, False)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(torch.backends.cuda.matmul, name, value)


def operand(t: Tensor, compute_dtype: torch.dtype) -> Tensor:
    t = t.to(compute_dtype)
    return t if t.device.type == "cuda" else t.to(accumulate_dtype(compute_dtype))


def out_tile(a: Tensor, dtype: torch.dtype) -> Tensor:
    return a if a.dtype == dtype else torch.empty_like(a, dtype=dtype)


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    if a.device.type == "cpu" and a.itemsize < 4:  # whose libraries may round partial sums
        wide = torch.mm(a.float(), b.float())
        return out.add_(wide) if accumulate else out.copy_(wide)
    if a.dtype == out.dtype:
        with _sums_in_fp32() if out.itemsize < 4 else contextlib.nullcontext():
            return torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    if not accumulate:
        parts = parts_of_sum(a.shape[0], a.shape[1], b.shape[1], a.device)
        return _product_in_parts(a, b, out, parts) if parts > 1 else torch.mm(a, b, out_dtype=out.dtype, out=out)
    if torch.__version__ >= "2.10":
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    # which took no fp32 `out` beside half-precision operands
    return out.add_(torch.mm(a, b, out_dtype=out.dtype))


def put_labels_(a: Tensor, y: Tensor, start: int, value: Tensor) -> None:
    column = (y - start).clamp(0, a.shape[1] - 1)[:, None]
    # not scatter_add_, which adds with atomics on some devices
    a.scatter_(1, column, (a.gather(1, column) + value[:, None]).to(a.dtype))


def scale_(t: Tensor, factor: Tensor) -> None:
    if t.device.type == "cpu" or t.dtype == factor.dtype:
        t.mul_(factor)
        return
    for part in t.view(-1).split(2**24):  # other devices would round the factor to the dtype of t
        part.copy_(part.to(factor.dtype) * factor)


def parts_of_sum(m: int, k: int, n: int, device: torch.device) -> int:
    """Of a product [m, k] x [k, n] of half-precision operands, with sums in fp32."""
    if device.type != "cuda" or k < LONG_SUM:
        return 1
    multiprocessors = waves.PLANNED
    if torch.cuda.is_available():
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return waves.sum_parts(m, k, n, multiprocessors)


def _product_in_parts(a: Tensor, b: Tensor, out: Tensor, parts: int) -> Tensor:
    """Of [m, k] and [k, n]: products of parts of k, computed side by side where one would leave a GPU half idle, and
    added in their order."""
    size = a.shape[1] // parts
    whole = parts * size
    of_a = a[:, :whole].unflatten(1, (parts, size)).transpose(0, 1)
    of_b = b[:whole].unflatten(0, (parts, size))
    found = torch.bmm(of_a, of_b) if a.dtype == out.dtype else torch.bmm(of_a, of_b, out_dtype=out.dtype)
    torch.sum(found, 0, out=out)
    return out if whole == a.shape[1] else product(a[:, whole:], b[whole:], out, accumulate=True)
