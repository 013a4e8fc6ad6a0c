"""What a run leaves on disk so that it can go on: checkpoints that are complete or absent, and the metrics file."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

PREFIX = "checkpoint-"
WEIGHTS, STATE, PROGRESS = FILES = ("weights.safetensors", "state.pt", "progress.json")
SHARDS = "shards"  # in the place of WEIGHTS, with the optimizer's state too: a folder of torch.distributed.checkpoint
CHECKSUMS = "SHA256SUMS"  # of FILES, as sha256sum writes and checks them
_NAME = re.compile(rf"{PREFIX}[0-9]+")
_SUM = re.compile("[0-9a-f]{64}")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes `path` when the block ends: whole, or, after a crash, not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    yield temporary
    for entry in list(temporary.rglob("*")):
        _sync(entry)
    _sync(temporary)
    discard(path)
    temporary.rename(path)
    _sync(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Like `atomic_directory`, for one file; safe when several processes write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    yield temporary
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def discard(directory: Path) -> None:
    """Deletes a directory that another process may be looking for: it vanishes at once, not file by file."""
    if directory.exists():
        if not directory.is_dir():
            raise ValueError(f"output_dir: expected no file {directory}, in whose place a directory is written")
        grave = directory.with_name(f".{directory.name}.old.tmp")
        if grave.exists():
            shutil.rmtree(grave)
        directory.rename(grave)
        shutil.rmtree(grave)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no directories
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in `output_dir`, whole or damaged, oldest step first; not what another trainer calls so."""
    found = [path for path in output_dir.glob(f"{PREFIX}*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted((path for path in found if _is_ours(path)), key=_step)


def _is_ours(path: Path) -> bool:
    """Whether it has a file of a checkpoint, or has lost them all."""
    names = {entry.name for entry in path.iterdir()}
    return not names or not names.isdisjoint({*FILES, CHECKSUMS})


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def damage(path: Path, files: Sequence[str] | None = FILES) -> str:
    """What is wrong with the files of a checkpoint, or of another directory with checksums (None: of those that it has
    a checksum of), by these; "" if nothing is."""
    try:
        lines = (path / CHECKSUMS).read_text(encoding="ascii").splitlines()
        sums = {name: checksum for checksum, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):  # missing, not to be read, or not a checksum and a name a line
        sums = {}
    in_shards = {f"{SHARDS}/.metadata", STATE, PROGRESS} <= sums.keys() and WEIGHTS not in sums
    names = tuple(sums) if files is None or in_shards else tuple(files)
    complete = bool(sums) and sums.keys() == set(names) and all(map(_SUM.fullmatch, sums.values()))
    problems = [problem for name in (CHECKSUMS, *names) if (problem := _problem(path, name, complete, sums))]
    if problems == [f"{CHECKSUMS} is missing"] and files is not None:
        return f"{CHECKSUMS} is missing (versions before this one wrote none, and their schedule was another)"
    return ", ".join(problems)


def _problem(path: Path, name: str, complete: bool, sums: dict[str, str]) -> str:
    """`complete`: the checksums can be what was written."""
    file = path / name
    try:
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size == 0:
            return f"{name} is empty"
        whole = complete if name == CHECKSUMS else not complete or _sha256(file) == sums[name]
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return "" if whole else f"{name} is damaged"


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensor_digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """A SHA-256 of each tensor: equal for equal dtypes, shapes and bits alone."""

    def digest(tensor: torch.Tensor) -> str:
        hasher = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return hasher.hexdigest()

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


def write_checksums(directory: Path, names: Iterable[str]) -> None:
    sums = "".join(f"{_sha256(directory / name)}  {name}\n" for name in names)
    (directory / CHECKSUMS).write_text(sums, newline="\n")


def find_checkpoint(output_dir: Path, resume: str, overwrite: bool = False) -> Path | None:
    """The checkpoint that `resume` ("auto", "never" or a path) means, or None for a fresh start. "auto" means the
    newest whose files have the checksums that they were written with, and warns of what is wrong with newer ones.

    Raises `ValueError` where going on would mix this run with the checkpoints of another, where no checkpoint is whole,
    or, unless told to `overwrite` it, where it would replace a run that has finished and left no checkpoint.
    """
    existing = list_checkpoints(output_dir)
    if existing and overwrite:
        raise ValueError(
            f"overwrite: {output_dir} holds {existing[-1].name}, which a run goes on from: delete its checkpoints, or "
            "leave overwrite out to go on"
        )
    if not existing and (output_dir / "final").exists() and not overwrite:
        raise ValueError(
            f"output_dir: {output_dir} holds a finished run (final/) without checkpoints to go on from: give another "
            "output_dir, or overwrite to replace it"
        )
    if resume == "auto":
        return _newest_whole(existing)
    if resume == "never":
        if existing:
            raise ValueError(
                f"resume: 'never' would start afresh in {output_dir}, which holds {existing[-1].name} of another run: "
                "delete its checkpoints, give another output_dir, or resume 'auto' to go on"
            )
        return None
    chosen = Path(resume)
    if not chosen.is_dir() or not any((chosen / name).exists() for name in FILES):
        raise ValueError(f"resume: expected 'auto', 'never' or the path of a checkpoint directory, got {resume!r}")
    if problems := damage(chosen):
        raise ValueError(f"resume: {chosen} is not whole: {problems}")
    step = json.loads((chosen / PROGRESS).read_text())["step"]
    newer = [path.name for path in existing if _step(path) > step]
    if newer:
        raise ValueError(
            f"resume: {chosen} is at step {step}, but {output_dir} also holds {', '.join(newer)}: "
            "delete what is newer or give another output_dir"
        )
    return chosen


def _newest_whole(checkpoints: list[Path]) -> Path | None:
    passed: list[str] = []
    for path in reversed(checkpoints):
        problems = damage(path)
        if not problems:
            if passed:
                warnings.warn(f"{'; '.join(passed)}. Going on from the one before, {path}", stacklevel=5)
            return path
        passed.append(f"{path} is not whole: {problems}")
    if passed:
        raise ValueError(
            f"resume: there is no checkpoint to go on from: {'; '.join(passed)}. Delete them to start afresh, or give "
            "another output_dir"
        )
    return None


def remove_leftovers(output_dir: Path) -> None:
    """Deletes what a killed run was still writing."""
    for name in (PREFIX, "best", "final", "base_model", "metrics.jsonl"):
        for path in output_dir.glob(f".{name}*.tmp"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def save_checkpoint(
    output_dir: Path,
    weights: Mapping[str, torch.Tensor],
    state: dict[str, Any],
    progress: dict[str, Any],
    limit: int | None,
    shards: Path | None = None,
) -> Path:
    """Writes `checkpoint-STEP` with the checksums of its files, and deletes the oldest beyond `limit`. Those of later
    steps, which lie there where this run went on from one before them, do not count.

    `weights` are the trainable ones (safetensors), `state` holds tensors and plain values (optimizer, scheduler,
    scaler, random generators), `progress` (JSON) at least the `step`. `shards`, a folder beside the checkpoint, is
    moved into it in the place of weights.
    """
    from safetensors.torch import save_file

    path = output_dir / f"{PREFIX}{progress['step']}"
    with atomic_directory(path) as directory:
        names = list(FILES)
        if shards is None:
            save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, directory / WEIGHTS)
        else:
            shards.rename(directory / SHARDS)
            of_shards = sorted(f"{SHARDS}/{file.name}" for file in (directory / SHARDS).iterdir())
            names = [*of_shards, STATE, PROGRESS]
        torch.save(state, directory / STATE)
        (directory / PROGRESS).write_text(json.dumps(progress, indent=1))
        write_checksums(directory, names)
    until_now = [other for other in list_checkpoints(output_dir) if _step(other) <= progress["step"]]
    for old in until_now[: -limit if limit else 0]:
        discard(old)
    return path


def read_progress(path: Path) -> dict[str, Any]:
    """What was given to `save_checkpoint` as that."""
    return json.loads((path / PROGRESS).read_text())


def load_checkpoint(
    path: Path, weights: Mapping[str, torch.Tensor], identity: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Copies the saved weights into `weights` and returns (state, progress), both as given to `save_checkpoint`.

    Raises `ValueError` naming every entry of `identity`, which is what the trajectory follows from, that differs from
    the checkpoint's `progress["identity"]`.
    """
    from safetensors.torch import load_file

    state, progress = load_state(path, identity)
    saved = load_file(path / WEIGHTS)
    check_trained(path, saved, weights)
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(saved[name])
    return state, progress


def check_trained(path: Path, saved: Collection[str], weights: Collection[str]) -> None:
    """Raises `ValueError` where others are trained, by their names, than the checkpoint has."""
    if odd := sorted(set(saved) ^ set(weights)):
        raise ValueError(f"{path} holds other trainable weights than this run: they differ in {', '.join(odd[:3])}")


def load_state(path: Path, identity: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same without weights, which may be in shards."""
    progress = read_progress(path)
    _check_unchanged(path, progress["identity"], identity)
    return torch.load(path / STATE, map_location="cpu", weights_only=True), progress


def _check_unchanged(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    changed = [
        f"{name} (was {saved[name]!r}, is {value!r})"
        for name, value in current.items()
        if name in saved and saved[name] != value
    ]
    if changed:
        raise ValueError(
            f"{path} cannot be resumed, since the run would not go on along its trajectory: {'; '.join(changed)}. "
            "Undo the change or give another output_dir"
        )


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's, PyTorch's and the device's random generators, as plain values and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    backend: Any = getattr(torch, device.type, None)
    if hasattr(backend, "get_rng_state"):
        state["device"] = backend.get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "device" in state:
        getattr(torch, device.type).set_rng_state(state["device"])


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, on disk as soon as it is written.

    A fresh run (`step` 0) starts it empty; a resumed one keeps the rows up to the checkpoint's `step` and drops the
    rest, half a line of a killed process included, since it is about to write them again.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        rows = [row for row in read_metrics(path) if row["step"] <= step] if step and path.exists() else []
        with atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def sync(self) -> None:
        """Makes the rows survive a power failure, as a checkpoint written next does."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line without its end, which a killed process leaves, is no row.

    Raises `ValueError` that names file and line where another is no row.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            try:
                row = json.loads(line)
                rows.append({"step": int(row["step"])} | row)
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{path} is damaged: expected a JSON object with a step in line {number}, got "
                    f"{line[:60].decode(errors='replace')!r}. Delete the line, or the file, to go on without its curves"
                ) from None
    return rows
