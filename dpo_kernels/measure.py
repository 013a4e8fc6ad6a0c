"""How time and memory are measured, and on what machine: nothing here knows what is computed."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpo_kernels.verdicts import cpu_name
from dpo_kernels.verdicts import version as version

MIB = 2**20
CPU = torch.device("cpu")
MIN_ROUNDS = 3
FLUSH_BYTES, FLUSHES = 2**29, 4  # about half a millisecond on an H200


class Run(NamedTuple):
    """One thing to time: a call on prepared inputs."""

    prepare: Callable[[], None]
    call: Callable[[], object]
    warm_up: bool = False  # once more: it may be compiled again for what others did to the inputs


def interleaved(
    runs: list[Run],
    rounds: int,
    *,
    device: torch.device = CPU,
    seconds: float = math.inf,
    progress: Callable[[str], None] = lambda text: None,
) -> list[list[float] | str]:
    """Seconds of each run, or why it failed. Every round runs each once and in another order, so that a machine that
    slows down slows all of them, and none has always the same before it. Runs are warm already, or warm up. After
    `seconds` no round beyond the third begins."""
    samples: list[list[float]] = [[] for _ in runs]
    failures: dict[int, str] = {}
    timed = _by_events(device) if device.type == "cuda" else _by_clock(device)
    gc.collect()
    gc.freeze()  # what imports left behind: looking through it again and again takes longer than a small run
    deadline = time.monotonic() + seconds
    order = random.Random(0)
    for number in range(-1, rounds):  # the first to warm up
        if number >= MIN_ROUNDS and time.monotonic() > deadline:
            break
        if number >= 0:
            progress(f"round {number + 1} of {rounds}")
        for index in order.sample(range(len(runs)), len(runs)):
            if index in failures or (number < 0 and not runs[index].warm_up):
                continue
            runs[index].prepare()
            gc.collect()
            try:
                seconds_taken = timed(runs[index].call)
                if number >= 0:
                    samples[index].append(seconds_taken)
            except Exception as error:  # it may fail in any way
                failures[index] = described(error)
            if index in failures:
                recover(device)
    gc.unfreeze()
    return [failures.get(index, times) for index, times in enumerate(samples)]


def _by_clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """By the host's clock. Before, memory that is not used takes what a run left out of the caches."""
    unused = torch.zeros(min(2 * _cache_bytes(), FLUSH_BYTES), dtype=torch.uint8, device=device)

    def timed(call: Callable[[], object]) -> float:
        unused.add_(1)
        synchronize(device)
        start = time.perf_counter()
        result = call()
        synchronize(device)
        seconds = time.perf_counter() - start
        del result
        return seconds

    return timed


def _cache_bytes() -> int:
    """Of the last level, as Linux says; 32 MiB if it does not."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(size.read_text().strip().removesuffix("K")) * 1024 if size.exists() else 32 * MIB


def _by_events(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Between two events on the device. Before, it is kept busy writing to memory that is not used: this takes what a
    run left out of its caches, and lets the host get ahead, as it is in a training step."""
    unused = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def timed(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize(device)
        for _ in range(FLUSHES):
            unused.zero_()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    return timed


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def recover(device: torch.device) -> None:
    """After a failure, memory that it may have left in pieces goes back. Raises if the device is of no more use."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def described(error: Exception) -> str:
    """One line. Kept instead of the error, which keeps the tensors of the frames it came through."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


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
        except Exception as error:  # it may fail in any way
            return described(error)


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
    return (grown - _returned_bytes(result, inputs)) / MIB


def peak_allocated(contender: Any, inputs: Any, device: torch.device) -> float | str:
    """The same on a CUDA device, of a call that has been made before: what PyTorch allocates there, at its highest."""
    inputs.prepare(contender.overwrites)
    gc.collect()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        result = contender.run(inputs)
        synchronize(device)
    except Exception as error:
        return described(error)
    return (torch.cuda.max_memory_allocated(device) - before - _returned_bytes(result, inputs)) / MIB


def _returned_bytes(result: Any, inputs: Any) -> int:
    return sum(gradient.nbytes for gradient in result.gradients.values() if not _is_input(gradient, inputs))


def _is_input(tensor: torch.Tensor, inputs: Any) -> bool:
    return any(isinstance(t, torch.Tensor) and t.data_ptr() == tensor.data_ptr() for t in vars(inputs).values())


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """What the figures depend on. DPO_KERNELS_COMMIT names the commit of a copy without its repository."""
    changes = _git("status", "--porcelain")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or os.environ.get("DPO_KERNELS_COMMIT"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def describe(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"type": device.type, "name": cpu_name()}
    found = torch.cuda.get_device_properties(device)
    names = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size")
    described = {name: getattr(found, name, None) for name in names}
    return {"type": device.type, **described, "cuda": torch.version.cuda}


def gpu(device: torch.device | None = None) -> dict[str, str] | None:
    """What nvidia-smi says of a GPU now, the first one by default; None without it."""
    fields = ["name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem"]
    fields += ["power.draw", "power.limit", "temperature.gpu"]
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    if device is not None:
        query.append(f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}")
    said = _output(*query)
    return dict(zip(fields, said.splitlines()[0].split(", "), strict=True)) if said else None


def _git(*arguments: str) -> str | None:
    """What git says of this package's own repository; None where it was installed elsewhere, be it below another."""
    root = Path(__file__).resolve().parents[1]
    found = _output("git", "rev-parse", "--show-toplevel")
    return _output("git", *arguments) if found is not None and Path(found) == root else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
