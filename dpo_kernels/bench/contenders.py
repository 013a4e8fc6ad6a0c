"""What is compared, peers apart, one plain function each: the bare products and copies that are the limit, and ours.

A run takes the inputs of a case, does one forward (and backward) and returns what it found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from dpo_kernels import dispatch, dpo_loss, linear_dpo_loss, linear_sequence_logps, sequence_logps
from dpo_kernels.bench.cases import HeadCase, HeadInputs, LogitsInputs, Loss, Result, sigmoid_loss
from dpo_kernels.options import Impl

OURS = "dpo_kernels"  # the package


@dataclass(frozen=True)
class Contender:
    """A way to do it. `run` must be picklable: memory is measured in another process."""

    name: str
    run: Callable[[Any], Result]
    package: str = "torch"
    products: int = 3  # of [N, H] by [H, V] that the task takes at least, where it has a matrix product
    compiled: bool = False  # by torch.compile, which takes memory of its own in the first call
    overwrites: bool = False  # its inputs
    loss: Loss = sigmoid_loss  # what its gradients are of


# The limit


def products(inputs: HeadInputs, *, count: int) -> Result:
    """x W^T; then dlogits W; then dlogits^T x: nothing but matrix products."""
    x, logits, dx, dweight = inputs.buffers
    with torch.no_grad():
        torch.mm(x, inputs.weight.T, out=logits)
        if count >= 2:
            torch.mm(logits, inputs.weight, out=dx)
        if count >= 3:
            torch.mm(logits.T, x, out=dweight)
    return Result()


def product_fp32_out(inputs: HeadInputs) -> Result:
    """x W^T without the rounding of its result."""
    with torch.no_grad():
        torch.mm(inputs.buffers.x, inputs.weight.T, out_dtype=torch.float32)
    return Result()


LIMITS = {
    count: Contender(f"{count} x torch.mm", partial(products, count=count), products=count) for count in range(1, 4)
}
FP32_OUT = Contender("1 x torch.mm, fp32 out", product_fp32_out, products=1)


# Ours


def path_a(inputs: HeadInputs, *, impl: Impl, fused: bool | None = None) -> Result:
    """Forward only; `fused`: by one kernel, without tiles, where the implementation leaves the choice."""
    taken: list[bool] = []
    fold = dispatch.load(impl).linear_fold_

    def linear_fold_(*args: Any) -> bool:
        taken.append(fold(*args))
        return taken[-1]

    with torch.no_grad(), _forward(impl, fused), _setting(impl, "linear_fold_", linear_fold_):
        out = linear_sequence_logps(
            inputs.hidden, inputs.weight, inputs.labels, num_labelled=inputs.num_labelled, impl=impl
        )
    if fused and not all(taken):
        raise RuntimeError("the fused forward is not for this device, dtype or shape: it went on in tiles")
    return Result(out.logps, out.token_logps)


@contextmanager
def _forward(impl: Impl, fused: bool | None) -> Iterator[None]:
    """What the implementation's name takes for path A, for as long as it is entered; None leaves it."""
    if fused is None:
        yield
        return
    before = dict(dispatch.FORWARD_OF)
    dispatch.FORWARD_OF[impl] = cast(Any, f"{impl}_fused" if fused else impl)
    try:
        yield
    finally:
        dispatch.FORWARD_OF.clear()
        dispatch.FORWARD_OF.update(before)


@contextmanager
def _setting(impl: Impl, name: str, value: Any) -> Iterator[None]:
    """Of an implementation's module, for as long as it is entered."""
    module = dispatch.load(impl)
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def with_tiles(inputs: HeadInputs, *, run: Callable[..., Result], impl: Impl, tile_bytes: int) -> Result:
    """A path without a fused forward, with tiles of this size."""
    with _setting(impl, "tile_bytes", lambda device: tile_bytes), _forward(impl, False):
        return run(inputs)


def path_b(inputs: HeadInputs, *, impl: Impl) -> Result:
    """Frozen head, any loss."""
    return _any_loss(inputs, inputs.weight.detach(), impl)


def path_c(inputs: HeadInputs, *, impl: Impl, chunk_bytes: int | None = None) -> Result:
    """Trained head, the fused loss."""
    out = linear_dpo_loss(
        inputs.hidden,
        inputs.weight,
        inputs.labels,
        inputs.ref_logps,
        beta=inputs.beta,
        num_labelled=inputs.num_labelled,
        chunk_bytes=chunk_bytes,
        impl=impl,
    )
    out.loss.backward()
    return Result(out.logps, None, out.loss, inputs.gradients())


