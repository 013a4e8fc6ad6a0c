"""Which combinations of a grid a short test run takes, and which a long one."""

from itertools import combinations, product

import pytest

# Of the fixture `impl`, for a grid that it is a dimension of: indirect=["impl"]
IMPLS = ["torch", "cpu", "triton", "cuda"]


def each_value(*dimensions):
    """All combinations of the dimensions' values, as parameters. Those that a walk along all dimensions at once comes
    by, and so each value, are run every time; the others are run with `--full`."""
    steps = range(max(map(len, dimensions)))
    every_time = {tuple(step % len(values) for values in dimensions) for step in steps}
    return _parameters(dimensions, _grid(dimensions), every_time)


def covering(*dimensions, full=3):
    """Combinations of the dimensions' values, as parameters: a few in which any two values of different dimensions
    meet, which are run every time, and with `--full` others, until any `full` of them meet."""
    grid = _grid(dimensions)
    every_time = _meeting(grid, 2, [])
    return _parameters(dimensions, _meeting(grid, full, every_time), set(every_time))


def _meeting(grid, strength, chosen):
    """`chosen` and as many combinations more as it takes for any `strength` values of different dimensions to meet."""
    strength = min(strength, len(grid[0]))
    missing = {each: set(combinations(enumerate(each), strength)) for each in grid}
    found = list(chosen)
    for each in chosen:
        _strike_out(missing, each)
    while missing:
        found.append(max(missing, key=lambda each: len(missing[each])))  # the first of the best
        _strike_out(missing, found[-1])
    return found


def _strike_out(missing, combination):
    """What meets in this one is not missing in the others; those in which nothing is are left out."""
    met = missing.pop(combination, set())
    for each in [each for each, meetings in missing.items() if not meetings.isdisjoint(met)]:
        missing[each] = missing[each] - met
        if not missing[each]:
            del missing[each]


def _grid(dimensions):
    return list(product(*(range(len(values)) for values in dimensions)))


def _parameters(dimensions, grid, every_time):
    return [
        pytest.param(
            *(values[i] for values, i in zip(dimensions, at, strict=True)),
            marks=() if at in every_time else pytest.mark.full,
        )
        for at in sorted(grid)
    ]
