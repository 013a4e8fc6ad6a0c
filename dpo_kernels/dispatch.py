"""Which implementation computes a call, and why the others do not."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import NamedTuple, cast, get_args

import torch

from dpo_kernels.impl.interface import TileKernels
from dpo_kernels.options import Impl

IMPLEMENTATIONS: tuple[Impl, ...] = ("torch", "cpu", "triton", "cuda")
_MODULES = {
    "torch": "dpo_kernels.impl.torch",
    "cpu": "dpo_kernels.impl.native",
    "triton": "dpo_kernels.impl.triton",
    "cuda": "dpo_kernels.impl.cuda",
}


class Choice(NamedTuple):
    """What "auto" takes on a type of device, and the measurements that say so."""

    device: str
    impl: Impl
    measured: str


# The first that fits and can run is taken, "torch" at last. So far no dtype or shape wants another one than its device.
CHOICES = (Choice("cpu", "cpu", "benchmarks/results/cpu-amd-epyc-avx512-2-threads"),)
# The devices that compiled CUDA kernels are for.
CUDA_DEVICE = "cuda"


def unavailable_reason(impl: str, device: torch.device) -> str | None:
    """Why `impl` cannot run on `device`, or None if it can."""
    if impl == "cpu":
        if device.type != "cpu":
            return f"it computes on the CPU, not on {device.type!r}"
        return CPU_PROBLEM
    if impl == "cuda":
        if device.type != CUDA_DEVICE:
            return f"it needs a GPU of NVIDIA's, not {device.type!r}"
        return "it needs a GPU of NVIDIA's, and this PyTorch is for AMD's" if torch.version.hip else CUDA_PROBLEM
    if impl == "triton":
        if not HAS_TRITON:
            return "Triton is not installed: pip install triton"
        if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            return f"it needs a GPU, or TRITON_INTERPRET=1 in the environment for tests on the CPU, not {device.type!r}"
    return None


def _extension_problem(name: str, compiler: str, build: str) -> str | None:
    again = f"dpo_kernels again with DPO_KERNELS_BUILD={build}"
    if importlib.util.find_spec(name) is None:
        return f"its extension was not built: install {compiler}, then {again}"
    try:
        importlib.import_module(name)
    except ImportError as error:  # built against libraries that this machine lacks
        return f"its extension does not load, install {again}: {error}"
    return None


# Asked once, here: torch.compile cannot trace an import.
HAS_TRITON = importlib.util.find_spec("triton") is not None
CPU_PROBLEM = _extension_problem("dpo_kernels._native", "a C++ compiler", "cpu")
CUDA_PROBLEM = _extension_problem("dpo_kernels._cuda", "the CUDA toolkit", "cuda")


def check_impl(impl: object) -> Impl:
    """The name as it is; raises `ValueError` for what is no implementation's."""
    for known in get_args(Impl):
        if impl == known:
            return cast(Impl, known)
    raise ValueError(f"impl: expected one of {get_args(Impl)}, got {impl!r}")


def choose(impl: str, device: torch.device) -> Impl:
    """Resolves "auto" to the fastest implementation for `device`; checks an explicit choice and never replaces it.

    Raises:
        ValueError: `impl` is unknown, or cannot run on `device`; the message gives the reason.
    """
    name = check_impl(impl)
    if name == "auto":
        candidates: tuple[Impl, ...] = (*(choice.impl for choice in CHOICES if choice.device == device.type), "torch")
        return next(each for each in candidates if unavailable_reason(each, device) is None)
    reason = unavailable_reason(name, device)
    if reason is not None:
        raise ValueError(f"impl: {name!r} cannot run on device {str(device)!r}: {reason}")
    return name


def load(impl: str) -> TileKernels:
    """The module behind a resolved name."""
    return cast(TileKernels, importlib.import_module(_MODULES[impl]))
