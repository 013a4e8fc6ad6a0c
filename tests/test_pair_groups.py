"""The plan of path C: how whole pairs are put together."""

import itertools
import random

import pytest
import torch

from dpo_kernels.comparisons import Halves
from dpo_kernels.dispatch import load
from dpo_kernels.impl import exponential_paths, paths
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


MIB, ALL = 2**20, None


@pytest.mark.parametrize(
    ("rows", "hidden", "vocab", "dweight", "mib", "parts", "stores"),
    [
        (8192, 2048, 151936, True, 1802, 1, ALL),
        (8192, 2048, 151936, True, 1500, 1, "some"),  # eight parts would read and write sums of dW eight times
        (8192, 2048, 151936, True, 1024, 1, "some"),  # the sums alone are more
        (8192, 2048, 151936, True, 1023.7, 1, "some"),
        (8192, 2048, 151936, True, 140, 1, "some"),
        (8192, 2048, 151936, True, 128, None, None),  # as path D has at a time
        (8192, 2048, 151936, True, 0, None, None),
        (32768, 4096, 128256, True, 4096, 4, ALL),  # a third would be computed again
        (32768, 4096, 128256, True, 3000, 1, "some"),  # no pair fits beside the sums
        (8192, 2048, 151936, False, 1024, 3, ALL),  # there are no sums
        (8192, 2048, 151936, False, 290, 1, "some"),  # no pair fits
    ],
)
def test_exponentials_are_all_stored_or_some_or_none(rows, hidden, vocab, dweight, mib, parts, stores):
    """Of eight pairs that are alike. The device is asked for their sizes only where several parts may come of them."""
    pytest.importorskip("triton", reason="Triton is not installed")
    k, chunk_bytes = load("triton"), mib * MIB
    weight = torch.empty(vocab, hidden, dtype=torch.bfloat16, device="meta")
    sequence = torch.arange(rows) % 8
    if chunk_bytes < 4 * weight.numel() * dweight:
        sequence = torch.empty(rows, dtype=torch.int64, device="meta")
    groups = plan_groups(
        Rows(sequence, sequence), Halves(8), weight, torch.float32, chunk_bytes, "triton",
        dweight=dweight, exponentials=True,
    )  # fmt: skip
    if parts is None:
        assert groups is None
        return
    stored = groups[0].stored
    assert len(groups) == parts and groups[-1].rows.stop == rows and (stored is None) == (stores is ALL)
    if stored is None:
        return

    def bytes_of(stored):
        return paths.kept_bytes(k, rows, weight, torch.float32, True, dweight, stored).buffer

    more = min(vocab, stored + k.shift_columns(weight.device))
    assert bytes_of(stored) <= chunk_bytes < bytes_of(more) and stored % 64 == 0 and stored < vocab
    kept = exponential_paths.kept_columns(k, rows, weight) if dweight else 0
    assert stored - kept >= k.recomputed_columns(rows, vocab - stored, hidden, weight.device)
