"""What this machine has, which implementation `auto` picks, and why not the others."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

import dpo_kernels
from dpo_kernels.dispatch import CHOICES, IMPLEMENTATIONS, choose, load, unavailable_reason

PACKAGES = ("torch", "triton", "transformers", "datasets", "accelerate", "peft", "trl")


def devices() -> list[torch.device]:
    """The CPU and every accelerator that PyTorch sees."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        found += [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]
    return found


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> str:
    """In a line: of the package, and of the PyTorch that it runs on."""
    return f"dpo_kernels {dpo_kernels.__version__}, torch {torch.__version__}"


def report() -> str:
    """A text for people and for bug reports."""
    lines = [
        f"dpo_kernels   {dpo_kernels.__version__}",
        f"python        {platform.python_version()} on {platform.platform()}",
        *(f"{package:<13} {version(package)}" for package in PACKAGES),
    ]
    for device in devices():
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        picked = choose("auto", device)
        by = [f"by {choice.measured}" for choice in CHOICES if choice[:2] == (device.type, picked)]
        lines.append(f"\n{device} ({name}): auto picks {picked!r}, {by[0] if by else 'for want of measurements'}")
        lines.append(f"  temporary memory of one call: tiles of {load(picked).tile_bytes(device) / 2**20:.0f} MiB")
        for impl in IMPLEMENTATIONS:
            reason = unavailable_reason(impl, device)
            lines.append(f"  {impl:<7} {reason or load(impl).description()}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Shows what this machine has, which implementation is picked, and why not the others."


def run(options: argparse.Namespace) -> int:
    print(report())
    return 0
