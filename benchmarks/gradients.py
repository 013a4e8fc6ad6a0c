"""Times path C's products of exponentials on a Hopper GPU, dX and dW, which are weighed on their way to the tensor
cores, beside PyTorch's products of dlogits that lie in memory, which a pass of 4 bytes a logit would make before.

    python benchmarks/gradients.py --json out.json

A row for each size; `difference` is the largest one of a gradient, over the gradient's largest number. The exit status
is 1 where that is more than rounding explains.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import dispatch, measure
from dpo_kernels.impl.interface import GradRows, LogitTransform

SIZES = [(8192, h, v) for h in (4096, 2048) for v in (128256, 151936)]  # N, H, V
QUICK = [(48, 64, 520)]
LIMIT = 2e-2  # dlogits come of exponentials in fp16 here, and in fp32 there
COLUMNS = ("N", "H", "V", "dX, ms", "PyTorch's", "dW, ms", "PyTorch's", "difference")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=15, help="timed runs of each product (default: %(default)s)")
    add("--seconds", type=float, default=60, help="when they are over no size begins (default: %(default)s)")
    add("--device", default="cuda", help="of the kernels (default: %(default)s)")
    add("--quick", action="store_true", help="a tiny size, to see that it runs; the times mean nothing")
    add("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    device, begin, rows = torch.device(args.device), time.monotonic(), list[dict[str, Any]]()
    if reason := dispatch.unavailable_reason("cuda", device):
        sys.exit(f"impl 'cuda': {reason}")
    kernels = dispatch.load("cuda")
    if not kernels.has_fused_forward(device):
        print("these products are Hopper's: nothing to time")
        return
    print("".join(f"{name:>12}" for name in COLUMNS), flush=True)
    sizes = QUICK if args.quick else SIZES
    for size in sizes:
        if time.monotonic() - begin > args.seconds:
            break
        row = measured(kernels, *size, device, args.rounds, args.seconds / len(sizes))
        cells = [*map(str, size), *(f"{1e3 * row[name]:.2f}" for name in ("dX", "dX_of_d", "dW", "dW_of_d"))]
        print("".join(f"{cell:>12}" for cell in [*cells, f"{row['difference']:.1e}"]), flush=True)
        rows.append(row)
        if args.json:
            args.json.write_text(json.dumps({"environment": measure.describe(device), "rows": rows}, indent=2) + "\n")
    if not rows:
        sys.exit(f"no size was begun within {args.seconds:g} s")
    relative = [f"{name} {max(row[name] / row[f'{name}_of_d'] for row in rows):.2f}" for name in ("dX", "dW")]
    print(f"{' and '.join(relative)} of PyTorch's time at most, at {len(rows)} sizes of {len(sizes)}")
    if len(rows) < len(sizes) or any(row["difference"] > LIMIT for row in rows):
        sys.exit(1)


def measured(kernels: Any, n: int, h: int, v: int, device: torch.device, rounds: int, seconds: float) -> dict[str, Any]:
    """Medians in seconds: of both products, and of PyTorch's."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.randn(size, h, generator=generator, device=device).to(torch.bfloat16).mul_(scale)
        for size, scale in ((n, 1.0), (v, h**-0.5))
    )
    y = torch.randint(v, (n,), generator=generator, device=device)
    g, rows, everything = torch.ones(n, device=device), slice(0, n), slice(0, v)
    sweep = kernels.exponentials(x, weight, None, y, LogitTransform(), (), n, (v,), packed=True)
    e, d = (weight.new_empty(v, kernels.padded_rows(n))[:, :n] for _ in range(2))
    sweep.write(rows, [e])
    logp, norm, _ = sweep.finish(rows)
    dlogits = sweep.weigh([e], rows, g)
    stored = kernels.recomputed(x, weight, None, GradRows(y, norm, logp, g), LogitTransform())
    stored.write(everything, d)
    dx, dx_of_d = (torch.empty(n, h, device=device) for _ in range(2))
    dw, dw_of_d = (torch.empty_like(weight) for _ in range(2))
    calls = {
        "dX": lambda: dlogits.dhidden(dx),
        "dX_of_d": lambda: kernels.product(d.t(), weight, dx_of_d),
        "dW": lambda: dlogits.dweight([everything], dw, None, False),
        "dW_of_d": lambda: kernels.product(d, x, dw_of_d),
    }
    runs = [measure.Run(lambda: None, call, warm_up=True) for call in calls.values()]
    found = measure.interleaved(runs, rounds, device=device, seconds=seconds / 2)
    row: dict[str, Any] = {"N": n, "H": h, "V": v}
    for name, times in zip(calls, found, strict=True):
        if isinstance(times, str):
            sys.exit(f"{name} at N {n}, H {h}, V {v}: {times}")
        row[name] = statistics.median(times)
    pairs = ((sweep.dhidden(dx, dx), stored.dhidden(dx_of_d, dx_of_d)), (dw, dw_of_d))
    return row | {"difference": max(difference(*pair) for pair in pairs)}


def difference(a: Tensor, b: Tensor) -> float:
    """In parts, so that no copy in fp32 is large; what is not a number is infinitely far."""
    parts = zip(a.split(2**14), b.split(2**14), strict=True)
    most = torch.stack([(one.float() - other.float()).abs().amax() for one, other in parts]).amax()
    found = float(most / b.abs().amax())
    return found if found == found else float("inf")


if __name__ == "__main__":
    main()
