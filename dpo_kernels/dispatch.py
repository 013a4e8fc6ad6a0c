"""Which implementation computes a call, and why the others do not."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

IMPLEMENTATIONS = ("torch", "cpu", "triton", "cuda")
_MODULES = {"torch": "dpo_kernels.impl.torch"}


def unavailable_reason(impl: str, device: torch.device) -> str | None:
    """Why `impl` cannot run on `device`, or None if it can."""
    if impl not in _MODULES:
        return f"this version of dpo_kernels has no {impl!r} implementation"
    return None


def choose(impl: str, device: torch.device) -> str:
    """Resolves "auto" to the fastest implementation for `device`; checks an explicit choice and never replaces it.

    Raises:
        ValueError: `impl` is unknown, or cannot run on `device`; the message gives the reason.
    """
    if impl == "auto":
        return next(name for name in reversed(IMPLEMENTATIONS) if unavailable_reason(name, device) is None)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {('auto', *IMPLEMENTATIONS)}, got {impl!r}")
    reason = unavailable_reason(impl, device)
    if reason is not None:
        raise ValueError(f"impl: {impl!r} cannot run on device {str(device)!r}: {reason}")
    return impl


def load(impl: str) -> ModuleType:
    """The module behind a resolved name."""
    return importlib.import_module(_MODULES[impl])
