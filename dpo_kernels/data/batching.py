"""Batches of tokenized preference pairs and rankings: their sequences concatenated along the first dimension."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.comparisons import Groups, Pair, checked_pairs

_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
_REF_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
_RESPONSES = ("chosen", "rejected")
_GROUP = ("prompt_ids", "response_ids", "pairs")
# What examples of the other kind have
_OF_PAIRS = (*_TOKENS[1:], *_REF_LOGPS, "chosen_token_weights", "rejected_token_weights")
_OF_RANKINGS = ("response_token_weights", "ref_logps")


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

    A ranking, as `group_rankings` makes them, is a mapping with `prompt_ids`, `response_ids` (lists of token ids, one a
    response) and `pairs` (chosen, rejected), numbers of responses, which connect them all; and optionally `index`,
    `weight` (of each of its pairs), `ref_logps` (numbers, one a response) and `response_token_weights`, a list of
    numbers or None for each response. A batch with a ranking has S sequences, those of one example after the other, and
    pairs in it are rankings of two.

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

    A batch of G examples with a ranking among them has S rows in the place of 2B, and in addition
        `pairs`: P times (chosen, rejected), numbers of rows, on the host, as `linear_dpo_loss` takes them;
        `pair_weights` `[P]` and `group_weights` `[G]` float32, where the examples carry a weight.

    Raises `ValueError` for options out of range, for no examples, for an example without tokens or without one of the
    three keys, for what is no token id, number, pair or index where one belongs, for pairs that leave a response alone
    or do not connect them, for weights that are negative, not finite, or not as many as the tokens of their response,
    and where only some examples carry reference log-probabilities, an index or a weight.
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
        tokens = checked(examples)
        return self.assemble(tokens) | carried(examples, tokens)

    def assemble(self, tokens: Tokenized) -> dict[str, Any]:
        """What of a batch follows from the tokens."""
        responses, prompts = tokens.responses, [tokens.prompts[n] for n in tokens.prompt_of]
        length = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

        shape = (len(responses), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, self.ignore_index, dtype=torch.int64)
        token_weights = torch.zeros(shape, dtype=torch.float32)
        for row, (prompt, response, given) in enumerate(zip(prompts, responses, tokens.weights, strict=True)):
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


class Tokenized(NamedTuple):
    """Of G examples with S responses, as tensors."""

    prompts: list[Tensor]  # G
    responses: list[Tensor]  # S: all chosen ones, then all rejected ones; with a ranking, example by example
    weights: list[Tensor | None]  # of their tokens
    prompt_of: list[int]  # S, numbers of prompts
    pairs: list[list[Pair]] | None  # of each example, numbers of responses; None: halves


def checked(examples: Any) -> Tokenized:
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
        keys, others = (_GROUP, _OF_PAIRS) if is_ranking(example) else (_TOKENS, _OF_RANKINGS)
        if found := [key for key in others if example.get(key) is not None]:
            kind = "a ranking" if is_ranking(example) else "a pair"
            raise ValueError(f"examples[{number}]: expected {kind}, with {', '.join(keys)}, got {', '.join(found)} too")
        if missing := [key for key in keys if key not in example]:
            raise ValueError(
                f"examples[{number}]: expected the keys {', '.join(keys)}, missing {', '.join(missing)} "
                f"(keys: {', '.join(example)}); tokenize_preferences makes them"
            )
    if any(map(is_ranking, examples)):
        return _checked_groups(examples)

    count = len(examples)
    ids = _token_ids([(each[key], f"examples[{n}]: {key}") for key in _TOKENS for n, each in enumerate(examples)])
    names = [f"{response}_token_weights" for response in _RESPONSES]
    given = [(each.get(name), f"examples[{n}]: {name}") for name in names for n, each in enumerate(examples)]
    weights = [_token_weights(*one, len(response)) for one, response in zip(given, ids[count:], strict=True)]
    return _not_empty(Tokenized(ids[:count], ids[count:], weights, [*range(count)] * 2, None))


def is_ranking(example: Mapping[str, Any]) -> bool:
    return "response_ids" in example


def _checked_groups(examples: Sequence[Mapping[str, Any]]) -> Tokenized:
    """Of rankings, and of pairs, which are rankings of two."""
    given: list[tuple[Any, str]] = []
    of_tokens: list[tuple[Any, str]] = []
    prompt_of: list[int] = []
    pairs: list[list[Pair]] = []
    for number, example in enumerate(examples):
        name, first = f"examples[{number}]", len(given)
        if is_ranking(example):
            responses = _one_each(example["response_ids"], None, f"{name}: response_ids")
            own = _pairs_of(example["pairs"], len(responses), name)
            weights = example.get("response_token_weights")
            weights = [None] * len(responses) if weights is None else weights
            weights = _one_each(weights, len(responses), f"{name}: response_token_weights")
        else:
            responses, own = [example[key] for key in _TOKENS[1:]], [(0, 1)]
            weights = [example.get(f"{response}_token_weights") for response in _RESPONSES]
        given += [(ids, f"{name}: response {n}") for n, ids in enumerate(responses)]
        of_tokens += [(one, f"{name}: token weights of response {n}") for n, one in enumerate(weights)]
        prompt_of += [number] * len(responses)
        pairs.append([(first + chosen, first + rejected) for chosen, rejected in own])
    prompts = _token_ids([(each["prompt_ids"], f"examples[{n}]: prompt_ids") for n, each in enumerate(examples)])
    ids = _token_ids(given)
    found = [_token_weights(*one, len(response)) for one, response in zip(of_tokens, ids, strict=True)]
    return _not_empty(Tokenized(prompts, ids, found, prompt_of, pairs))


def _one_each(given: Any, count: int | None, name: str) -> Sequence[Any]:
    """A list with something for each response, of which there are two at least."""
    given = given.tolist() if hasattr(given, "tolist") else given
    if (
        not isinstance(given, Sequence)
        or isinstance(given, str)
        or len(given) < 2
        or len(given) != (count or len(given))
    ):
        what = "two or more" if count is None else count
        raise ValueError(f"{name}: expected a list, one entry for each of {what} responses, got {given!r:.80}")
    return given


def _pairs_of(given: Any, responses: int, name: str) -> list[Pair]:
    try:
        pairs = checked_pairs(given, responses)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).replace('sequence', 'response')}") from None
    if Groups(pairs, responses, torch.device("cpu")).groups > 1:
        raise ValueError(f"{name}: pairs: expected pairs that connect all {responses} responses, got {given!r:.80}")
    return pairs


def _not_empty(tokens: Tokenized) -> Tokenized:
    for number, response in zip(tokens.prompt_of, tokens.responses, strict=True):
        if len(tokens.prompts[number]) + len(response) == 0:
            raise ValueError(f"examples[{number}]: expected token ids, got an empty sequence")
    return tokens


def carried(examples: Sequence[Mapping[str, Any]], tokens: Tokenized) -> dict[str, Any]:
    """What examples carry beside tokens, and their pairs."""
    batch: dict[str, Any] = {}
    counts = None if tokens.pairs is None else torch.tensor([len(pairs) for pairs in tokens.pairs])
    if tokens.pairs is not None:
        batch["pairs"] = [pair for pairs in tokens.pairs for pair in pairs]
    if _carried(examples, ("weight",)):
        given = [_weight(example["weight"], f"examples[{n}]: weight") for n, example in enumerate(examples)]
        weights = torch.tensor(given, dtype=torch.float32)
        batch["pair_weights"] = weights if counts is None else weights.repeat_interleave(counts)
        if counts is not None:
            batch["group_weights"] = weights
    if counts is not None:
        batch |= _reference_of_groups(examples, tokens)
    elif _carried(examples, _REF_LOGPS):
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


def _reference_of_groups(examples: Sequence[Mapping[str, Any]], tokens: Tokenized) -> dict[str, Any]:
    """`ref_logps` [S], of rankings under this name, of pairs among them under their own two."""
    found: list[float] = []
    for number, example in enumerate(examples):
        name, responses = f"examples[{number}]", tokens.prompt_of.count(number)
        if not is_ranking(example):
            example = {"ref_logps": [example[key] for key in _REF_LOGPS]} if _carried([example], _REF_LOGPS) else {}
        if "ref_logps" not in example:
            continue
        given = _one_each(example["ref_logps"], responses, f"{name}: ref_logps")
        found += [_number(value, f"{name}: ref_logps", "a number") for value in given]
    if found and len(found) != len(tokens.responses):
        raise ValueError(
            f"examples: expected ref_logps of every response or of none, got {len(found)} of {len(tokens.responses)}"
        )
    return {"ref_logps": torch.tensor(found, dtype=torch.float32)} if found else {}


def _token_ids(given: Sequence[tuple[Any, str]]) -> list[Tensor]:
    """[n] each, of values and their names; that none is negative is looked at for all at once."""
    found = []
    for value, name in given:
        try:
            ids = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise _no_token_ids(value, name) from None
        if ids.ndim != 1 or (len(ids) and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
            raise _no_token_ids(value, name)
        found.append(ids.to(torch.int64))
    together = torch.cat(found)
    if len(together) and int(together.min()) < 0:
        raise _no_token_ids(
            *next(one for one, ids in zip(given, found, strict=True) if len(ids) and int(ids.min()) < 0)
        )
    return found


def _no_token_ids(value: Any, name: str) -> ValueError:
    return ValueError(f"{name}: expected a list of token ids, whole numbers of at least 0, got {value!r:.80}")


def _token_weights(given: Any, name: str, length: int) -> Tensor | None:
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
