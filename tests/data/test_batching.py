"""PairCollator: one right-padded batch, chosen rows before rejected ones."""

import numpy as np
import pytest
import torch

from dpo_kernels.data.batching import PairCollator

PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6], "index": 7},
    {"prompt_ids": [8], "chosen_ids": [9], "rejected_ids": [10, 11, 12], "index": 3},
]


def test_batch():
    batch = PairCollator(pad_token_id=0)(PAIRS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [8, 9, 0, 0, 0], [1, 2, 3, 6, 0], [8, 10, 11, 12, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    x = -100
    assert batch["labels"].tolist() == [[x, x, x, 4, 5], [x, 9, x, x, x], [x, x, x, 6, x], [x, 10, 11, 12, x]]
    assert batch["num_labelled"] == 7 and isinstance(batch["num_labelled"], int)
    assert batch["index"].tolist() == [7, 3]
    assert all(batch[key].dtype == torch.int64 for key in ("input_ids", "attention_mask", "labels", "index"))
    assert "ref_logps" not in batch


def test_padding_ids_inside_a_response_are_labels():
    batch = PairCollator(pad_token_id=0)([{"prompt_ids": [1], "chosen_ids": [0, 2], "rejected_ids": [0]}])
    assert batch["labels"].tolist() == [[-100, 0, 2], [-100, 0, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert "index" not in batch


def test_num_labelled_leaves_out_a_first_token_that_nothing_predicts():
    batch = PairCollator(pad_token_id=0)([{"prompt_ids": [], "chosen_ids": [1, 2], "rejected_ids": [3]}])
    assert batch["num_labelled"] == int((batch["labels"][:, 1:] != -100).sum()) == 1


@pytest.mark.parametrize(("multiple", "length"), [(None, 5), (1, 5), (5, 5), (8, 8)])  # below, at and above the length
def test_pad_to_multiple_of(multiple, length):
    batch = PairCollator(pad_token_id=0, pad_to_multiple_of=multiple, ignore_index=-1)(PAIRS)
    assert batch["input_ids"].shape == batch["labels"].shape == (4, length)
    assert batch["num_labelled"] == int((batch["labels"][:, 1:] != -1).sum()) == 7


def test_reference_logps_are_chosen_before_rejected():
    pairs = [{**pair, "ref_chosen_logps": -1.0 - i, "ref_rejected_logps": -11.0 - i} for i, pair in enumerate(PAIRS)]
    batch = PairCollator(pad_token_id=0)(pairs)
    assert batch["ref_logps"].tolist() == [-1.0, -2.0, -11.0, -12.0]
    assert batch["ref_logps"].dtype == torch.float32


def weighted(number, **weights):
    return {**PAIRS[number], **weights}


def test_labels_are_where_weights_are_not_0():
    pairs = [weighted(0, chosen_token_weights=[0, 1]), weighted(1, rejected_token_weights=[1.0, 0.0, 1.0])]
    batch = PairCollator(pad_token_id=0)(pairs)
    x = -100
    assert batch["labels"].tolist() == [[x, x, x, x, 5], [x, 9, x, x, x], [x, x, x, 6, x], [x, 10, x, 12, x]]
    assert batch["num_labelled"] == int((batch["labels"][:, 1:] != x).sum()) == 5
    assert "token_weights" not in batch  # the labels say it
    whole = PairCollator(pad_token_id=0)(PAIRS)
    assert all(torch.equal(batch[key], whole[key]) for key in ("input_ids", "attention_mask"))


def test_token_weights_stand_beside_the_labels():
    pairs = [weighted(0, chosen_token_weights=[0.5, 0], rejected_token_weights=[2]), PAIRS[1]]
    batch = PairCollator(pad_token_id=0, pad_to_multiple_of=8)(pairs)
    expected = [[0, 0, 0, 0.5, 0], [0, 1, 0, 0, 0], [0, 0, 0, 2, 0], [0, 1, 1, 1, 0]]
    assert batch["token_weights"].tolist() == [[*row, 0, 0, 0] for row in expected]
    assert batch["token_weights"].dtype == torch.float32
    assert torch.equal(batch["token_weights"] != 0, batch["labels"] != -100)
    assert batch["num_labelled"] == 6


@pytest.mark.parametrize("ones", [None, [1, 1], [1.0, 1.0], torch.ones(2)])
def test_weights_of_1_are_as_good_as_none(ones):
    batch, expected = PairCollator(0)([weighted(0, chosen_token_weights=ones), PAIRS[1]]), PairCollator(0)(PAIRS)
    assert batch.keys() == expected.keys() and torch.equal(batch["labels"], expected["labels"])


def test_a_first_token_without_a_prompt_has_a_weight_but_no_prediction():
    pair = {"prompt_ids": [], "chosen_ids": [1, 2], "rejected_ids": [3], "chosen_token_weights": [0.5, 0]}
    batch = PairCollator(pad_token_id=0)([pair])
    assert batch["num_labelled"] == 0 and batch["token_weights"].tolist() == [[0.5, 0], [1, 0]]


def test_weights_of_pairs():
    batch = PairCollator(pad_token_id=0)([weighted(0, weight=0), weighted(1, weight=2.5)])
    assert batch["pair_weights"].tolist() == [0, 2.5] and batch["pair_weights"].dtype == torch.float32
    assert "pair_weights" not in PairCollator(pad_token_id=0)(PAIRS)
    assert batch["num_labelled"] == 7  # a pair's weight is the loss's affair


def test_tensors_are_taken_as_well_as_lists():
    tensors = [{key: torch.tensor(value) for key, value in pair.items()} for pair in PAIRS]
    batch, expected = PairCollator(pad_token_id=0)(tensors), PairCollator(pad_token_id=0)(PAIRS)
    assert all(torch.equal(batch[key], expected[key]) for key in ("input_ids", "labels", "index"))


def test_arrays_and_tensors_without_tokens_are_taken():
    pairs = [{**PAIRS[0], "chosen_ids": np.array([4, 5], dtype=np.int32), "index": np.int64(7)}]
    pairs += [{**PAIRS[1], "rejected_ids": torch.tensor([10, 11, 12], dtype=torch.int32)}]
    batch, expected = PairCollator(pad_token_id=np.int64(0))(pairs), PairCollator(pad_token_id=0)(PAIRS)
    assert all(torch.equal(batch[key], expected[key]) for key in ("input_ids", "labels", "index"))
    for nothing in ([], (), torch.tensor([]), np.array([])):
        batch = PairCollator(0)([{"prompt_ids": nothing, "chosen_ids": [1], "rejected_ids": [2]}])
        assert batch["input_ids"].tolist() == [[1], [2]]


WRONG_IDS = ["abc", None, 5, [1.5], [1.0], [-1], [0, -1], [True, False], ["a"], [None], [[1]], [2**63], {"a": 1}]


@pytest.mark.parametrize("wrong", [*WRONG_IDS, torch.tensor([1.5]), np.array([-1])], ids=str)
@pytest.mark.parametrize("key", ["prompt_ids", "chosen_ids", "rejected_ids"])
def test_token_ids_are_whole_numbers(key, wrong):
    with pytest.raises(ValueError, match=rf"^examples\[1\]: {key}: expected a list of token ids, .* at least 0, got "):
        PairCollator(pad_token_id=0)([PAIRS[0], {**PAIRS[1], key: wrong}])


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (None, "examples: expected at least one pair, got none"),
        (PAIRS[0], "examples: expected a list of pairs, got dict"),
        (3, "examples: expected a list of pairs, got int"),
        (iter(PAIRS), "examples: expected a list of pairs, got list_iterator"),
        ([PAIRS[0], 3], r"examples\[1\]: expected a pair, a mapping with the keys prompt_ids, .*, got 3"),
        ("abc", r"examples\[0\]: expected a pair, .*, got 'a'"),
    ],
)
def test_examples_are_a_list_of_pairs(examples, message):
    with pytest.raises(ValueError, match=message):
        PairCollator(pad_token_id=0)(examples)


LOGPS = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": "a"}, "weight: expected a finite number >= 0, got 'a'"),
        ({"weight": "1"}, "weight: expected a finite number >= 0, got '1'"),
        ({"weight": None}, "weight: expected a finite number >= 0, got None"),
        ({"weight": True}, "weight: expected a finite number >= 0, got True"),
        ({"weight": [1.0]}, r"weight: expected a finite number >= 0, got \[1.0\]"),
        ({**LOGPS, "ref_chosen_logps": None}, "ref_chosen_logps: expected a number, got None"),
        ({**LOGPS, "ref_rejected_logps": "x"}, "ref_rejected_logps: expected a number, got 'x'"),
        ({"index": None}, "index: expected a whole number, got None"),
        ({"index": 1.5}, "index: expected a whole number, got 1.5"),
        ({"index": "7"}, "index: expected a whole number, got '7'"),
        ({"index": 2**63}, "index: expected a whole number, got 9223372036854775808"),
        ({"chosen_token_weights": "ab"}, "chosen_token_weights: expected a list of finite numbers >= 0, got 'ab'"),
        ({"rejected_token_weights": [None]}, "rejected_token_weights: expected a list of finite .*, got .None."),
        ({"chosen_token_weights": 1.0}, "chosen_token_weights: expected a number for each of the 2 tokens"),
    ],
)
def test_what_belongs_to_a_pair_is_named(given, message):
    with pytest.raises(ValueError, match=rf"^examples\[0\]: {message}"):
        PairCollator(pad_token_id=0)([{**PAIRS[0], **given}])


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "at least one pair"),
        ([PAIRS[0], {"prompt_ids": [1], "chosen_ids": [2]}], r"examples\[1\].*missing rejected_ids"),
        ([PAIRS[0], {"prompt_ids": [], "chosen_ids": [2], "rejected_ids": []}], r"examples\[1\].*empty sequence"),
        ([PAIRS[0], {k: v for k, v in PAIRS[1].items() if k != "index"}], "index in every pair or in none, got 1 of 2"),
        ([{**PAIRS[0], "ref_chosen_logps": 0.0}], "ref_chosen_logps and ref_rejected_logps"),
        ([weighted(0, weight=1), PAIRS[1]], "weight in every pair or in none, got 1 of 2"),
        (
            [weighted(0, weight=1), weighted(1, weight=-1)],
            r"examples\[1\]: weight: expected a finite number >= 0, got -1",
        ),
        ([weighted(0, weight=float("nan"))], r"examples\[0\]: weight: expected .* got nan"),
        (
            [PAIRS[0], weighted(1, rejected_token_weights=[1.0])],
            r"examples\[1\]: rejected_token_weights: .* the 3 tokens",
        ),
        ([weighted(0, chosen_token_weights=[1.0, -1.0])], r"examples\[0\]: chosen_token_weights: expected finite"),
        (
            [weighted(0, chosen_token_weights=[1.0, float("inf")])],
            r"examples\[0\]: chosen_token_weights: expected finite",
        ),
    ],
)
def test_errors_name_the_example_and_the_key(examples, message):
    with pytest.raises(ValueError, match=message):
        PairCollator(pad_token_id=0)(examples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_token_id": None}, "pad_token_id.*None"),
        ({"pad_token_id": -1}, "pad_token_id: expected a token id .*, got -1"),
        ({"pad_token_id": True}, "pad_token_id: expected a token id .*, got True"),
        ({"pad_token_id": "0"}, "pad_token_id: expected a token id .*, got '0'"),
        ({"pad_token_id": 0, "pad_to_multiple_of": 0}, "pad_to_multiple_of.*0"),
        ({"pad_token_id": 0, "pad_to_multiple_of": "8"}, "pad_to_multiple_of: .* above 0, got '8'"),
        ({"pad_token_id": 0, "pad_to_multiple_of": True}, "pad_to_multiple_of: .* above 0, got True"),
        ({"pad_token_id": 0, "pad_to_multiple_of": 8.0}, "pad_to_multiple_of: .* above 0, got 8.0"),
        ({"pad_token_id": 0, "ignore_index": 0}, "ignore_index.*0"),
        ({"pad_token_id": 0, "ignore_index": None}, "ignore_index: expected a whole number below 0, .*, got None"),
        ({"pad_token_id": 0, "ignore_index": -1.0}, "ignore_index: expected a whole number below 0, .*, got -1.0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PairCollator(**options)


RANKING = {"prompt_ids": [1, 2], "response_ids": [[3], [4, 5], [6]], "pairs": [[0, 1], [0, 2]]}
PLAIN = {"prompt_ids": [7], "chosen_ids": [8, 9], "rejected_ids": [10]}


def test_rankings_lie_one_after_the_other_and_pairs_among_them():
    batch = PairCollator(0)([RANKING, PLAIN])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [1, 2, 4, 5], [1, 2, 6, 0], [7, 8, 9, 0], [7, 10, 0, 0]]
    assert batch["labels"][1].tolist() == [-100, -100, 4, 5]
    assert batch["pairs"] == [(0, 1), (0, 2), (3, 4)]
    assert batch["num_labelled"] == 7 and not {"pair_weights", "ref_logps"} & batch.keys()


def test_what_rankings_carry():
    ranking = RANKING | {"weight": 0.5, "ref_logps": [-1, -2, -3], "index": 4}
    ranking |= {"response_token_weights": [None, [0, 0.5], [1.0]]}
    plain = PLAIN | {"weight": 2.0, "ref_chosen_logps": -4, "ref_rejected_logps": -5, "index": 9}
    batch = PairCollator(0)([ranking, plain])
    assert batch["pair_weights"].tolist() == [0.5, 0.5, 2.0] and batch["group_weights"].tolist() == [0.5, 2.0]
    assert batch["ref_logps"].tolist() == [-1, -2, -3, -4, -5] and batch["index"].tolist() == [4, 9]
    assert batch["token_weights"][:3].tolist() == [[0, 0, 1, 0], [0, 0, 0, 0.5], [0, 0, 1, 0]]
    assert batch["labels"][1].tolist() == [-100, -100, -100, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_ids": [[1]]}, r"response_ids: expected a list, one entry for each of two or more responses"),
        ({"response_ids": "ab"}, "response_ids: expected a list"),
        ({"response_ids": [[1], [2], [-3]]}, r"response 2: expected a list of token ids.*\[-3\]"),
        ({"response_ids": [[1], [2], 3]}, "response 2: expected a list of token ids"),
        ({"pairs": [[0, 1]]}, r"pairs: expected every response in some pair, got none with response 2"),
        ({"pairs": [[0, 3]]}, r"pairs: expected pairs \(chosen, rejected\) of two different responses from 0 to 2"),
        ({"pairs": []}, "pairs: expected pairs"),
        (
            {"response_ids": [[1], [2], [3], [4]], "pairs": [[0, 1], [2, 3]]},
            "pairs: expected pairs that connect all 4 responses",
        ),
        ({"response_token_weights": [None]}, "response_token_weights: expected a list, one entry for each of 3"),
        ({"response_token_weights": [None, [1.0], None]}, "token weights of response 1: expected a number for each of"),
        ({"ref_logps": [1.0]}, "ref_logps: expected a list, one entry for each of 3 responses"),
        ({"ref_logps": [1.0, "x", 2.0]}, "ref_logps: expected a number, got 'x'"),
        ({"prompt_ids": [], "response_ids": [[1], [], [2]]}, "expected token ids, got an empty sequence"),
    ],
)
def test_bad_rankings_are_named(change, message):
    with pytest.raises(ValueError, match=rf"examples\[1\]: {message}"):
        PairCollator(0)([PLAIN, RANKING | change])


