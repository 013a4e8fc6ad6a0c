"""What is launched: kernels of Triton's by name, PyTorch's operators, and matrix products by shape."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dpo_kernels import ops


class Launched:
    """In the place of a kernel: notes its launches."""

    def __init__(self, kernel: Any, name: str, launches: Counter[str]):
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **constants: Any) -> Any:
            self.launches[self.name] += 1
            with _disable_current_modes():  # an interpreter's own
                return self.kernel[grid](*args, **constants)

        return launch


class LaunchedByModule:
    """In the place of the compiled CUDA module: notes which of its functions, each a launch, are called."""

    def __init__(self, module: Any, launches: Counter[str]):
        self.module, self.launches = module, launches

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)
        if isinstance(function, (type, int)):
            return function

        def launch(*args: Any) -> Any:
            self.launches[name] += 1
            return function(*args)

        return launch


TRITON = tuple(
    f"triton{part}" for part in ("", "_exponentials", "_join", "_linear", "_pairs", "_rows", "_scale", "_sequences")
)
CUDA = ("cuda", "cuda_exponentials", "cuda_linear", "cuda_positions")


def launches_of(monkeypatch: Any, impl: str) -> Counter[str]:
    """Of kernels of this implementation, "triton" or "cuda", by name."""
    launches: Counter[str] = Counter()
    for module in (
        importlib.import_module(f"dpo_kernels.impl.{name}") for name in (TRITON if impl == "triton" else CUDA)
    ):
        if impl == "cuda":
            monkeypatch.setattr(module, "_cuda", LaunchedByModule(module._cuda, launches))
            continue
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launched(getattr(module, name), name, launches))
    return launches


class Operators(TorchDispatchMode):
    """Counts PyTorch's operators that launch something, or wait for it, inside the custom operators too; and notes the
    largest tensor that comes to be, in bytes."""

    WITHOUT_KERNEL = (
        *("empty", "view", "slice", "select", "t", "transpose", "as_strided", "unbind", "detach", "alias", "expand"),
        *("unsqueeze", "squeeze", "split"),
    )
    # Of these, some make a copy.
    MAYBE_VIEWS = ("reshape", "to", "contiguous")

    def __init__(self, launches: Counter[str]):
        super().__init__()
        self.launches, self.largest = launches, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name in ops.IMPLEMENTATION_OF:
            with self:
                return ops.IMPLEMENTATION_OF[name](*args)
        out = func(*args, **(kwargs or {}))
        name = name.removeprefix("aten::").partition(".")[0]
        is_view = name in self.MAYBE_VIEWS and out.data_ptr() == args[0].data_ptr()
        known = (f"{each}_" for each in self.WITHOUT_KERNEL)
        if not (is_view or name in (*self.WITHOUT_KERNEL, "new_empty") or name.startswith(tuple(known))):
            self.launches[name] += 1
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel() * out.itemsize)
        return out


def record(monkeypatch: Any, kernels: Any, *modules: Any) -> tuple[Counter[str], list[tuple[int, int, int, bool]]]:
    """Launches by name, of the kernels of `modules`; and products [m, k] x [k, n] of the implementation `kernels`, with
    whether they are added to what is there."""
    launches: Counter[str] = Counter()
    shapes: list[tuple[int, int, int, bool]] = []
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launched(getattr(module, name), name, launches))

    def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
        assert out.dtype == torch.float32 or not accumulate, "a sum is rounded once"
        launches["product"] += 1
        shapes.append((*a.shape, b.shape[1], accumulate))
        with _disable_current_modes():
            wide = a.float() @ b.float()
            return out.add_(wide) if accumulate else out.copy_(wide)

    monkeypatch.setattr(kernels, "product", product)
    return launches, shapes
