"""Tokenized preference pairs: where they come from, which are held out, and how they become batches."""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_kernels.data.batching import PairCollator
from dpo_kernels.data.packing import PackedCollator
from dpo_kernels.data.preview import pair_text, some_rows
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.sizes import Sizes, rankings
from dpo_kernels.training.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from dpo_kernels.data.tokenization import DataReport

logger = logging.getLogger(__name__)

DEMO_ROWS = 600
EXAMPLE_CHARACTERS = 1000
WEIGHTLESS = "weight 0"
# What errors of `load_preferences` begin with, and the settings that these arguments come from.
SETTINGS = {"name_or_path": "dataset", "weights": "dataset_weights", "split": "dataset_split", "name": "dataset_config"}


class Part(NamedTuple):
    """The pairs to train on, or those that are held out, as token ids; and what became of the rows they come from."""

    name: str
    pairs: Dataset
    report: DataReport
    rows: Dataset
    numbers: np.ndarray  # of the rows that the pairs come from

    def source(self, pair: int) -> str:
        return str(self.rows[int(self.numbers[pair])]["source"])

    def summary(self) -> str:
        return f"{self.name}: {self.report.summary()}"


def load_data(config: TrainConfig) -> tuple[PreTrainedTokenizerBase, Dataset, Dataset | None]:
    """The tokenizer, and the token ids of the training and of the held-out pairs. Says what became of the rows."""
    tokenizer, parts = load_parts(config)
    for part in parts:
        if part.report.dropped:
            warnings.warn(part.summary(), stacklevel=2)
        else:
            logger.info(part.summary())
    return tokenizer, parts[0].pairs, parts[1].pairs if len(parts) > 1 else None


def load_parts(config: TrainConfig) -> tuple[PreTrainedTokenizerBase, list[Part]]:
    """The tokenizer and the pairs to train on, then those that are held out, if any are."""
    from dpo_kernels.data.loading import split_train_eval

    dataset = _load(config, "dataset")
    tokenizer = load_tokenizer(config, dataset)
    _check_has_conversations(config, dataset)
    rows = {"train": dataset}
    if config.eval_dataset:
        rows["eval"] = _load(config, "eval_dataset")
    elif config.eval_fraction:
        # before prompts are cut: pairs of one prompt stay together
        rows["train"], rows["eval"] = split_train_eval(dataset, eval_fraction=config.eval_fraction, seed=config.seed)
    parts = [_tokenized(config, name, part, tokenizer) for name, part in rows.items()]
    _check_weights_fit(config, parts)
    return tokenizer, parts


def _load(config: TrainConfig, key: str) -> Dataset:
    """The rows of the setting `key`, dataset or eval_dataset; errors name the settings."""
    from dpo_kernels.data.demo import demo_preferences
    from dpo_kernels.data.loading import load_preferences, normalize_preferences

    training, named = key == "dataset", getattr(config, key)
    names = [named] if isinstance(named, str) else named
    max_rows = config.max_rows if training else None

    def demo() -> Dataset:
        return normalize_preferences(demo_preferences(max_rows or DEMO_ROWS), origin="demo")

    sources = [demo() if name == "demo" else name for name in names]
    try:
        return load_preferences(
            sources if len(sources) > 1 else sources[0],
            split=config.dataset_split if training else config.eval_split or "train",
            name=config.dataset_config if named == config.dataset else None,
            weights=config.dataset_weights if training else None,
            seed=config.seed,
            max_rows=max_rows,
            ranked_pairs=config.ranked_pairs,
            empty_response=config.empty_response,
        )
    except ValueError as error:
        argument, colon, rest = str(error).partition(":")
        setting = SETTINGS.get(argument, argument)
        if not training:
            setting = {"dataset": key, "dataset_split": "eval_split"}.get(setting, setting)
        raise ValueError(f"{setting}{colon}{rest}") from error


