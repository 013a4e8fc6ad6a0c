"""Which combinations of a grid a short test run takes."""

from itertools import combinations, product

import pytest

# Of the fixture `impl`, for a grid that it is a dimension of: indirect=["impl"]
IMPLS = ["torch", "cpu", "triton", "cuda"]


def each_value(*dimensions):
    """All combinations of the dimensions' values, as parameters. Those that a walk along all dimensions at once comes
    by, and so each value, are run every time; the others are run with `--full`."""
    steps = range(max(map(len, dimensions)))
    return _parameters(dimensions, {tuple(step % len(values) for values in dimensions) for step in steps})


def covering(*dimensions, others=True):
    """All combinations of the dimensions' values, as parameters. A few of them, in which any two values of different
    dimensions meet, are run every time; the others are run with `--full`, or, where there are thousands of them
    (`others=False`), never."""
    grid = _grid(dimensions)

    def meetings(combination):
        return set(combinations(enumerate(combination), 2)) if len(dimensions) > 1 else {combination}

    missing, few = set().union(*map(meetings, grid)), set()
    while missing:
        best = max(grid, key=lambda combination: len(meetings(combination) & missing))  # the first of the best
        few.add(best)
        missing -= meetings(best)
    return [each for each in _parameters(dimensions, few) if others or not each.marks]


def _grid(dimensions):
    return list(product(*(range(len(values)) for values in dimensions)))


def _parameters(dimensions, every_time):
    return [
        pytest.param(
            *(values[i] for values, i in zip(dimensions, at, strict=True)),
            marks=() if at in every_time else pytest.mark.full,
        )
        for at in _grid(dimensions)
    ]
