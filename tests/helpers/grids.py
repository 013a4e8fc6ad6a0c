"""Which combinations of a grid a short test run takes."""

from itertools import combinations, product

import pytest


def covering(*dimensions):
    """All combinations of the dimensions' values, as parameters. A few of them, in which any two values of different
    dimensions meet, are run every time; the others are run with `--full`."""
    grid = list(product(*(range(len(values)) for values in dimensions)))

    def meetings(combination):
        return set(combinations(enumerate(combination), 2)) if len(dimensions) > 1 else {combination}

    missing, few = set().union(*map(meetings, grid)), set()
    while missing:
        best = max(grid, key=lambda combination: len(meetings(combination) & missing))  # the first of the best
        few.add(best)
        missing -= meetings(best)
    return [
        pytest.param(
            *(values[i] for values, i in zip(dimensions, at, strict=True)), marks=() if at in few else pytest.mark.full
        )
        for at in grid
    ]
