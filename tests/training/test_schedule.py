"""Which examples a step takes: batches of so many, or of so many tokens."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("datasets")
from datasets import Dataset

from dpo_kernels.data.lengths import real_lengths
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.schedule import ByExamples, ByTokens, Schedule, deal, filled, in_order, of_process, shares
from dpo_kernels.training.sizes import Lengths, Sizes

BUDGET = 500
WAYS = ["concatenated", "padding_free", "shared_prefix", "packed_shared_prefix"]


def examples(count=400, seed=0):
    draw = np.random.default_rng(seed)
    rows = [
        {name: [1] * int(draw.geometric(0.02) % 120 + 1) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for _ in range(count)
    ]
    rows[7]["chosen_ids"] = [1] * (BUDGET + 1)
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def pairs():
    return examples()


def slots(rows, sizes):
    """As the collators lay them out."""
    if sizes.padded:
        return sizes.longest[rows].max() * sizes.rows[rows].sum()
    return sizes.tokens[rows].sum()


@pytest.mark.parametrize("way", WAYS)
def test_sizes_are_those_of_batches(pairs, way):
    from dpo_kernels.data import PackedCollator, PairCollator

    packed, shared = way in ("padding_free", "packed_shared_prefix"), "shared" in way
    collator = PairCollator(0) if way == "concatenated" else PackedCollator(0, packed=packed, shared_prefix=shared)
    sizes, rows = Sizes.of(pairs, way), np.arange(3, 20)
    batch = collator([pairs[int(row)] for row in rows])
    assert batch["input_ids"].numel() == slots(rows, sizes)
    assert batch["attention_mask"].sum() == sizes.tokens[rows].sum()
    assert batch["num_labelled"] == sizes.labelled[rows].sum()


@pytest.mark.parametrize("way", WAYS)
def test_an_epoch_takes_every_example_once_within_the_budget(pairs, way):
    sizes = Sizes.of(pairs, way)
    order = ByTokens(sizes, BUDGET, accumulation=2, processes=2, seed=3)
    epochs = []
    first = [sizes.longest[rows].max() for rows in order._batches(0)[:20]]
    assert first != sorted(first, reverse=True)  # the longest do not come first
    for epoch in range(2):
        steps = [order.step(epoch, position) for position in range(order.steps(epoch))]
        batches = [rows for step in steps for of_one in step for rows in of_one]
        assert sorted(np.concatenate(batches)) == list(range(len(pairs)))
        assert all(slots(rows, sizes) <= BUDGET or len(rows) == 1 for rows in batches)
        assert all(len(of_one) == 2 for step in steps[:-1] for of_one in step)
        assert [len(rows) for rows in batches if 7 in rows] == [1]
        epochs.append([sorted(rows) for rows in batches])
    assert epochs[0] != epochs[1]
    again = ByTokens(sizes, BUDGET, accumulation=2, processes=2, seed=3)
    assert str(again.step(1, 4)) == str(order.step(1, 4))  # of nothing but its number
    other = ByTokens(sizes, BUDGET, accumulation=2, processes=2, seed=4)
    assert str(other.step(1, 4)) != str(order.step(1, 4))


def test_packed_batches_are_full(pairs):
    """Of ten times the longest usual example, under 3 % are left, but for the last batch of a window."""
    sizes, budget = Sizes.of(pairs, "packed_shared_prefix"), 3000
    batches = filled(np.arange(len(pairs)), sizes, budget)
    assert sum(budget - slots(rows, sizes) for rows in batches[:-1]) < 0.03 * budget * len(batches[:-1])


def test_an_example_goes_where_it_fits_best():
    """Where there is most room, 3 would be in the second batch, and the last 2 alone."""
    sizes = SimpleNamespace(padded=False, tokens=np.array([2, 7, 3, 6, 2]))
    assert [rows.tolist() for rows in filled(np.arange(5), sizes, budget=10)] == [[1, 2], [3, 0, 4]]


def test_a_budget_beyond_all_numbers(pairs):
    sizes = Sizes.of(pairs, "packed_shared_prefix")
    order = ByTokens(sizes, 10**30, accumulation=1, processes=1, seed=0)
    assert order.steps(0) == 1 and sorted(order.step(0, 0)[0][0]) == list(range(len(pairs)))


def test_windows_are_a_part_of_the_order():
    """What is far apart in the permutation comes in other batches, so that training goes through all the data."""
    pairs = examples(3000, seed=1)
    sizes = Sizes.of(pairs, "packed_shared_prefix")
    order = ByTokens(sizes, BUDGET, accumulation=1, processes=1, seed=0)
    place = np.empty(len(pairs))
    place[np.random.default_rng([0, 0]).permutation(len(pairs))] = np.arange(len(pairs))
    spans = [np.ptp(place[rows]) for rows in order._batches(0)]
    assert max(spans) < 0.5 * len(pairs) and len(spans) > 500


@pytest.fixture(scope="module")
def real():
    """Pairs as long as real ones, cut at 1024 tokens."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = real_lengths(400_000, 1024)[:1003]
    return Dataset.from_list([{name: [1] * n for name, n in zip(names, row, strict=True)} for row in rows])


