"""Which kernels compute a call, and why the others do not.

A *family* of kernels is an implementation, or one whose product x.W^T does at its end what tiles of logits are else
stored for ("_fused"): the forward without gradients is then a single kernel, paths B and C store exponentials, and path
D the gradient of the logits. What "auto" takes is looked up: the verdict of this very device, which `dpo-kernels tune`
has measured; then the table of measurements that come with the package; then "torch". The number of rows is not asked
for, so which kernels a row sees does not depend on how a batch is cut, and nothing is ever measured in a call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast, get_args

import torch

from dpo_kernels import verdicts
from dpo_kernels.impl.interface import TileKernels
from dpo_kernels.options import Impl

Family = Literal["torch", "cpu", "triton", "triton_fused", "cuda", "cuda_fused"]
Path = Literal["A", "B", "C", "D", "E"]
IMPLEMENTATIONS: tuple[Impl, ...] = ("torch", "cpu", "triton", "cuda")
NAMES: tuple[Impl, ...] = get_args(Impl)
FAMILIES: tuple[Family, ...] = get_args(Family)
_MODULES = {
    "torch": "dpo_kernels.impl.torch",
    "cpu": "dpo_kernels.impl.native",
    "triton": "dpo_kernels.impl.triton",
    "cuda": "dpo_kernels.impl.cuda",
}
_FUSED = "_fused"
# Whose kernels do what takes PyTorch several launches.
_FOR_GPUS = ("triton", "cuda")
# The path without gradients.
FORWARDS = ("A",)
# What an implementation's own name takes there. Of Triton's fused forward no GPU has yet said that it is faster: it is
# that of path D alone, whose backward stores no logits.
FORWARD_OF: dict[str, Family] = {"cuda": "cuda_fused"}
# Those that can do without logits, and what an implementation's own name takes there: a tile costs more than its pass.
SWEEPS = ("B", "C", "D")
SWEEP_OF: dict[str, Family] = {"triton": "triton_fused", "cuda": "cuda_fused"}


class Choice(NamedTuple):
    """What "auto" takes on a type of device without a verdict, and the measurements that say so."""

    device: str
    impl: Impl
    measured: str


# The first that fits and can run is taken, "torch" at last. So far no dtype or shape wants another one than its device.
CHOICES = (Choice("cpu", "cpu", "benchmarks/results/cpu-amd-epyc-avx512-2-threads"),)
# The devices that compiled CUDA kernels are for.
CUDA_DEVICE = "cuda"
# Those that Triton compiles for: of NVIDIA and AMD, and of Intel.
TRITON_DEVICES = ("cuda", "xpu")


def unavailable_reason(impl: str, device: torch.device) -> str | None:
    """Why `impl` cannot run on `device`, or None if it can."""
    if impl == "cpu":
        if device.type != "cpu":
            return f"it computes on the CPU, not on {device.type!r}"
        return CPU_PROBLEM
    if impl == "cuda":
        if device.type != CUDA_DEVICE:
            return f"it needs a GPU of NVIDIA's, not {device.type!r}"
        if torch.version.hip:
            return "it needs a GPU of NVIDIA's, and this PyTorch is for AMD's"
        return CUDA_PROBLEM or _driver_problem()
    if impl == "triton":
        if not HAS_TRITON:
            return "Triton is not installed: pip install triton"
        if device.type not in TRITON_DEVICES and not (
            device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        ):
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
# Of CUDA's runtimes by their major version, the first driver that takes them, on Linux.
DRIVERS = {12: "525", 13: "580"}


def driver_needed() -> str | None:
    """By the runtime that the CUDA kernels were linked with; None where there are none, or one newer than is known."""
    built = getattr(sys.modules.get("dpo_kernels._cuda"), "CUDA_VERSION", 0)
    return DRIVERS.get(built // 1000)


@torch.compiler.assume_constant_result
def _driver_problem() -> str | None:
    """Asked where there is a GPU in use already: the question may start CUDA's runtime."""
    built = getattr(sys.modules.get("dpo_kernels._cuda"), "CUDA_VERSION", 0)
    taken = verdicts.cuda_of_driver()
    if not built or not taken or taken // 1000 >= built // 1000:
        return None
    return (
        f"its kernels were built with CUDA {spelled(built)}, for drivers from {driver_needed() or '?'} on, and the "
        f"driver here takes CUDA up to {spelled(taken)}"
    )


