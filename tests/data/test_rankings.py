"""Pairs of a ranking as one row: every pair once, every response once, and what does not go together apart."""

import json
from collections import Counter
from itertools import combinations

import chat_templates as families
import datasets
import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_kernels.data import group_rankings
from dpo_kernels.data.loading import load_preferences, split_train_eval
from dpo_kernels.data.tokenization import _fit, tokenize_preferences


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return families.tokenizer()


def pair(chosen, rejected, group=None, prompt=(1, 2), **more):
    """A pair; with a group `chosen` and `rejected` are places, and the response of place n is [10 + n] * 2."""
    responses = {"chosen_ids": chosen, "rejected_ids": rejected}
    if group is not None:
        responses = {key: [10 + place] * 2 for key, place in responses.items()}
        more = {"members": [chosen, rejected], **more}
    return {"prompt_ids": list(prompt), **responses, "group": group, "members": None, **more}


def grouped(*pairs):
    names = dict.fromkeys(name for one in pairs for name in one)
    rows = Dataset.from_list([{**dict.fromkeys(names), **one} for one in pairs])
    without = [name for name in names if name in ("group", "members") and not any(one[name] for one in pairs)]
    return group_rankings(rows.remove_columns(without))[:]


def split_again(rows):
    """All pairs that grouped rows stand for, as often as they are there."""
    return Counter(
        (tuple(responses[chosen]), tuple(responses[rejected]))
        for responses, pairs in zip(rows["response_ids"], rows["pairs"], strict=True)
        for chosen, rejected in pairs
    )


# One ranking


def test_all_pairs_of_a_ranking_are_one_row():
    rows = grouped(*(pair(i, j, "a", index=7 + i + j) for i, j in combinations(range(3), 2)))
    assert rows == {
        "index": [8],
        "prompt_ids": [[1, 2]],
        "response_ids": [[[10, 10], [11, 11], [12, 12]]],
        "pairs": [[[0, 1], [0, 2], [1, 2]]],
    }


def test_a_plain_pair_is_a_ranking_of_two():
    rows = grouped(pair([3], [4, 5], index=0), pair([3], [4, 5], index=1))
    assert rows["response_ids"] == [[[3], [4, 5]]] * 2 and rows["pairs"] == [[[0, 1]]] * 2 and rows["index"] == [0, 1]


def test_types_of_the_columns():
    (row,) = group_rankings(Dataset.from_list([pair(0, 1, "a", weight=2, index=0)])).with_format("arrow")
    assert {name: str(kind) for name, kind in zip(row.column_names, row.schema.types, strict=True)} == {
        "index": "int64",
        "prompt_ids": "list<item: int32>",
        "response_ids": "list<item: list<item: int32>>",
        "pairs": "list<item: list<item: int64>>",
        "weight": "double",
    }


def test_rankings_come_in_the_order_of_their_first_pairs():
    rows = grouped(
        pair(0, 1, "b", index=0), pair([3], [4], index=1), pair(0, 1, "a", index=2), pair(0, 2, "b", index=3)
    )
    assert rows["index"] == [0, 1, 2] and rows["pairs"] == [[[0, 1], [0, 2]], [[0, 1]], [[0, 1]]]


def test_responses_of_no_pair_are_left_out():
    rows = grouped(pair(4, 6, "a"), pair(1, 6, "a"))
    assert rows["response_ids"] == [[[11, 11], [14, 14], [16, 16]]]
    assert rows["pairs"] == [[[1, 2], [0, 2]]]


def test_pairs_that_do_not_hang_together_are_rows_of_their_own():
    rows = grouped(*(pair(i, j, "a", index=n) for n, (i, j) in enumerate([(0, 3), (1, 2), (5, 6), (1, 4), (2, 4)])))
    assert rows["pairs"] == [[[0, 1]], [[0, 1], [0, 2], [1, 2]], [[0, 1]]] and rows["index"] == [0, 1, 2]
    assert rows["response_ids"][1] == [[11, 11], [12, 12], [14, 14]]
    rows = grouped(*(pair(i, j, "a") for i, j in [(0, 3), (1, 2), (0, 2)]))  # the last one joins them
    assert rows["pairs"] == [[[0, 3], [1, 2], [0, 2]]]


