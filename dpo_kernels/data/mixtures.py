"""Several datasets as one: how often the pairs of each are taken, and which."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np

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


def rows(sizes: Sequence[tuple[str, int]], shares: Sequence[float], seed: int) -> np.ndarray:
    """Which rows of all datasets, one after the other, are taken: `share * size` of each, to the nearest whole number.

    All of them as often as they fit into that, and a random choice of the rest, which follows from the seed and the
    dataset's place: the same in every process, and whatever the other datasets are.

    Args:
        sizes: name and number of rows of each dataset.

    Raises `ValueError` that names a dataset of which a share above 0 takes nothing.
    """
    taken, start = [], 0
    for place, ((name, size), share) in enumerate(zip(sizes, shares, strict=True)):
        wanted = math.floor(share * size + 0.5)
        if share and not wanted:
            raise ValueError(f"weights: {share:g} of {name!r}, which has {size} pairs, is not one pair")
        whole, rest = divmod(wanted, size or 1)
        some = np.random.default_rng([seed, place]).permutation(size)[:rest]
        taken.append(start + np.concatenate([np.tile(np.arange(size), whole), np.sort(some)]))
        start += size
        if size:
            logger.info("%d of %d pairs of %s", wanted, size, name)
    return np.concatenate(taken)
