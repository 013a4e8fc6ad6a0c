"""What was found of the kernels on this machine's own devices: files that `dpo-kernels tune` writes and `dispatch`
reads.

A verdict speaks for one kind of device, its driver, and these very kernels and versions: all of that is its key, and
the name of its file. So a file never has to be asked whether it still holds, and another driver simply has none.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.metadata
import json
import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

PATHS = ("A", "B", "C", "D", "E")
# A family of kernels is taken where it is at least this much faster than plain PyTorch, whatever the number of rows.
FASTER = 1.03
# A head that was not timed is taken for the nearest one that was, if neither of its sizes is further away.
NEAR = 2.0
FORMAT = 1
# What it is called where it is built for one kind of GPU.
TRITON = ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-xpu", "triton-windows")


class Head(NamedTuple):
    """What kernels are timed for."""

    dtype: str  # "bfloat16", as torch names it
    hidden: int
    vocab: int
    softcap: float | None = None

    def __str__(self) -> str:
        cap = f", softcap {self.softcap:g}" if self.softcap else ""
        return f"{self.dtype}, H={self.hidden}, V={self.vocab}{cap}"


class Refusal(NamedTuple):
    """Why a family of kernels is not taken here."""

    family: str
    dtype: str | None  # None: whatever the dtype
    kind: str  # "hung", "ended", "failed" or "wrong"
    at: str  # what it was doing
    reason: str

    def __str__(self) -> str:
        dtype = f" in {self.dtype}" if self.dtype else ""
        return f"{self.family}{dtype} {self.kind} at {self.at}: {self.reason}"


@dataclass
class Times:
    """What was measured for a head, in milliseconds a call: of each path, each family, each number of rows."""

    head: Head
    tokens: tuple[int, ...]
    ms: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    untimed: dict[str, str] = field(default_factory=dict)
    """Paths of which a time is missing, and why: memory that was taken."""


@dataclass
class Verdict:
    key: dict[str, Any]
    verified: list[tuple[str, str]] = field(default_factory=list)  # (family, dtype)
    refused: list[Refusal] = field(default_factory=list)
    times: list[Times] = field(default_factory=list)
    measured: str = ""

    def refuses(self, family: str, dtype: str) -> Refusal | None:
        return next((each for each in self.refused if each.family == family and each.dtype in (None, dtype)), None)

    def trusts(self, family: str, dtype: str) -> bool:
        return (family, dtype) in self.verified and not self.refuses(family, dtype)

    def of(self, head: Head) -> Times | None:
        return next((times for times in self.times if times.head[:3] == head[:3]), None)

    def knows(self, head: Head, whole: bool = True) -> bool:
        """Whether all of it was timed; not `whole`: or there was a reason why not."""
        times = self.of(head)
        if times is None:
            return False
        return all(path in times.ms and not (whole and path in times.untimed) for path in PATHS)

    def choice(self, times: Times, path: str) -> str:
        """The fastest family among those that are right, and faster than PyTorch for every number of rows."""
        ms, dtype = times.ms.get(path, {}), times.head.dtype
        base = ms.get("torch")
        if base is None or len(base) < len(times.tokens):
            return "torch"
        able = {
            family: sum(taken / own for taken, own in zip(found, base, strict=True))
            for family, found in ms.items()
            if all(
                self.trusts(each, dtype) for each in {family, family.removesuffix("_fused")}
            )  # which it goes back to
            and len(found) == len(base)
            and all(taken * FASTER <= own for taken, own in zip(found, base, strict=True))
        }
        return min(able, key=lambda family: able[family], default="torch")


# Keys


def key_of(device: torch.device) -> dict[str, Any] | None:
    """What a verdict on this device rests on; None where PyTorch sees no such device."""
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        found = {"name": cpu_name(), "capability": capability, "units": torch.get_num_threads()}
        return _with_versions({"type": "cpu", **found, "driver": None})
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if here is None or here.type != device.type:
        return None
    backend: Any = getattr(torch, device.type, None)
    if not hasattr(backend, "get_device_properties") or (device.index or 0) >= torch.accelerator.device_count():
        return None
    of = backend.get_device_properties(device)
    shown = f"{of.major}.{of.minor}" if hasattr(of, "major") else getattr(of, "version", None)
    units = getattr(of, "multi_processor_count", None) or getattr(of, "max_compute_units", None)
    found = {"name": of.name, "capability": getattr(of, "gcnArchName", shown), "units": units}
    return _with_versions({"type": device.type, **found, "driver": driver(device)})


def _with_versions(found: dict[str, Any]) -> dict[str, Any]:
    triton = next(filter(None, map(version, TRITON)), None)
    versions = {"torch": torch.__version__, "triton": triton, "dpo_kernels": version("dpo_kernels")}
    return {**found, **versions, "kernels": _digest_of_kernels()}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")  # of Linux
    if not info.exists():
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def driver(device: torch.device) -> str | None:
    """Its version, as the driver itself says."""
    if device.type == "xpu":
        return getattr(torch.xpu.get_device_properties(device), "driver_version", None)
    module = "/sys/module/amdgpu/version" if torch.version.hip else "/proc/driver/nvidia/version"
    try:
        found = re.search(r"\d+\.\d+(\.\d+)*", Path(module).read_text())
    except OSError:
        found = None
    if found:
        return found[0]
    # where containers show no such file: the newest CUDA that the driver takes
    return str(cuda_of_driver() or "") or None if device.type == "cuda" else None


def cuda_of_driver() -> int:
    """1000 times major plus 10 times minor of the newest CUDA that NVIDIA's driver takes; 0 without one."""
    asked = getattr(torch._C, "_cuda_getDriverVersion", None)
    return asked() if asked is not None else 0