def test_a_part_has_the_prompt_of_its_own_pairs():
    rows = grouped(pair(0, 1, "a", prompt=[1, 2, 3]), pair(2, 3, "a", prompt=[3]), pair(1, 4, "a", prompt=[2, 3]))
    assert rows["prompt_ids"] == [[2, 3], [3]]


# What is there twice, or does not go together


@pytest.mark.parametrize("copies", [2, 3])
def test_copies_of_pairs_are_copies_of_the_ranking(copies):
    pairs = [pair(i, j, "a") for i, j in combinations(range(3), 2)]
    rows = grouped(*pairs * copies, pairs[1])
    assert rows["pairs"] == [[[0, 1], [0, 2], [1, 2]]] * copies + [[[0, 1]]]
    assert rows["response_ids"][-1] == [[10, 10], [12, 12]]
    rows = grouped(*(one for one in pairs for _ in range(copies)))
    assert rows["pairs"] == [[[0, 1], [0, 2], [1, 2]]] * copies


@pytest.mark.parametrize("other", [[9, 2], [1, 2, 3], [3], [1, 3]], ids=str)
def test_another_prompt_is_another_row(other):
    rows = grouped(pair(0, 1, "a"), pair(0, 2, "a", prompt=other), pair(1, 2, "a"), pair(0, 3, "a", prompt=other))
    assert rows["prompt_ids"] == [[1, 2], other] and rows["pairs"] == [[[0, 1], [1, 2]], [[0, 1], [0, 2]]]
    assert rows["response_ids"][1] == [[10, 10], [12, 12], [13, 13]]


def test_another_response_under_the_same_place_is_another_row():
    rows = grouped(pair(0, 1, "a"), pair(0, 2, "a", chosen_ids=[77]), pair(1, 2, "a"))
    assert rows["response_ids"] == [[[10, 10], [11, 11], [12, 12]], [[77], [12, 12]]]
    assert rows["pairs"] == [[[0, 1], [1, 2]], [[0, 1]]]


def test_another_weight_is_another_row():
    rows = grouped(pair(0, 1, "a", weight=2.0), pair(0, 2, "a", weight=0.5), pair(1, 2, "a", weight=2.0))
    assert rows["weight"] == [2.0, 0.5] and rows["pairs"] == [[[0, 1], [1, 2]], [[0, 1]]]
    assert "weight" not in grouped(pair(0, 1, "a"))
    assert grouped(pair([3], [4], weight=2.0), pair([3], [4]))["weight"] == [2.0, 1.0]


def test_token_weights():
    rows = grouped(
        pair(0, 1, "a", chosen_token_weights=[0.0, 1.0], rejected_token_weights=[1.0, 1.0]),
        pair(1, 2, "a", rejected_token_weights=[0.5, 2.0]),
        pair([3], [4, 5, 6]),
    )
    assert rows["response_token_weights"] == [[[0.0, 1.0], [1.0, 1.0], [0.5, 2.0]], [[1.0], [1.0] * 3]]
    other = grouped(pair(0, 1, "a"), pair(0, 2, "a", chosen_token_weights=[0.0, 1.0]))
    assert other["pairs"] == [[[0, 1]], [[0, 1]]]  # the same response, labelled otherwise
    assert "response_token_weights" not in grouped(pair(0, 1, "a"))


