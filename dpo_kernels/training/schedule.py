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

    def steps(self, epoch: int) -> int:
        return math.ceil(self.examples / self._of_step)

    def step(self, epoch: int, position: int) -> Step:
        order = _permutation(self.examples, self.seed, epoch)
        return divided(order[position * self._of_step : (position + 1) * self._of_step], self.size, self.processes)

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
        batches = self._batches(epoch)[position * count : (position + 1) * count]
        return [batches[rank :: self.processes] for rank in range(self.processes)]

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


def divided(rows: np.ndarray, size: int, processes: int) -> Step:
    """The rows of a step shared out among processes, in micro-batches."""
    return [
        [mine[first : first + size] for first in range(0, len(mine), size)]
        for mine in (rows[rank::processes] for rank in range(processes))
    ]


def in_order(config: TrainConfig, sizes: Sizes, processes: int) -> Step:
    """All examples once, for an evaluation."""
    rows, size = np.arange(len(sizes.tokens)), config.per_device_eval_batch_size
    if config.max_tokens_per_batch is None or size is not None:
        return divided(rows, size or config.per_device_batch_size, processes)
    batches = filled(rows, sizes, config.max_tokens_per_batch)
    return [batches[rank::processes] for rank in range(processes)]


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


def shares(step: Step, rank: int, weight: np.ndarray) -> Iterator[tuple[np.ndarray, float, bool]]:
    """The part of a process in a step: the rows of each micro-batch, the factor of its mean loss with which the
    gradients of all processes come to those of the mean over all losses of the step, and whether it is the last.
    `weight` [n] is what examples count for in these means."""
    total = sum(weight[rows].sum() for of_one in step for rows in of_one)
    mine, share = step[rank], len(step) / total  # DDP takes the mean over the processes
    if not mine:  # a last step of few: this process is waited for, but counts for nothing
        mine, share = [step[0][0][:1]], 0.0
    for number, rows in enumerate(mine, start=1):
        yield rows, float(share * weight[rows].sum()), number == len(mine)


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
            order = ByExamples(len(sizes.tokens), config.per_device_batch_size, accumulation, processes, seed)
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
