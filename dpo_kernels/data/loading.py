"""Preference datasets: from files or the hub to normalized rows, each with its source."""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, Json, List, Value

from dpo_kernels.data import layouts

_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".csv", ".parquet")
_SPLIT_NAMES = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev", "eval"},
    "test": {"test", "testing"},
}
_ROWS_TO_RECOGNIZE = 100  # the first rows of a JSON file may lack optional fields
_NORMALIZED = ("source", "prompt", "chosen", "rejected")

_RawRows = Iterator[tuple[str, Mapping[str, Any]]]


# Loading


def load_preferences(
    name_or_path: str | os.PathLike[str],
    *,
    split: str = "train",
    name: str | None = None,
    max_rows: int | None = None,
    ranked_pairs: str = "best_vs_worst",
    empty_response: str = "error",
    cache_dir: str | None = None,
) -> Dataset:
    """Preference pairs in one form, from any of `dpo_kernels.data.layouts.KNOWN_LAYOUTS`.

    Args:
        name_or_path: a local `.jsonl` (also `.jsonl.gz`), `.json`, `.csv` or `.parquet` file; a directory of those, or
            one that `Dataset.save_to_disk` wrote; or a dataset on the hub.
        split: split to load. A single file is its own train split. In a directory, files whose names or folders hold
            a split's name (`train`, `validation`, `test`, ...) belong to it; where none does, all are train.
        name: configuration of a hub dataset.
        max_rows: keep the first `max_rows` pairs.
        ranked_pairs: how ranked answers become pairs, `"best_vs_worst"` or `"best_vs_each"`.
        empty_response: `"error"`, or `"drop"`, which leaves rows with an empty response to `tokenize_preferences` to
            drop and count.
        cache_dir: where `datasets` keeps the converted rows; default: its own cache directory.

    Returns a `Dataset` with the columns `prompt`, `chosen`, `rejected`, either all text or all lists of messages
    `{"role", "content", ...}`; `source`, which names file and row; and `tools`, where some row has tools. It is
    converted once, then served from the cache while contents, path and options stay the same; its fingerprint is the
    same in every process.

    Raises `ValueError`: for columns of no known layout, or unpaired ones; naming file and row (counted from 1: the
    line of a JSON Lines file, the element of a JSON array, the record of a CSV file) for a broken line, a field
    missing or of the wrong type, or an empty response; for a file or split that is not there.
    """
    path = Path(name_or_path).expanduser()
    options: dict[str, Any] = {
        "max_rows": max_rows,
        "ranked_pairs": ranked_pairs,
        "empty_response": empty_response,
        "cache_dir": cache_dir,
    }
    if not path.exists():
        if path.name.endswith(_SUFFIXES) or str(name_or_path).startswith((".", "/", "~")):
            raise ValueError(f"name_or_path: there is no file or directory {str(name_or_path)!r}")
        dataset = datasets.load_dataset(str(name_or_path), name, split=split, cache_dir=cache_dir)
        return normalize_preferences(dataset, origin=f"{name_or_path}[{split}]", **options)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, Dataset):
            saved = datasets.DatasetDict({"train": saved})
        if split not in saved:
            raise ValueError(f"split: {str(path)!r} has the splits {', '.join(map(str, saved))}, not {split!r}")
        return normalize_preferences(saved[split], origin=str(path), **options)

    files = _data_files(path, split)
    digest = digest_of(*((str(file), file_digest(file)) for file in files))
    return _converted(lambda: chain.from_iterable(map(_read, files)), digest, str(path), **options)