def test_arrays_and_tensors_are_lists_too():
    expected = PairCollator(0)([RANKING | {"ref_logps": [-1.0, -2.0, -3.0]}])
    for kind in (np.array, torch.tensor):
        given = RANKING | {"pairs": kind(RANKING["pairs"]), "ref_logps": kind([-1.0, -2.0, -3.0])}
        found = PairCollator(0)([given | {"response_ids": [kind(ids) for ids in RANKING["response_ids"]]}])
        assert found["pairs"] == expected["pairs"] and torch.equal(found["input_ids"], expected["input_ids"])
        assert torch.equal(found["ref_logps"], expected["ref_logps"])
    square = PairCollator(0)([{"prompt_ids": [1], "response_ids": np.array([[3, 4], [5, 6]]), "pairs": [[0, 1]]}])
    assert square["input_ids"].tolist() == [[1, 3, 4], [1, 5, 6]]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (RANKING | {"chosen_ids": [1]}, "expected a ranking, with prompt_ids, response_ids, pairs, got chosen_ids too"),
        (RANKING | {"ref_chosen_logps": -1.0}, "expected a ranking, .*, got ref_chosen_logps too"),
        (PLAIN | {"ref_logps": [-1.0, -2.0]}, "expected a pair, with .*, got ref_logps too"),
    ],
)
def test_an_example_of_both_kinds_is_named(example, message):
    with pytest.raises(ValueError, match=rf"examples\[0\]: {message}"):
        PairCollator(0)([example])


def test_a_ranking_without_pairs_is_named():
    with pytest.raises(
        ValueError, match=r"examples\[0\]: expected the keys prompt_ids, response_ids, pairs, missing pairs"
    ):
        PairCollator(0)([{"prompt_ids": [1], "response_ids": [[1], [2]]}])
    with pytest.raises(ValueError, match="expected ref_logps of every response or of none, got 2 of 5"):
        PairCollator(0)([RANKING, PLAIN | {"ref_chosen_logps": -4, "ref_rejected_logps": -5}])
