"""Several datasets at once: what is taken of each, that it is the same everywhere, and what is refused."""

import json
import logging
from collections import Counter

import datasets
import numpy as np
import pytest
from datasets import Dataset

from dpo_kernels.data import mixtures
from dpo_kernels.data.loading import from_json_text, is_normalized, load_preferences, split_train_eval


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def text_rows(name, count, **more):
    return [{"prompt": f"{name}{n}", "chosen": "a", "rejected": "b", **more} for n in range(count)]


def chat_rows(name, count, **more):
    def turn(role, content):
        return [{"role": role, "content": content}]

    return [
        {"prompt": turn("user", f"{name}{n}"), "chosen": turn("assistant", "a"), "rejected": turn("assistant", "b")}
        | more
        for n in range(count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs of plain text: five in a.jsonl, four in b.jsonl; and two conversations in chat.jsonl."""
    folder = tmp_path_factory.mktemp("mixture")
    write(folder / "a.jsonl", text_rows("a", 5))
    write(folder / "b.jsonl", text_rows("b", 4))
    write(folder / "chat.jsonl", chat_rows("c", 2))
    write(folder / "weighted.jsonl", text_rows("w", 2, weight=0.5))
    return folder


def prompts(dataset):
    return dataset["prompt"][:]


# Which rows


def plain(name, count):
    return name, np.arange(count)


@pytest.mark.parametrize(
    ("share", "size", "wanted"),
    [
        (1, 5, 5),
        (2, 5, 10),
        (0.5, 4, 2),
        (0.5, 5, 3),
        (1.5, 4, 6),
        (0.1, 30, 3),
        (1.1, 10, 11),
        (0.3, 10, 3),
        (0, 4, 0),
    ],
)
def test_every_row_is_there_as_often_as_its_share_says(share, size, wanted):
    rows = mixtures.rows([plain("a", size)], [share], seed=0)
    counts = np.bincount(rows, minlength=size)
    assert len(rows) == wanted
    assert set(counts) <= {int(share), int(share) + 1}  # nothing twice before everything is there once
    assert all(np.all(np.diff(part) > 0) for part in np.split(rows, np.flatnonzero(np.diff(rows) <= 0) + 1))  # in order


def test_the_random_part_follows_from_seed_and_place_alone():
    first = mixtures.rows([plain("a", 100), plain("b", 7)], [0.5, 1], seed=3)
    assert np.array_equal(first, mixtures.rows([plain("another name", 100), plain("b", 7)], [0.5, 1], seed=3))
    assert np.array_equal(first[:50], mixtures.rows([plain("a", 100), plain("c", 3)], [0.5, 2], seed=3)[:50])
    assert not np.array_equal(first, mixtures.rows([plain("a", 100), plain("b", 7)], [0.5, 1], seed=4))
    both = mixtures.rows([plain("a", 100), plain("b", 100)], [0.5, 0.5], seed=3)
    assert not np.array_equal(both[:50], both[50:] - 100)  # places have choices of their own
    assert first[:8].tolist() == [0, 1, 2, 3, 4, 10, 11, 15]  # in this version and the next


def test_random_halves_are_halves_of_all_rows():
    counts = np.bincount(np.concatenate([mixtures.rows([plain("a", 10)], [0.5], seed) for seed in range(400)]))
    assert np.all(np.abs(counts - 200) < 50)  # five standard deviations


def test_rankings_are_taken_whole():
    units = np.array([0, 0, 0, 1, 2, 2, 3, 1])  # three rankings, one of them apart from itself, and a pair
    for seed in range(20):
        rows = mixtures.rows([plain("a", 3), ("b", units)], [1, 0.5], seed)[3:] - 3
        assert np.all(np.diff(rows) > 0) and len(set(units[rows])) == 2
        assert np.array_equal(rows, np.flatnonzero(np.isin(units, units[rows])))
    rows = mixtures.rows([("b", units)], [2.25], seed=0)
    assert rows[:16].tolist() == [*range(8), *range(8)] and len(set(units[rows[16:]])) == 1
    (chosen,) = set(units[rows[16:]])
    assert rows[16:].tolist() == np.flatnonzero(units == chosen).tolist()


def test_each_ranking_is_as_likely_as_another():
    units = np.repeat(np.arange(10), np.arange(1, 11))
    taken = [np.unique(units[mixtures.rows([("a", units)], [0.5], seed)]) for seed in range(400)]
    counts = np.bincount(np.concatenate(taken))
    assert all(len(each) == 5 for each in taken)
    assert np.all(np.abs(counts - 200) < 50)  # five standard deviations


def test_units_are_rankings_and_pairs_without_one():
    def units(*pairs):
        return mixtures.units(Dataset.from_list([{"group": group, "members": members} for group, members in pairs]))

    a, b = ("a", [0, 1]), ("a", [0, 2])
    assert units(a, b, (None, None), ("b", [0, 1]), (None, None)).tolist() == [0, 0, 1, 2, 3]
    assert units(("b", [0, 1]), a, ("b", [0, 2]), b).tolist() == [0, 1, 0, 1]  # also where they are not side by side
    assert units(a, b, a, b, b).tolist() == [0, 0, 1, 1, 2]  # the ranking's next copy
    assert units(a, a, b, b).tolist() == [0, 1, 0, 1]
    for columns in ({}, {"group": ["a", "a"]}):
        assert mixtures.units(Dataset.from_dict({"prompt": ["q", "q"], **columns})).tolist() == [0, 1]


# Datasets


def test_datasets_come_one_after_the_other(folder):
    mixed = load_preferences([folder / "a.jsonl", str(folder / "b.jsonl")])
    assert prompts(mixed) == [f"a{n}" for n in range(5)] + [f"b{n}" for n in range(4)]
    assert mixed[6]["source"] == f"{folder}/b.jsonl, row 2"
    assert is_normalized(mixed)


def test_weights_of_datasets(folder):
    names = [folder / "a.jsonl", folder / "b.jsonl"]
    mixed = load_preferences(names, weights=[1, 0.5], seed=5)
    assert prompts(mixed)[:5] == [f"a{n}" for n in range(5)] and len(mixed) == 7
    assert set(prompts(mixed)[5:]) < {f"b{n}" for n in range(4)}
    again = load_preferences(names, weights=[1.0, 0.5], seed=5)
    assert again[:] == mixed[:] and again._fingerprint == mixed._fingerprint
    twice = load_preferences(names, weights=(2, 1.25))
    assert sorted(prompts(twice)[:10]) == sorted([f"a{n}" for n in range(5)] * 2) and len(twice) == 15
    fingerprints = {
        load_preferences(names, weights=weights, seed=seed)._fingerprint
        for weights, seed in ((None, 0), ([1, 0.5], 0), ([1, 0.5], 1), ([0.5, 1], 0))
    }
    assert len(fingerprints) == 4


def test_a_single_dataset_may_have_a_weight(folder):
    assert len(load_preferences(folder / "b.jsonl", weights=[0.5])) == 2
    assert prompts(load_preferences([folder / "b.jsonl"])) == prompts(load_preferences(folder / "b.jsonl"))


def test_a_weight_of_zero_leaves_a_dataset_out_and_says_so(folder):
    with pytest.warns(UserWarning, match="a.jsonl: left out whole: its weight is 0"):
        mixed = load_preferences([folder / "a.jsonl", folder / "b.jsonl"], weights=[0, 0.5], seed=5)
    assert (
        prompts(mixed)
        == prompts(load_preferences([folder / "a.jsonl", folder / "b.jsonl"], weights=[1, 0.5], seed=5))[5:]
    )


def test_pairs_of_a_prompt_are_held_out_together_however_often_they_are_there(folder):
    mixed = load_preferences([folder / "a.jsonl", folder / "b.jsonl"], weights=[3, 1])
    train, held_out = split_train_eval(mixed, eval_fraction=0.3)
    assert not set(prompts(train)) & set(prompts(held_out))


def test_max_rows_counts_for_each_dataset_before_its_weight(folder):
    mixed = load_preferences([folder / "a.jsonl", folder / "b.jsonl"], max_rows=2, weights=[1, 2])
    assert prompts(mixed) == ["a0", "a1", "b0", "b1", "b0", "b1"]


def test_columns_that_some_datasets_have(folder):
    mixed = load_preferences([folder / "a.jsonl", folder / "weighted.jsonl"])
    assert [from_json_text(row)["weight"] for row in mixed] == [1.0] * 5 + [0.5] * 2
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"a": None}}}]
    mixed = load_preferences([folder / "chat.jsonl", Dataset.from_list(chat_rows("d", 1, tools=json.dumps(tools)))])
    rows = [from_json_text(row) for row in mixed.with_format("arrow")[:].to_pylist()]
    assert [row["tools"] for row in rows] == [None, None, tools]
    assert [row["source"].rpartition("/")[2] for row in rows] == [
        "chat.jsonl, row 1",
        "chat.jsonl, row 2",
        "dataset 2, row 1",
    ]


def ranked(prompt):
    return {"prompt": prompt, "answers": [{"answer": f"{prompt}{n}", "rank": n} for n in range(3)]}


def test_rankings_of_several_datasets_stay_apart(tmp_path):
    """Also where both call them by the same name."""
    one, other = (
        load_preferences(Dataset.from_list([ranked(name)]), ranked_pairs="best_vs_each", cache_dir=str(tmp_path))
        for name in "xy"
    )
    assert one["group"][:] == other["group"][:] == ["dataset, row 1"] * 2
    mixed = load_preferences([one, other], weights=[1, 2])
    assert mixed["group"][:] == ["1: dataset, row 1"] * 2 + ["2: dataset, row 1"] * 4
    assert mixed["members"][:] == [[0, 1], [0, 2]] * 3
    assert is_normalized(mixed) and mixed._fingerprint == load_preferences([one, other], weights=[1, 2])._fingerprint
    third = load_preferences(Dataset.from_list([ranked("z")]), ranked_pairs="best_vs_each", cache_dir=str(tmp_path))
    again = load_preferences([mixed, third])
    assert sorted(set(again["group"][:])) == ["1: 1: dataset, row 1", "1: 2: dataset, row 1", "2: dataset, row 1"]


def rankings(count, tmp_path, **options):
    """Each with three pairs."""
    rows = Dataset.from_list([ranked(f"q{n}") for n in range(count)])
    return load_preferences(rows, ranked_pairs="all_pairs", cache_dir=str(tmp_path), **options)


def ranked_as_they_were(dataset):
    """How often each ranking is there, of which no pair may be missing."""
    pairs = Counter(zip(dataset["group"][:], map(tuple, dataset["members"][:]), strict=True))
    groups = {group: pairs[group, (0, 1)] for group, _ in pairs}
    assert pairs == {(group, pair): n for group, n in groups.items() for pair in ((0, 1), (0, 2), (1, 2))}
    return groups


@pytest.mark.parametrize("weight", [0.5, 0.25, 1.5, 2])
def test_a_part_of_rankings_is_rankings(tmp_path, weight):
    ready = rankings(8, tmp_path)
    for dataset in (ready, ready.shuffle(seed=1), ready.with_format("numpy")):
        for seed in range(5):
            mixed = load_preferences(dataset, weights=[weight], seed=seed)
            counts = ranked_as_they_were(mixed)
            assert sum(counts.values()) == 8 * weight and len(mixed) == 3 * 8 * weight
            assert max(counts.values()) - min(counts.values()) <= (0 if weight % 1 == 0 or weight < 1 else 1)


def test_a_part_of_a_mixture_has_whole_rankings(tmp_path, folder):
    twice = load_preferences([rankings(4, tmp_path)], weights=[2])
    counts = ranked_as_they_were(load_preferences(twice, weights=[0.5], seed=2))
    assert sum(counts.values()) == 4 and set(counts.values()) == {1, 2}  # copies are apart, as those of a pair are
    assert ranked_as_they_were(load_preferences(twice, max_rows=12)) == {f"dataset, row {n}": 1 for n in range(1, 5)}
    assert sum(ranked_as_they_were(load_preferences(twice, max_rows=13)).values()) == 5


def test_a_part_of_an_openassistant_tree(tmp_path):
    rows = [{"message_id": f"p{n}", "parent_id": None, "role": "prompter", "text": "q", "rank": None} for n in range(6)]
    rows += [
        {"message_id": f"a{n}{k}", "parent_id": f"p{n}", "role": "assistant", "text": str(k), "rank": k}
        for k in range(3)
        for n in range(6)
    ]
    mixed = load_preferences(write(tmp_path / "trees.jsonl", rows), weights=[0.5], ranked_pairs="all_pairs")
    assert len(ranked_as_they_were(mixed)) == 3 and len(mixed) == 9


def test_what_is_said_of_pairs_and_rankings(tmp_path, folder, caplog):
    caplog.set_level(logging.INFO, logger="dpo_kernels.data.mixtures")
    ready = rankings(4, tmp_path)
    both = load_preferences([ready, folder / "chat.jsonl"])
    load_preferences([ready, folder / "chat.jsonl"], weights=[1.5, 1])
    load_preferences(both, weights=[2])
    assert [record.getMessage().replace(str(folder), "folder") for record in caplog.records] == [
        "12 of 12 pairs of dataset 1, with 4 of 4 rankings",
        "2 of 2 pairs of folder/chat.jsonl",
        "18 of 12 pairs of dataset 1, with 6 of 4 rankings",
        "2 of 2 pairs of folder/chat.jsonl",
        "28 of 14 pairs of dataset, with 8 of 4 rankings",
    ]
    for seed in range(5):
        groups = Counter(load_preferences(both, weights=[0.5], seed=seed)["group"][:])
        counts = f"{groups.total()} of 14 pairs of dataset, with {len(groups - Counter({None: 2}))} of 4 rankings"
        assert caplog.messages[-1] == counts
    assert {message.partition(",")[0] for message in caplog.messages[-5:]} > {"9 of 14 pairs of dataset"}
    with pytest.raises(ValueError, match="weights: 0.1 of 'dataset', which has 4 rankings, is not one of them"):
        load_preferences(ready, weights=[0.1])
    with pytest.raises(ValueError, match="'dataset', which has 4 rankings and 2 other pairs, is not one of them"):
        load_preferences(both, weights=[0.05])


def test_rankings_beside_plain_pairs(folder):
    mixed = load_preferences([folder / "chat.jsonl", Dataset.from_list([ranked("q")])], ranked_pairs="all_pairs")
    assert mixed["group"][:] == [None] * 2 + ["dataset 2, row 1"] * 3
    assert mixed["members"][:] == [None, None, [0, 1], [0, 2], [1, 2]]
    rows = [from_json_text(row) for row in mixed.with_format("arrow")[:].to_pylist()]
    assert [(row["group"], row["members"]) for row in rows][1:3] == [(None, None), ("dataset 2, row 1", [0, 1])]


def test_datasets_of_every_origin(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, **_: Dataset.from_list(text_rows(config, 1)))
    load_preferences(folder / "a.jsonl").save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/test.jsonl", text_rows("t", 1))
    mixed = load_preferences(
        ["someone/pairs", "someone/pairs", tmp_path / "saved", tmp_path / "data"],
        split=["train_prefs", "train_prefs", "train", "test"],
        name=["en", "de", None, None],
    )
    assert prompts(mixed) == ["en0", "de0", *(f"a{n}" for n in range(5)), "t0"]
    assert mixed["source"][:3] == [
        "someone/pairs/en[train_prefs], row 1",
        "someone/pairs/de[train_prefs], row 1",
        f"{folder}/a.jsonl, row 1",  # as it was when it was saved
    ]


def test_one_warning_names_the_unused_columns_of_all(folder, tmp_path):
    names = [write(tmp_path / f"{name}.jsonl", text_rows(name, 1, **{name: 1})) for name in ("topic", "score")]
    with pytest.warns(UserWarning) as caught:
        load_preferences([*names, folder / "a.jsonl"])
    (message,) = [str(warning.message) for warning in caught]
    assert "topic.jsonl: the column 'topic'" in message and "score.jsonl: the column 'score'" in message
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "weights: expected one for each of 2 datasets, got 1"),
        ([1, 1, 1], "weights: expected one for each of 2 datasets, got 3"),
        ([1, -0.5], "weights: expected numbers from 0 to 1000, got -0.5"),
        ([1, float("nan")], "got nan"),
        ([1, float("inf")], "got inf"),
        ([1, "0.5"], "got '0.5'"),
        ([1, None], "got None"),
        ([True, 1], "got True"),
        ([0, 0.0], r"weights: expected one above 0, got \[0, 0.0\]"),
        ([1, 0.1], r"weights: 0.1 of '.*b.jsonl', which has 4 pairs, is not one pair"),
    ],
)
def test_weights_out_of_range(folder, weights, message):
    with pytest.raises(ValueError, match=message):
        load_preferences([folder / "a.jsonl", folder / "b.jsonl"], weights=weights)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "name_or_path: expected a name or path, or a list of them, got \\[\\]"),
        ([3], "name_or_path: expected a name or path, or a list of them"),
        (["a.jsonl", "chat.jsonl"], "'.*a.jsonl' is plain text, '.*chat.jsonl' is conversational: expected one kind"),
        (["chat.jsonl", "weighted.jsonl"], "'.*weighted.jsonl' is plain text, '.*chat.jsonl' is conversational"),
        (["a.jsonl", "b.jsonl", "a.jsonl"], "'.*a.jsonl' and '.*a.jsonl' are the same, .* give it the weight 2"),
        (["a.jsonl", "../{here}/a.jsonl"], "are the same"),
        (["b.jsonl", "b.jsonl/../b.jsonl"], "there is no file or directory"),
        (["a.jsonl", "none.jsonl"], "there is no file or directory '.*none.jsonl'"),
    ],
)
def test_mixtures_that_are_refused(folder, names, message):
    with pytest.raises(ValueError, match=message):
        load_preferences([folder / n.format(here=folder.name) if isinstance(n, str) else n for n in names])


def test_a_folder_and_a_file_in_it_are_refused(tmp_path):
    write(tmp_path / "a.jsonl", text_rows("a", 1))
    with pytest.raises(ValueError, match="or share '.*a.jsonl'"):
        load_preferences([tmp_path, tmp_path / "a.jsonl"])
    same = Dataset.from_list(text_rows("d", 1))
    with pytest.raises(ValueError, match="'dataset 1' and 'dataset 2' are the same"):
        load_preferences([same, same])


@pytest.mark.parametrize("option", [{"split": ["train"]}, {"name": ["x", None, None]}])
def test_options_for_each_dataset(folder, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}: expected one, or one for each of 2 datasets"):
        load_preferences([folder / "a.jsonl", folder / "b.jsonl"], **option)
