"""The plan of path C: how whole pairs are put together."""

import itertools
import random

import pytest
import torch

from dpo_kernels.comparisons import Halves
from dpo_kernels.impl.interface import Rows
from dpo_kernels.pair_groups import plan_groups

WEIGHT = torch.empty(1000, 16, device="meta")


def planned(sizes, budget, counts=None):
    """Rows of each part, for pairs of so many rows, of which `budget` have room; [R][P] `counts` of each rank."""
    sequence = torch.tensor([pair for pair, size in enumerate(sizes) for _ in range(size)], dtype=torch.int64)
    groups = plan_groups(
        Rows(sequence, sequence), Halves(len(sizes)), WEIGHT, torch.float32, budget * 1000 * 4, "torch", dweight=False,
        counts=counts and [[*of_rank, *[0] * len(sizes)] for of_rank in counts],
    )  # fmt: skip
    if groups is None:
        return None
    # in their order, and all of them
    assert [group.rows.start for group in groups] == [0, *(group.rows.stop for group in groups[:-1])]
    assert [group.of.start for group in groups] == [0, *(group.of.stop for group in groups[:-1])]
    assert groups[-1].rows.stop == sum(sizes) and groups[-1].of.stop == len(sizes)
    assert all(sum(sizes[group.of]) == group.rows.stop - group.rows.start for group in groups)
    return [group.rows.stop - group.rows.start for group in groups]


def test_parts_are_alike():
    """Not two full ones and what is left."""
    assert planned([10] * 16, 70) == [60, 60, 40]
    assert planned([10] * 16, 79) == planned([10] * 16, 70)
    assert planned([10] * 16, 80) == [80, 80]
    assert planned([10] * 16, 160) == [160]
    assert planned([5, 5, 40, 5, 5, 5], 45) == [10, 40, 15]
    assert planned([0, 7, 0, 0, 7, 0], 7) == [7, 7]
    assert planned([10] * 4 + [11], 10) is None


def fewest_and_least(sizes, budget):
    """Of all ways to cut: the number of parts, and rows of the largest."""
    found = []
    for cuts in itertools.product([False, True], repeat=len(sizes) - 1):
        parts = [[sizes[0]]]
        for cut, size in zip(cuts, sizes[1:], strict=True):
            parts.append([size]) if cut else parts[-1].append(size)
        largest = max(map(sum, parts))
        if largest <= budget:
            found.append((len(parts), largest))
    return min(found)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_parts_are_fewer_or_smaller(seed):
    draw = random.Random(seed)
    sizes = [draw.randint(0, 30) for _ in range(9)]
    for budget in (30, 41, 77, sum(sizes) - 1):
        found = planned(sizes, budget)
        assert (len(found), max(found)) == fewest_and_least(sizes, budget)


def test_ranks_have_the_same_parts():
    """Each with room for its own rows, and the largest of all of them as small as may be."""
    here, there = [9, 1, 1, 9, 1, 1], [1, 9, 1, 1, 1, 9]
    found = [planned(sizes, 12, counts=[here, there]) for sizes in (here, there)]
    assert found == [[11, 11], [11, 11]]
    assert planned(here, 12) == [11, 11] and planned(there, 10) == [10, 3, 9]
