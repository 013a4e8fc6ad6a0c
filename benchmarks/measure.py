"""How time and memory are measured, and on what machine: nothing here knows what is computed."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

MIB = 2**20


class Run(NamedTuple):
    """One thing to time: a call on prepared inputs."""

    prepare: Callable[[], None]
    call: Callable[[], object]


def interleaved(
    runs: list[Run],
    rounds: int,
    *,
    synchronize: Callable[[], None] = lambda: None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[list[float]]:
    """Seconds of each run, in every round once and in an order that rotates, so that a machine that slows down slows
    all of them. Runs are warm already. `synchronize` waits for a device."""
    samples: list[list[float]] = [[] for _ in runs]
    gc.collect()
    gc.freeze()  # what imports left behind: looking through it again and again takes longer than a small run
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        for step in range(len(runs)):
            index = (number + step) % len(runs)
            runs[index].prepare()
            gc.collect()
            synchronize()
            start = time.perf_counter()
            result = runs[index].call()
            synchronize()
            samples[index].append(time.perf_counter() - start)
            del result
    gc.unfreeze()
    return samples


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, minimum and interquartile range in milliseconds."""
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    found = {"median_ms": statistics.median(seconds), "min_ms": min(seconds), "iqr_ms": high - low}
    return {name: value * 1e3 for name, value in found.items()}


def peak_memory(contender: Any, case: Any, threads: int) -> float | str:
    """MiB of resident memory that one call needs beyond its inputs and the gradients that it returns; or why that is
    not known.

    A process of its own makes the inputs, does a tiny call (libraries and threads start; a compiled contender does a
    full one, since compiling takes memory too), hands free pages back, and has Linux reset the high-water mark of its
    resident set (VmHWM) before the one call that counts. So scratch memory that a library keeps is counted too.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return "needs /proc/self/clear_refs, as Linux has it"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_peak_memory, contender, case, threads).result()
        except BrokenProcessPool:
            return "the process was killed: out of memory?"


def _peak_memory(contender: Any, case: Any, threads: int) -> float:
    torch.set_num_threads(threads)
    inputs = case.inputs()
    warm_up = inputs if contender.compiled else case.tiny().inputs()
    warm_up.prepare(contender.overwrites)
    contender.run(warm_up)
    inputs.prepare(contender.overwrites)
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    result = contender.run(inputs)
    grown = _status_bytes("VmHWM") - before
    returned = sum(gradient.nbytes for gradient in result.gradients.values() if not _is_input(gradient, inputs))
    return (grown - returned) / MIB


def _is_input(tensor: torch.Tensor, inputs: Any) -> bool:
    return any(isinstance(t, torch.Tensor) and t.data_ptr() == tensor.data_ptr() for t in vars(inputs).values())


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def _git(*arguments: str) -> str | None:
    """What git says of the benchmark's own repository; None without one."""
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