def normalize_preferences(
    dataset: Dataset,
    *,
    origin: str = "dataset",
    max_rows: int | None = None,
    ranked_pairs: str = "best_vs_worst",
    empty_response: str = "error",
    cache_dir: str | None = None,
) -> Dataset:
    """Converts a `Dataset` of any known layout to the form of `load_preferences`; `origin` names it in `source`.

    Raises `ValueError` as `load_preferences` does.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(f"dataset: expected one split, a datasets.Dataset, got {type(dataset).__name__}")
    return _converted(
        lambda: _dataset_rows(dataset, origin),
        digest_of(dataset._fingerprint, origin),
        origin,
        max_rows=max_rows,
        ranked_pairs=ranked_pairs,
        empty_response=empty_response,
        cache_dir=cache_dir,
    )


def _converted(
    read: Callable[[], _RawRows],
    digest: str,
    origin: str,
    *,
    max_rows: int | None,
    ranked_pairs: str,
    empty_response: str,
    cache_dir: str | None,
) -> Dataset:
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows: expected None or at least 1, got {max_rows}")
    first_rows = list(islice(read(), _ROWS_TO_RECOGNIZE))
    if not first_rows:
        raise ValueError(f"{origin}: there are no rows")
    try:
        layout = layouts.recognize(list(dict.fromkeys(chain.from_iterable(row for _, row in first_rows))))
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None

    def convert() -> Iterator[layouts.Row]:
        return layouts.convert(read(), layout, ranked_pairs=ranked_pairs, empty_response=empty_response)

    first = next(convert(), None)
    if first is None:
        raise ValueError(f"{origin}: there is no preference pair among the rows, which have the layout {layout!r}")
    # Messages and tools differ in their keys from row to row. As Arrow structs, each would get all keys of the others.
    part: Any = Value("string") if isinstance(first["prompt"], str) else List(Json())
    features = Features({"source": Value("string"), "prompt": part, "chosen": part, "rejected": part, "tools": Json()})
    try:
        dataset = Dataset.from_generator(
            lambda: map(_as_json_text, islice(convert(), max_rows)),
            features=features,
            cache_dir=cache_dir,
            fingerprint=digest_of(digest, max_rows, ranked_pairs, empty_response),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise ValueError(str(error.__cause__)) from None
        raise
    if dataset.data.column("tools").null_count == len(dataset):
        dataset = dataset.remove_columns("tools")
    return dataset


def _as_json_text(row: layouts.Row) -> layouts.Row:
    """Messages and tools as the JSON text that is stored. Left to itself, `datasets` would round numbers in them to ten
    decimal places."""

    def text(value: Any) -> str:
        try:
            encoded = json.dumps(value, ensure_ascii=False, allow_nan=False)
            encoded.encode()
        except ValueError as error:
            raise ValueError(f"{row['source']}: not to be kept as JSON: {error}") from None
        if Json().encode_example(encoded) != encoded:
            raise ValueError(f"{row['source']}: not to be kept as JSON, a number in it is too large: {encoded:.200}")
        return encoded

    row = {**row, "tools": text(row["tools"]) if row["tools"] else None}
    if isinstance(row["prompt"], list):
        for name in ("prompt", "chosen", "rejected"):
            row[name] = [text(message) for message in row[name]]
    return row


def from_json_text(row: Mapping[str, Any]) -> layouts.Row:
    row = {**row, "tools": json.loads(row["tools"]) if row.get("tools") else None}
    if isinstance(row["prompt"], list):
        for name in ("prompt", "chosen", "rejected"):
            row[name] = [json.loads(message) for message in row[name]]
    return row


def _data_files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        if not path.name.endswith(_SUFFIXES):
            raise ValueError(f"name_or_path: expected a file ending in {', '.join(_SUFFIXES)}, got {str(path)!r}")
        if split != "train":
            raise ValueError(f"split: a single file is its own train split, got {split!r} for {str(path)!r}")
        return [path]
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.name.endswith(_SUFFIXES)]
    if not files:
        raise ValueError(f"name_or_path: no file ending in {', '.join(_SUFFIXES)} in the directory {str(path)!r}")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = set(re.split(r"[^a-z]+", str(file.relative_to(path)).lower()))
        for known, names in _SPLIT_NAMES.items():
            if words & names:
                by_split.setdefault(known, []).append(file)
                break
    by_split = by_split or {"train": files}
    if split not in by_split:
        raise ValueError(f"split: the directory {str(path)!r} has the splits {', '.join(by_split)}, not {split!r}")
    return by_split[split]


# Reading files. A row's source is known here, which pyarrow's readers would not tell.


def _read(file: Path) -> _RawRows:
    if file.suffix == ".csv":
        return _read_csv(file)
    if file.suffix == ".parquet":
        return _read_parquet(file)
    if file.suffix == ".json":
        with open(file, encoding="utf-8-sig", errors="replace") as stream:
            if stream.read(4096).lstrip().startswith("["):
                return _read_json_array(file)
    return _read_json_lines(file)


def _read_json_lines(file: Path) -> _RawRows:
    opener: Any = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            source = f"{file}, row {number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                raise ValueError(f"{source}: the line is not valid JSON: {error}") from None
            yield source, _object(row, source)


def _read_json_array(file: Path) -> _RawRows:
    """Elements of a JSON array, decoded one by one: the file's text and one row are in memory, never all rows."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: the file is not UTF-8 text: {error}") from None
    decode, separator = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    at, number = text.index("[") + 1, 0
    while True:
        at = separator.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("]", at):
            break
        number += 1
        source = f"{file}, row {number}"
        try:
            row, at = decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}: the element is not valid JSON: {error}") from None
        yield source, _object(row, source)
    if text[at + 1 :].strip():
        raise ValueError(f"{file}: the array of {number} rows is followed by {text[at + 1 : at + 41].strip()!r}")


def _object(row: Any, source: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(row).__name__}")
    return row