def uneven(steps, sizes):
    """Mean over the steps of the largest rank's slots by the mean rank's, and of the largest of micro-batches that meet
    by their mean."""
    of_ranks, that_meet = [], []
    for step in steps:
        found = np.array([[slots(rows, sizes) for rows in of_one] for of_one in step])
        of_ranks.append(found.sum(1).max() / found.sum(1).mean())
        that_meet.append((found.max(0) / found.mean(0)).mean())
    return np.mean(of_ranks), np.mean(that_meet)


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("way", ["concatenated", "packed_shared_prefix"])
def test_processes_have_equal_parts_of_a_step(real, way, accumulation, processes):
    sizes, size = Sizes.of(real, way), 4
    order = ByExamples(len(real), size, accumulation, processes, seed=5, sizes=sizes)
    as_drawn = ByExamples(len(real), size, accumulation, processes, seed=5)
    steps, before = ([each.step(1, n) for n in range(each.steps(1))] for each in (order, as_drawn))
    for step, drawn in zip(steps, before, strict=True):
        assert [len(of_one) for of_one in step] == [len(of_one) for of_one in drawn] or step is steps[-1]
        assert sorted(np.concatenate(sum(step, []))) == sorted(np.concatenate(sum(drawn, [])))
        counts = [sum(map(len, of_one)) for of_one in step]
        assert max(counts) - min(counts) <= 1 and max(map(len, sum(step, []))) <= size
    more, drawn = (np.array(uneven(each[:-1], sizes)) - 1 for each in (steps, before))
    assert all(drawn > 0.05) and all(more < {"concatenated": 0.6, "packed_shared_prefix": 0.2}[way] * drawn)
    found, drawn = ([slots(rows, sizes) for step in each[:-1] for rows in sum(step, [])] for each in (steps, before))
    if accumulation > 1 and way == "concatenated":  # like comes to like
        assert sum(found) < 0.85 * sum(drawn)
    elif accumulation > 1:  # short with long
        assert max(found) < 0.85 * max(drawn)
    assert str(order.step(1, 3)) == str(steps[3])


