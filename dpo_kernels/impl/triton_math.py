"""What the Triton kernels compute of single numbers, and how they are launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.impl.interface import LogitTransform

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x in fewer instructions than tl.exp, for what is done to every entry."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def huge(DTYPE: tl.constexpr):
    """From where on neighbouring logits are so far apart that the smaller one's exponential is 0 beside the larger
    one's, be it to the base e or 2. Below, 2^rest of `shift_by` and its square stay within the type."""
    return tl.full([], 2.0**60 if DTYPE.primitive_bitwidth == 64 else 2.0**29, DTYPE)


@triton.jit
def shift_by(top, unit):
    """What exponentials are taken relative to, as 2^(z unit - shift) = exp(z - top) 2^rest, which is one multiply-add
    and one instruction an entry: top unit, rounded, and the rest, exact. `unit` is LOG2_E, or 1 of huge logits."""
    # A product would be put, unrounded, into multiply-adds with what it is subtracted from.
    shift = tl.fma(top, unit, 0.0)
    return shift, tl.fma(top, unit, -shift)


@triton.jit
def _tanh(x):
    """tanh x, and 1 - tanh^2 x, which keeps its digits where tanh reaches 1."""
    t = tl.abs(x)
    e = exp(-2.0 * t)
    inverse = 1.0 / (1.0 + e)
    magnitude = (1.0 - e) * inverse
    if x.dtype == tl.float32:  # below 0.625, where 1 - e cancels: t + t^3 p(t^2), derived in csrc/README.md
        s = x * x
        p = s * -5.704978e-3 + 2.06390787e-2
        p = p * s + -5.37397116e-2
        p = p * s + 1.33314416e-1
        p = p * s + -3.33332807e-1
        magnitude = tl.where(t < 0.625, t * s * p + t, magnitude)
    return tl.where(x < 0, -magnitude, magnitude), 4.0 * e * inverse * inverse


@triton.jit
def to_logits(a, INNER: tl.constexpr, OUTER: tl.constexpr):
    """Of x.W + b: the logits, and the softcap's part of dz/da. INNER None: no softcap."""
    if INNER is None:
        z = a * OUTER
        slope = tl.zeros_like(z) + 1.0
    else:
        z, slope = _tanh(a * INNER)
        z = z * OUTER
    return z, slope


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0, with nothing that cancels."""
    series = tl.zeros_like(x) + 1.0
    for k in tl.static_range(14, 1, -1):
        series = 1.0 + series * (x * (1.0 / k))
    return tl.where(x > -0.35, -x * series, 1.0 - tl.exp(x))


@triton.jit
def log1p(x):
    """Of x >= 0, where 1 + x rounds: its logarithm, and what it is off."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0))))


def transform_constants(transform: LogitTransform) -> dict[str, Any]:
    scale, softcap, temperature = transform
    if softcap is None:
        return {"INNER": None, "OUTER": transform.slope}
    return {"INNER": scale / softcap, "OUTER": softcap / temperature}


def stats_constants(names: Sequence[str]) -> dict[str, int | None]:
    """Of each statistic the kernels' name for it, and which one of those asked for it is."""
    constants = {
        "ENTROPY": "entropy",
        "IS_TOP1": "is_top1",
        "MEAN_LOGIT": "mean_logit",
        "SUM_SQ_PROBS": "log_sum_sq_probs",
    }
    return {own: names.index(name) if name in names else None for own, name in constants.items()}


def run(kernel: Any, grid: tuple[int, ...], where: Tensor, *args: Any, **constants: Any) -> None:
    """On the device of `where`, which need not be the current one."""
    with torch.cuda.device_of(where):
        kernel[grid](*args, **constants)