def version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _digest_of_kernels() -> str:
    """Of all that computes: the compiled modules, and the Python around the kernels."""
    here = Path(__file__).parent
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    found = (here / f"{name}{suffix}" for name in ("_native", "_cuda") for suffix in suffixes)
    files = [file for file in found if file.exists()] + sorted((here / "impl").glob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def difference(key: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What is another in `other` than it is now."""
    return ", ".join(f"{name} {other.get(name)}, now {key[name]}" for name in key if key[name] != other.get(name))


# Files


class NoFolder(OSError):
    """There is nowhere to keep files."""


def folder() -> Path:
    """$DPO_KERNELS_CACHE; else $XDG_CACHE_HOME/dpo_kernels; ~/.cache/dpo_kernels without it (or where it is no absolute
    path, as its specification says)."""
    if own := os.environ.get("DPO_KERNELS_CACHE"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "dpo_kernels"
    try:
        return Path.home() / ".cache" / "dpo_kernels"
    except RuntimeError as error:
        raise NoFolder(f"{error} DPO_KERNELS_CACHE names a folder instead") from None


def file_of(key: Mapping[str, Any]) -> Path:
    text = json.dumps(key, sort_keys=True)
    return folder() / f"{_slug(key)}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _slug(key: Mapping[str, Any]) -> str:
    return re.sub(r"[^a-z0-9]+", "-", str(key["name"]).lower()).strip("-") or str(key["type"])


def read(key: Mapping[str, Any]) -> Verdict | None:
    """The verdict of this key. What is there and is none is named in a warning, and is as good as nothing."""
    try:
        file = file_of(key)
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NoFolder):
        return None
    except (OSError, UnicodeDecodeError) as error:
        warnings.warn(f"{file} cannot be read ({error}), and is left out of account", stacklevel=2)
        return None
    try:
        return _parse(text, key)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"{file} is no verdict of dpo-kernels tune ({type(error).__name__}: {error}), and is left out of account: "
            "`dpo-kernels tune` writes it again",
            stacklevel=2,
        )
        return None


def _parse(text: str, key: Mapping[str, Any]) -> Verdict:
    found = json.loads(text)
    if found["format"] != FORMAT or found["key"] != dict(key):
        raise ValueError("it is of another format, or of another device")
    verdict = Verdict(dict(key), measured=str(found["measured"]))
    verdict.verified = [(str(family), str(dtype)) for family, dtype in found["verified"]]
    verdict.refused = [Refusal(**each) for each in found["refused"]]
    for each in found["times"]:
        head = Head(**each["head"])
        if not isinstance(getattr(torch, head.dtype, None), torch.dtype):
            raise ValueError(f"expected a dtype, got {head.dtype!r}")
        if not (type(head.hidden) is int and type(head.vocab) is int and min(head[1:3]) > 0):
            raise ValueError(f"expected sizes of a head, got {head}")
        if head.softcap is not None and not isinstance(head.softcap, (int, float)):
            raise ValueError(f"expected a number as softcap, got {head.softcap!r}")
        ms = {
            path: {str(family): [float(one) for one in times] for family, times in families.items()}
            for path, families in each["ms"].items()
        }
        tokens = tuple(map(int, each["tokens"]))
        if any(len(times) > len(tokens) for families in ms.values() for times in families.values()):
            raise ValueError("expected a time for each number of rows")
        untimed = {str(path): str(why) for path, why in each["untimed"].items()}
        verdict.times.append(Times(head, tokens, ms, untimed))
    return verdict


def write(verdict: Verdict) -> Path:
    """Whole or not at all, and at once for whoever reads. Raises `OSError`."""
    file = file_of(verdict.key)
    file.parent.mkdir(parents=True, exist_ok=True)
    verdict.measured = datetime.now(timezone.utc).isoformat(timespec="seconds")
    refused = [each._asdict() for each in verdict.refused]
    times = [asdict(each) | {"head": each.head._asdict()} for each in verdict.times]
    content = {"format": FORMAT} | asdict(verdict) | {"refused": refused, "times": times}
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(file)
    return file


def forget(key: Mapping[str, Any]) -> list[Path]:
    """Deletes what is known of this kind of device, by whatever versions; what was deleted."""
    gone = [file for file in _same_device(key) if file.exists()]
    for file in gone:
        file.unlink()
    return gone


def elsewhere(key: Mapping[str, Any]) -> list[str]:
    """How verdicts on this kind of device differ from what is asked, where there are some of others."""
    found = []
    for file in _same_device(key):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # of no use then, and not asked for
            other = json.loads(file.read_text(encoding="utf-8"))["key"]
            if other != dict(key):
                found.append(difference(key, other))
    return found


def _same_device(key: Mapping[str, Any]) -> list[Path]:
    pattern = re.compile(re.escape(_slug(key)) + r"-[0-9a-f]{16}\.json")
    try:
        return sorted(file for file in folder().glob("*.json") if pattern.fullmatch(file.name))
    except NoFolder:
        return []


@contextlib.contextmanager
def lock(key: Mapping[str, Any], waiting: Any = None) -> Iterator[None]:
    """Nobody else is in here for this key while we are; it ends with the process that has it. `waiting()` is called
    where another one has it. Raises `OSError`."""
    try:
        import fcntl
    except ImportError as error:
        raise OSError(f"this system has no locks on files that end with their process: {error}") from error
    file = file_of(key).with_suffix(".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