def test_micro_batches_of_so_many_tokens_are_dealt_too(real):
    sizes = Sizes.of(real, "concatenated")
    order, alone = (ByTokens(sizes, 9000, 8 // processes, processes, seed=0) for processes in (4, 1))
    steps = [order.step(0, n) for n in range(order.steps(0))]
    for step, drawn in zip(steps, (alone.step(0, n) for n in range(alone.steps(0))), strict=True):
        ours = sorted(str(rows) for of_one in step for rows in of_one)
        assert ours == sorted(map(str, drawn[0]))
        counts = [len(of_one) for of_one in step]
        assert max(counts) - min(counts) <= 1
    dealt = [[drawn[rank::4] for rank in range(4)] for (drawn,) in (alone.step(0, n) for n in range(order.steps(0)))]
    assert uneven(steps[:-1], sizes)[0] < uneven(dealt[:-1], sizes)[0]


def test_one_process_takes_a_step_as_it_is_drawn(real):
    sizes = Sizes.of(real, "packed_shared_prefix")
    step = ByExamples(len(real), 4, accumulation=2, processes=1, seed=5, sizes=sizes).step(0, 1)
    assert np.array_equal(np.concatenate(step[0]), np.random.default_rng([5, 0]).permutation(len(real))[8:16])
    order = ByTokens(sizes, 9000, accumulation=3, processes=1, seed=5)
    assert all(map(np.array_equal, order.step(0, 2)[0], order._batches(0)[6:9]))


def test_losses_that_compare_the_examples_of_a_batch_have_random_ones(real):
    """Batches of pairs that are all long, or all short, would be others."""
    sizes, settings = Sizes.of(real), TrainConfig(loss_type="aot")
    order = np.random.default_rng([settings.seed, 0]).permutation(len(real))
    step = Schedule.of(settings, sizes, processes=2).step(0)
    assert [rows.tolist() for (rows,) in step] == [order[:8:2].tolist(), order[1:8:2].tolist()]
    assert in_order(settings, sizes, processes=2)[1][0].tolist() == [1, 3, 5, 7]
    settings = TrainConfig(loss_type="sigmoid")
    for step in (Schedule.of(settings, sizes, processes=2).step(0), in_order(settings, sizes, processes=2)):
        assert all((np.diff(sizes.longest[of_one[0]]) <= 0).all() for of_one in step)


def test_few_are_dealt_to_the_first():
    """So that the first process has what others compute for it to meet them."""
    assert [dealt.tolist() for dealt in deal(np.array([1, 5]), 3)] == [[1], [0], []]
    assert [dealt.tolist() for dealt in deal(np.array([9, 5, 4, 1, 1]), 2)] == [[0, 3], [1, 2, 4]]


def test_steps_of_epochs_of_different_lengths():
    counts = [3, 5, 2, 4]
    order = SimpleNamespace(steps=counts.__getitem__, step=lambda epoch, position: (epoch, position))
    schedule = Schedule(order, steps=14, warmup_steps=0)
    found = [schedule.step(number) for number in range(14)]
    assert found == [(epoch, position) for epoch, count in enumerate(counts) for position in range(count)]
    assert [number for number in range(1, 14) if schedule.ends_epoch(number)] == [3, 8, 10]
    assert [schedule.epoch(number) for number in (0, 3, 4, 8, 9)] == [0, 1, 1.2, 2, 2.5]


def test_how_many_steps_there_are(pairs):
    sizes = Sizes.of(pairs, "packed_shared_prefix")
    config = TrainConfig(max_tokens_per_batch=BUDGET, gradient_accumulation_steps=3, epochs=2.5)
    schedule = Schedule.of(config, sizes, processes=2)
    counts = [schedule.order.steps(epoch) for epoch in range(3)]
    assert schedule.steps == counts[0] + counts[1] + -(-counts[2] // 2)
    assert Schedule.of(TrainConfig(max_tokens_per_batch=BUDGET, max_steps=7), sizes, processes=1).steps == 7


@pytest.mark.parametrize("tokens", [{}, {"max_tokens_per_batch": BUDGET}], ids=str)
@pytest.mark.parametrize("size", [{}, {"per_device_eval_batch_size": 7}], ids=str)
def test_an_evaluation_takes_every_example_once(pairs, tokens, size):
    settings = tokens | size
    sizes = Sizes.of(pairs, "packed_shared_prefix")
    found = in_order(TrainConfig(**settings), sizes, processes=3)
    assert sorted(np.concatenate([rows for of_one in found for rows in of_one])) == list(range(len(pairs)))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    if size:
        batches = [rows for of_one in found for rows in of_one]
        assert max(map(len, batches)) <= 7 and len(batches) == sum(-(-sum(map(len, of_one)) // 7) for of_one in found)
    elif tokens:
        assert all(slots(rows, sizes) <= BUDGET or len(rows) == 1 for of_one in found for rows in of_one)


def test_where_shards_are_gathered_all_take_as_many_micro_batches():
    step = [[np.array([0, 1]), np.array([2])], [np.array([3])], []]
    weight = np.array([1.0, 1.0, 2.0, 4.0])
    found = [list(shares(step, rank, weight, even=True)) for rank in range(3)]
    assert [[rows.tolist() for rows, _, _ in mine] for mine in found] == [[[0, 1], [2]], [[3], [0]], [[0], [0]]]
    assert [[share for _, share, _ in mine] for mine in found] == [
        [0.75, 0.75],
        [1.5, 0],
        [0, 0],
    ]  # 3 of 8 each, times 3
    assert [[last for _, _, last in mine] for mine in found] == [[False, True]] * 3
    assert [len(list(shares(step, rank, weight))) for rank in range(3)] == [2, 1, 1]
    assert [len(of_process(step, rank, even=False)) for rank in range(3)] == [2, 1, 0]


def test_sizes_of_rankings():
    rows = [
        {"prompt_ids": [1, 2], "response_ids": [[3], [4, 5, 6], [7]], "pairs": [[0, 1], [0, 2], [1, 2]], "weight": 2.0},
        {"prompt_ids": [9], "response_ids": [[8, 8], [8]], "pairs": [[1, 0]], "weight": 0.5},
    ]
    rankings = Dataset.from_list(rows)
    lengths = Lengths.of(rankings)
    assert lengths.pairs.tolist() == [[0, 1], [0, 2], [1, 2], [4, 3]]
    assert lengths.numbers(np.array([1, 0])).tolist() == [3, 4, 0, 1, 2]
    sizes = Sizes.of(rankings, "packed_shared_prefix")
    assert sizes.tokens.tolist() == [7, 4] and sizes.labelled.tolist() == [5, 3] and sizes.pairs.tolist() == [3, 1]
    assert sizes.chosen.tolist() == [pytest.approx(5 / 3), 1] and sizes.weight.tolist() == [6, 0.5]
    assert sizes.mean_chosen_length() == pytest.approx((2 * 1 + 2 * 1 + 2 * 3 + 0.5 * 1) / 6.5)
    assert Sizes.of(rankings, listwise=True).weight.tolist() == [2, 0.5]
    padded = Sizes.of(rankings)
    assert padded.tokens.tolist() == [11, 5] and padded.longest.tolist() == [5, 3] and padded.rows.tolist() == [3, 2]
