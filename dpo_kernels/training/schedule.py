"""Which examples each optimizer step takes, in micro-batches, and at which learning rate.

A step is a function of nothing but its number, so that a run can go on from any. An example is a pair or a ranking.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from dpo_kernels.losses import BATCH_LOSSES
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.sizes import Sizes

WINDOW = 64  # batches of so many tokens that examples are packed among

Step: TypeAlias = "list[list[np.ndarray]]"  # of each process its micro-batches: rows of examples


@dataclass(frozen=True)
class ByExamples:
    """Every epoch is a permutation of its own, whose last step takes what is left."""

    examples: int
    size: int  # examples of a micro-batch
    accumulation: int
    processes: int
    seed: int
    sizes: Sizes | None = None  # by which processes have equal parts of a step

    def steps(self, epoch: int) -> int:
        return math.ceil(self.examples / self._of_step)

    def step(self, epoch: int, position: int) -> Step:
        order = _permutation(self.examples, self.seed, epoch)
        rows = order[position * self._of_step : (position + 1) * self._of_step]
        return divided(rows, self.size, self.processes, self.sizes)

    @property
    def _of_step(self) -> int:
        return self.size * self.accumulation * self.processes


@dataclass(eq=False)
class ByTokens:
    """Micro-batches of at most `budget` slots. Every epoch is a permutation of its own, which goes through windows:
    those of one are packed, and the batches that come of it shuffled."""

    sizes: Sizes
    budget: int
    accumulation: int
    processes: int
    seed: int

    def __post_init__(self) -> None:
        self._steps: dict[int, int] = {}
        self._batches = functools.lru_cache(maxsize=2)(self._batches_of)  # of an epoch, and of the next

    def steps(self, epoch: int) -> int:
        if epoch not in self._steps:
            self._steps[epoch] = math.ceil(len(self._batches(epoch)) / (self.accumulation * self.processes))
        return self._steps[epoch]

    def step(self, epoch: int, position: int) -> Step:
        count = self.accumulation * self.processes
        return shared_out(self._batches(epoch)[position * count : (position + 1) * count], self.sizes, self.processes)

    def _batches_of(self, epoch: int) -> list[np.ndarray]:
        order = _permutation(len(self.sizes.tokens), self.seed, epoch)
        tokens = np.cumsum(self.sizes.tokens[order])
        window = tokens // min(WINDOW * self.budget, tokens[-1] + 1)
        shuffle = np.random.default_rng([self.seed, epoch, 1])
        found: list[np.ndarray] = []
        for rows in np.split(order, np.flatnonzero(np.diff(window)) + 1):
            batches = filled(rows, self.sizes, self.budget)
            found += [batches[n] for n in shuffle.permutation(len(batches))]
        return found


def divided(rows: np.ndarray, size: int, processes: int, sizes: Sizes | None = None) -> Step:
    """The rows of a step shared out among processes, in micro-batches. With `sizes`, processes compute near equal
    numbers of slots, and so do their micro-batches that meet; one process takes the rows as they come."""
    if sizes is None or processes == 1:
        of_each = [rows[rank::processes] for rank in range(processes)]
    else:
        of_each = [rows[dealt] for dealt in deal(sizes.alone(rows), processes)]
        if not sizes.padded:
            return [[mine[dealt] for dealt in deal(sizes.alone(mine), math.ceil(len(mine) / size))] for mine in of_each]
    # padded rows are like their neighbours: the longest come first
    return [[mine[first : first + size] for first in range(0, len(mine), size)] for mine in of_each]


def shared_out(batches: list[np.ndarray], sizes: Sizes, processes: int) -> Step:
    """Micro-batches shared out among processes, which compute near equal numbers of slots."""
    if processes == 1:
        return [batches]
    return [[batches[n] for n in dealt] for dealt in deal(np.array([*map(sizes.slots, batches)]), processes)]


def deal(costs: np.ndarray, hands: int) -> list[np.ndarray]:
    """Numbers of the entries of `costs` [n], dealt so that hands have near equal sums and, but for one, as many: the
    highest first, and to each hand one a round, of which the hand that has least takes the highest."""
    found: list[list[int]] = [[] for _ in range(hands)]
    sums = np.zeros(hands)
    highest_first = np.argsort(-costs, kind="stable")
    for first in range(0, len(costs), max(1, hands)):
        for hand, number in zip(np.argsort(sums, kind="stable"), highest_first[first : first + hands], strict=False):
            found[hand].append(number)
            sums[hand] += costs[number]
    return [np.array(numbers, dtype=int) for numbers in found]


def in_order(config: TrainConfig, sizes: Sizes, processes: int) -> Step:
    """All examples once, for an evaluation."""
    rows, size = np.arange(len(sizes.tokens)), config.per_device_eval_batch_size
    if config.max_tokens_per_batch is None or size is not None:
        return divided(rows, size or config.per_device_batch_size, processes, _balancing(config, sizes))
    return shared_out(filled(rows, sizes, config.max_tokens_per_batch), sizes, processes)


def _balancing(config: TrainConfig, sizes: Sizes) -> Sizes | None:
    """None for losses that compare the examples of a batch, which then are as the seed has drawn them."""
    return sizes if BATCH_LOSSES.isdisjoint(config.loss_type) else None


def filled(rows: np.ndarray, sizes: Sizes, budget: int) -> list[np.ndarray]:
    """Batches of at most `budget` slots, padding included: the longest first, and each where it fits best. An example
    that is longer than that is alone."""
    longest_first = rows[np.argsort(-(sizes.longest if sizes.padded else sizes.tokens)[rows], kind="stable")]
    batches: list[list[int]] = []
    if sizes.padded:  # to the length of the first
        slots = 0
        for row in longest_first.tolist():
            count = int(sizes.rows[row])
            if batches and slots + int(sizes.longest[batches[-1][0]]) * count <= budget:
                batches[-1].append(row)
            else:
                batches.append([row])
                slots = 0
            slots += int(sizes.longest[batches[-1][0]]) * count
        return [np.array(batch) for batch in batches]
    room: list[tuple[int, int]] = []  # of each batch and its number, sorted
    for row in longest_first.tolist():
        tokens = int(sizes.tokens[row])
        place = bisect.bisect_left(room, (tokens, -1))
        if place == len(room):
            left, number = budget, len(batches)
            batches.append([])
        else:
            left, number = room.pop(place)
        batches[number].append(row)
        if left > tokens:
            bisect.insort(room, (left - tokens, number))
    return [np.array(batch) for batch in batches]


def shares(step: Step, rank: int, weight: np.ndarray, even: bool = False) -> Iterator[tuple[np.ndarray, float, bool]]:
    """The part of a process in a step: the rows of each micro-batch, the factor of its mean loss with which the
    gradients of all processes come to those of the mean over all losses of the step, and whether it is the last.
    `weight` [n] is what examples count for in these means; `even`: as many micro-batches for each process."""
    total = sum(weight[rows].sum() for of_one in step for rows in of_one)
    share = len(step) / total  # DDP and FSDP2 take the mean over the processes
    mine = of_process(step, rank, even, least=1)  # in a last step of few, a process may be waited for alone
    for number, (rows, counts) in enumerate(mine, start=1):
        yield rows, float(share * weight[rows].sum()) if counts else 0.0, number == len(mine)


def of_process(step: Step, rank: int, even: bool, least: int = 0) -> list[tuple[np.ndarray, bool]]:
    """The micro-batches of a process, and whether they count. Those that do not are there for the other processes to
    meet: where shards of a model are gathered (`even`), as many as any of them has."""
    mine = [(rows, True) for rows in step[rank]]
    wanted = max(least, max(map(len, step)) if even else 0)
    return mine + [(step[0][0][:1], False)] * (wanted - len(mine))


@functools.lru_cache(maxsize=2)
def _permutation(examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(examples)


@dataclass(frozen=True)
class Schedule:
    """How many steps there are, which examples each of them takes, and how fast it learns."""

    order: ByExamples | ByTokens
    steps: int  # in all
    warmup_steps: int

    @classmethod
    def of(cls, config: TrainConfig, sizes: Sizes, processes: int) -> Schedule:
        accumulation, seed = config.gradient_accumulation_steps, config.seed
        order: ByExamples | ByTokens
        if config.max_tokens_per_batch is None:
            size, balancing = config.per_device_batch_size, _balancing(config, sizes)
            order = ByExamples(len(sizes.tokens), size, accumulation, processes, seed, balancing)
        else:
            order = ByTokens(sizes, config.max_tokens_per_batch, accumulation, processes, seed)
        steps = config.max_steps or _steps(order, config.epochs)
        warmup_steps = math.ceil(config.warmup_ratio * steps) if config.warmup_steps is None else config.warmup_steps
        return cls(order, steps, warmup_steps)

    def step(self, number: int) -> Step:
        return self.order.step(*self._place(number))

    def epoch(self, step: int) -> float:
        """How many epochs so many steps are."""
        epoch, position = self._place(step)
        return epoch + position / self.order.steps(epoch)

    def ends_epoch(self, step: int) -> bool:
        """Whether so many steps are whole epochs."""
        return self._place(step)[1] == 0

    def _place(self, step: int) -> tuple[int, int]:
        epoch = 0
        while step >= (steps := self.order.steps(epoch)):
            step, epoch = step - steps, epoch + 1
        return epoch, step

    def rate(self, decay: str, step: int) -> float:
        """What the learning rate is of its peak in a step. It is the peak after `warmup_steps`, and above 0 from the
        first of them on: a step at rate 0 would learn nothing."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        decaying = max(1, self.steps - self.warmup_steps)
        if decay == "linear":
            return max(0.0, (self.steps - step) / decaying)
        if decay == "cosine":
            return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / decaying)))
        return 1.0


def _steps(order: ByExamples | ByTokens, epochs: float) -> int:
    if isinstance(order, ByExamples):
        return math.ceil(epochs * order.steps(0))
    whole = int(epochs)
    return sum(order.steps(epoch) for epoch in range(whole)) + math.ceil((epochs - whole) * order.steps(whole))