def _tokenized(config: TrainConfig, name: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Part:
    from dpo_kernels.data.tokenization import Rows, tokenize_preferences

    which = {"train": "the training pairs", "eval": "the held-out pairs"}[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\d+ of \d+ preference pairs kept")  # the report is for all who load to show
        try:
            pairs, report = tokenize_preferences(
                rows,
                tokenizer,
                max_length=config.max_length,
                truncation=config.truncation,
                add_eos=config.add_eos,
                chat_template_kwargs=config.chat_template_kwargs,
                train_on=config.train_on,
                num_proc=config.num_proc,
            )
        except ValueError as error:
            raise ValueError(str(error).replace("dataset: no preference", f"{which}: no preference", 1)) from error
    if "weight" in pairs.column_names:
        weights = np.asarray(pairs["weight"][:])
        if not weights.all():
            without = np.flatnonzero(weights == 0)
            sources = tuple(rows[int(number)]["source"] for number in np.asarray(pairs["index"][:])[without[:5]])
            dropped = report.dropped | {WEIGHTLESS: Rows(len(without), sources)}
            report = replace(report, kept=len(weights) - len(without), dropped=dropped)
        if not weights.any():
            raise ValueError(f"{which}: no preference pair is left\n{report.summary()}")
        pairs = pairs.select(np.flatnonzero(weights)).remove_columns("weight")
        ratios = weights[weights > 0] / weights.max()  # nothing else matters, and these are there in fp32 too
        if ratios.min() < 1:
            pairs = pairs.add_column("weight", ratios)
    return Part(name, pairs.remove_columns("index"), report, rows, np.asarray(pairs["index"][:]))


def _check_has_conversations(config: TrainConfig, dataset: Dataset) -> None:
    """A setting without effect is a misunderstanding, here too."""
    if isinstance(dataset[0]["prompt"], list):
        return
    for name, default in (("chat_template", None), ("chat_template_kwargs", None), ("train_on", "all")):
        if getattr(config, name) != default:
            raise ValueError(
                f"{name}: has an effect only on conversations, and the dataset {config.dataset!r} is plain text, which "
                f"goes through no chat template: expected {default}, got {getattr(config, name)!r}"
            )


def _check_weights_fit(config: TrainConfig, parts: list[Part]) -> None:
    from dpo_kernels.losses import BATCH_LOSSES

    for name in BATCH_LOSSES.intersection(config.loss_type):
        for part in parts:
            if "weight" in part.pairs.column_names:
                raise ValueError(
                    f"loss_type: {name!r} sorts the pairs of a batch, which cannot be weighted, and the {part.name} "
                    "pairs have different weights: take another loss, or leave out the column weight"
                )


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """Token ids to the text that they stand for, special tokens included."""
    return lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class Pairs:
    """Token ids of all pairs, or rankings, and how some of them become a batch."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    held_out: Dataset | None
    device: torch.device
    batching: str = "concatenated"

    @classmethod
    def load(cls, config: TrainConfig, accelerator: Accelerator) -> Pairs:
        with accelerator.main_process_first():  # the others then find the tokenized data in the cache
            tokenizer, *loaded = load_data(config)
            train, held_out = (_in_groups(config, pairs) for pairs in loaded)
            assert train is not None
            return cls(tokenizer, train, held_out, accelerator.device)

    def example(self, seed: int) -> str:
        """One of the pairs to train on as text, cut in the middle where it is long."""
        (number,) = some_rows(len(self.train), 1, seed)
        row = self.train[number]
        if rankings(self.train):
            row = first_pair(row)
        encoding = sys.stdout.encoding or "ascii"
        return pair_text(row, decoder(self.tokenizer), encoding=encoding, longest=EXAMPLE_CHARACTERS)

    def sets(self) -> list[Dataset]:
        return [self.train, self.held_out] if self.held_out else [self.train]

    def sizes(self, examples: Dataset, listwise: bool = False) -> Sizes:
        return Sizes.of(examples, self.batching, listwise)

    def map(self, function: Callable[[Dataset], Dataset]) -> Pairs:
        held_out = self.held_out
        return replace(self, train=function(self.train), held_out=function(held_out) if held_out else held_out)

    @functools.cached_property
    def collator(self) -> PairCollator:
        padding = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)  # it is masked: any token will do
        pad = next(token for token in padding if token is not None)
        if self.batching == "concatenated":
            return PairCollator(pad)
        packed, shared = self.batching != "shared_prefix", self.batching != "padding_free"
        return PackedCollator(pad, packed=packed, shared_prefix=shared)

    def batch(self, pairs: Dataset, rows: Iterable[int]) -> dict[str, Any]:
        """Those rows of a set, collated, on the device."""

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return (value.pin_memory() if self.device.type == "cuda" else value).to(self.device, non_blocking=True)

        return {name: move(value) for name, value in self.collator([pairs[int(row)] for row in rows]).items()}


def _in_groups(config: TrainConfig, pairs: Dataset | None) -> Dataset | None:
    """Pairs of one ranking together, so that each of its answers is computed once."""
    from dpo_kernels.data.rankings import group_rankings

    if pairs is None or "group" not in pairs.column_names:
        return pairs
    if config.ld_alpha is not None:
        raise ValueError(
            f"ld_alpha: expected none beside ranked_pairs {config.ranked_pairs!r}, since an answer has as many "
            f"log-probabilities as pairs with it, got {config.ld_alpha!r}"
        )
    return group_rankings(pairs)


def first_pair(ranking: Mapping[str, Any]) -> dict[str, Any]:
    """The first of a ranking's pairs, as an example of its own."""
    places = zip(("chosen", "rejected"), ranking["pairs"][0], strict=True)
    pair = {"prompt_ids": ranking["prompt_ids"]}
    weights = ranking.get("response_token_weights")
    for response, place in places:
        pair[f"{response}_ids"] = ranking["response_ids"][place]
        if weights is not None:
            pair[f"{response}_token_weights"] = weights[place]
    return pair
