"""Batches without padding: what is in which slot, and what predicts what."""

import pytest
import torch

pytest.importorskip("datasets")
from dpo_kernels.data import PackedCollator, PairCollator

PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8]},
    {"prompt_ids": [9], "chosen_ids": [10, 11, 12], "rejected_ids": [13]},
]


def test_a_row_with_all_pairs():
    batch = PackedCollator(0)(PAIRS)
    assert batch["input_ids"].tolist() == [list(range(1, 14))]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3, 1]]
    assert batch["attention_mask"].tolist() == [[1] * 13]
    prompt_begin, prompt_end, begin, position = batch["layout"][0, 0].T.tolist()
    assert prompt_begin == [0] * 8 + [8] * 5
    assert prompt_end == [0] * 3 + [3] * 5 + [8] + [9] * 4
    assert begin == [0] * 3 + [3] * 2 + [5] * 3 + [8] + [9] * 3 + [12]
    assert [position] == batch["position_ids"].tolist()
    assert batch["labels"].tolist() == [[4, 5, -100], [10, 11, 12], [6, 7, 8], [13, -100, -100]]
    assert batch["predictors"].tolist() == [[2, 3, 0], [8, 9, 10], [2, 5, 6], [8, 0, 0]]
    assert batch["num_labelled"] == 9 and "token_weights" not in batch


def test_a_pair_a_row():
    batch = PackedCollator(0, packed=False)(PAIRS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    assert batch["layout"][1, 0, 5:].tolist() == [[slot, slot, slot, 0] for slot in (5, 6, 7)]  # padding sees itself
    assert batch["predictors"].tolist() == [[2, 3, 0], [8, 9, 10], [2, 5, 6], [8, 0, 0]]


def test_without_shared_prefix():
    batch = PackedCollator(0, shared_prefix=False)(PAIRS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 9, 13]]
    assert batch["layout"][0, 0, :, 2].tolist() == [0] * 5 + [5] * 6 + [11] * 4 + [15] * 2
    assert batch["predictors"].tolist() == [[2, 3, 0], [11, 12, 13], [7, 8, 9], [15, 0, 0]]


@pytest.mark.parametrize("options", [{}, {"packed": False}, {"shared_prefix": False}], ids=str)
def test_it_counts_as_the_padded_batch_does(options):
    """Tokens without a prompt, without weight, and what examples carry."""
    examples = [
        {"prompt_ids": [], "chosen_ids": [4, 5], "rejected_ids": [9], "weight": 2.0},
        {"prompt_ids": [3], "chosen_ids": [6, 7], "rejected_ids": [8], "weight": 1, "chosen_token_weights": [0, 0.5]},
    ]
    for n, example in enumerate(examples):
        example |= {"index": n, "ref_chosen_logps": -1.0 - n, "ref_rejected_logps": -3.0}
    padded, packed = PairCollator(0)(examples), PackedCollator(0, **options)(examples)
    assert packed["num_labelled"] == padded["num_labelled"] == 3
    shifted = padded["labels"][:, 1:]
    assert (packed["labels"] != -100).sum(1).tolist() == (shifted != -100).sum(1).tolist()
    for name in ("pair_weights", "ref_logps", "index"):
        assert torch.equal(packed[name], padded[name])
    weights = [[w for w in row if w] for row in packed["token_weights"].tolist()]
    assert weights == [[w for w in row if w] for row in padded["token_weights"][:, 1:].tolist()]


def test_a_multiple():
    assert PackedCollator(0, pad_to_multiple_of=8)(PAIRS)["input_ids"].shape == (1, 16)


NEGATIVE = {"prompt_ids": [-1], "chosen_ids": [1], "rejected_ids": [1]}


@pytest.mark.parametrize(("example", "message"), [({}, "missing"), (NEGATIVE, "prompt_ids")])
def test_bad_examples_are_named(example, message):
    with pytest.raises(ValueError, match=rf"examples\[0\].*{message}"):
        PackedCollator(0)([example])


RANKING = {"prompt_ids": [1, 2], "response_ids": [[3], [4, 5], [6]], "pairs": [[0, 1], [0, 2], [1, 2]]}


def test_a_ranking_is_one_group():
    batch = PackedCollator(0)([RANKING, PAIRS[1]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2, 3, 2, 0, 1, 2, 3, 1]]
    prompt_begin, prompt_end, begin, _ = batch["layout"][0, 0].T.tolist()
    assert prompt_begin == [0] * 6 + [6] * 5
    assert prompt_end == [0, 0] + [2] * 4 + [6] + [7] * 4
    assert begin == [0, 0, 2, 3, 3, 5, 6, 7, 7, 7, 10]
    assert batch["labels"].tolist() == [[3, -100, -100], [4, 5, -100], [6, -100, -100], [10, 11, 12], [13, -100, -100]]
    assert batch["predictors"].tolist() == [[1, 0, 0], [1, 3, 0], [1, 0, 0], [6, 7, 8], [6, 0, 0]]
    assert batch["pairs"] == [(0, 1), (0, 2), (1, 2), (3, 4)]
    assert batch["num_labelled"] == 8


def test_a_ranking_a_row_and_with_its_prompt_each_time():
    rows = PackedCollator(0, packed=False)([RANKING, PAIRS[1]])
    assert rows["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6], [9, 10, 11, 12, 13, 0]]
    whole = PackedCollator(0, shared_prefix=False)([RANKING])
    assert whole["input_ids"].tolist() == [[1, 2, 3, 1, 2, 4, 5, 1, 2, 6]]
    assert whole["predictors"].tolist() == [[1, 0], [4, 5], [8, 0]]
