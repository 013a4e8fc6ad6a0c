"""Which responses are compared with which: the halves of a batch, or pairs among groups of any size.

A group is what pairs connect: the responses to a prompt. Path C takes whole groups, since what a response weighs in
the loss is known once all that it is compared with are.

Dimensions: S sequences (responses), P pairs, G groups; s and p of a part of them, which is some groups in a row.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Pair: TypeAlias = "tuple[int, int]"  # chosen, rejected


class Halves(NamedTuple):
    """S = 2P sequences, chosen then rejected: n is compared with n + P, and each pair is a group of its own."""

    pairs: int

    @property
    def groups(self) -> int:
        return self.pairs

    @property
    def stages(self) -> list[list[list[int]]]:
        """Of each group, a sequence and all that it is preferred to, as often as there are such."""
        return [[[n, n + self.pairs]] for n in range(self.pairs)]

    def split(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """[S, ...] to [P, ...] of the chosen and of the rejected sequence of each pair."""
        chosen, rejected = t.chunk(2)
        return chosen, rejected

    def joined(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """[P] and [P] to [S]: of each sequence the sum over the pairs that it is in, as the one or as the other."""
        return torch.cat([chosen, rejected])

    def spread(self, t: Tensor) -> Tensor:
        """[P] to [S]: of each sequence the sum over the pairs that it is in."""
        return t.repeat(2)

    def group_of(self, sequence: Tensor) -> Tensor:
        return sequence % self.pairs

    def order(self, sequence: Tensor) -> Tensor:
        """What to sort sequences by, so that each group is together."""
        return sequence % self.pairs * 2 + sequence // self.pairs

    def part(self, of: slice) -> Halves:
        """These groups among themselves, with their sequences numbered as `take` takes them."""
        return Halves(of.stop - of.start)

    def take(self, t: Tensor, of: slice) -> Tensor:
        """[S, ...] to [s, ...]."""
        return torch.cat([t[of], t[of.start + self.pairs : of.stop + self.pairs]])

    def put(self, t: Tensor, of: slice, values: Tensor) -> None:
        """[s] into [S]."""
        t.view(2, self.pairs)[:, of] = values.view(2, -1)

    def local(self, sequence: Tensor, of: slice) -> Tensor:
        """The numbers that the part's sequences have in it."""
        return sequence % self.pairs - of.start + sequence // self.pairs * (of.stop - of.start)

    def pairs_of(self, of: slice) -> slice | Tensor:
        """What to index [P] by."""
        return of


