"""Operands and matrix products through PyTorch, on every device: fp32 sums of products of any floating dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from dpo_kernels.impl.interface import accumulate_dtype


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
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    if torch.__version__ >= "2.10":
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    # which took no fp32 `out` beside half-precision operands
    return out.add_(torch.mm(a, b, out_dtype=out.dtype))
