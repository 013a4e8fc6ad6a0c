"""Held-out pairs: split off so that no prompt is on both sides."""

from __future__ import annotations

import hashlib
import json
from numbers import Real
from typing import Any

import numpy as np
from datasets import Dataset

from dpo_kernels.data.batching import whole_number


def split_train_eval(
    dataset: Dataset, *, eval_fraction: float | None = None, eval_rows: int | None = None, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Splits off held-out pairs: `(train, eval)`, the same for the same data and seed.

    Pairs that share a prompt or a ranking stay together, or the held-out accuracy would be measured on prompts that
    were trained on. So `eval` has at least the wanted number of rows, and a few more where its last prompt has several
    pairs.

    Args:
        dataset: of `load_preferences` or of `tokenize_preferences`.
        eval_fraction: share of the rows to hold out, above 0 and below 1; or
        eval_rows: their number.

    Raises `ValueError` unless exactly one of the two is given, and where nothing would be left to train on.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(f"dataset: expected one split, a datasets.Dataset, got {type(dataset).__name__}")
    if (eval_fraction is None) == (eval_rows is None):
        raise ValueError(f"expected eval_fraction or eval_rows, got {eval_fraction=} and {eval_rows=}")
    if eval_fraction is not None and not (isinstance(eval_fraction, Real) and 0 < eval_fraction < 1):
        raise ValueError(f"eval_fraction: expected a number above 0 and below 1, got {eval_fraction!r}")
    if eval_rows is not None:
        expected = f"1 to {len(dataset) - 1} of {len(dataset)} rows"
        eval_rows = whole_number("eval_rows", eval_rows, expected, least=1, most=len(dataset) - 1)
    seed = whole_number("seed", seed, "a whole number of at least 0", least=0)
    wanted = eval_rows if eval_rows is not None else max(1, round(len(dataset) * (eval_fraction or 0)))
    prompts = _same_prompt(dataset)
    held_out: list[int] = []
    for place in np.random.default_rng(seed).permutation(len(prompts)):
        if len(held_out) >= wanted:
            break
        held_out += prompts[place]
    rest = sorted(set(range(len(dataset))) - set(held_out))
    if not rest:
        raise ValueError(
            f"dataset: {len(dataset)} rows with {len(prompts)} different prompts leave nothing to train on "
            "beside held-out pairs: give those as a dataset of their own (eval_dataset), or train without evaluation "
            "(eval_fraction: 0)"
        )
    return dataset.select(rest), dataset.select(sorted(held_out))


def _same_prompt(dataset: Dataset) -> list[list[int]]:
    """The rows of each prompt. Those of a ranking are of one prompt, of which a tokenizer may have cut more or less."""
    column = "prompt_ids" if "prompt_ids" in dataset.column_names else "prompt"
    columns = [name for name in (column, "group") if name in dataset.column_names]
    first_with: dict[Any, int] = {}
    earlier: list[int] = []  # a row of the same prompt for each: itself, or one before it

    def first(number: int) -> int:
        while earlier[number] != number:
            number = earlier[number] = earlier[earlier[number]]
        return number

    for number, row in enumerate(dataset.select_columns(columns)):
        key = hashlib.blake2b(json.dumps(row[column]).encode(), digest_size=16).digest()
        earlier.append(number)
        for shared in (key, row.get("group")):
            if shared is not None:
                one, other = sorted((first(number), first(first_with.setdefault(shared, number))))
                earlier[other] = one
    rows: dict[int, list[int]] = {}
    for number in range(len(earlier)):
        rows.setdefault(first(number), []).append(number)
    return list(rows.values())