class Groups:
    """Pairs among S sequences, each of which is in one pair or more.

    Args:
        pairs: P times (chosen, rejected).
        sequences: S.
        device: of what is indexed.
    """

    def __init__(self, pairs: Sequence[Pair], sequences: int, device: torch.device) -> None:
        self.device = device
        self._pairs = pairs
        self._members = _connected(pairs, sequences)
        self._group = [0] * sequences
        for number, members in enumerate(self._members):
            for sequence in members:
                self._group[sequence] = number
        self._pairs_of: list[list[int]] = [[] for _ in self._members]
        for number, (chosen, _) in enumerate(pairs):
            self._pairs_of[self._group[chosen]].append(number)
        self._order = [sequence for members in self._members for sequence in members]
        self._begins = [0, *itertools.accumulate(map(len, self._members))]
        places = [0] * sequences
        for place, sequence in enumerate(self._order):
            places[sequence] = place
        self._chosen, self._rejected = self._tensor([n for pair in zip(*pairs, strict=True) for n in pair]).chunk(2)
        self._group_of, self._place_of = self._tensor([*self._group, *places]).chunk(2)

    @property
    def pairs(self) -> int:
        return len(self._pairs)

    @property
    def groups(self) -> int:
        return len(self._members)

    @property
    def stages(self) -> list[list[list[int]]]:
        preferred: dict[int, list[int]] = {}
        for chosen, rejected in self._pairs:
            preferred.setdefault(chosen, [chosen]).append(rejected)
        return [[preferred[n] for n in members if n in preferred] for members in self._members]

    def split(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t[self._chosen], t[self._rejected]

    def joined(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        of_chosen, of_rejected = (t.new_zeros(len(self._order)) for t in (chosen, rejected))
        of_chosen.index_put_((self._chosen,), chosen, accumulate=True)  # not index_add_, which adds in any order
        return of_chosen + of_rejected.index_put_((self._rejected,), rejected, accumulate=True)

    def spread(self, t: Tensor) -> Tensor:
        return t.new_zeros(len(self._order)).index_add(0, self._chosen, t).index_add(0, self._rejected, t)

    def group_of(self, sequence: Tensor) -> Tensor:
        return self._group_of[sequence]

    def order(self, sequence: Tensor) -> Tensor:
        return self._place_of[sequence]

    def part(self, of: slice) -> Groups:
        place = {sequence: n for n, sequence in enumerate(self._sequences(of))}
        pairs = [self._pairs[n] for numbers in self._pairs_of[of] for n in numbers]
        return Groups([(place[i], place[j]) for i, j in pairs], len(place), self.device)

    def take(self, t: Tensor, of: slice) -> Tensor:
        return t[self._tensor(self._sequences(of))]

    def put(self, t: Tensor, of: slice, values: Tensor) -> None:
        t[self._tensor(self._sequences(of))] = values

    def local(self, sequence: Tensor, of: slice) -> Tensor:
        return self.order(sequence) - self._begins[of.start]

    def pairs_of(self, of: slice) -> slice | Tensor:
        return self._tensor([n for numbers in self._pairs_of[of] for n in numbers])

    def _sequences(self, of: slice) -> list[int]:
        return self._order[self._begins[of.start] : self._begins[of.stop]]

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


Comparisons: TypeAlias = Halves | Groups


def comparisons_of(pairs: object, sequences: int, device: torch.device, argument: str = "hidden") -> Comparisons:
    """Of `pairs`, or of halves if there are none. Raises `ValueError` for what are none, and where the tensor of that
    name has no halves."""
    if pairs is None:
        if sequences == 0 or sequences % 2:
            hint = "" if argument == "hidden" else ", or pairs that say which is preferred to which"
            raise ValueError(
                f"{argument}: expected an even number of sequences, chosen then rejected{hint}, got {sequences}"
            )
        return Halves(sequences // 2)
    return Groups(checked_pairs(pairs, sequences), sequences, device)


def checked_pairs(pairs: object, sequences: int) -> list[Pair]:
    """`pairs` as numbers, which name every one of so many sequences. Raises `ValueError`."""
    expected = f"pairs: expected pairs (chosen, rejected) of two different sequences from 0 to {sequences - 1}"
    given: Any = pairs.tolist() if hasattr(pairs, "tolist") else pairs
    found: list[Pair] = []
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(f"{expected}, got {pairs!r:.80}")
    for n, pair in enumerate(given):
        try:
            chosen, rejected = map(operator.index, pair)
        except (TypeError, ValueError):
            raise ValueError(f"{expected}, got {pair!r:.80} as pair {n}") from None
        if any(isinstance(number, bool) for number in pair):
            raise ValueError(f"{expected}, got {pair!r:.80} as pair {n}")
        if chosen == rejected or not (0 <= chosen < sequences and 0 <= rejected < sequences):
            raise ValueError(f"{expected}, got {(chosen, rejected)} as pair {n}")
        found.append((chosen, rejected))
    if missing := set(range(sequences)).difference(*found):
        raise ValueError(f"pairs: expected every sequence in some pair, got none with sequence {min(missing)}")
    return found


def _connected(pairs: Sequence[Pair], sequences: int) -> list[list[int]]:
    """Groups of sequences, in the order of their first ones."""
    root = list(range(sequences))

    def find(n: int) -> int:
        while root[n] != n:
            root[n] = n = root[root[n]]
        return n

    for chosen, rejected in pairs:
        root[find(rejected)] = find(chosen)
    members: dict[int, list[int]] = {}
    for n in range(sequences):
        members.setdefault(find(n), []).append(n)
    return list(members.values())