def path_d(inputs: HeadInputs, *, impl: Impl) -> Result:
    """Trained head, any loss."""
    return _any_loss(inputs, inputs.weight, impl)


def _any_loss(inputs: HeadInputs, weight: Tensor, impl: Impl) -> Result:
    out = linear_sequence_logps(inputs.hidden, weight, inputs.labels, num_labelled=inputs.num_labelled, impl=impl)
    loss = dpo_loss(*out.logps.chunk(2), *inputs.ref_logps.chunk(2), beta=inputs.beta).losses.mean()
    loss.backward()
    return Result(out.logps, out.token_logps, loss, inputs.gradients())


def paths(impl: Impl) -> dict[str, Contender]:
    described = {
        "A": ("A forward", path_a, 1),
        "B": ("B frozen head", path_b, 2),
        "C": ("C fused loss", path_c, 3),
        "D": ("D any loss", path_d, 3),  # it does four
    }
    return {
        key: Contender(f"{name}, {impl}", partial(run, impl=impl), OURS, products=count)
        for key, (name, run, count) in described.items()
    }


def variants(key: str, impl: Impl, case: HeadCase, chunk_bytes: int | None = None) -> list[Contender]:
    """A path in the ways that an implementation has for such inputs: A in tiles and by one kernel; C with its own
    budget and with `chunk_bytes`."""
    path = paths(impl)[key]
    run: Callable[..., Result] = path.run
    if key == "A" and has_fused_forward(impl):
        in_tiles = replace(path, run=partial(run, fused=False))
        fused = replace(path, name=f"{path.name}, fused", run=partial(run, fused=True))
        return [in_tiles, fused] if _takes_fused_forward(impl, case) else [in_tiles]
    if key == "C" and chunk_bytes is not None:
        name = f"{path.name}, {chunk_bytes / 2**30:g} GiB"
        return [path, replace(path, name=name, run=partial(run, chunk_bytes=chunk_bytes))]
    return [path]


def has_fused_forward(impl: Impl) -> bool:
    return hasattr(dispatch.load(impl), "has_fused_forward")


def _takes_fused_forward(impl: Impl, case: HeadCase) -> bool:
    """Half precision, 16 numbers at a time; the CUDA one on Hopper alone."""
    device = torch.device(case.device)
    has = cast(Any, dispatch.load(impl)).has_fused_forward(device) and (impl != "cuda" or device.type == "cuda")
    return case.dtype != torch.float32 and case.hidden % 16 == 0 and has


# From logits


def read_logits(inputs: LogitsInputs) -> Result:
    """The labelled rows once."""
    labelled, _ = inputs.rows
    for rows in labelled:
        rows.sum()
    return Result()


def read_and_scale_logits(inputs: LogitsInputs) -> Result:
    """The same, one read and write of them, and zeros in the others."""
    labelled, others = inputs.rows
    for rows in labelled:
        rows.sum()
        rows.mul_(1.0)
    for rows in others:
        rows.zero_()
    return Result()


def copy_logits(inputs: LogitsInputs) -> Result:
    """One read, and one write elsewhere."""
    torch.empty_like(inputs.logits.detach()).copy_(inputs.logits.detach())
    return Result()


def ours_from_logits(inputs: LogitsInputs, *, impl: Impl, backward: bool, inplace: bool = False) -> Result:
    with torch.set_grad_enabled(backward):
        out = sequence_logps(
            inputs.logits, inputs.labels, inplace_backward=inplace, num_labelled=inputs.num_labelled, impl=impl
        )
    return finish_logits(inputs, out.token_logps, out.logps)


def finish_logits(inputs: LogitsInputs, token_logps: Tensor, logps: Tensor) -> Result:
    if not logps.requires_grad:
        return Result(logps, token_logps)
    (dlogits,) = torch.autograd.grad(logps, inputs.logits, inputs.dlogps.to(logps.dtype))
    return Result(logps, token_logps, gradients={"logits": dlogits})


READ = Contender("read", read_logits)
READ_AND_SCALE = Contender("read, scale in place", read_and_scale_logits, overwrites=True)
COPY = Contender("copy", copy_logits)


def from_logits(impl: Impl, *, backward: bool) -> list[Contender]:
    run = partial(ours_from_logits, impl=impl, backward=backward)
    found = [Contender(f"E, {impl}", run, OURS)]
    if backward:
        found.append(Contender(f"E in place, {impl}", partial(run, inplace=True), OURS, overwrites=True))
    return found
