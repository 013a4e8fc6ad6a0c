"""Several datasets as one: how often the pairs of each are taken, and which; rankings stay whole."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from datasets import Dataset

logger = logging.getLogger(__name__)

_MOST_COPIES = 1000  # more is a slip of the pen, and fills the memory


def shares(weights: Sequence[float] | None, datasets: int) -> list[float]:
    """How often each dataset is taken. Raises `ValueError` for weights out of range, or not one for each."""
    if weights is None:
        return [1.0] * datasets
    if len(weights) != datasets:
        raise ValueError(f"weights: expected one for each of {datasets} datasets, got {len(weights)}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= _MOST_COPIES:
            raise ValueError(f"weights: expected numbers from 0 to {_MOST_COPIES}, got {weight!r}")
    if not any(weights):
        raise ValueError(f"weights: expected one above 0, got {list(weights)}")
    return [float(weight) for weight in weights]


def units(dataset: Dataset) -> np.ndarray:
    """What is taken whole: for each row of a dataset that `load_preferences` made, the number of its unit, int64.

    Pairs that share a ranking are one unit, and each other pair is one. Units are numbered in the order of their first
    rows. A pair that is there again, since the dataset has the ranking twice, is of the ranking's next copy.
    """
    if not {"group", "members"}.issubset(dataset.column_names):
        return np.arange(len(dataset))
    rankings = dataset.select_columns(["group", "members"]).with_format("arrow")[:]
    columns = (rankings.column(name).to_pylist() for name in ("group", "members"))
    found = np.empty(len(dataset), np.int64)
    numbers: dict[Hashable, int] = {}
    copies: Counter[Hashable] = Counter()
    for row, (group, members) in enumerate(zip(*columns, strict=True)):
        unit: Hashable = row
        if group is not None:
            pair = (group, tuple(members or ()))
            unit = (group, copies[pair])
            copies[pair] += 1
        found[row] = numbers.setdefault(unit, len(numbers))
    return found


def first_rows(units: np.ndarray, max_rows: int) -> np.ndarray:
    """The rows of all units that begin within the first `max_rows` rows."""
    return np.flatnonzero(units <= units[:max_rows].max(initial=-1))


def rows(parts: Sequence[tuple[str, np.ndarray]], shares: Sequence[float], seed: int) -> np.ndarray:
    """Which rows of all datasets, one after the other, are taken: of each `share` times its units, rankings and pairs
    outside of them, to the nearest whole number.

    All of them as often as they fit into that, and a random choice of the rest, which follows from the seed and the
    dataset's place: the same in every process, and whatever the other datasets are.

    Args:
        parts: name and `units` of each dataset.

    Raises `ValueError` that names a dataset of which a share above 0 takes nothing.
    """
    taken, start = [], 0
    for place, ((name, units), share) in enumerate(zip(parts, shares, strict=True)):
        pairs = np.bincount(units)  # of each unit
        size, rankings = len(pairs), int(np.count_nonzero(pairs > 1))
        wanted = math.floor(share * size + 0.5)
        if share and not wanted:
            has = f"{len(units)} pairs, is not one pair"
            if rankings:
                others = f" and {size - rankings} other pairs" if size > rankings else ""
                has = f"{rankings} rankings{others}, is not one of them"
            raise ValueError(f"weights: {share:g} of {name!r}, which has {has}")
        whole, rest = divmod(wanted, size or 1)
        some = np.random.default_rng([seed, place]).permutation(size)[:rest]
        chosen = np.concatenate([np.tile(np.arange(len(units)), whole), np.flatnonzero(np.isin(units, some))])
        taken.append(start + chosen)
        start += len(units)
        if size:
            with_rankings = ""
            if rankings:
                among = whole * rankings + np.count_nonzero(pairs[some] > 1)
                with_rankings = f", with {among} of {rankings} rankings"
            logger.info("%d of %d pairs of %s%s", len(chosen), len(units), name, with_rankings)
    return np.concatenate(taken)