def _read_csv(file: Path) -> _RawRows:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB a cell is less than long responses need
    number = 0
    with open(file, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for number, row in enumerate(reader, start=1):
                source = f"{file}, row {number}"
                if None in row:
                    raise ValueError(f"{source}: more cells than the header's {len(reader.fieldnames or ())}")
                yield source, {column: _cell(cell, f"{source}: column {column!r}") for column, cell in row.items()}
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file}, row {number + 1}: the record is not valid CSV: {error}") from None


def _cell(cell: str | None, where: str) -> Any:
    """A cell of text, or of messages written as JSON."""
    if cell is None or not re.match(r"\[\{\s*['\"](role|from|content|value)['\"]", cell):
        return cell
    try:
        return json.loads(cell)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} looks like a list of messages, which must be JSON: {error}") from None


def _read_parquet(file: Path) -> _RawRows:
    try:
        dataset = Dataset.from_parquet(str(file))
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(f"{file}: the file is not valid Parquet: {error.__cause__ or error}") from None
    yield from _dataset_rows(dataset, str(file))


def _dataset_rows(dataset: Dataset, origin: str) -> _RawRows:
    kinds = {name: getattr(feature, "feature", feature) for name, feature in dataset.features.items()}
    media = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image | datasets.Audio | datasets.Video)]
    exact = {name for name, kind in kinds.items() if isinstance(kind, Json)}
    for number, row in enumerate(dataset.remove_columns(media), start=1):
        yield (
            f"{origin}, row {number}",
            {name: value if name in exact else _without_nulls(value) for name, value in row.items()},
        )


def _without_nulls(value: Any) -> Any:
    """Undoes what Arrow does to objects with different keys: each gets the keys of all, null where it had none."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def file_digest(file: Path) -> str:
    digest = hashlib.blake2b()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@functools.cache
def _code_digest() -> str:
    """Changes whenever the code that makes cached rows does, so that no cache outlives it."""
    return "".join(file_digest(Path(file)) for file in (__file__, layouts.__file__))


def digest_of(*parts: Any) -> str:
    """Fingerprint of what cached rows depend on: the same in every process, unlike a pickle's."""
    text = json.dumps([_code_digest(), *parts], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def is_normalized(dataset: Dataset) -> bool:
    if not isinstance(dataset, Dataset) or set(dataset.column_names) - {"tools"} != set(_NORMALIZED):
        return False
    kinds = [dataset.features[name] for name in _NORMALIZED]
    return kinds[0] == Value("string") and kinds[1:] in ([Value("string")] * 3, [List(Json())] * 3)


# Splitting


def split_train_eval(
    dataset: Dataset, *, eval_fraction: float | None = None, eval_rows: int | None = None, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Splits off held-out pairs: `(train, eval)`, the same for the same data and seed.

    Pairs that share a prompt stay together, or the held-out accuracy would be measured on prompts that were trained
    on. So `eval` has at least the wanted number of rows, and a few more where its last prompt has several pairs.

    Args:
        dataset: of `load_preferences` or of `tokenize_preferences`.
        eval_fraction: share of the rows to hold out, above 0 and below 1; or
        eval_rows: their number.

    Raises `ValueError` unless exactly one of the two is given, and where nothing would be left to train on.
    """
    if (eval_fraction is None) == (eval_rows is None):
        raise ValueError(f"expected eval_fraction or eval_rows, got {eval_fraction=} and {eval_rows=}")
    if eval_fraction is not None and not 0 < eval_fraction < 1:
        raise ValueError(f"eval_fraction: expected a number above 0 and below 1, got {eval_fraction}")
    if eval_rows is not None and not 0 < eval_rows < len(dataset):
        raise ValueError(f"eval_rows: expected 1 to {len(dataset) - 1} of {len(dataset)} rows, got {eval_rows}")
    wanted = eval_rows if eval_rows is not None else max(1, round(len(dataset) * (eval_fraction or 0)))
    column = "prompt_ids" if "prompt_ids" in dataset.column_names else "prompt"
    same_prompt: dict[bytes, list[int]] = {}
    for number, row in enumerate(dataset.select_columns(column)):
        key = hashlib.blake2b(json.dumps(row[column]).encode(), digest_size=16).digest()
        same_prompt.setdefault(key, []).append(number)
    prompts = list(same_prompt.values())
    held_out: list[int] = []
    for place in np.random.default_rng(seed).permutation(len(prompts)):
        if len(held_out) >= wanted:
            break
        held_out += prompts[place]
    rest = sorted(set(range(len(dataset))) - set(held_out))
    if not rest:
        raise ValueError(
            f"dataset: {len(dataset)} rows with {len(prompts)} different prompts leave nothing to train on"
        )
    return dataset.select(rest), dataset.select(sorted(held_out))
