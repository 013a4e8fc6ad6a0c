"""How long the examples of a set are, which are pairs or rankings, and what identifies their tokens."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_kernels.data.batching import is_ranking

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
TOKEN_WEIGHTS = ("chosen_token_weights", "rejected_token_weights")
OF_RANKINGS = "response_token_weights"


@dataclass(frozen=True)
class Lengths:
    """Of n examples with S responses and P pairs."""

    prompts: np.ndarray  # [n] tokens
    responses: np.ndarray  # [S] tokens, those of one example after the other
    labelled: np.ndarray  # [S] tokens that have a label
    counts: np.ndarray  # [n] responses of each example
    pairs: np.ndarray  # [P, 2] chosen and rejected, numbers of responses
    pair_counts: np.ndarray  # [n] pairs of each example

    @classmethod
    def of(cls, examples: Dataset) -> Lengths:
        if not rankings(examples):
            prompts, *both = pair_lengths(examples).values()
            labelled = list(both)
            for i, column in enumerate(TOKEN_WEIGHTS):
                if column in examples.column_names:
                    labelled[i] = _count(_flat(examples, column), both[i])
            twos = np.full(len(prompts), 2)
            pairs = np.arange(2 * len(prompts)).reshape(-1, 2)
            responses, labels = (np.stack(each, axis=1).ravel() for each in (both, labelled))
            return cls(prompts, responses, labels, twos, pairs, twos // 2)
        prompts, responses, counts = _nested(examples)
        labels = responses
        if OF_RANKINGS in examples.column_names:
            labels = _count(_flat(examples, OF_RANKINGS), responses)
        of_examples = examples["pairs"][:]
        pair_counts = np.array([len(each) for each in of_examples])
        pairs = np.array([pair for each in of_examples for pair in each])
        first = np.repeat(np.cumsum(counts) - counts, pair_counts)
        return cls(prompts, responses, labels, counts, pairs + first[:, None], pair_counts)

    @functools.cached_property
    def first(self) -> np.ndarray:
        """[n] the number of each example's first response."""
        return np.cumsum(self.counts) - self.counts

    def numbers(self, rows: np.ndarray) -> np.ndarray:
        """Of the responses of some examples, one example after the other."""
        return np.concatenate([np.arange(self.first[row], self.first[row] + self.counts[row]) for row in rows])


def rankings(examples: Dataset) -> bool:
    return is_ranking(dict.fromkeys(examples.column_names))


@dataclass(frozen=True)
class Sizes:
    """What each example of a set counts for, [n] each."""

    tokens: np.ndarray  # that go through the model
    longest: np.ndarray  # its longest row
    rows: np.ndarray  # how many it has
    labelled: np.ndarray  # tokens
    chosen: np.ndarray  # labelled tokens of a chosen response, on average over its pairs
    pairs: np.ndarray
    weight: np.ndarray  # in the mean over the losses
    padded: bool  # rows to the longest of a batch; else the examples of a batch are one row

    @classmethod
    def of(cls, examples: Dataset, batching: str = "concatenated", listwise: bool = False) -> Sizes:
        """`listwise`: a ranking has one loss, and not one a pair."""
        found = Lengths.of(examples)
        total, longest, labelled = (
            of_each.reduceat(of_responses, found.first)
            for of_each, of_responses in (
                (np.add, found.responses),
                (np.maximum, found.responses),
                (np.add, found.labelled),
            )
        )
        shared, padded = "shared_prefix" in batching, batching in ("concatenated", "shared_prefix")
        tokens = total + found.prompts * (1 if shared else found.counts)
        of_pairs = np.repeat(np.arange(len(tokens)), found.pair_counts)
        chosen = np.bincount(of_pairs, found.labelled[found.pairs[:, 0]], len(tokens)) / found.pair_counts
        weight = np.asarray(examples["weight"][:]) if "weight" in examples.column_names else np.ones(len(tokens))
        return cls(
            tokens=tokens,
            longest=tokens if shared else found.prompts + longest,
            rows=np.ones_like(found.counts) if shared else found.counts,
            labelled=labelled,
            chosen=chosen,
            pairs=found.pair_counts,
            weight=weight if listwise else weight * found.pair_counts,
            padded=padded,
        )

    def alone(self, rows: np.ndarray) -> np.ndarray:
        """[n] how many slots each of some examples has in a batch of its own, padding included."""
        return self.longest[rows] * self.rows[rows] if self.padded else self.tokens[rows]

    def slots(self, rows: np.ndarray) -> int:
        """How many a batch of them has."""
        return int(self.longest[rows].max() * self.rows[rows].sum() if self.padded else self.tokens[rows].sum())

    def mean_chosen_length(self, rows: np.ndarray | slice = slice(None)) -> float:
        """Labelled tokens of the chosen responses, those of each pair as often as its weight says."""
        return float(np.average(self.chosen[rows], weights=self.weight[rows]))