# Prompts that were cut


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([[1, 5, 6, 7], [1, 6, 7], [1, 7]], [[1, 7]]),  # behind BOS
        ([[1, 7], [1, 6, 7], [1, 5, 6, 7]], [[1, 7]]),
        ([[1, 6, 7], [7], [1, 5, 6, 7]], [[7]]),
        ([[4, 5, 6], [5, 6], [6]], [[6]]),
        ([[1, 5, 6, 7], [1, 5, 6], [1, 5, 6, 7]], [[1, 5, 6, 7], [1, 5, 6]]),  # another end
    ],
)
def test_the_shortest_prompt_of_a_ranking(prompts, expected):
    rows = grouped(*(pair(0, n + 1, "a", prompt=prompt) for n, prompt in enumerate(prompts)))
    assert rows["prompt_ids"] == expected
    assert sum(map(len, rows["pairs"])) == 3


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    prompt_length=st.integers(1, 10),
    max_length=st.integers(2, 16),
    has_bos=st.booleans(),
    truncation=st.sampled_from(["prompt_start", "response_end", "drop"]),
)
def test_truncated_pairs_of_a_ranking_are_one_row_that_fits(lengths, prompt_length, max_length, has_bos, truncation):
    prompt = list(range(1, prompt_length + 1))
    responses = [list(range(100 * (n + 1), 100 * (n + 1) + length)) for n, length in enumerate(lengths)]
    kept = []
    for members in combinations(range(len(lengths)), 2):
        ids = (prompt, *(responses[place] for place in members))
        (cut, *both), _, dropped = _fit(ids, has_bos, max_length, truncation)
        if not dropped:
            kept.append({"prompt_ids": cut, "chosen_ids": both[0], "rejected_ids": both[1]} | {"members": members})
    if not kept:
        return
    dataset = Dataset.from_list([{**row, "members": list(row["members"]), "group": "a"} for row in kept])
    (row,) = group_rankings(dataset)
    places = sorted({place for pair in kept for place in pair["members"]})
    assert [places[n] for pair in row["pairs"] for n in pair] == [n for pair in kept for n in pair["members"]]
    assert row["prompt_ids"] == min((pair["prompt_ids"] for pair in kept), key=len)
    assert len(row["prompt_ids"]) + max(map(len, row["response_ids"])) <= max_length
    assert all(responses[place][: len(ids)] == ids for place, ids in zip(places, row["response_ids"], strict=True))


# From files


def ranking(prompt, *answers):
    return {"prompt": prompt, "answers": [{"answer": text, "rank": rank} for rank, text in answers]}


def tokens(rows, tokenizer, *, ranked_pairs="all_pairs", **options):
    rows = rows if isinstance(rows, Dataset) else load_preferences(Dataset.from_list(rows), ranked_pairs=ranked_pairs)
    return tokenize_preferences(rows, tokenizer, **options)[0]


def decoded(row, tokenizer):
    return [tokenizer.decode(ids) for ids in row["response_ids"]]


@pytest.mark.parametrize("ranked_pairs", ["best_vs_worst", "best_vs_each", "all_pairs"])
def test_nectar(tokenizer, ranked_pairs):
    rows = [ranking("q", (2, "yes"), (1, "no"), (2, "maybe"), (3, "never")), ranking("r", (1, "yes"), (2, "no"))]
    pairs = tokens(rows, tokenizer, ranked_pairs=ranked_pairs)
    first, second = group_rankings(pairs)
    answers = {"best_vs_worst": "no never"}.get(ranked_pairs, "no yes maybe never").split()
    assert decoded(first, tokenizer) == [f"{answer}<|im_end|>\n" for answer in answers]
    expected = {"best_vs_worst": [[0, 1]], "best_vs_each": [[0, 1], [0, 2], [0, 3]]}
    assert first["pairs"] == expected.get(ranked_pairs, [[0, 1], [0, 2], [0, 3], [1, 3], [2, 3]])
    assert decoded(second, tokenizer) == ["yes<|im_end|>\n", "no<|im_end|>\n"] and second["pairs"] == [[0, 1]]
    both = zip(pairs["chosen_ids"], pairs["rejected_ids"], strict=True)
    assert split_again(group_rankings(pairs)[:]) == Counter((tuple(a), tuple(b)) for a, b in both)


