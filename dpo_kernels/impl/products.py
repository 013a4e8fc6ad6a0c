"""Operands and matrix products through PyTorch, on every device: fp32 sums of products of any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_kernels.impl.interface import accumulate_dtype


def operand(t: Tensor, compute_dtype: torch.dtype) -> Tensor:
    t = t.to(compute_dtype)
    return t if t.device.type == "cuda" else t.to(accumulate_dtype(compute_dtype))


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    if not accumulate:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    if torch.__version__ >= "2.10":
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    # which took no fp32 `out` beside half-precision operands
    return out.add_(torch.mm(a, b, out_dtype=out.dtype))
