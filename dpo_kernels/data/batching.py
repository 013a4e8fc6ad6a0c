"""Batches of tokenized preference pairs: chosen and rejected sequences concatenated along the first dimension."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
_REF_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
_RESPONSES = ("chosen", "rejected")


def whole_number(argument: str, value: Any, expected: str, *, least: float = -math.inf, most: float = math.inf) -> int:
    """`value` as an int, where it is one, or NumPy's or PyTorch's, from `least` to `most`; no bool. Raises `ValueError`
    that names the argument and what was expected."""
    try:
        number = operator.index(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool) or not least <= number <= most:
        raise ValueError(f"{argument}: expected {expected}, got {value!r:.80}")
    return number


@dataclass
class PairCollator:
    """Collates B pairs to one right-padded batch of 2B sequences: rows `0..B-1` chosen, `B..2B-1` rejected.

    A pair is a mapping with `prompt_ids`, `chosen_ids` and `rejected_ids` (lists of token ids), as
    `tokenize_preferences` makes them, and optionally `index`, the pair `ref_chosen_logps`, `ref_rejected_logps`, a
    `weight`, and `chosen_token_weights`, `rejected_token_weights`: numbers >= 0, one a token of the response; None: 1.

    Args:
        pad_token_id: fills `input_ids` past a sequence's end. Any id of the vocabulary will do: padding is masked.
        pad_to_multiple_of: rounds the padded length T up to a multiple of this.
        ignore_index: the label of prompt and padding positions; negative, so that it is no token id.

    Returns a dict with
        `input_ids`, `attention_mask`, `labels` `[2B, T]` int64: labels are unshifted, `labels[s, t] = input_ids[s, t]`
            on the response where the token's weight is not 0, `ignore_index` elsewhere;
        `token_weights` `[2B, T]` float32, where some token of the batch has a weight other than 0 and 1: unshifted like
            the labels, the weight of token t of sequence s, 0 without a label;
        `pair_weights` `[B]` float32, where the examples carry a weight;
        `num_labelled` int: labels that some position predicts, `(labels[:, 1:] != ignore_index).sum()`, counted here,
            on the host;
        `ref_logps` `[2B]` float32, where the examples carry reference log-probabilities;
        `index` `[B]` int64, where the examples carry their index.

    Raises `ValueError` for options out of range, for no examples, for an example without tokens or without one of the
    three keys, for what is no token id, number or index where one belongs, for weights that are negative, not finite,
    or not as many as the tokens of their response, and where only some examples carry reference log-probabilities, an
    index or a weight.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    ignore_index: int = -100

    def __post_init__(self) -> None:
        expected = "a token id (where the tokenizer has no padding token, its EOS id will do)"
        self.pad_token_id = whole_number("pad_token_id", self.pad_token_id, expected, least=0)
        if self.pad_to_multiple_of is not None:
            expected = "None or a whole number above 0"
            self.pad_to_multiple_of = whole_number("pad_to_multiple_of", self.pad_to_multiple_of, expected, least=1)
        expected = "a whole number below 0, which is no token id"
        self.ignore_index = whole_number("ignore_index", self.ignore_index, expected, most=-1)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return self.assemble(checked(examples)) | carried(examples)

    def assemble(self, pairs: TokenizedPairs) -> dict[str, Any]:
        """What of a batch follows from the tokens."""
        prompts, responses, weights = pairs
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts * 2, responses, strict=True)]
        length = max(lengths)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

        shape = (len(responses), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, self.ignore_index, dtype=torch.int64)
        token_weights = torch.zeros(shape, dtype=torch.float32)
        for row, (prompt, response, given) in enumerate(zip(prompts * 2, responses, weights, strict=True)):
            start, end = len(prompt), len(prompt) + len(response)
            input_ids[row, :start] = prompt
            input_ids[row, start:end] = response
            attention_mask[row, :end] = 1
            token_weights[row, start:end] = 1 if given is None else given
        labelled = token_weights != 0
        labels[labelled] = input_ids[labelled]

        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "num_labelled": int(labelled[:, 1:].sum()),  # no position predicts the first token of a sequence
        }
        if bool(((token_weights != 1) & labelled).any()):
            batch["token_weights"] = token_weights
        return batch


class TokenizedPairs(NamedTuple):
    """Of B pairs, as tensors."""

    prompts: list[Tensor]  # B
    responses: list[Tensor]  # 2B, chosen then rejected
    weights: list[Tensor | None]  # of their tokens


