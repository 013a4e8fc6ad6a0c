"""Files of preference data: which files of a folder are read, and which are left out, and why."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_kernels.data.formats import SUFFIXES

# As words, or as several words in a row, of a file's or a folder's name.
_SPLITS = {
    "train": ("train", "training", "trainset"),
    "validation": (
        *("validation", "valid", "val", "dev", "eval", "evaluation", "heldout", "held out", "holdout", "hold out"),
        *("validationset", "valset", "devset", "evalset"),
    ),
    "test": ("test", "tests", "testing", "testset"),
}
# Files with a suffix of data that say something about a dataset or a model, and hold no rows.
_DESCRIPTIONS = {
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json", "info.json"),
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "package.json"),
}
# What lies beside data and is nobody's idea of rows: left out without a word.
_UNSAID = ""
_NO_DATA = re.compile(
    r"\..*|(readme|license|licence|notice|citation|changelog|makefile|_success)(\..*)?"
    r"|.*\.(md|rst|py|ipynb|sh|ya?ml|toml|cfg|ini|lock|log|pdf|png|jpe?g|gif|svg|webp)",
    re.IGNORECASE,
)
_NAMED = 5  # files that a note names for each reason


def find(path: Path, split: str) -> tuple[list[Path], list[str]]:
    """The files of a split, in the order of their names, and what was left out and why: a note for each reason.

    A single file is its own train split. In a folder, a file belongs to the split whose name is a word of its own name
    (`test_sft.jsonl`, but not `latest.jsonl`), else of the folder it lies in, and to train where there is none. A
    split that goes by none of the usual names (`train_prefs`) is looked for as it is.

    Raises `ValueError` for a file of no known suffix, and for a split or folder without files.
    """
    if path.is_file():
        if not path.name.lower().endswith(SUFFIXES):
            raise ValueError(f"name_or_path: expected a file ending in {', '.join(SUFFIXES)}, got {str(path)!r}")
        if split != "train":
            raise ValueError(f"split: a single file is its own train split, got {split!r} for {str(path)!r}")
        return [path], []

    if not re.fullmatch(r"[\w .-]+", split):
        raise ValueError(f"split: expected the name of a split, got {split!r} for the directory {str(path)!r}")
    wanted = _words(split)
    usual = next((known for known, names in _SPLITS.items() if wanted in names), None)
    by_split: dict[str, dict[str, Path]] = {}
    left_out: dict[str, list[str]] = {}
    first_name: dict[str, str] = {}
    everything = {"/".join(file.relative_to(path).parts): file for file in sorted(_walk(path))}
    for name, file in everything.items():
        reason = _no_rows(name, file, everything)
        same = first_name.setdefault(os.path.realpath(file), name) if reason is None else name
        if same != name:
            reason = f"the same file as {same}"
        if reason is not None:
            left_out.setdefault(reason, []).append(name)
            continue
        its_split = split if usual is None and _has_words(name, wanted) else _split_of(name)
        by_split.setdefault(its_split, {})[name] = file

    left_out.pop(_UNSAID, None)
    notes = [f"{_listed(names)} ({reason})" for reason, names in left_out.items()]
    files = by_split.pop(usual or split, {})
    if not files:
        also = f"; left out: {'; '.join(notes)}" if notes else ""
        if not by_split:
            raise ValueError(
                f"name_or_path: no file ending in {', '.join(SUFFIXES)} in the directory {str(path)!r}{also}"
            )
        has = ", ".join(sorted(by_split))
        raise ValueError(f"split: the directory {str(path)!r} has the splits {has}, not {split!r}{also}")
    notes += [f"{_listed(list(names))} (split {other})" for other, names in sorted(by_split.items())]
    return list(files.values()), notes


def repeated(digests: Mapping[Path, str]) -> list[str]:
    """A sentence for each file that looks as if its rows were those of another; the files' digests are given."""
    first: dict[Any, Path] = {}
    said = []
    for file, digest in digests.items():
        suffix = next(suffix for suffix in SUFFIXES[::-1] if file.name.lower().endswith(suffix))
        same_name = first.setdefault(file.with_name(file.name[: -len(suffix)]), file)
        same_contents = first.setdefault(digest, file)
        if same_contents != file:
            said.append(f"{file} is a copy of {same_contents}: its rows are there twice")
        elif same_name != file:
            said.append(f"{file} has the name of {same_name}: rows that are in both are there twice")
    return said


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, through links to folders too."""

    def stop(error: OSError) -> None:
        raise error

    seen = set()
    for top, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(top)
        if real in seen:  # a link to a folder above it, or a second one to the same
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(top, name) for name in names)


def _no_rows(path: str, file: Path, others: Collection[str]) -> str | None:
    """Why a file, at that place in a folder, is not read; None where it is."""
    hidden = any(part.startswith(".") for part in path.split("/"))
    name = file.name.lower()
    if not name.endswith(SUFFIXES):
        return _UNSAID if hidden or _NO_DATA.fullmatch(name) else "no known suffix"
    if hidden:
        return "hidden"
    if name.removesuffix(".gz") in _DESCRIPTIONS:
        return "describes data, holds none"
    if not file.is_file():
        return "a link to nothing" if file.is_symlink() else "no file"
    if not file.stat().st_size:
        return "empty"
    unpacked = file.with_name(file.name[:-3])
    if name.endswith(".gz") and path[:-3] in others and unpacked.is_file() and unpacked.stat().st_size:
        return "packed, and there unpacked too"
    return None


def _split_of(path: str) -> str:
    """The split whose name comes first in the innermost part of a path that has one."""
    for part in reversed(path.split("/")):
        words = f" {_words(part)} "
        places = {words.find(f" {name} "): known for known, names in _SPLITS.items() for name in names}
        places.pop(-1, None)
        if places:
            return places[min(places)]
    return "train"


def _has_words(path: str, wanted: str) -> bool:
    return bool(wanted) and any(f" {wanted} " in f" {_words(part)} " for part in path.split("/"))


def _words(name: str) -> str:
    """Words and numbers of a name in lower case: `"heldOut_sft-01.jsonl"` gives `"held out sft 01 jsonl"`."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)).lower()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