def test_openassistant(tokenizer):
    def message(name, parent, role, text, rank=None):
        return {"message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank}

    rows = [
        message("p", None, "prompter", "q"),
        *(message(f"a{n}", "p", "assistant", f"answer {n}", float(n)) for n in (2, 0, 1)),
        message("f", "a1", "prompter", "and?"),
        *(message(f"b{n}", "f", "assistant", f"more {n}", n) for n in range(2)),
        *(message(f"c{n}", "f", "assistant", f"even {n}", 1) for n in range(2)),
    ]
    first, second = group_rankings(tokens(rows, tokenizer))
    assert decoded(first, tokenizer) == [f"answer {n}<|im_end|>\n" for n in range(3)]
    assert first["pairs"] == [[0, 1], [0, 2], [1, 2]]
    assert decoded(second, tokenizer) == [f"{text}<|im_end|>\n" for text in ("more 0", "more 1", "even 0", "even 1")]
    assert second["pairs"] == [[0, 1], [0, 2], [0, 3]]
    assert "answer 1" in tokenizer.decode(second["prompt_ids"])


def test_dropped_pairs_leave_their_responses_out(tokenizer):
    answers = [(1, "yes"), (2, "no"), (3, "no"), (4, "no " * 200), (5, " ")]
    loaded = load_preferences(
        Dataset.from_list([ranking("q", *answers)]), ranked_pairs="all_pairs", empty_response="drop"
    )
    with pytest.warns(UserWarning, match="2 of 10 preference pairs kept"):
        pairs = tokens(loaded, tokenizer, max_length=60, truncation="drop")
    (row,) = group_rankings(pairs)
    assert decoded(row, tokenizer) == ["yes<|im_end|>\n", "no<|im_end|>\n", "no<|im_end|>\n"]
    assert row["pairs"] == [[0, 1], [0, 2]]


def test_the_chosen_response_among_the_rejected(tokenizer):
    row = {"prompt": "Say:", "chosen": " a", "rejected": [" b", " a", " c"]}
    with pytest.warns(UserWarning, match="identical"):
        pairs = tokens([row], tokenizer)
    (row,) = group_rankings(pairs)
    assert decoded(row, tokenizer) == [f" {text}<|im_end|>" for text in "abc"] and row["pairs"] == [[0, 1], [0, 2]]


def test_prompts_cut_for_each_pair_are_one_prompt(tokenizer):
    rows = [ranking("word " * 40, (1, "a"), (2, "b " * 9), (3, "c " * 30)), ranking("q", (1, "a"), (2, "b"), (3, "c"))]
    pairs = tokens(rows, tokenizer, max_length=60)
    assert len({len(prompt) for prompt in pairs["prompt_ids"][:3]}) == 2
    first, _ = group_rankings(pairs)
    assert first["pairs"] == [[0, 1], [0, 2], [1, 2]]
    assert first["prompt_ids"] == min(pairs["prompt_ids"][:3], key=len)
    assert len(first["prompt_ids"]) + max(map(len, first["response_ids"])) == 60


def test_a_mixture_with_plain_pairs(tokenizer, tmp_path):
    chat = {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}
    one, other = (
        load_preferences(Dataset.from_list([ranking(name, (1, "x"), (2, "y"), (3, "z"))]), ranked_pairs="all_pairs")
        for name in "pq"
    )
    plain = Dataset.from_list([chat])
    mixed = load_preferences([one, plain, other], weights=[1, 1, 2])
    rows = group_rankings(tokens(mixed, tokenizer))[:]
    assert rows["pairs"] == [[[0, 1], [0, 2], [1, 2]], [[0, 1]], *[[[0, 1], [0, 2], [1, 2]]] * 2]
    assert rows["index"] == [0, 3, 4, 7]
    assert rows["prompt_ids"][0] != rows["prompt_ids"][2] == rows["prompt_ids"][3]


def test_weights_from_the_rows(tokenizer):
    turn = {"role": "assistant", "content": "a", "weight": 0.5}
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": [turn], "rejected": ["b", "c"], "weight": 3}
    pairs = tokens([json.loads(json.dumps(row)), {**row, "weight": 1}], tokenizer)
    rows = group_rankings(pairs)[:]
    assert rows["weight"] == [3.0, 1.0] and rows["pairs"] == [[[0, 1], [0, 2]]] * 2
    chosen, *rejected = rows["response_token_weights"][0]
    assert set(chosen) == {0.5} and all(set(weights) == {1.0} for weights in rejected)
    assert [list(map(len, one)) for one in rows["response_token_weights"]] == [
        list(map(len, one)) for one in rows["response_ids"]
    ]


def test_parts_of_a_split_are_grouped_alike(tokenizer):
    pairs = tokens([ranking(f"q{n}", (1, "a"), (2, "b"), (3, "c")) for n in range(6)], tokenizer)
    train, held_out = split_train_eval(pairs, eval_rows=4)
    assert len(group_rankings(train)) == 4 and len(group_rankings(held_out)) == 2
    assert all(len(own) == 3 for part in (train, held_out) for own in group_rankings(part)["pairs"])


def test_many_pairs_in_any_order():
    """More than a read and a table hold."""
    rows = [pair(0, place, f"ranking {n}", prompt=[n + 1]) for place in (1, 2) for n in range(4200)]
    dataset = Dataset.from_list(rows).select(np.random.default_rng(0).permutation(len(rows)))
    ours = group_rankings(dataset)
    assert len(ours) == 4200 and sorted(ours["prompt_ids"][:]) == [[n + 1] for n in range(4200)]
    assert all(sorted(pairs) == [[0, 1], [0, 2]] for pairs in ours["pairs"][:])
    assert list(dict.fromkeys(prompt[0] for prompt in dataset["prompt_ids"])) == [p[0] for p in ours["prompt_ids"]]
    assert ours._fingerprint == group_rankings(dataset)._fingerprint != dataset._fingerprint


# What is refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ref_chosen_logps": 0.5}, "'ref_chosen_logps' holds what a reference model gives each pair: group first"),
        ({"topic": "x"}, "the column 'topic' has no place in rows of several pairs"),
        ({"prompt_ids": None}, "pairs: row 2: prompt_ids: expected token ids, got null"),
        ({"rejected_ids": []}, "pairs: row 2: rejected_ids: expected token ids, got none"),
        ({"members": None}, "pairs: row 2: members: expected two places, the better one first, got None"),
        ({"members": [1]}, r"row 2: members: expected two places, the better one first, got \[1\]"),
        ({"members": [2, 1]}, r"row 2: members: .* got \[2, 1\]"),
        ({"members": [1, 1]}, r"row 2: members: .* got \[1, 1\]"),
        ({"members": [-1, 1]}, r"row 2: members: .* got \[-1, 1\]"),
        ({"chosen_token_weights": [1.0]}, "row 2: chosen_token_weights: expected a number for each of 2 tokens, got 1"),
    ],
)
def test_unsound_pairs(changed, message):
    first = {**pair(0, 1, "a"), **dict.fromkeys(changed.keys() - pair(0, 1, "a").keys())}
    with pytest.raises(ValueError, match=message):
        group_rankings(Dataset.from_list([first, {**pair(0, 2, "a"), **changed}]))


def test_the_row_of_many_is_named():
    rows = [pair(0, 1, f"ranking {n}") for n in range(1500)]
    for wrong in ({"members": [0, 0]}, {"chosen_ids": []}, {"chosen_token_weights": [1.0]}):
        last = pair(0, 1, "a", **wrong)
        with pytest.raises(ValueError, match="pairs: row 1501: "):
            group_rankings(Dataset.from_list([{**dict.fromkeys(last), **rows[0]}, *rows[1:], last]))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "pairs: expected one split, a datasets.Dataset, got list"),
        (Dataset.from_list([{"prompt": "q"}]), "got prompt, without prompt_ids, chosen_ids, rejected_ids"),
        (Dataset.from_list([pair(0, 1, "a")]).select([]), "pairs: expected one pair or more, got none"),
        (Dataset.from_list([pair(0, 1, "a")]).remove_columns("members"), "expected both of the columns .* got 'group'"),
        (Dataset.from_dict({name: [3] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}), "expected lists of"),
    ],
)
def test_what_is_no_dataset_of_tokenized_pairs(dataset, message):
    with pytest.raises(ValueError, match=message):
        group_rankings(dataset)