def checked(examples: Any) -> TokenizedPairs:
    """The tokens of examples. Raises `ValueError` as `PairCollator` does."""
    if examples is not None and (isinstance(examples, Mapping) or not hasattr(examples, "__len__")):
        raise ValueError(f"examples: expected a list of pairs, got {type(examples).__name__}")
    if not examples:
        raise ValueError("examples: expected at least one pair, got none")
    for number, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise ValueError(
                f"examples[{number}]: expected a pair, a mapping with the keys {', '.join(_TOKENS)}, "
                f"got {example!r:.80}"
            )
        missing = [key for key in _TOKENS if key not in example]
        if missing:
            raise ValueError(
                f"examples[{number}]: expected the keys {', '.join(_TOKENS)}, missing {', '.join(missing)} "
                f"(keys: {', '.join(example)}); tokenize_preferences makes them"
            )

    prompts, *of_all = ([_token_ids(example, n, key) for n, example in enumerate(examples)] for key in _TOKENS)
    responses = [response for of_one in of_all for response in of_one]
    for number, (prompt, response) in enumerate(zip(prompts * 2, responses, strict=True)):
        example = number % len(examples)
        if len(prompt) + len(response) == 0:
            raise ValueError(f"examples[{example}]: expected token ids, got an empty sequence")
    for key, of_one in zip(_TOKENS, [prompts, *of_all], strict=True):
        ids = torch.cat(of_one)
        if len(ids) and int(ids.min()) < 0:
            number = next(n for n, each in enumerate(of_one) if len(each) and int(each.min()) < 0)
            raise _no_token_ids(examples[number], number, key)
    weights = [
        _token_weights(example, number, key, len(ids))
        for key, of_one in zip(_RESPONSES, of_all, strict=True)
        for number, (example, ids) in enumerate(zip(examples, of_one, strict=True))
    ]
    return TokenizedPairs(prompts, responses, weights)


def carried(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What examples carry beside tokens."""
    batch: dict[str, Any] = {}
    if _carried(examples, ("weight",)):
        pair_weights = [_weight(example["weight"], f"examples[{n}]: weight") for n, example in enumerate(examples)]
        batch["pair_weights"] = torch.tensor(pair_weights, dtype=torch.float32)
    if _carried(examples, _REF_LOGPS):
        ref_logps = [
            _number(example[key], f"examples[{n}]: {key}", "a number")
            for key in _REF_LOGPS
            for n, example in enumerate(examples)
        ]
        batch["ref_logps"] = torch.tensor(ref_logps, dtype=torch.float32)
    if _carried(examples, ("index",)):
        indices = [
            whole_number(f"examples[{n}]: index", e["index"], "a whole number", least=-(2**63), most=2**63 - 1)
            for n, e in enumerate(examples)
        ]
        batch["index"] = torch.tensor(indices, dtype=torch.int64)
    return batch


def _token_ids(example: Mapping[str, Any], number: int, key: str) -> Tensor:
    """[n] integers; that they are not negative is looked at in the batch, for all at once."""
    try:
        ids = torch.as_tensor(example[key])
    except (TypeError, ValueError, RuntimeError):
        raise _no_token_ids(example, number, key) from None
    if ids.ndim != 1 or (len(ids) and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
        raise _no_token_ids(example, number, key)
    return ids.to(torch.int64)


def _no_token_ids(example: Mapping[str, Any], number: int, key: str) -> ValueError:
    return ValueError(
        f"examples[{number}]: {key}: expected a list of token ids, whole numbers of at least 0, "
        f"got {example[key]!r:.80}"
    )


def _token_weights(example: Mapping[str, Any], number: int, response: str, length: int) -> Tensor | None:
    given, name = example.get(f"{response}_token_weights"), f"examples[{number}]: {response}_token_weights"
    if given is None:
        return None
    try:
        weights = torch.as_tensor(given, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected a list of finite numbers >= 0, got {given!r:.80}") from None
    if weights.shape != (length,):
        raise ValueError(f"{name}: expected a number for each of the {length} tokens, got shape {tuple(weights.shape)}")
    if length and not bool((weights >= 0).all() & weights.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers >= 0, got {weights.tolist()}")
    return weights


def _weight(value: Any, name: str) -> float:
    weight = _number(value, name, "a finite number >= 0")
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
    return weight


def _number(value: Any, name: str, expected: str) -> float:
    try:
        number = None if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = None
    if number is None:
        raise ValueError(f"{name}: expected {expected}, got {value!r:.80}")
    return number


def _carried(examples: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> bool:
    """Whether all examples have all the keys; `ValueError` where only some of them are there."""
    present = [key in example for example in examples for key in keys]
    if any(present) and not all(present):
        raise ValueError(
            f"examples: expected {' and '.join(keys)} in every pair or in none, got {sum(present)} of {len(present)}"
        )
    return all(present)
