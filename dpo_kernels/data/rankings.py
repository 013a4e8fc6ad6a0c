"""Tokenized pairs that share a ranking as one row, in which the prompt and each response are once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, List, Value
from datasets.table import InMemoryTable

from dpo_kernels.data.loading import digest_of

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_TOKEN_WEIGHTS = ("chosen_token_weights", "rejected_token_weights")
_RANKING = ("group", "members")
_KNOWN = ("index", *_IDS, *_TOKEN_WEIGHTS, *_RANKING, "weight")
_FEATURES = {
    "index": Value("int64"),
    "prompt_ids": List(Value("int32")),
    "response_ids": List(List(Value("int32"))),
    "pairs": List(List(Value("int64"))),
    "response_token_weights": List(List(Value("float64"))),
    "weight": Value("float64"),
}
_PAIRS_A_READ, _ROWS_A_TABLE = 1000, 4096


class _Response(NamedTuple):
    ids: np.ndarray
    weights: np.ndarray | None  # of the tokens; None for all where no pair has any

    def is_same(self, other: _Response) -> bool:
        if not np.array_equal(self.ids, other.ids):
            return False
        return self.weights is None or other.weights is None or np.array_equal(self.weights, other.weights)


class _Pair(NamedTuple):
    row: int
    index: Any  # its number as `tokenize_preferences` gave it, or None
    prompt: np.ndarray
    weight: float | None
    group: str | None
    members: tuple[int, int]  # chosen, rejected


@dataclass
class _Ranking:
    """Pairs of one ranking with one prompt, each of them once."""

    prompt: np.ndarray
    responses: dict[int, _Response] = field(default_factory=dict)
    pairs: list[_Pair] = field(default_factory=list)

    def takes(self, pair: _Pair, responses: Sequence[_Response]) -> bool:
        short, long = sorted((self.prompt, pair.prompt), key=len)
        known = [self.responses.get(place, given) for place, given in zip(pair.members, responses, strict=True)]
        return _is_end(short, long) and all(map(_Response.is_same, known, responses))

    def add(self, pair: _Pair, responses: Sequence[_Response]) -> None:
        if len(pair.prompt) == len(self.prompt):
            pair = pair._replace(prompt=self.prompt)  # the same, which is kept once
        self.prompt = min(self.prompt, pair.prompt, key=len)
        for place, response in zip(pair.members, responses, strict=True):
            self.responses.setdefault(place, response)
        self.pairs.append(pair)

    def connected(self) -> list[_Ranking]:
        """Rankings in which pairs lead from each response to each other one: without the pairs that were dropped, there
        may be several."""
        parts: list[set[int]] = []
        for pair in self.pairs:
            touched = [part for part in parts if not part.isdisjoint(pair.members)]
            parts = [*(part for part in parts if part not in touched), set(pair.members).union(*touched)]
        if len(parts) == 1:
            return [self]
        found = []
        for part in parts:
            pairs = [pair for pair in self.pairs if pair.members[0] in part]
            prompt = min((pair.prompt for pair in pairs), key=len)
            found.append(_Ranking(prompt, {place: self.responses[place] for place in part}, pairs))
        return found

    def ordered(self) -> list[_Response]:
        """From best to worst."""
        return [self.responses[place] for place in sorted(self.responses)]

    def renumbered(self) -> list[np.ndarray]:
        """The pairs as places in `ordered`."""
        places = {member: place for place, member in enumerate(sorted(self.responses))}
        return [np.array([places[member] for member in pair.members]) for pair in self.pairs]


def group_rankings(pairs: Dataset) -> Dataset:
    """The pairs of each ranking as one row, so that a model reads the prompt and each response once.

    Pairs go together that have the same `group` and the same prompt. Truncation cuts the start of the prompt for each
    pair by itself, but for its first token, where that is BOS: a row has the shortest prompt of its pairs, which leaves
    room for the longest response. No pair is lost. One whose prompt or response differs from that of the others
    otherwise, or whose weight does, and one that is there again (a dataset with the weight 2), goes into another row of
    the same ranking. Responses of which no pair is left are left out, and where those that are left fall apart, so that
    pairs do not lead from each to each other one, each part is a row. A pair without a ranking is a row by itself.

    Args:
        pairs: from `tokenize_preferences`, before log-probabilities of a reference model are computed.

    Returns a dataset in memory, its rows in the order of their first pairs, with

        `index`: that of the row's first pair, where `pairs` has it;
        `prompt_ids`: list of int32;
        `response_ids`: a list of int32 for each response, from the best to the worst;
        `pairs`: lists `[chosen, rejected]` of places in `response_ids`, int64, in the order of the pairs;
        `response_token_weights`: where some pair has token weights, a list of float64 as long as its ids for each
            response;
        `weight`: float64, of each of the row's pairs, where pairs have weights.

    The fingerprint follows from that of `pairs`.

    Raises `ValueError` for what is no dataset of tokenized pairs, for columns that rows of several pairs have no place
    for, such as `ref_chosen_logps`, and, naming the row (counted from 1), for ids that are missing or empty, for token
    weights that are not as many as the ids, and for members that are no two places, the better one first.
    """
    names = _checked_columns(pairs)
    rankings: list[_Ranking] = []
    by_name: dict[tuple[str, float | None], list[_Ranking]] = {}
    next_place: dict[tuple[str, float | None, tuple[int, int]], int] = {}
    for pair, responses in _read(pairs, names):
        same: list[_Ranking] = []
        place = 0
        if pair.group is not None:
            same = by_name.setdefault((pair.group, pair.weight), same)
            # rows before this place have the pair already, or do not take it
            place = next_place.get((pair.group, pair.weight, pair.members), 0)
            place = next((n for n in range(place, len(same)) if same[n].takes(pair, responses)), len(same))
            next_place[pair.group, pair.weight, pair.members] = place + 1
        if place == len(same):
            same.append(_Ranking(pair.prompt))
            rankings.append(same[place])
        same[place].add(pair, responses)
    rankings = [part for ranking in rankings for part in ranking.connected()]
    rankings.sort(key=lambda ranking: ranking.pairs[0].row)

    absent = {"index", "weight"}.difference(names)
    if names.isdisjoint(_TOKEN_WEIGHTS):
        absent.add("response_token_weights")
    features = Features({name: feature for name, feature in _FEATURES.items() if name not in absent})
    tables = [
        _table(rankings[start : start + _ROWS_A_TABLE], features) for start in range(0, len(rankings), _ROWS_A_TABLE)
    ]
    return Dataset(
        InMemoryTable(pa.concat_tables(tables)),
        info=DatasetInfo(features=features),
        fingerprint=digest_of(pairs._fingerprint, "group_rankings"),
    )


def _checked_columns(pairs: Dataset) -> set[str]:
    """The columns in which some pair has something."""
    if not isinstance(pairs, Dataset):
        raise ValueError(f"pairs: expected one split, a datasets.Dataset, got {type(pairs).__name__}")
    found = ", ".join(pairs.column_names) or "none"
    if missing := [name for name in _IDS if name not in pairs.column_names]:
        raise ValueError(
            f"pairs: expected the columns of tokenize_preferences, got {found}, without {', '.join(missing)}"
        )
    if not len(pairs):
        raise ValueError("pairs: expected one pair or more, got none")
    for name in pairs.column_names:
        if name.startswith("ref_"):
            raise ValueError(
                f"pairs: the column {name!r} holds what a reference model gives each pair: group first, then compute it"
            )
        if name not in _KNOWN:
            raise ValueError(f"pairs: the column {name!r} has no place in rows of several pairs: remove it first")
    if len(given := [name for name in _RANKING if name in pairs.column_names]) == 1:
        raise ValueError(f"pairs: expected both of the columns {_RANKING}, or none, got {given[0]!r}")
    return {name for name in pairs.column_names if pairs.data.column(name).null_count < len(pairs.data)}


def _read(pairs: Dataset, names: set[str]) -> Iterator[tuple[_Pair, tuple[_Response, _Response]]]:
    first = 1  # row of a table
    for table in pairs.with_format("arrow").iter(_PAIRS_A_READ):
        prompts = _token_ids(table, "prompt_ids", first)
        chosen, rejected = (_responses(table, key, names, first) for key in ("chosen", "rejected"))
        indices, weights, groups, members = (
            table.column(name).to_pylist() if name in names else [None] * len(table)
            for name in ("index", "weight", *_RANKING)
        )
        for n in range(len(table)):
            weight = 1.0 if weights[n] is None and "weight" in names else weights[n]
            places = (0, 1) if groups[n] is None else _checked_members(members[n], first + n)
            yield _Pair(first + n, indices[n], prompts[n], weight, groups[n], places), (chosen[n], rejected[n])
        first += len(table)


def _responses(table: pa.Table, key: str, names: set[str], first: int) -> list[_Response]:
    """Where some response of the dataset has token weights, all have: 1 where none are given."""
    ids, column = _token_ids(table, f"{key}_ids", first), f"{key}_token_weights"
    if names.isdisjoint(_TOKEN_WEIGHTS):
        return [_Response(each, None) for each in ids]
    given = _arrays(table, column) if column in names else [None] * len(ids)
    responses = [_Response(each, np.ones(len(each)) if w is None else w) for each, w in zip(ids, given, strict=True)]
    for row, (each, weights) in enumerate(responses, start=first):
        if weights is not None and len(weights) != len(each):
            expected = f"a number for each of {len(each)} tokens"
            raise ValueError(f"pairs: row {row}: {column}: expected {expected}, got {len(weights)}")
    return responses


def _token_ids(table: pa.Table, name: str, first: int) -> list[np.ndarray]:
    found = []
    for row, ids in enumerate(_arrays(table, name), start=first):
        if ids is None or not len(ids):
            raise ValueError(f"pairs: row {row}: {name}: expected token ids, got {'null' if ids is None else 'none'}")
        found.append(ids)
    return found


def _checked_members(members: Any, row: int) -> tuple[int, int]:
    sound = isinstance(members, list) and len(members) == 2 and all(isinstance(place, int) for place in members)
    if not sound or not 0 <= members[0] < members[1]:
        raise ValueError(f"pairs: row {row}: members: expected two places, the better one first, got {members!r:.80}")
    return members[0], members[1]


def _arrays(table: pa.Table, name: str) -> list[np.ndarray | None]:
    """The lists of a column, without a copy; None for null."""
    column = table.column(name).combine_chunks()
    if not isinstance(column, pa.ListArray | pa.LargeListArray):
        raise ValueError(f"pairs: {name}: expected lists of numbers, got {column.type}")
    values, offsets = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
    return [
        values[start:end] if valid else None
        for start, end, valid in zip(offsets[:-1], offsets[1:], column.is_valid().to_pylist(), strict=True)
    ]


def _is_end(short: np.ndarray, long: np.ndarray) -> bool:
    """Whether a prompt is what a cut left of another one: its end, be it behind the same first token."""
    end = long[len(long) - len(short) :]
    return bool(short[0] in (end[0], long[0]) and np.array_equal(short[1:], end[1:]))


def _table(rankings: Sequence[_Ranking], features: Features) -> pa.Table:
    responses = [ranking.ordered() for ranking in rankings]
    columns = {
        "index": lambda: [ranking.pairs[0].index for ranking in rankings],
        "prompt_ids": lambda: _lists([ranking.prompt for ranking in rankings], pa.int32()),
        "response_ids": lambda: _nested([[one.ids for one in given] for given in responses], pa.int32()),
        "pairs": lambda: _nested([ranking.renumbered() for ranking in rankings], pa.int64()),
        "response_token_weights": lambda: _nested(
            [[one.weights for one in given] for given in responses], pa.float64()
        ),
        "weight": lambda: [ranking.pairs[0].weight for ranking in rankings],
    }
    return pa.table({name: columns[name]() for name in features}, schema=features.arrow_schema)


def _lists(arrays: Sequence[Any], values: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(_offsets(arrays), pa.array(np.concatenate(arrays), values))


def _nested(rows: Sequence[Sequence[Any]], values: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(_offsets(rows), _lists([array for row in rows for array in row], values))


def _offsets(rows: Sequence[Any]) -> pa.Array:
    return pa.array(np.cumsum([0, *map(len, rows)]), pa.int32())
