"""Preference datasets: from files or the hub to normalized rows, each with its source; several of them as a mixture."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Json, List, Value

from dpo_kernels.data import files, formats, layouts, mixtures, ranked
from dpo_kernels.data.batching import whole_number
from dpo_kernels.data.splitting import split_train_eval as split_train_eval

_ROWS_TO_RECOGNIZE = 100  # the first rows of a JSON file may lack optional fields
_MARK = "Preference pairs in the form of dpo_kernels.data.load_preferences"  # a dataset's description
_PARTS = ("prompt", "chosen", "rejected")
_WHERE_THERE_ARE_ANY = {
    "tools": Json(),
    "weight": Value("float64"),
    "chosen_token_weights": List(Value("float64")),
    "rejected_token_weights": List(Value("float64")),
    "altered": List(Value("string")),
    "group": Value("string"),
    "members": List(Value("int64")),
}
# Noticed while a dataset is made, and then taken out of it: unused columns that no row before has, rankings without a
# pair, rejected responses in no pair. The last row has what comes after it, too.
_LATE, _TIED, _UNPAIRED = _NOTED = "late", "tied", "unpaired"

Name: TypeAlias = "str | os.PathLike[str] | Dataset"


# Loading


def load_preferences(
    name_or_path: Name | Sequence[Name],
    *,
    split: str | Sequence[str] = "train",
    name: str | Sequence[str | None] | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    max_rows: int | None = None,
    ranked_pairs: str = "best_vs_worst",
    empty_response: str = "error",
    cache_dir: str | None = None,
) -> Dataset:
    """Preference pairs in one form, from any of `dpo_kernels.data.layouts.KNOWN_LAYOUTS`.

    Args:
        name_or_path: a local `.jsonl`, `.ndjson`, `.json`, `.csv` or `.tsv` file (each also packed, as in `.jsonl.gz`)
            or `.parquet` file; a directory of those, or one that `Dataset.save_to_disk` wrote; a dataset on the hub; a
            `Dataset`; or several of these, one after the other in the result.
        split: split to load, or one for each of several datasets. A single file is its own train split. In a
            directory, files whose names or folders have a split's name (`train`, `validation`, `test`, ...) as a word
            belong to it; all others are train.
        name: configuration of a hub dataset, or one for each of several datasets.
        weights: how often the pairs of each dataset are taken, once by default: 2 takes each twice, 0.5 a random half
            of them, 1.5 all of them and a random half once more, 0 none. Pairs that share a ranking are taken together:
            0.5 is half of the rankings.
        seed: with the dataset's place in the list, what that random part follows from.
        max_rows: keep the first `max_rows` pairs, of each dataset; a ranking that begins within them is kept whole.
        ranked_pairs: how ranked answers become pairs: `"best_vs_worst"`, `"best_vs_each"`, or `"all_pairs"`, each
            answer with every one that is ranked below it. Of a list of rejected responses, which are all of one rank,
            the first takes the last one, the others take all.
        empty_response: `"error"`, or `"drop"`, which leaves rows with an empty response to `tokenize_preferences` to
            drop and count.
        cache_dir: where `datasets` keeps the converted rows; default: its own cache directory.

    Returns a `Dataset` with the columns `prompt`, `chosen`, `rejected`, either all text or all lists of messages
    `{"role", "content", ...}`; `source`, which names file and row; and, where some row has them, `tools`, `weight` (of
    the pair), `chosen_token_weights`, `rejected_token_weights` (lists of numbers), `altered` (reasons for which a row
    is not what the file has), and of pairs that share a ranking `group`, its name, and `members`, the places of chosen
    and rejected among the ranking's answers from best to worst. Rows are converted once, then served from the cache
    while contents, path and options stay the same; the fingerprint is the same in every process.

    Warns of files in a directory that are left out, of columns that are not used, of rankings that give no pair, and of
    rejected responses that are in none: one warning each.

    Raises `ValueError`: for columns of no known layout, or unpaired ones; naming file and row (counted from 1: the
    line of a JSON Lines file, the element of a JSON array, the record of a CSV file) for a broken line, a field
    missing or of the wrong type, or an empty response; for a file or split that is not there, or a damaged archive;
    for datasets of different kinds, for one that is there twice, and for weights that leave nothing of one; and for an
    argument that is not what it should be, which it names.
    """
    several = isinstance(name_or_path, list | tuple)
    names: list[Any] = list(name_or_path) if isinstance(name_or_path, list | tuple) else [name_or_path]
    if not names or not all(isinstance(one, str | os.PathLike | Dataset) and one != "" for one in names):
        raise ValueError(f"name_or_path: expected a name or path, or a list of them, got {name_or_path!r:.80}")
    splits = _one_each("split", split, names)
    configurations = _one_each("name", name, names, or_none=True)
    if weights is not None:
        try:
            weights = list(weights)
        except TypeError:
            raise ValueError(f"weights: expected a list, with a number for each dataset, got {weights!r:.80}") from None
    shares = mixtures.shares(weights, len(names))
    seed = whole_number("seed", seed, "a whole number of at least 0", least=0)
    options = _Options(max_rows, ranked_pairs, empty_response, cache_dir)
    notes = _Notes()
    loaded: list[_Loaded | None] = []
    for place, (one, its_split, configuration) in enumerate(zip(names, splits, configurations, strict=True), start=1):
        if not shares[place - 1]:
            loaded.append(None)
            notes.files.append(f"{'dataset' if isinstance(one, Dataset) else one}: left out whole: its weight is 0")
            continue
        loaded.append(_load(one, its_split, configuration, options, notes, f" {place}" if several else ""))
    if several or weights is not None:
        dataset = _joined(loaded, shares, seed)
    else:
        (dataset,) = (one.dataset for one in loaded if one)
    notes.warn()
    return dataset


def normalize_preferences(
    dataset: Dataset,
    *,
    origin: str = "dataset",
    max_rows: int | None = None,
    ranked_pairs: str = "best_vs_worst",
    empty_response: str = "error",
    cache_dir: str | None = None,
) -> Dataset:
    """Converts a `Dataset` of any known layout to the form of `load_preferences`; `origin` names it in `source`. Rows
    that have this form already stay as they are.

    Warns and raises `ValueError` as `load_preferences` does.
    """
    if not isinstance(origin, str):
        raise ValueError(f"origin: expected a string, got {origin!r:.80}")
    notes = _Notes()
    options = _Options(max_rows, ranked_pairs, empty_response, cache_dir)
    dataset = _normalized(dataset, origin, options, notes)
    notes.warn()
    return dataset


@dataclass(frozen=True)
class _Options:
    max_rows: int | None
    ranked_pairs: str
    empty_response: str
    cache_dir: str | None

    def __post_init__(self) -> None:
        if self.max_rows is not None:
            max_rows = whole_number("max_rows", self.max_rows, "None or a whole number above 0", least=1)
            object.__setattr__(self, "max_rows", max_rows)
        for name, known in (("ranked_pairs", layouts.RANKED_PAIRS), ("empty_response", layouts.EMPTY_RESPONSE)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        if not isinstance(self.cache_dir, str | os.PathLike | None):
            raise ValueError(f"cache_dir: expected None or the path of a directory, got {self.cache_dir!r:.80}")


@dataclass(frozen=True)
class _Notes:
    """What there is to say of a load, a sentence a dataset."""

    files: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)

    def warn(self) -> None:
        for sentences in (self.files, self.unused, self.tied, self.unpaired):
            if sentences:
                warnings.warn("\n".join(sentences), stacklevel=3)


@dataclass(frozen=True)
class _Loaded:
    dataset: Dataset
    origin: str
    made_of: frozenset[str]  # files, or what stands for them: a dataset that is given twice has some twice


def _one_each(argument: str, value: Any, names: Sequence[Any], *, or_none: bool = False) -> list[Any]:
    """A string for each dataset, or None."""
    values: list[Any] = list(value) if isinstance(value, list | tuple) else [value] * len(names)
    if not all(isinstance(one, str) or (one is None and or_none) for one in values):
        expected = "None, a string" if or_none else "a string"
        raise ValueError(f"{argument}: expected {expected}, or a list of them, got {value!r:.80}")
    if len(values) != len(names):
        raise ValueError(f"{argument}: expected one, or one for each of {len(names)} datasets, got {len(values)}")
    return values


def _load(name: Name, split: str, configuration: str | None, options: _Options, notes: _Notes, place: str) -> _Loaded:
    """One dataset; `place`, as in `" 2"`, tells it from others of its name in `source`, where there are several."""
    if isinstance(name, Dataset):
        origin = f"dataset{place}"
        return _Loaded(_normalized(name, origin, options, notes), origin, frozenset([name._fingerprint]))
    path = Path(name).expanduser()
    if not path.exists():
        if path.name.lower().endswith(formats.SUFFIXES) or str(name).startswith((".", "/", "~")):
            raise ValueError(f"name_or_path: there is no file or directory {str(name)!r}")
        try:
            dataset = datasets.load_dataset(str(name), configuration, split=split, cache_dir=options.cache_dir)
        except (OSError, ValueError) as error:
            raise ValueError(f"name_or_path: no file or directory {str(name)!r}, nor on the hub: {error}") from error
        origin = f"{name}/{configuration}[{split}]" if configuration and place else f"{name}[{split}]"
        return _Loaded(_normalized(dataset, origin, options, notes), origin, frozenset([f"{origin} {configuration}"]))
    if (path / "dataset_dict.json").exists() or all((path / f"{n}.json").exists() for n in ("state", "dataset_info")):
        dataset = _normalized(_saved(path, split), str(path), options, notes)
        return _Loaded(dataset, str(path), frozenset([f"{path.resolve()}[{split}]"]))

    found, left_out = files.find(path, split)
    if left_out:
        notes.files.append(f"{path}: left out {'; '.join(left_out)}")
    digests = {file: file_digest(file) for file in found}
    notes.files.extend(files.repeated(digests))
    sources = [_Source(str(file), digest, functools.partial(formats.read, file)) for file, digest in digests.items()]
    dataset = _converted(sources, str(path), options, notes)
    return _Loaded(dataset, str(path), frozenset(str(file.resolve()) for file in found))


def _saved(path: Path, split: str) -> Dataset:
    """A split of what `save_to_disk` wrote."""
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: the saved dataset cannot be loaded: {error}") from None
    if isinstance(saved, Dataset):
        saved = datasets.DatasetDict({"train": saved})
    if split not in saved:
        raise ValueError(f"split: {str(path)!r} has the splits {', '.join(map(str, saved))}, not {split!r}")
    return saved[split]


def _normalized(dataset: Dataset, origin: str, options: _Options, notes: _Notes) -> Dataset:
    if not isinstance(dataset, Dataset):
        raise ValueError(f"dataset: expected one split, a datasets.Dataset, got {type(dataset).__name__}")
    if is_normalized(dataset):
        if options.max_rows is None:
            return dataset
        kept = mixtures.first_rows(mixtures.units(dataset), options.max_rows)
        return dataset.select(kept, new_fingerprint=digest_of(dataset._fingerprint, options.max_rows))
    read = functools.partial(formats.dataset_rows, dataset, origin)
    return _converted([_Source(origin, dataset._fingerprint, read)], origin, options, notes)


def _joined(loaded: Sequence[_Loaded | None], shares: Sequence[float], seed: int) -> Dataset:
    """All datasets as one; None stands for those whose share is 0."""
    there = [one for one in loaded if one]
    made_of: dict[str, str] = {}
    for one in there:
        if twice := sorted(one.made_of & made_of.keys()):
            raise ValueError(
                f"name_or_path: {made_of[twice[0]]!r} and {one.origin!r} are the same, or share {twice[0]!r}: to take "
                "the pairs of a dataset twice, give it the weight 2"
            )
        made_of |= dict.fromkeys(one.made_of, one.origin)
    kinds = {one.dataset.features["prompt"] == Value("string"): one.origin for one in reversed(there)}
    if len(kinds) > 1:
        raise ValueError(
            f"name_or_path: {kinds[True]!r} is plain text, {kinds[False]!r} is conversational: expected one kind"
        )
    parts = [(one.origin, mixtures.units(one.dataset)) if one else ("", np.arange(0)) for one in loaded]
    rows = mixtures.rows(parts, shares, seed)
    fingerprint = digest_of([one.dataset._fingerprint for one in there], shares, seed)
    joined = _with_groups_apart([one.dataset for one in there])
    return joined.select(rows, new_fingerprint=fingerprint)


def _with_groups_apart(parts: Sequence[Dataset]) -> Dataset:
    """Datasets one after the other; where several have rankings, the dataset's place is part of a ranking's name."""
    joined = datasets.concatenate_datasets(list(parts))
    if sum("group" in part.column_names for part in parts) < 2:
        return joined
    places = np.repeat(np.arange(1, len(parts) + 1), [len(part) for part in parts])
    groups = joined["group"][:]
    named = [group and f"{place}: {group}" for place, group in zip(places, groups, strict=True)]
    return joined.remove_columns("group").add_column("group", pa.array(named, pa.string()))


# Conversion


@dataclass(frozen=True)
class _Source:
    """Rows of one layout: of a file, or of a dataset."""

    origin: str
    digest: str  # of the contents
    read: Callable[[], formats.RawRows]

    @functools.cached_property
    def first_rows(self) -> list[tuple[str, Mapping[str, Any]]]:
        return list(islice(self.read(), _ROWS_TO_RECOGNIZE))

    @functools.cached_property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(chain.from_iterable(row for _, row in self.first_rows)))

    @functools.cached_property
    def layout(self) -> str:
        try:
            return layouts.recognize(self.columns)
        except ValueError as error:
            raise ValueError(f"{self.origin}: {error}") from None


class _HasSystem(Exception):
    """A row has a system turn, so that rows of plain text before it are conversations too."""


def _converted(sources: Sequence[_Source], origin: str, options: _Options, notes: _Notes) -> Dataset:
    digest = digest_of(
        [(s.origin, s.digest) for s in sources], options.max_rows, options.ranked_pairs, options.empty_response
    )
    if empty := [source.origin for source in sources if not source.first_rows]:
        if len(empty) == len(sources):
            raise ValueError(f"{origin}: there are no rows")
        notes.files.append(f"{origin}: no rows in {', '.join(empty)}")
        sources = [source for source in sources if source.first_rows]
    conversational = any(layouts.has_system(source.first_rows) for source in sources)
    try:
        dataset = _generated(sources, origin, options, digest, conversational)
    except _HasSystem:
        dataset = _generated(sources, origin, options, digest, conversational=True)

    unused: dict[str, list[str]] = {}
    for source in sources:
        unused.setdefault(source.layout, []).extend(source.columns)
    noticed = {name: list(chain(*dataset.data.column(name).drop_null().to_pylist())) for name in _NOTED}
    for entry in dict.fromkeys(noticed[_LATE]):
        layout, _, column = entry.partition(" ")
        unused[layout].append(column)
    said = [layouts.unused_note(layout, list(dict.fromkeys(columns))) for layout, columns in unused.items()]
    notes.unused.extend(f"{origin}: {note}" for note in said if note)
    if tied := ranked.tied_note(noticed[_TIED]):
        notes.tied.append(f"{origin}: {tied}")
    if unpaired := ranked.unpaired_note(noticed[_UNPAIRED]):
        notes.unpaired.append(f"{origin}: {unpaired}")

    without = [name for name in _WHERE_THERE_ARE_ANY if dataset.data.column(name).null_count == len(dataset)]
    dataset = dataset.remove_columns([*without, *_NOTED])
    dataset.info.description = _MARK
    return dataset


def _generated(
    sources: Sequence[_Source], origin: str, options: _Options, digest: str, conversational: bool
) -> Dataset:
    rows = functools.partial(_noted_rows, sources, options, conversational)
    first = next(rows(), None)
    if first is None:
        names = ", ".join(dict.fromkeys(repr(source.layout) for source in sources))
        raise ValueError(f"{origin}: there is no preference pair among the rows, which have the layout {names}")
    # Messages and tools differ in their keys from row to row. As Arrow structs, each would get all keys of the others.
    part: Any = Value("string") if isinstance(first["prompt"], str) else List(Json())
    features = {"source": Value("string"), **dict.fromkeys(_PARTS, part), **_WHERE_THERE_ARE_ANY}
    try:
        return Dataset.from_generator(
            lambda: map(_as_json_text, rows()),
            features=Features({**features, **dict.fromkeys(_NOTED, List(Value("string")))}),
            cache_dir=options.cache_dir,
            fingerprint=digest_of(digest, conversational),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, _HasSystem):
            raise error.__cause__ from None
        if isinstance(error.__cause__, ValueError):
            raise ValueError(str(error.__cause__)) from None
        raise


def _noted_rows(sources: Sequence[_Source], options: _Options, conversational: bool) -> Iterator[layouts.Row]:
    """The rows to keep, each with what was noticed on the way to it; the last with what was noticed after it, too."""
    noted: dict[str, list[str]] = {name: [] for name in _NOTED}
    held: layouts.Row = {}
    for row in _normalized_rows(sources, options, conversational, noted):
        if held:
            yield held
        held = {**row, **{name: found[:] for name, found in noted.items()}}
        for found in noted.values():
            found.clear()
    if held:
        yield {**held, **{name: held[name] + found for name, found in noted.items()}}


def _normalized_rows(
    sources: Sequence[_Source], options: _Options, conversational: bool, noted: Mapping[str, list[str]]
) -> Iterator[layouts.Row]:
    """The rows to keep of all sources, of one kind: plain text or conversations."""
    is_text: bool | None = None
    taken = 0
    # OpenAssistant's replies may have their prompt in another file; the rows of other layouts are complete in theirs.
    for _, group in groupby(sources, key=lambda source: source.layout == "openassistant" or source.origin):
        together = list(group)
        pairs = layouts.convert(
            chain.from_iterable(_watched(source, conversational, noted[_LATE]) for source in together),
            together[0].layout,
            ranked_pairs=options.ranked_pairs,
            empty_response=options.empty_response,
            conversational=conversational,
            max_rows=None if options.max_rows is None else options.max_rows - taken,
            tied=noted[_TIED],
            unpaired=noted[_UNPAIRED],
        )
        for row in pairs:
            taken += 1
            if is_text is None:
                is_text = isinstance(row["prompt"], str)
            if isinstance(row["prompt"], str) != is_text:
                kinds = ("plain text", "conversational")[:: -1 if is_text else 1]
                raise ValueError(
                    f"{row['source']}: this row is {kinds[0]}, the rows of other files before it are {kinds[1]}"
                )
            yield row
        if options.max_rows is not None and taken >= options.max_rows:
            return


def _watched(source: _Source, conversational: bool, late: list[str]) -> formats.RawRows:
    """The rows of a source, whose layout is that of its first rows: a column that comes later must not change it. Such
    columns go into `late` if they are not used."""
    known = set(source.columns)
    for where, row in source.read():
        if not known.issuperset(row):
            new = [column for column in row if column not in known]
            known.update(new)
            try:
                layout = layouts.recognize(known)
            except ValueError:
                layout = "unknown"
            if layout != source.layout:
                raise ValueError(
                    f"{where}: the row has columns that the first {_ROWS_TO_RECOGNIZE} have not ({', '.join(new)}), "
                    f"and with these the layout is {layout!r}, not {source.layout!r}"
                )
            late += [f"{layout} {column}" for column in layouts.unused(layout, new)]
        if not conversational and layouts.has_system([(where, row)]):
            raise _HasSystem
        yield where, row


# Rows as they are stored


def _as_json_text(row: layouts.Row) -> layouts.Row:
    """Messages and tools as the JSON text that is stored. Left to itself, `datasets` would round numbers in them to ten
    decimal places."""

    def text(value: Any) -> str:
        try:
            encoded = json.dumps(value, ensure_ascii=False, allow_nan=False)
            encoded.encode()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{row['source']}: not to be kept as JSON: {error}") from None
        if Json().encode_example(encoded) != encoded:
            raise ValueError(f"{row['source']}: not to be kept as JSON, a number in it is too large: {encoded:.200}")
        return encoded

    stored = {**row, "tools": text(row["tools"]) if row["tools"] else None}
    stored |= {name: row[name] or None for name in ("altered", *_NOTED)}
    if isinstance(row["prompt"], list):
        stored |= {name: [text(message) for message in row[name]] for name in _PARTS}
    return stored


def from_json_text(row: Mapping[str, Any]) -> layouts.Row:
    """A stored row as `layouts.convert` gave it. A pair without a weight among pairs with weights has 1."""
    weight = 1.0 if row.get("weight") is None and "weight" in row else row.get("weight")
    row = {**dict.fromkeys(_WHERE_THERE_ARE_ANY), **row, "weight": weight, "altered": list(row.get("altered") or [])}
    row["tools"] = json.loads(row["tools"]) if row["tools"] else None
    if isinstance(row["prompt"], list):
        row |= {name: [json.loads(message) for message in row[name]] for name in _PARTS}
    return row


def is_normalized(dataset: Dataset) -> bool:
    """Whether the rows are in the form of `load_preferences`, also after they were selected, mapped or saved. It takes
    more than columns of these names and types."""
    if not isinstance(dataset, Dataset) or dataset.info.description != _MARK:
        return False
    kinds = [dataset.features.get(name) for name in ("source", *_PARTS)]
    if kinds[0] != Value("string") or dataset.data.column("source").null_count:
        return False
    return kinds[1:] in ([Value("string")] * 3, [List(Json())] * 3)


# Cache


def file_digest(file: Path) -> str:
    digest = hashlib.blake2b()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@functools.cache
def _code_digest() -> str:
    """Changes whenever the code that makes cached rows does, so that no cache outlives it."""
    return "".join(file_digest(file) for file in sorted(Path(__file__).parent.glob("*.py")))


def digest_of(*parts: Any) -> str:
    """Fingerprint of what cached rows depend on: the same in every process, unlike a pickle's."""
    text = json.dumps([_code_digest(), *parts], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