def spelled(version: int) -> str:
    """13000 as 13.0."""
    return f"{version // 1000}.{version % 1000 // 10}"


def check_impl(impl: object) -> Impl:
    """The name as it is; raises `ValueError` for what is no implementation's."""
    for known in NAMES:
        if impl == known:
            return known
    raise ValueError(f"impl: expected one of {NAMES}, got {impl!r}")


def check_runs(impl: str, device: torch.device) -> Impl:
    """Raises `ValueError` if `impl` is unknown, or cannot run on `device`; the message gives the reason."""
    name = check_impl(impl)
    reason = None if name == "auto" else unavailable_reason(name, device)
    if reason is not None:
        raise ValueError(f"impl: {name!r} cannot run on device {str(device)!r}: {reason}")
    return name


def choose(
    impl: str, device: torch.device, path: Path, dtype: torch.dtype, vocab: int, hidden: int | None = None
) -> Family:
    """The kernels that compute `path` for a head [vocab, hidden], with operands (path E: logits) of `dtype`. An
    explicit implementation is checked and never replaced by another.

    Raises:
        ValueError: `impl` is unknown, or cannot run on `device`; the message gives the reason.
    """
    name = check_runs(impl, device)
    if name != "auto":
        return _own(name, path)
    for of_path, family in _nearest(_table(device, _generation), dtype, vocab, hidden):
        if of_path == path:
            return family
    return _own(default(device), path)


def choices(impl: str, device: torch.device, dtype: torch.dtype, vocab: int, hidden: int) -> dict[str, Family]:
    """Of every path."""
    return {path: choose(impl, device, path, dtype, vocab, hidden) for path in get_args(Path)}


def default(device: torch.device) -> Impl:
    """What "auto" takes without a verdict."""
    candidates: tuple[Impl, ...] = (*(choice.impl for choice in CHOICES if choice.device == device.type), "torch")
    return next(each for each in candidates if unavailable_reason(each, device) is None)


def _own(impl: str, path: Path) -> Family:
    of_path = FORWARD_OF if path in FORWARDS else SWEEP_OF if path in SWEEPS else {}
    return of_path.get(impl, cast(Family, impl))


def impl_of(family: str) -> Impl:
    return cast(Impl, family.removesuffix(_FUSED))


def is_fused(family: str) -> bool:
    """Whether no tiles of logits are stored, where that can be for the operands."""
    return family.endswith(_FUSED)


def sums_tokens(family: str) -> bool:
    """Whether the family has kernels for sums over the tokens of sequences, each a launch."""
    return impl_of(family) in _FOR_GPUS


def finds_rows(family: str) -> bool:
    """Whether the family has kernels that find labelled rows, copy their hidden states together, and sum and compare
    what comes of them."""
    return impl_of(family) != "torch"


def puts_rows(family: str) -> bool:
    """Whether the family has a kernel that puts rows in fp32 to their positions."""
    return impl_of(family) in _FOR_GPUS


def paths_of(family: str) -> tuple[str, ...]:
    """The paths of which the family has kernels of its own."""
    if not is_fused(family):
        return get_args(Path)
    return (*FORWARDS, *SWEEPS) if impl_of(family) in SWEEP_OF else FORWARDS


def families(device: torch.device) -> list[Family]:
    """Those that can run on `device`."""
    return [family for family in FAMILIES if _can_run(family, device)]


def _can_run(family: str, device: torch.device) -> bool:
    if unavailable_reason(impl_of(family), device) is not None:
        return False
    return not is_fused(family) or cast(Any, load(family)).has_fused_forward(device)


@functools.cache
def load(family: str) -> TileKernels:
    """The module behind a resolved name."""
    return cast(TileKernels, importlib.import_module(_MODULES[impl_of(family)]))


# Verdicts


class Row(NamedTuple):
    """What is taken for a head, and for those near it. None: whatever it is."""

    device: str | None  # its type
    dtype: torch.dtype | None
    vocab: int | None
    hidden: int | None
    families: tuple[tuple[str, Family], ...]  # of paths