def data_fingerprint(examples: Dataset, weighted: bool = True) -> str:
    """Identifies the token ids of all examples, in their order, and their weights; without `weighted`, those of tokens
    alone, which log-probabilities depend on."""
    of_tokens: tuple[str, ...] = TOKEN_WEIGHTS
    if rankings(examples):
        of_tokens = (OF_RANKINGS,)
        lengths = Lengths.of(examples)
        parts = [lengths.prompts, lengths.responses, lengths.counts, lengths.pairs, lengths.pair_counts]
        hasher = hashlib.sha256(b"".join(part.astype(np.int64).tobytes() for part in parts))
        for column in ("prompt_ids", "response_ids"):
            hasher.update(_flat(examples, column).astype(np.int64).data)
    else:
        hasher = hashlib.sha256(np.stack([*pair_lengths(examples).values()]).tobytes())
        for _, tokens in _columns(examples):
            hasher.update(tokens.astype(np.int64).data)
    for column in (*of_tokens, *["weight"] * weighted):
        if column in examples.column_names:
            values = np.asarray(examples["weight"][:]) if column == "weight" else _flat(examples, column)
            hasher.update(column.encode() + values.astype(np.float64).tobytes())
    return hasher.hexdigest()


def pair_lengths(pairs: Dataset) -> dict[str, np.ndarray]:
    """How many tokens each pair has in each of `TOKEN_COLUMNS`."""
    lengths = [length for length, _ in _columns(pairs)]
    return {column: np.concatenate(lengths[i :: len(TOKEN_COLUMNS)]) for i, column in enumerate(TOKEN_COLUMNS)}


def check_fits(examples: Dataset, model: nn.Module, name: str) -> None:
    """Raises `ValueError` where a token id has no row in the model's embeddings, or a sequence more tokens than the
    model has positions."""
    config: Any = model.config
    longest = int(Sizes.of(examples).longest.max())
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ValueError(
            f"max_length: a pair has {longest} tokens, but the model {name!r} has {positions} positions: expected at "
            f"most {positions}"
        )
    entries = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    for column in ("prompt_ids", "response_ids") if rankings(examples) else TOKEN_COLUMNS:
        tokens = _flat(examples, column)
        if len(tokens) and tokens.max() >= entries:
            raise ValueError(
                f"tokenizer: token id {tokens.max()} is outside the vocabulary of the model {name!r}, which has "
                f"{entries} entries: take the model's own tokenizer"
            )


def _columns(pairs: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Lengths and token ids, a thousand pairs at a time and one of `TOKEN_COLUMNS` after the other."""
    import pyarrow.compute

    for table in pairs.select_columns(list(TOKEN_COLUMNS)).with_format("arrow").iter(batch_size=1000):
        for column in TOKEN_COLUMNS:
            lengths = pyarrow.compute.list_value_length(table[column])
            yield lengths.to_numpy().astype(np.int64), pyarrow.compute.list_flatten(table[column]).to_numpy()


def _nested(examples: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of prompts [n], of responses [S], and how many responses there are [n]."""
    import pyarrow.compute

    found: list[list[np.ndarray]] = [[], [], []]
    for table in examples.select_columns(["prompt_ids", "response_ids"]).with_format("arrow").iter(batch_size=1000):
        responses = pyarrow.compute.list_flatten(table["response_ids"])
        for each, lists in zip(found, (table["prompt_ids"], responses, table["response_ids"]), strict=True):
            each.append(pyarrow.compute.list_value_length(lists).to_numpy().astype(np.int64))
    prompts, responses, counts = map(np.concatenate, found)
    return prompts, responses, counts


def _flat(examples: Dataset, column: str) -> np.ndarray:
    """All numbers of a column of lists, or of lists of lists, one after the other."""
    import pyarrow.compute

    found = []
    for table in examples.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        values = pyarrow.compute.list_flatten(table[column])
        if column == OF_RANKINGS or column == "response_ids":
            values = pyarrow.compute.list_flatten(values)
        found.append(values.to_numpy())
    return np.concatenate(found)


def _count(weights: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How many weights are not 0, of lists of these lengths that lie one after the other."""
    counted = weights.astype(np.float32) != 0  # as batches have them
    return np.bincount(np.repeat(np.arange(len(lengths)), lengths), counted, len(lengths)).astype(np.int64)
