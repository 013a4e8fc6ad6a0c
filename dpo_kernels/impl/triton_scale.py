"""The loss's own gradient into gradients that were formed before it was known, on Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.impl.interface import accumulate_dtype

BLOCK = 4096
# As many as all multiprocessors have at once; they go on from there.
PROGRAMS = 2048


@triton.jit(do_not_specialize_on_alignment=["factor_ptr"])
def scale_kernel(t_ptr, factor_ptr, N, ACC: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, N, step):
            place = first + tl.arange(0, BLOCK)
            t = tl.load(t_ptr + place, mask=place < N).to(ACC)
            tl.store(t_ptr + place, (t * factor).to(t_ptr.dtype.element_ty), mask=place < N)


def scale_(t: Tensor, factor: Tensor) -> None:
    """See `interface.TileKernels`."""
    assert t.is_contiguous() and factor.ndim == 0
    acc = accumulate_dtype(t.dtype)
    if t.numel():
        with torch.cuda.device_of(t):
            scale_kernel[(min(triton.cdiv(t.numel(), BLOCK), PROGRAMS),)](
                t, factor.to(acc), t.numel(), ACC=tl.float64 if acc == torch.float64 else tl.float32, BLOCK=BLOCK,
                num_warps=8,
            )  # fmt: skip