# Of verdicts, once for each device; and what goes before these: `pin`.
_known: dict[torch.device, tuple[Row, ...]] = {}
_pinned: list[Row] = []
# Another one whenever these change: compiled code looks at it, and is compiled again.
_generation = "0"
# Types of devices of which it was said that they should be tuned.
_told: set[str] = set()


@torch.compiler.assume_constant_result
def _table(device: torch.device, generation: str) -> tuple[Row, ...]:
    if device not in _known:  # not earlier: to ask a GPU what it is starts its runtime, which cannot be forked
        _known[device] = _rows_of_verdict(device)
    return (*(row for row in _pinned if row.device in (None, device.type)), *_known[device])


def _changed() -> None:
    global _generation
    _generation = str(int(_generation) + 1)


def _rows_of_verdict(device: torch.device) -> tuple[Row, ...]:
    key = verdicts.key_of(device)
    if key is None:
        return ()
    verdict = verdicts.read(key)
    if verdict is None:
        if needs_tuning(device) and device.type not in _told and os.environ.get("DPO_KERNELS_TUNE") != "0":
            say_no_more(device)
            others = verdicts.elsewhere(key)
            since = f" (it was tuned with {others[-1]})" if others else ""
            warnings.warn(
                f"dpo_kernels computes with plain PyTorch on {key['name']}{since}: its faster kernels are taken once "
                "they have been proven on this machine, in about a minute, by `dpo-kernels tune`",
                stacklevel=2,
            )
        return ()
    able = families(device)
    return tuple(
        Row(
            device.type,
            getattr(torch, times.head.dtype),
            times.head.vocab,
            times.head.hidden,
            tuple(
                (path, found if found in able else "torch")
                for path in times.ms
                for found in [cast(Family, verdict.choice(times, path))]
            ),
        )
        for times in verdict.times
    )


def say_no_more(device: torch.device) -> None:
    """That such devices should be tuned."""
    _told.add(device.type)


def needs_tuning(device: torch.device) -> bool:
    """Whether there are faster kernels for `device` of which no measurement speaks."""
    return default(device) == "torch" and families(device) != ["torch"]


def _nearest(
    rows: tuple[Row, ...], dtype: torch.dtype, vocab: int, hidden: int | None
) -> tuple[tuple[str, Family], ...]:
    """The families of the row whose head is nearest: the first of equal ones, none if all are too far."""
    found: tuple[tuple[str, Family], ...] = ()
    least = float("inf")
    for row in rows:
        if row.dtype is None or row.dtype == dtype:
            v, h = _ratio(row.vocab, vocab), _ratio(row.hidden, hidden)
            if v <= verdicts.NEAR and h <= verdicts.NEAR and v * h < least:
                least, found = v * h, row.families
    return found


def _ratio(measured: int | None, asked: int | None) -> float:
    if measured is None or asked is None:
        return 1.0
    asked = int(asked)  # a graph for any size is then one for this size
    return max(measured, asked, 1) / max(1, min(measured, asked))


def pin(
    families: Mapping[str, Family],
    device: str | None = None,
    dtype: torch.dtype | None = None,
    vocab: int | None = None,
    hidden: int | None = None,
) -> Row:
    """From now on, "auto" takes these on such devices for this head, whatever was measured; a later pin goes before an
    earlier one. What it returns can be unpinned."""
    row = Row(device, dtype, vocab, hidden, tuple(families.items()))
    _pinned.insert(0, row)
    _changed()
    return row


def unpin(row: Row) -> None:
    at = next((n for n, each in enumerate(_pinned) if each is row), None)
    if at is not None:
        del _pinned[at]
        _changed()


@contextmanager
def taking(family: Family) -> Iterator[None]:
    """Within, "auto" takes this family for everything; for what is not fused, its implementation."""
    of_path = {path: family if path in paths_of(family) else impl_of(family) for path in get_args(Path)}
    row = pin(cast(Mapping[str, Family], of_path))
    try:
        yield
    finally:
        unpin(row)


def forget() -> None:
    """Verdicts are read again when they are next asked for."""
    _known.clear()
    _changed()
