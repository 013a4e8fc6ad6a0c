"""Tokenized preference pairs: where they come from, which are held out, and in what order they are taken."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dpo_kernels.data.batching import PairCollator
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.policy import load_tokenizer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
DEMO_ROWS = 600


def load_data(config: TrainConfig) -> tuple[PreTrainedTokenizerBase, Dataset, Dataset | None]:
    """The tokenizer, and the token ids of the training and of the held-out pairs."""
    from dpo_kernels.data.loading import load_preferences, split_train_eval
    from dpo_kernels.data.tokenization import tokenize_preferences

    rows = {"ranked_pairs": config.ranked_pairs, "empty_response": config.empty_response}

    def load(name: str, split: str, max_rows: int | None = None) -> Dataset:
        if name == "demo":
            from dpo_kernels.data.demo import demo_preferences

            return demo_preferences(max_rows or DEMO_ROWS)
        subset = config.dataset_config if name == config.dataset else None
        return load_preferences(name, split=split, name=subset, max_rows=max_rows, **rows)

    def tokenize(dataset: Dataset) -> Dataset:
        tokenized, report = tokenize_preferences(
            dataset,
            tokenizer,
            max_length=config.max_length,
            truncation=config.truncation,
            add_eos=config.add_eos,
            num_proc=config.num_proc,
        )
        logger.info(report.summary())
        return tokenized.select_columns(list(TOKEN_COLUMNS))

    dataset = load(config.dataset, config.dataset_split, config.max_rows)
    tokenizer = load_tokenizer(config, dataset)
    if config.eval_dataset:
        return tokenizer, tokenize(dataset), tokenize(load(config.eval_dataset, config.eval_split or "train"))
    if not config.eval_fraction:
        return tokenizer, tokenize(dataset), None
    # before prompts are cut: pairs of one prompt stay together
    train_rows, eval_rows = split_train_eval(dataset, eval_fraction=config.eval_fraction, seed=config.seed)
    return tokenizer, tokenize(train_rows), tokenize(eval_rows)


@dataclass(frozen=True)
class Pairs:
    """Token ids of all pairs, and how some of them become a batch."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    held_out: Dataset | None
    device: torch.device

    @classmethod
    def load(cls, config: TrainConfig, accelerator: Accelerator) -> Pairs:
        with accelerator.main_process_first():  # the others then find the tokenized data in the cache
            return cls(*load_data(config), accelerator.device)

    def sets(self) -> list[Dataset]:
        return [self.train, self.held_out] if self.held_out else [self.train]

    def map(self, function: Callable[[Dataset], Dataset]) -> Pairs:
        held_out = self.held_out
        return replace(self, train=function(self.train), held_out=function(held_out) if held_out else held_out)

    @functools.cached_property
    def collator(self) -> PairCollator:
        padding = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)  # it is masked: any token will do
        return PairCollator(next(token for token in padding if token is not None))

    def batch(self, pairs: Dataset, rows: Iterable[int]) -> dict[str, Any]:
        """Those rows of a set, collated, on the device."""

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return (value.pin_memory() if self.device.type == "cuda" else value).to(self.device, non_blocking=True)

        return {name: move(value) for name, value in self.collator([pairs[int(row)] for row in rows]).items()}


def pairs_of_step(step: int, pairs: int, pairs_per_step: int, seed: int) -> np.ndarray:
    """The rows of an optimizer step, a function of nothing but its number: every epoch is a permutation of its own,
    whose last step takes what is left."""
    epoch, position = divmod(step, math.ceil(pairs / pairs_per_step))
    return _permutation(pairs, seed, epoch)[position * pairs_per_step : (position + 1) * pairs_per_step]


@functools.lru_cache(maxsize=2)
def _permutation(pairs: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(pairs)


def data_fingerprint(pairs: Dataset) -> str:
    """Identifies the token ids of all pairs, in their order."""
    hasher = hashlib.sha256(np.stack([*pair_lengths(pairs).values()]).tobytes())
    for _, tokens in _columns(pairs):
        hasher.update(tokens.astype(np.int64).data)
    return hasher.hexdigest()


def pair_lengths(pairs: Dataset) -> dict[str, np.ndarray]:
    """How many tokens each pair has in each of `TOKEN_COLUMNS`."""
    lengths = [length for length, _ in _columns(pairs)]
    return {column: np.concatenate(lengths[i :: len(TOKEN_COLUMNS)]) for i, column in enumerate(TOKEN_COLUMNS)}


def check_fits(pairs: Dataset, model: nn.Module, name: str) -> None:
    """Raises `ValueError` where a token id has no row in the model's embeddings, or a pair more tokens than the model
    has positions."""
    lengths = pair_lengths(pairs)
    longest = int((lengths["prompt_ids"] + np.maximum(lengths["chosen_ids"], lengths["rejected_ids"])).max())
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr,operator]
    if positions is not None and longest > positions:
        raise ValueError(
            f"max_length: a pair has {longest} tokens, but the model {name!r} has {positions} positions: expected at "
            f"most {positions}"
        )
    entries = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    for _, tokens in _columns(pairs):
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
