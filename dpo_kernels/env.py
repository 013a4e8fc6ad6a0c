"""What this machine has, which implementation `auto` picks, and why not the others."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

import dpo_kernels
from dpo_kernels import verdicts
from dpo_kernels.dispatch import (
    CHOICES,
    IMPLEMENTATIONS,
    default,
    driver_needed,
    load,
    needs_tuning,
    unavailable_reason,
)

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
        if device.type == "cpu":
            name = f"{torch.get_num_threads()} threads"
        else:
            name = (verdicts.key_of(device) or {}).get("name", "?")
        picked = default(device)
        by = [f"by {choice.measured}" for choice in CHOICES if choice[:2] == (device.type, picked)]
        lines.append(f"\n{device} ({name}): auto picks {picked!r}, {by[0] if by else 'for want of measurements'}")
        lines.append(f"  temporary memory of one call: tiles of {load(picked).tile_bytes(device) / 2**20:.0f} MiB")
        lines += [f"  {line}" for line in verdict_lines(device)]
        for impl in IMPLEMENTATIONS:
            reason = unavailable_reason(impl, device)
            lines.append(f"  {impl:<7} {reason or load(impl).description()}")
    return "\n".join([*lines, *driver_lines()])


def driver_lines() -> list[str]:
    """Where there is a driver of NVIDIA's, and PyTorch sees no GPU with it."""
    found = verdicts.driver(torch.device("cuda")) if not torch.version.hip else None
    if found is None or torch.cuda.is_available():
        return []
    needed = driver_needed()
    lines = [f"\nNVIDIA's driver {found} is here, and PyTorch sees no GPU with it:"]
    if torch.version.cuda is None:
        return [*lines, f"  this PyTorch {torch.__version__} was built without CUDA"]
    if needed is not None:
        lines.append(f"  the CUDA kernels take drivers from {needed} on")
    return [*lines, f"  this PyTorch was built with CUDA {torch.version.cuda}"]


def verdict_lines(device: torch.device) -> list[str]:
    """What was measured here, and how to have it measured."""
    key = verdicts.key_of(device)
    if key is None:
        return []
    verdict, how = verdicts.read(key), "`dpo-kernels tune`"
    if verdict is None:
        wanted = needs_tuning(device)
        lines = [f"no verdict of this machine: {how} {'makes' if wanted else 'would make'} one, in about a minute"]
        return lines + [f"  there is one of {other}" for other in verdicts.elsewhere(key)]
    lines = [
        f"verdict of {verdict.measured}, {verdicts.file_of(key)}; driver {key['driver']}, kernels {key['kernels']}"
    ]
    for times in verdict.times:
        lines.append(f"  {times.head}: auto picks")
        lines += [f"    {line}" for line in times_lines(verdict, times)]
    lines += [f"  refused: {refusal}" for refusal in verdict.refused]
    return lines


def times_lines(verdict: verdicts.Verdict, times: verdicts.Times) -> list[str]:
    """Of a head: for each path what is picked, and its times beside those of the others."""
    lines = []
    for path in verdicts.PATHS:
        if path in times.ms:
            shown = "; ".join(
                f"{family} {' and '.join(f'{one:.4g}' for one in found)} ms" for family, found in times.ms[path].items()
            )
            lines.append(
                f"{path}: {verdict.choice(times, path)!r} ({shown}, at {' and '.join(map(str, times.tokens))} rows)"
            )
    return lines + [f"{path}: not timed in full: {why}" for path, why in times.untimed.items()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Shows what this machine has, which implementation is picked, and why not the others."


def run(options: argparse.Namespace) -> int:
    print(report())
    return 0
