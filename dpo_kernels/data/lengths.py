"""Batches with the lengths of real preference pairs, without the pairs: `lengths.json` beside this file, measured by
`benchmarks/lengths.py`."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from torch import Tensor

LENGTHS = Path(__file__).with_name("lengths.json")
MIN_PAIRS = 4  # in a real batch: fewer have any share of labels

Lengths = tuple[tuple[int, int, int], ...]  # tokens of prompt, chosen and rejected response of each pair


def blank_labels(tokens: int, sequences: int, lengths: Lengths) -> Tensor:
    """[S, T] with 0 where a label belongs, else -100: every position of `sequences`; or, with `lengths`, the responses
    in one right-padded batch of pairs, chosen before rejected."""
    if not lengths:
        return torch.zeros(sequences, tokens // sequences, dtype=torch.int64)
    longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in lengths)
    labels = torch.full((2 * len(lengths), longest - 1), -100)
    for pair, (prompt, chosen, rejected) in enumerate(lengths):
        labels[pair, prompt - 1 : prompt - 1 + chosen] = 0
        labels[pair + len(lengths), prompt - 1 : prompt - 1 + rejected] = 0
    return labels


def real_lengths(tokens: int, max_length: int, *, path: Path = LENGTHS, seed: int = 0) -> Lengths:
    """Pairs drawn from measured lengths, `MIN_PAIRS` and until their responses have `tokens` tokens, over and over if
    there are too few.
    Where a pair exceeds `max_length`, the start of its prompt is cut, then the end of a response."""
    measured = json.loads(path.read_text())["lengths"]
    draw = random.Random(seed)
    pairs: list[tuple[int, int, int]] = []
    left: list[list[int]] = []
    while len(pairs) < MIN_PAIRS or sum(chosen + rejected for _, chosen, rejected in pairs) < tokens:
        left = left or draw.sample(measured, len(measured))
        prompt, chosen, rejected = left.pop()
        prompt = min(prompt, max(1, max_length - max(chosen, rejected)))
        pairs.append((prompt, min(chosen, max_length - prompt), min(rejected, max_length - prompt)))
    return tuple(pairs)
