"""Loading, tokenization and their accounts: what is read, where the boundary lies, what is cut, dropped and cached."""

import gzip
import json
import unicodedata

import datasets
import forks
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import example, given, settings
from hypothesis import strategies as st
from places import SHARED
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dpo_kernels.data import tokenization
from dpo_kernels.data.demo import demo_tokenizer
from dpo_kernels.data.loading import (
    from_json_text,
    is_normalized,
    load_preferences,
    normalize_preferences,
    split_train_eval,
)
from dpo_kernels.data.messages import LOOKS_LIKE_MESSAGES
from dpo_kernels.data.tokenization import DataReport, tokenize_preferences

REAL = SHARED / "data"
TEXTS = ["What is the colour of the sky? It is blue.", "Say yes or no. I say yes, and he says no."]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "number"}}}}}]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer(TEXTS, 300)


@pytest.fixture
def templated():
    """Gives a tokenizer with another chat template; the shared one stays as it is."""

    def make(template, **changes):
        tokenizer = demo_tokenizer(TEXTS, 300)
        tokenizer.chat_template = template
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        return tokenizer

    return make


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def text_rows(count=3):
    return [{"prompt": f"Say {n}:", "chosen": f" yes {n}", "rejected": f" no {n}"} for n in range(count)]


def chat_row(prompt="q", chosen="a", rejected="b"):
    return {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(dataset):
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in dataset]


def counts(reasons):
    return {reason: rows.count for reason, rows in reasons.items()}


# Loading


@pytest.mark.parametrize("rows", [text_rows(), [chat_row(), chat_row("p")]], ids=["text", "conversational"])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "lines.json", "csv", "parquet"])
def test_every_file_format(tmp_path, rows, kind):
    path = tmp_path / f"pairs.{kind}"
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n\n" for row in rows).encode()))
    elif kind == "json":
        path.write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8")
    elif kind == "csv":
        flat = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
        Dataset.from_list(flat).to_csv(str(path))
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        write(path, rows)
    loaded = load_preferences(path)
    assert pairs(loaded) == rows
    assert loaded.column_names == ["source", "prompt", "chosen", "rejected"]
    numbers = (1, 3) if kind == "jsonl.gz" else (1, 2)  # blank lines count, so that the number is the line's
    assert loaded[:2]["source"] == [f"{path}, row {number}" for number in numbers]


def test_messages_and_tools_come_back_exactly(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": None, "b": 0.1, "c": [1, "x"]}}}
    rows = [
        {**chat_row(), "tools": TOOLS},
        {**chat_row(), "chosen": [{**assistant(""), "tool_calls": [call]}]},
        chat_row('quotes " and </s> and 日本語', "a\u2028b", "1.10"),
    ]
    loaded = load_preferences(write(tmp_path / "pairs.jsonl", rows))
    assert pairs(loaded) == [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    assert loaded[:]["tools"] == [TOOLS, None, None]
    loaded.to_parquet(str(tmp_path / "pairs.parquet"))
    again = load_preferences(tmp_path / "pairs.parquet")
    assert pairs(again) == pairs(loaded) and again[:]["tools"] == loaded[:]["tools"]


def test_numbers_in_tool_calls_reach_the_template_unrounded(tmp_path, templated):
    tokenizer = templated(
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
    )
    call = {"function": {"name": "add", "arguments": {"a": 1e-12, "b": 0.12345678901234568, "c": None}}}
    row = {**chat_row(), "chosen": [{**assistant(""), "tool_calls": [call]}]}
    dataset = load_preferences(write(tmp_path / "pairs.jsonl", [row]))
    (ids,), _ = tokenize_preferences(dataset, tokenizer)
    assert tokenizer.decode(ids["chosen_ids"]) == json.dumps([call]) + "<|im_end|>"


@pytest.mark.parametrize(("number", "message"), [(2**70, "too large"), (float("inf"), "Out of range float")])
def test_numbers_that_cannot_be_kept_are_refused(tmp_path, number, message):
    call = {"function": {"name": "add", "arguments": {"a": number}}}
    row = {**chat_row(), "chosen": [{**assistant(""), "tool_calls": [call]}]}
    with pytest.raises(ValueError, match=f"pairs.jsonl, row 2: not to be kept as JSON.*{message}"):
        load_preferences(write(tmp_path / "pairs.jsonl", [chat_row(), row]))


def test_arrow_files_give_objects_their_own_keys_back(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "say", "arguments": {"text": "x"}}}
    rows = [{**chat_row(), "chosen": [{**assistant(""), "tool_calls": [c]}], "tools": TOOLS} for c in (call, other)]
    Dataset.from_list(rows, on_mixed_types=None).to_parquet(str(tmp_path / "pairs.parquet"))
    loaded = load_preferences(tmp_path / "pairs.parquet")
    assert pairs(loaded) == [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]


def test_optional_fields_may_be_missing_from_first_rows(tmp_path):
    rows = [chat_row(), {**chat_row(), "system": "be brief"}]
    loaded = load_preferences(write(tmp_path / "pairs.jsonl", rows))
    assert loaded[1]["prompt"][0] == {"role": "system", "content": "be brief"}


def test_directories_and_splits(tmp_path):
    for name, rows in (
        ("train-0.jsonl", text_rows(2)),
        ("train-1.jsonl", text_rows(3)),
        ("sub/test.jsonl", text_rows(1)),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, rows)
    (tmp_path / "README.md").write_text("not data")
    with pytest.warns(UserWarning, match=r"left out sub/test.jsonl \(split test\)$"):
        assert pairs(load_preferences(tmp_path)) == text_rows(2) + text_rows(3)
    with pytest.warns(UserWarning, match=r"left out train-0.jsonl, train-1.jsonl \(split train\)$"):
        assert pairs(load_preferences(tmp_path, split="test")) == text_rows(1)
    with pytest.raises(ValueError, match="has the splits test, train, not 'validation'"):
        load_preferences(tmp_path, split="validation")
    with pytest.raises(ValueError, match="a single file is its own train split, got 'test'"):
        load_preferences(tmp_path / "train-0.jsonl", split="test")


def test_saved_datasets(tmp_path):
    DatasetDict({"train": Dataset.from_list(text_rows(2)), "test": Dataset.from_list(text_rows(1))}).save_to_disk(
        str(tmp_path / "both")
    )
    assert pairs(load_preferences(tmp_path / "both", split="test")) == text_rows(1)
    with pytest.raises(ValueError, match="has the splits train, test, not 'dev'"):
        load_preferences(tmp_path / "both", split="dev")
    Dataset.from_list(text_rows(2)).save_to_disk(str(tmp_path / "one"))
    assert pairs(load_preferences(tmp_path / "one")) == text_rows(2)
    with pytest.raises(ValueError, match="has the splits train, not 'test'"):
        load_preferences(tmp_path / "one", split="test")
    (tmp_path / "one/data-00000-of-00001.arrow").write_bytes(b"cut")
    with pytest.raises(ValueError, match="one: the saved dataset cannot be loaded"):
        load_preferences(tmp_path / "one")


def test_hub_names_go_to_datasets(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Dataset.from_list(text_rows(2))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_preferences("someone/pairs", split="train[:2]", name="en")
    assert calls == [(("someone/pairs", "en"), {"split": "train[:2]", "cache_dir": None})]
    assert pairs(loaded) == text_rows(2)
    assert loaded[1]["source"] == "someone/pairs[train[:2]], row 2"

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="no file or directory 'data/pairs', nor on the hub: no network"):
        load_preferences("data/pairs")


def test_media_columns_are_not_decoded():
    dataset = Dataset.from_list([{**row, "picture": {"bytes": b"no image", "path": None}} for row in text_rows(1)])
    dataset = dataset.cast_column("picture", datasets.Image())
    with pytest.warns(UserWarning, match="'picture' is not used"):
        assert pairs(normalize_preferences(dataset)) == text_rows(1)


def test_the_format_of_a_dataset_does_not_matter():
    dataset = Dataset.from_list(text_rows(2)).with_format("numpy", columns=["prompt"])
    assert pairs(normalize_preferences(dataset)) == text_rows(2)


def test_weights_and_what_was_altered_are_columns_where_there_are_any(tmp_path):
    rows = [{**row, "weight": n / 2, "chosen_token_weights": [1, 0.5]} for n, row in enumerate(text_rows(3))]
    plain, weighted = write(tmp_path / "plain.jsonl", text_rows(2)), write(tmp_path / "weighted.jsonl", rows)
    loaded = load_preferences(weighted)
    assert loaded.column_names == ["source", "prompt", "chosen", "rejected", "weight", "chosen_token_weights"]
    assert loaded["weight"][:] == [0.0, 0.5, 1.0]
    first = from_json_text(loaded[0])
    assert first["chosen_token_weights"] == [1.0, 0.5] and first["rejected_token_weights"] is None
    first = from_json_text(load_preferences(plain)[0])
    assert first == {
        **{"source": f"{plain}, row 1", **text_rows(1)[0]},
        **{"tools": None, "weight": None, "chosen_token_weights": None, "rejected_token_weights": None, "altered": []},
        **{"group": None, "members": None},
    }
    looks_like = {"prompt": "q", "chosen": '[{"role": "assistant", "content": ', "rejected": "b"}
    loaded = load_preferences(write(tmp_path / "altered.jsonl", [*text_rows(1), looks_like]))
    assert [from_json_text(row)["altered"] for row in loaded] == [[], [LOOKS_LIKE_MESSAGES]]


# Columns, layouts and kinds of rows


@pytest.mark.parametrize("rows", [2, 150])
def test_columns_that_are_not_used_are_named_once(tmp_path, rows):
    """The first rows' and the last row's, when the rows are converted and when they come from the cache."""
    given = [{**row, "functions": [], "id": 1} for row in text_rows(rows)]
    path = write(tmp_path / "pairs.jsonl", [*given, {**text_rows(1)[0], "late": 1}])
    for _ in range(2):
        with pytest.warns(UserWarning) as caught:
            assert load_preferences(path).column_names == ["source", "prompt", "chosen", "rejected"]
        (message,) = [str(warning.message) for warning in caught]
        assert message.startswith(f"{path}: ") and all(f"'{name}'" in message for name in ("functions", "id", "late"))
        assert caught[0].filename == __file__


def test_columns_of_several_files_are_named_in_one_warning(tmp_path):
    Dataset.from_list([{**row, "image": b"x", "score": 1} for row in text_rows(1)]).to_parquet(
        str(tmp_path / "a.parquet")
    )
    (tmp_path / "b.csv").write_text(",prompt,chosen,rejected,Notes\n0,p,a,b,c\n")
    write(tmp_path / "c.jsonl", [{**row, "score": 1} for row in text_rows(1)])
    with pytest.warns(UserWarning) as caught:
        load_preferences(tmp_path)
    (message,) = [str(warning.message) for warning in caught]
    assert all(message.count(f"'{name}'") == 1 for name in ("image", "score", "unnamed column 1", "Notes"))


def test_nothing_is_said_where_all_is_used(tmp_path, recwarn):
    load_preferences(write(tmp_path / "pairs.jsonl", [{**chat_row(), "tools": TOOLS, "system": "s", "weight": 2}]))
    assert not [warning for warning in recwarn if warning.category is UserWarning]


@pytest.mark.parametrize(
    ("first", "late", "message"),
    [
        ({"chosen": "q a", "rejected": "q b"}, {"prompt": "p"}, r"\(prompt\), .* is 'explicit', not 'implicit'"),
        (
            {"chosen": "q a", "rejected": "q b"},
            {"instruction": "p"},
            r"\(instruction\), .* is 'alpaca', not 'implicit'",
        ),
        (
            {"instruction": "q", "chosen": "a", "rejected": "b"},
            {"prompt": "p"},
            r"\(prompt\), .* is 'explicit', not 'alpaca'",
        ),
        ({"chosen": "q a", "rejected": "q b"}, {"messages": []}, r"\(messages\), .* is 'unknown', not 'implicit'"),
        (
            {"chosen": "q a", "rejected": "q b"},
            {"n": 1, "conversations": []},
            r"\(n, conversations\), .* is 'sharegpt', n",
        ),
    ],
)
def test_a_late_column_that_would_change_the_layout_is_an_error(tmp_path, first, late, message):
    path = write(tmp_path / "pairs.jsonl", [first] * 120 + [{**first, **late}])
    with pytest.raises(ValueError, match=f"row 121: the row has columns that the first 100 have not {message}"):
        load_preferences(path)


def test_each_file_of_a_folder_has_a_layout_of_its_own(tmp_path):
    write(tmp_path / "a.jsonl", [chat_row("q0")])
    write(
        tmp_path / "b.jsonl", [{"chosen": "\n\nHuman: q1\n\nAssistant: a", "rejected": "\n\nHuman: q1\n\nAssistant: b"}]
    )
    answers = [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]
    write(tmp_path / "c.jsonl", [{"prompt": "q2", "answers": answers}])
    write(tmp_path / "d.jsonl", [{"instruction": "q3", "chosen": "a", "rejected": "b"}])
    (tmp_path / "e.csv").write_text("prompt,chosen,rejected\n")  # no rows: fine beside others
    Dataset.from_list(text_rows(1)).select([]).to_parquet(str(tmp_path / "f.parquet"))
    write(tmp_path / "g.jsonl", [chat_row("q4")])
    expected = [chat_row(f"q{n}") for n in range(5)]
    with pytest.warns(UserWarning, match="no rows in .*/e.csv, .*/f.parquet"):
        loaded = load_preferences(tmp_path)
    assert pairs(loaded) == expected
    assert [source.rpartition("/")[2] for source in loaded["source"]] == [f"{name}.jsonl, row 1" for name in "abcdg"]
    write(tmp_path / "h.jsonl", [{"text": "q"}])
    with pytest.raises(ValueError, match=r"h.jsonl: the columns found \(text\) are no known"):
        load_preferences(tmp_path)


def test_files_of_a_folder_are_of_one_kind(tmp_path):
    write(tmp_path / "a.jsonl", text_rows(2))
    for conversation in (chat_row(), {"instruction": "q", "chosen": "a", "rejected": "b"}):
        write(tmp_path / "b.jsonl", [conversation])
        with pytest.raises(ValueError, match="b.jsonl, row 1: this row is conversational, the rows of other files bef"):
            load_preferences(tmp_path)
    write(tmp_path / "b.jsonl", [{**row, "weight": 2} for row in text_rows(2)])
    assert [from_json_text(row)["weight"] for row in load_preferences(tmp_path)] == [1.0, 1.0, 2.0, 2.0]


def test_replies_find_their_prompt_in_another_file(tmp_path):
    message = {"parent_id": None, "role": "prompter", "text": "q", "message_id": "1", "rank": None}
    replies = [
        {**message, "parent_id": "1", "role": "assistant", "text": t, "message_id": t, "rank": r}
        for t, r in ("a0", "b1")
    ]
    write(tmp_path / "a.jsonl", replies)
    write(tmp_path / "b.jsonl", [message])
    assert pairs(load_preferences(tmp_path)) == [chat_row()]


def test_a_folder_says_what_it_leaves_out_and_what_is_there_twice(tmp_path):
    for name in ("pairs.jsonl", "pairs (1).jsonl", "dev.jsonl"):
        write(tmp_path / name, text_rows(2))
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\nSay 0:, yes 0, no 0\n")
    (tmp_path / "dataset_info.json").write_text('{"pairs": {}}')
    (tmp_path / "header.csv").write_text("prompt,chosen,rejected\n")
    (tmp_path / "none.json").write_text("[]")
    with pytest.warns(UserWarning) as caught:
        assert len(load_preferences(tmp_path)) == 5
    (message,) = [str(warning.message) for warning in caught]
    assert message.split("\n") == [
        f"{tmp_path}: left out dataset_info.json (describes data, holds none); dev.jsonl (split validation)",
        f"{tmp_path}/pairs.jsonl is a copy of {tmp_path}/pairs (1).jsonl: its rows are there twice",
        f"{tmp_path}: no rows in {tmp_path}/header.csv, {tmp_path}/none.json",
    ]
    write(tmp_path / "pairs.jsonl", text_rows(1))
    with pytest.warns(
        UserWarning, match="pairs.jsonl has the name of .*/pairs.csv: rows that are in both are there tw"
    ):
        load_preferences(tmp_path)


def test_a_folder_without_names_of_splits_is_read_as_a_whole():
    path = SHARED / "cases" / "mixture"
    if not path.exists():
        pytest.skip(f"no case at {path}")
    assert len(load_preferences(path)) == 7


@pytest.mark.parametrize("rows", [1, 150])
@pytest.mark.parametrize("empty", ["", None, "  "])
def test_a_system_turn_in_a_later_row_makes_conversations_of_all(tmp_path, rows, empty):
    plain = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "pairs.jsonl", [{**plain, "system": empty}] * rows + [{**plain, "system": "Be nice"}])
    for _ in range(2):  # the second one from the cache
        loaded = load_preferences(path)
        assert pairs(loaded.select([0, rows])) == [
            chat_row(),
            {**chat_row(), "prompt": [{"role": "system", "content": "Be nice"}, user("q")]},
        ]
    assert pairs(load_preferences(path, max_rows=rows))[0] == (plain if rows > 100 else chat_row())


# Rows that have the form already


@pytest.mark.parametrize(
    "change",
    [
        lambda dataset: dataset.select([1, 0]),
        lambda dataset: dataset.shuffle(seed=0),
        lambda dataset: dataset.filter(lambda row: True),
        lambda dataset: dataset.map(lambda row: {"mine": 1}),
        lambda dataset: dataset.train_test_split(0.4, seed=0)["train"],
        lambda dataset: dataset.remove_columns("weight"),
        lambda dataset: dataset.shard(2, 0).flatten_indices(),
        lambda dataset: datasets.concatenate_datasets([dataset, dataset]),
        lambda dataset: datasets.interleave_datasets([dataset, dataset]),
        lambda dataset: dataset.with_format("arrow"),
    ],
    ids=["select", "shuffle", "filter", "map", "split", "remove", "shard", "concatenate", "interleave", "format"],
)
@pytest.mark.parametrize("row", [text_rows(1)[0], chat_row()], ids=["text", "conversational"])
def test_normalized_rows_are_known_after_they_were_changed(tmp_path, change, row):
    loaded = load_preferences(write(tmp_path / "pairs.jsonl", [{**row, "weight": 2}] * 3))
    changed = change(loaded)
    assert is_normalized(changed)
    assert normalize_preferences(changed) is changed


def test_normalized_rows_come_back_from_disk(tmp_path):
    loaded = load_preferences(write(tmp_path / "pairs.jsonl", [{**row, "weight": 2} for row in text_rows(3)]))
    DatasetDict({"train": loaded, "test": loaded.select([1])}).save_to_disk(str(tmp_path / "saved"))
    again = load_preferences(tmp_path / "saved")
    assert again[:] == loaded[:]
    assert load_preferences(tmp_path / "saved", max_rows=2)[:] == loaded[:2]
    assert load_preferences(tmp_path / "saved", split="test")[0]["source"] == f"{tmp_path}/pairs.jsonl, row 2"


def test_columns_of_the_same_names_alone_are_not_normalized(tmp_path, tokenizer):
    rows = [{"source": "forum", "prompt": "q", "chosen": "a", "rejected": "b"}]
    with pytest.warns(UserWarning, match="'source' is not used"):
        loaded = normalize_preferences(Dataset.from_list(rows))
    assert loaded[0]["source"] == "dataset, row 1"
    nothing = Dataset.from_list([{**rows[0], "chosen": " "}])
    assert not is_normalized(nothing)
    with pytest.raises(ValueError, match="row 1: the chosen response is empty"):
        tokenize_preferences(nothing, tokenizer)
    assert not is_normalized(loaded.remove_columns("source"))
    assert not is_normalized(loaded.select_columns(["source", "prompt"]))
    assert not is_normalized(datasets.concatenate_datasets([loaded, Dataset.from_list(text_rows(1))]))


def test_what_the_options_change_is_not_served_from_the_cache(tmp_path):
    answers = [{"answer": text, "rank": rank} for rank, text in enumerate("abc")]
    path = write(tmp_path / "nectar.jsonl", [{"prompt": "q", "answers": answers}])
    assert [len(load_preferences(path, ranked_pairs=which)) for which in ("best_vs_worst", "best_vs_each")] == [1, 2]
    path = write(tmp_path / "pairs.jsonl", [*text_rows(1), {**text_rows(1)[0], "chosen": ""}])
    assert len(load_preferences(path, empty_response="drop")) == 2
    with pytest.raises(ValueError, match="row 2: the chosen response is empty"):
        load_preferences(path)
    write(path, text_rows(3))
    assert len(load_preferences(path, empty_response="drop")) == 3


def ranking(*ranks, prompt="q"):
    return {"prompt": prompt, "answers": [{"answer": f"{prompt}{n}", "rank": rank} for n, rank in enumerate(ranks)]}


def test_rankings_are_columns_where_there_are_any(tmp_path):
    path = write(tmp_path / "nectar.jsonl", [ranking(1, 2), ranking(1, 1, 2)])
    assert load_preferences(path).column_names == ["source", "prompt", "chosen", "rejected"]
    loaded = load_preferences(path, ranked_pairs="all_pairs")
    assert loaded.column_names == ["source", "prompt", "chosen", "rejected", "group", "members"]
    assert loaded["group"][:] == [None, f"{path}, row 2", f"{path}, row 2"]
    assert loaded["members"][:] == [None, [0, 2], [1, 2]]
    rows = [from_json_text(row) for row in loaded.with_format("arrow")[:].to_pylist()]
    assert [row["members"] for row in rows] == [None, [0, 2], [1, 2]]
    assert rows[1]["prompt"] == [{"role": "user", "content": "q"}]
    loaded.save_to_disk(str(tmp_path / "saved"))
    again = load_preferences(tmp_path / "saved")
    assert is_normalized(again) and again[:] == loaded[:]


def completions(*scores):
    answers = [{"response": f"r{n}", "overall_score": score} for n, score in enumerate(scores)]
    return {"instruction": "q", "completions": answers}


@pytest.mark.parametrize("rows", [[(1, 1), (1, 2), (), (3, 4)], [(1, 2), (1, 1), (2,)]])
def test_rankings_without_a_pair_are_named(tmp_path, rows):
    path = write(tmp_path / "feedback.jsonl", [completions(*scores) for scores in rows])
    first, last = (n for n, scores in enumerate(rows, 1) if len(set(scores)) < 2)
    for _ in range(2):  # converted, and from the cache
        with pytest.warns(UserWarning, match="2 rankings have no two answers of different rank") as caught:
            loaded = load_preferences(path)
        assert len(loaded) == len(rows) - 2 and loaded.column_names == ["source", "prompt", "chosen", "rejected"]
        assert f"('{path}, row {first}', '{path}, row {last}')" in str(caught[0].message)
    with pytest.raises(ValueError, match="no preference pair among the rows, which have the layout 'ultrafeedback'"):
        load_preferences(write(tmp_path / "tied.jsonl", [completions(1, 1)]))


def test_many_rankings_without_a_pair_are_counted(tmp_path):
    path = write(tmp_path / "feedback.jsonl", [completions(1, 2), *[completions(1, 1)] * 7])
    with pytest.warns(UserWarning, match=r"feedback.jsonl: 7 rankings have .* row 6', \.\.\.\)"):
        load_preferences(path)


def test_rows_after_max_rows_are_not_read(tmp_path):
    path = write(tmp_path / "feedback.jsonl", [completions(1, 2), completions(1, "bad"), completions(1, 1)])
    assert len(load_preferences(path, max_rows=1)) == 1
    path = write(tmp_path / "ranked.jsonl", [completions(1, 2, 3), completions(1, "bad")])
    for most in (1, 2, 3):
        assert len(load_preferences(path, max_rows=most, ranked_pairs="all_pairs")) == 3
    with pytest.raises(ValueError, match="row 2: the field 'overall_score': expected a number, got 'bad'"):
        load_preferences(path, max_rows=4, ranked_pairs="all_pairs")


def rejected(*responses):
    return {"prompt": "q", "chosen": "a", "rejected": list(responses)}


def test_rejected_responses_in_no_pair_are_counted(tmp_path):
    path = write(tmp_path / "several.jsonl", [rejected("b", "c", "d"), rejected("b"), rejected("b", "c")])
    for _ in range(2):  # converted, and from the cache
        with pytest.warns(UserWarning) as caught:
            loaded = load_preferences(path)
        assert [str(warning.message) for warning in caught] == [
            f"{path}: 3 rejected responses are in no pair: best_vs_worst takes the last of several; best_vs_each takes "
            "all"
        ]
        assert caught[0].filename == __file__
        assert loaded["rejected"][:] == ["d", "b", "c"]
        assert loaded.column_names == ["source", "prompt", "chosen", "rejected"]
    other = write(tmp_path / "other.jsonl", [rejected("b", "c")])
    with pytest.warns(UserWarning) as caught:
        load_preferences([path, other])
    (message,) = [str(warning.message) for warning in caught]
    assert message.count("\n") == 1 and f"{other}: 1 rejected response is in no pair: " in message
    with pytest.warns(UserWarning, match="2 rejected responses are in no pair"):
        load_preferences(path, max_rows=1)


def test_what_is_in_a_pair_or_was_ranked_is_not_counted(tmp_path, recwarn):
    several = write(tmp_path / "several.jsonl", [rejected("b", "c", "d")])
    for which in ("best_vs_each", "all_pairs"):
        assert len(load_preferences(several, ranked_pairs=which)) == 3
    load_preferences(write(tmp_path / "one.jsonl", [rejected("b")]))
    load_preferences(write(tmp_path / "nectar.jsonl", [ranking(1, 2, 3)]))
    load_preferences(write(tmp_path / "feedback.jsonl", [completions(1, 2, 3)]))
    assert not [warning for warning in recwarn if "in no pair" in str(warning.message)]


def test_max_rows(tmp_path):
    path = write(tmp_path / "pairs.jsonl", text_rows(3))
    assert pairs(load_preferences(path, max_rows=2)) == text_rows(2)
    assert len(load_preferences(path)) == 3
    with pytest.raises(ValueError, match="max_rows: expected None or a whole number above 0, got 0"):
        load_preferences(path, max_rows=0)


@pytest.mark.parametrize(("most", "kept"), [(1, 1), (2, 3), (3, 3), (4, 6), (6, 6), (7, 7), (8, 7)])
def test_max_rows_keeps_rankings_whole(tmp_path, monkeypatch, most, kept):
    """A pair, rankings of two and three pairs, and a pair: whatever they are read from."""
    rows = [ranking(1, 2, prompt="a"), ranking(1, 1, 2), ranking(1, 2, 3), ranking(1, 2, prompt="b")]
    path = write(tmp_path / "nectar.jsonl", rows)
    loaded = load_preferences(path, ranked_pairs="all_pairs")
    assert pairs(load_preferences(path, ranked_pairs="all_pairs", max_rows=most)) == pairs(loaded)[:kept]
    ready = load_preferences(loaded, max_rows=most)
    assert ready[:] == loaded[:kept] and is_normalized(ready)
    assert ready._fingerprint == load_preferences(loaded, max_rows=most)._fingerprint
    assert ready._fingerprint not in (loaded._fingerprint, load_preferences(loaded, max_rows=9)._fingerprint)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Dataset.from_list(rows))
    assert len(load_preferences("someone/ranked", ranked_pairs="all_pairs", max_rows=most)) == kept
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    assert load_preferences("someone/ready", max_rows=most)[:] == loaded[:kept]
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts/a.jsonl", rows[:2])
    write(tmp_path / "parts/b.jsonl", rows[2:])
    parts = load_preferences(tmp_path / "parts", ranked_pairs="all_pairs", max_rows=most)
    assert pairs(parts) == pairs(loaded)[:kept]


def test_max_rows_of_rankings_that_are_not_side_by_side(tmp_path):
    path = write(tmp_path / "nectar.jsonl", [ranking(1, 2, 3, prompt=prompt) for prompt in "ab"])
    loaded = load_preferences(path, ranked_pairs="all_pairs")
    apart = loaded.select([3, 0, 4, 1, 5, 2])
    assert load_preferences(apart, max_rows=1)[:] == loaded[3:]
    assert load_preferences(apart, max_rows=2)[:] == apart[:]


def test_max_rows_of_openassistant_trees(tmp_path):
    def message(name, parent, role, rank=None):
        return {"message_id": name, "parent_id": parent, "role": role, "text": name, "rank": rank}

    rows = [message(prompt, None, "prompter") for prompt in "pq"]
    rows += [message(f"{prompt}{n}", prompt, "assistant", n) for n in range(3) for prompt in "pq"]
    path = write(tmp_path / "trees.jsonl", rows)
    groups = [f"{path}, message 'p'"] * 3 + [f"{path}, message 'q'"] * 3
    for most, kept in ((1, 3), (3, 3), (4, 6)):
        loaded = load_preferences(path, ranked_pairs="all_pairs", max_rows=most)
        assert loaded["group"][:] == groups[:kept]


@pytest.mark.parametrize("number", [np.int64(2), np.uint8(2)])
def test_numbers_of_numpy_are_numbers(tokenizer, number):
    dataset = load_preferences(Dataset.from_list(text_rows(3)), max_rows=number, seed=number, weights=[1])
    assert len(dataset) == 2
    train, held_out = split_train_eval(Dataset.from_list(text_rows(3)), eval_rows=number, seed=number)
    assert (len(train), len(held_out)) == (1, 2)
    assert len(tokenize_preferences(dataset, tokenizer, max_length=number + 100, num_proc=None)[0]) == 2
    assert 0 < len(split_train_eval(Dataset.from_list(text_rows(9)), eval_fraction=np.float32(0.5))[1]) < 9


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rows": "10"}, "max_rows: expected None or a whole number above 0, got '10'"),
        ({"max_rows": True}, "max_rows: expected None or a whole number above 0, got True"),
        ({"max_rows": 1.0}, "max_rows: expected None or a whole number above 0, got 1.0"),
        ({"ranked_pairs": "all"}, "ranked_pairs: expected one of .* got 'all'"),
        ({"ranked_pairs": None}, "ranked_pairs: expected one of .* got None"),
        ({"empty_response": True}, "empty_response: expected one of .* got True"),
        ({"cache_dir": 3}, "cache_dir: expected None or the path of a directory, got 3"),
        ({"split": None}, "split: expected a string, or a list of them, got None"),
        ({"split": 3}, "split: expected a string, or a list of them, got 3"),
        ({"split": [None]}, r"split: expected a string, or a list of them, got \[None\]"),
        ({"name": 3}, "name: expected None, a string, or a list of them, got 3"),
        ({"name": [3]}, r"name: expected None, a string, or a list of them, got \[3\]"),
        ({"weights": 0.5}, "weights: expected a list, with a number for each dataset, got 0.5"),
        ({"weights": "1"}, "weights: expected numbers from 0 to 1000, got '1'"),
        ({"seed": "a", "weights": [0.5]}, "seed: expected a whole number of at least 0, got 'a'"),
        ({"seed": "a"}, "seed: expected a whole number of at least 0, got 'a'"),
        ({"seed": -1}, "seed: expected a whole number of at least 0, got -1"),
        ({"seed": None}, "seed: expected a whole number of at least 0, got None"),
        ({"seed": True}, "seed: expected a whole number of at least 0, got True"),
    ],
)
def test_options_of_loading_out_of_range(ready, options, message):
    dataset = Dataset.from_list(text_rows(3))
    with pytest.raises(ValueError, match=f"^{message}"):
        load_preferences(normalize_preferences(dataset) if ready else dataset, **options)


def test_no_name_at_all():
    with pytest.raises(ValueError, match="name_or_path: expected a name or path, or a list of them, got ''"):
        load_preferences("")
    with pytest.raises(ValueError, match="origin: expected a string, got 3"):
        normalize_preferences(Dataset.from_list(text_rows(1)), origin=3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "cho\n',
            "row 2: the line is no",
        ),
        (
            "a.jsonl",
            b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n\n[1]\n',
            "row 3: expected a JSON object, got li",
        ),
        (
            "a.jsonl",
            b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}\n',
            "row 1: the line is not valid JSON.*utf-8",
        ),
        (
            "a.jsonl",
            b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": "a"}',
            "row 2: the field",
        ),
        ("a.jsonl", b'{"prompt": "p", "chosen": "a", "rejected": " "}\n', "row 1: the rejected response is empty"),
        ("a.jsonl", b"", "there are no rows"),
        (
            "a.json",
            b'[{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": ]',
            "row 2: the element is not valid",
        ),
        ("a.json", b'[{"prompt": "p", "chosen": "a", "rejected": "b"}', "row 2: the element is not valid JSON"),
        ("a.json", b'[{"prompt": "p", "chosen": "a", "rejected": "b"}] []', "array of 1 rows is followed by '\\[\\]'"),
        ("a.json", b"[]", "there are no rows"),
        ("a.json", b"[7]", "row 1: expected a JSON object, got int"),
        ("a.json", b"[\xff]", "not UTF-8"),
        ("a.csv", b"prompt,chosen,rejected\np,a,b\np,a\n", "row 2: fewer cells than the header's 3"),
        ("a.csv", b"prompt,chosen,rejected\np,a,b,c\n", "row 1: more cells than the header's 3"),
        ("a.csv", b'prompt,chosen,rejected\np,a,b\np,"a,b\n', "row 2: the record is not valid CSV"),
        ("a.csv", b"prompt,chosen,rejected\np,a,\n", "row 1: the rejected response is empty"),
        ("a.parquet", b"PAR1 not really", "the file is not valid Parquet"),
        (
            "a.jsonl",
            b'{"message_id": "1", "parent_id": null, "text": "p", "role": "prompter", "rank": null}',
            "there is no preference pair among the rows, which have the layout 'openassistant'",
        ),
        ("a.jsonl", b'{"text": "p"}\n', r"columns found \(text\) are no known preference layout"),
        ("a.jsonl", b'{"prompt": "p", "completion": "c", "label": true}', "unpaired.*KTO"),
    ],
)
def test_unsound_files_are_named_with_the_row(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_preferences(path)
    assert str(error.value).startswith(str(path))


def test_errors_after_the_first_rows_are_named_too(tmp_path):
    """Past the rows that recognition looks at, `datasets` wraps what its generators raise."""
    path = write(tmp_path / "pairs.jsonl", [*text_rows(150), {"prompt": "p", "chosen": "", "rejected": "b"}])
    with pytest.raises(ValueError) as error:
        load_preferences(path)
    assert str(error.value) == f"{path}, row 151: the chosen response is empty"


def test_paths_that_are_not_there(tmp_path):
    for missing in (tmp_path / "none.jsonl", "./none", "nowhere.csv"):
        with pytest.raises(ValueError, match="there is no file or directory"):
            load_preferences(missing)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="expected a file ending in .jsonl, .*got .*notes.txt"):
        load_preferences(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="no file ending in .* in the directory"):
        load_preferences(tmp_path)
    with pytest.raises(ValueError, match="expected one split, a datasets.Dataset, got DatasetDict"):
        normalize_preferences(DatasetDict({"train": Dataset.from_list(text_rows())}))


# The boundary


def test_plain_text_is_tokenized_in_parts(tokenizer):
    """Together, prompt and response would merge across the boundary: 'sk' + 'y' is one token here."""
    joined = tokenizer("the sky")["input_ids"]
    dataset = Dataset.from_list([{"prompt": "the sk", "chosen": "y", "rejected": "i"}])
    (row,), report = tokenize_preferences(dataset, tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "the sk"
    assert tokenizer.convert_ids_to_tokens(row["chosen_ids"]) == ["y", "<|im_end|>"]
    assert row["prompt_ids"] + row["chosen_ids"][:1] != joined
    assert report == DataReport(rows=1, kept=1, dropped={}, altered={})


TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
RESPONSE = TEXT.filter(lambda text: text.strip())


def nfc(text):
    """The form of Unicode that the demo's tokenizer, like every Qwen2 tokenizer, brings a text into first."""
    return unicodedata.normalize("NFC", text)


@settings(max_examples=60, deadline=None)
@example(prompt="e\u0301", chosen="a\u0300 b", rejected="\u212b")  # not in that form
@example(prompt="q", chosen="e\u0301", rejected="\u00e9")  # two texts, one form
@given(prompt=TEXT.filter(bool), chosen=RESPONSE, rejected=RESPONSE)
def test_decoding_gives_the_very_text_back(tokenizer, prompt, chosen, rejected):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    batch = pa.Table.from_pylist([row])
    columns = tokenization._tokenize_batch(
        batch, [0], tokenizer=tokenizer, max_length=None, truncation="drop", add_eos=False, template_kwargs={}
    )
    if nfc(chosen) == nfc(rejected):
        assert columns["dropped"] == [tokenization.IDENTICAL]
    else:
        decoded = [tokenizer.decode(columns[f"{key}_ids"][0]) for key in row]
        assert decoded == [nfc(prompt), nfc(chosen), nfc(rejected)]


def test_conversations_go_through_the_template(tokenizer):
    dataset = Dataset.from_list([chat_row("Say yes", "yes", "no, I say")])
    (row,), _ = tokenize_preferences(dataset, tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "<|im_start|>user\nSay yes<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row["chosen_ids"]) == "yes<|im_end|>\n"
    whole = tokenizer.apply_chat_template([user("Say yes"), assistant("no, I say")])["input_ids"]
    assert row["prompt_ids"] + row["rejected_ids"] == whole


def test_tools_and_template_arguments_reach_the_template(templated):
    tokenizer = templated("{{ tools | tojson if tools }}{{ mood }}{% for m in messages %}|{{ m.content }}{% endfor %}")
    rows = [{**chat_row(), "tools": TOOLS}, {**chat_row("p"), "tools": None}]
    dataset, _ = tokenize_preferences(Dataset.from_list(rows), tokenizer, chat_template_kwargs={"mood": "!"})
    assert tokenizer.decode(dataset[0]["prompt_ids"]) == json.dumps(TOOLS) + "!|q"
    assert tokenizer.decode(dataset[1]["prompt_ids"]) == "!|p"
    with pytest.raises(ValueError, match="chat_template_kwargs: tools are set by"):
        tokenize_preferences(Dataset.from_list(rows), tokenizer, chat_template_kwargs={"tools": []})


def test_renderings_that_part_early_move_the_boundary_and_are_reported(templated):
    """As with templates that open a thinking block for generation, which the finished turn does not have."""
    tokenizer = templated(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    )
    (row,), report = tokenize_preferences(Dataset.from_list([chat_row(chosen="<b>", rejected="<c>")]), tokenizer)
    assert counts(report.altered) == {tokenization.REDRAWN: 1}
    assert tokenizer.decode(row["prompt_ids"]) == "<|im_start|>user\nq<|im_end|><|im_start|>assistant\n"
    assert tokenizer.decode(row["chosen_ids"]) == "<b><|im_end|>"  # none of it is in the prompt, though "<" is shared


def test_alterations_of_dropped_pairs_are_not_counted(templated):
    tokenizer = templated("{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think>' if add_generation_prompt }}")
    rows = [chat_row(), chat_row(chosen="long " * 30)]
    with pytest.warns(UserWarning, match=tokenization.TOO_LONG):
        _, report = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=40, truncation="drop")
    assert counts(report.dropped) == {tokenization.TOO_LONG: 1} and counts(report.altered) == {tokenization.REDRAWN: 1}


def test_a_moved_boundary_does_not_cut_special_tokens(templated):
    tokenizer = templated(
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    # Prompt: "q<|im_end|><|im_start|>", whole: "q<|im_end|><|im_en...": they part inside the special tokens.
    dataset = Dataset.from_list([chat_row(chosen="<|im_end|>x", rejected="<|im_end|>y")])
    (row,), report = tokenize_preferences(dataset, tokenizer)
    assert counts(report.altered) == {tokenization.REDRAWN: 1}
    assert tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == ["q", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(row["chosen_ids"]) == ["<|im_end|>", "x", "<|im_end|>"]


def with_bos(**options):
    """A byte-level tokenizer that puts BOS before and EOS after a text of its own accord."""
    tokenizer = demo_tokenizer(TEXTS, 300)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    for name, value in options.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize("prompt", ["Say:", "<s>Say:"])
def test_bos_once_before_the_prompt_and_eos_once_after_the_responses(prompt):
    tokenizer = with_bos()
    rows = [{"prompt": prompt, "chosen": " yes", "rejected": " no</s>"}]
    (row,), _ = tokenize_preferences(Dataset.from_list(rows), tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "<s>Say:"
    assert row["prompt_ids"].count(tokenizer.bos_token_id) == 1
    assert [tokenizer.decode(row[key]) for key in ("chosen_ids", "rejected_ids")] == [" yes</s>", " no</s>"]


def test_the_template_writes_bos_in_conversations():
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    tokenizer = with_bos(chat_template=template.replace("{{ m.content }}", "{{ (':' if not loop.first) ~ m.content }}"))
    (row,), report = tokenize_preferences(Dataset.from_list([chat_row()]), tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "<s>q:" and not report.altered
    assert tokenizer.decode(row["chosen_ids"]) == "a</s>"  # the template ends no turn: EOS does

    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    (row,), _ = tokenize_preferences(Dataset.from_list([chat_row()]), tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "q:"  # the template wants no BOS


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("<|im_end|>\n", "a<|im_end|>\n"),  # EOS and white space, as in ChatML
        ("<turn>", "a<turn>"),  # an end of turn that is not EOS, as in Gemma and Llama 3
        ("\n", "a\n<|im_end|>"),  # nothing to stop at
    ],
)
def test_eos_unless_the_template_ends_the_turn(templated, ending, expected):
    tokenizer = templated("{% for m in messages %}{{ m.content }}" + ending.replace("\n", "\\n") + "{% endfor %}")
    tokenizer.chat_template = tokenizer.chat_template.replace("\\n", "{{ '\\n' }}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    (row,), _ = tokenize_preferences(Dataset.from_list([chat_row()]), tokenizer)
    assert tokenizer.decode(row["chosen_ids"]) == expected
    (row,), _ = tokenize_preferences(Dataset.from_list([chat_row()]), tokenizer, add_eos=False)
    assert tokenizer.decode(row["chosen_ids"]) == "a" + ending


def sentencepiece_like(kind):
    """Tokenizers that put a space before every text, as the Llama 2 family does."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    if kind == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=kind == "first")
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([*TEXTS, "\n:[]"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["always", "first", "normalizer"])
@pytest.mark.parametrize("response", [" yes", "yes", " the colour of the sky"])
def test_no_space_is_put_before_a_response(kind, response):
    tokenizer = sentencepiece_like(kind)
    dataset = Dataset.from_list([{"prompt": "Say [yes]", "chosen": response, "rejected": " no"}])
    (row,), report = tokenize_preferences(dataset, tokenizer)
    pieces = "".join(tokenizer.convert_ids_to_tokens(row["chosen_ids"]))
    assert pieces == response.replace(" ", "▁") + "</s>"
    assert not report.altered
    joined = tokenizer("Say [yes]" + response)["input_ids"]  # ']' merges with nothing here
    assert row["prompt_ids"] + row["chosen_ids"][:-1] == joined


# Truncation

IDS = ([1, 2, 3, 4, 5, 6], [11, 12, 13, 14], [21, 22])
CUT, END = tokenization.PROMPT_CUT, tokenization.RESPONSE_CUT


@pytest.mark.parametrize(
    ("policy", "max_length", "has_bos", "expected", "altered", "dropped"),
    [
        ("prompt_start", None, False, IDS, [], ""),
        ("prompt_start", 10, False, IDS, [], ""),  # exactly fits
        ("prompt_start", 9, False, ([2, 3, 4, 5, 6], *IDS[1:]), [CUT], ""),
        ("prompt_start", 9, True, ([1, 3, 4, 5, 6], *IDS[1:]), [CUT], ""),
        ("prompt_start", 6, True, ([1, 6], *IDS[1:]), [CUT], ""),
        ("prompt_start", 5, True, ([6], *IDS[1:]), [CUT], ""),  # room for one: the newest, not BOS
        ("prompt_start", 4, False, ([6], [11, 12, 13], [21, 22]), [CUT, END], ""),
        ("prompt_start", 2, False, ([6], [11], [21]), [CUT, END], ""),
        ("response_end", 9, False, (IDS[0], [11, 12, 13], [21, 22]), [END], ""),
        ("response_end", 7, False, (IDS[0], [11], [21]), [END], ""),
        ("response_end", 6, False, ([], [], []), [], tokenization.PROMPT_TOO_LONG),
        ("drop", 10, False, IDS, [], ""),
        ("drop", 9, False, ([], [], []), [], tokenization.TOO_LONG),
        ("error", 9, False, ([], [], []), [], tokenization.TOO_LONG),
    ],
)
def test_truncation(policy, max_length, has_bos, expected, altered, dropped):
    assert tokenization._fit(IDS, has_bos, max_length, policy) == (expected, altered, dropped)


def test_cutting_may_leave_no_difference():
    assert (
        tokenization._fit(([1, 2], [3, 4, 5], [3, 4, 6]), False, 4, "response_end")[2]
        == tokenization.IDENTICAL_AFTER_CUT
    )


def test_truncation_error_names_the_rows(tokenizer):
    rows = [*text_rows(1), {"prompt": "Say yes:", "chosen": " yes" * 20, "rejected": " no"}]
    with pytest.raises(ValueError, match="longer than max_length 16\n.*\n.*dataset, row 2"):
        tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=16, truncation="error")


def test_only_the_pair_that_is_too_long_is_cut(tokenizer):
    rows = [*text_rows(1), {"prompt": "Say yes: " * 9, "chosen": " yes", "rejected": " no, he says"}]
    dataset, report = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=32)
    assert counts(report.altered) == {tokenization.PROMPT_CUT: 1}
    assert report.altered[tokenization.PROMPT_CUT].examples == ("dataset, row 2",)
    row = dataset[1]
    assert len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) == 32
    assert ("Say yes: " * 9).endswith(tokenizer.decode(row["prompt_ids"]))
    assert tokenizer.decode(row["rejected_ids"]) == " no, he says<|im_end|>"


# What is dropped, and the report


def test_every_dropped_row_is_counted_with_its_reason(tmp_path, templated):
    tokenizer = templated(
        "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no such thing') }}{% endif %}"
        "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    shared = [user("p"), assistant("r")]
    rows = [
        chat_row(),
        chat_row(chosen="same", rejected="same"),
        chat_row(chosen=""),
        {**chat_row(), "chosen": [user("x")]},
        chat_row(prompt="refuse"),
        {
            "prompt": "p",
            "chosen": [*shared, user("x"), assistant("a")],
            "rejected": [*shared, user("y"), assistant("b")],
        },
        chat_row(chosen="long " * 30),
        chat_row("kept too"),
    ]
    dataset = load_preferences(write(tmp_path / "pairs.jsonl", rows[:3] + rows[4:]), empty_response="drop")
    with pytest.warns(UserWarning, match=tokenization.IDENTICAL):
        tokenized, report = tokenize_preferences(dataset, tokenizer, max_length=50, truncation="drop")
    assert counts(report.dropped) == {
        tokenization.IDENTICAL: 1,
        tokenization.EMPTY: 1,
        tokenization.REFUSED + "no such thing": 1,
        tokenization.OTHER_PROMPTS: 1,
        tokenization.TOO_LONG: 1,
    }
    assert (report.rows, report.kept, report.altered) == (7, 2, {})
    assert tokenized["index"][:] == [0, 6]
    assert tokenized.column_names == ["index", "prompt_ids", "chosen_ids", "rejected_ids"]
    file = tmp_path / "pairs.jsonl"
    assert report.dropped[tokenization.EMPTY].examples == (f"{file}, row 3",)
    assert f"dropped 1: {tokenization.EMPTY} ({file}, row 3)" in report.summary()
    assert report.summary().startswith("2 of 7 preference pairs kept")


def test_pairs_without_a_prompt_are_dropped(tokenizer):
    dataset = Dataset.from_list([*text_rows(1), {"prompt": "", "chosen": "yes", "rejected": "no"}])
    with pytest.warns(UserWarning, match="no prompt"):
        tokenized, report = tokenize_preferences(dataset, tokenizer)
    assert counts(report.dropped) == {tokenization.NO_PROMPT: 1} and len(tokenized) == 1
    _, report = tokenize_preferences(dataset, with_bos())  # BOS predicts the first token
    assert report.kept == 2


def test_summary_names_a_few_rows_of_many(tokenizer):
    dataset = Dataset.from_list(
        [*text_rows(1), *({"prompt": f"{n}", "chosen": "a", "rejected": "a"} for n in range(7))]
    )
    with pytest.warns(UserWarning):
        _, report = tokenize_preferences(dataset, tokenizer)
    assert "dropped 7: " in report.summary()
    assert "(dataset, row 2, row 3, row 4, row 5, row 6, ...)" in report.summary()


def test_nothing_left_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=f"no preference pair is left\n0 of 1 .*\n.*{tokenization.IDENTICAL}"):
        tokenize_preferences(Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "a"}]), tokenizer)


def test_tokenizers_that_lack_something(templated):
    chat, text = Dataset.from_list([chat_row()]), Dataset.from_list(text_rows())
    with pytest.raises(ValueError, match="has no chat template, which conversations need"):
        tokenize_preferences(chat, templated(None))
    no_eos = templated("x", eos_token=None)
    with pytest.raises(ValueError, match="has no EOS token.*add_eos=False"):
        tokenize_preferences(text, no_eos)
    (row, *_), _ = tokenize_preferences(text, no_eos, add_eos=False)
    assert no_eos.decode(row["chosen_ids"]) == " yes 0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length: expected None or a whole number of at least 2, got 1"),
        ({"max_length": "512"}, "max_length: expected None or a whole number of at least 2, got '512'"),
        ({"max_length": 512.0}, "max_length: expected .* got 512.0"),
        ({"max_length": True}, "max_length: expected .* got True"),
        ({"truncation": "left"}, "truncation: expected one of .* got 'left'"),
        ({"truncation": True}, "truncation: expected one of .* got True"),
        ({"train_on": None}, "train_on: expected one of .* got None"),
        ({"add_eos": "no"}, "add_eos: expected True or False, got 'no'"),
        ({"add_eos": None}, "add_eos: expected True or False, got None"),
        ({"num_proc": 0}, "num_proc: expected None or a whole number above 0, got 0"),
        ({"num_proc": "2"}, "num_proc: expected None or a whole number above 0, got '2'"),
        ({"num_proc": True}, "num_proc: expected .* got True"),
        (
            {"chat_template_kwargs": "x"},
            "chat_template_kwargs: expected None or a mapping of names to values.* got 'x'",
        ),
        ({"chat_template_kwargs": {1: 2}}, "chat_template_kwargs: expected None or a mapping.* got {1: 2}"),
        (
            {"chat_template_kwargs": {"date": {1}}},
            "chat_template_kwargs: date: expected a value as JSON has, got {1}",
        ),
    ],
)
def test_options_out_of_range(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize_preferences(Dataset.from_list(text_rows()), tokenizer, **options)


@pytest.mark.parametrize("wrong", [None, "gpt2", PreTrainedTokenizerFast, Tokenizer(models.BPE())])
def test_what_is_no_tokenizer_of_transformers(wrong):
    with pytest.raises(
        ValueError, match="tokenizer: expected a tokenizer of transformers, such as AutoTokenizer.*, got"
    ):
        tokenize_preferences(Dataset.from_list(text_rows()), wrong)


def test_a_dataset_in_the_tokenizers_place(tokenizer):
    with pytest.raises(ValueError, match="dataset: expected one split, a datasets.Dataset, got Qwen2Tokenizer"):
        tokenize_preferences(tokenizer, Dataset.from_list(text_rows()))


# Cache


@pytest.fixture
def batches(monkeypatch):
    """Counts the batches that are really tokenized."""
    seen = []
    tokenize_batch = tokenization._tokenize_batch

    def counting(*args, **kwargs):
        seen.append(1)
        return tokenize_batch(*args, **kwargs)

    monkeypatch.setattr(tokenization, "_tokenize_batch", counting)
    return seen


def test_a_second_call_is_served_from_the_cache_report_included(tmp_path, batches):
    rows = [*text_rows(4), {"prompt": "p", "chosen": "a", "rejected": "a"}, {**text_rows(1)[0], "prompt": "long " * 40}]
    path = write(tmp_path / "pairs.jsonl", rows)
    results = []
    for used in (False, True):
        tokenizer = demo_tokenizer(TEXTS, 300)  # a new object with the same contents
        if used:  # calls leave their padding and truncation behind in the tokenizer
            tokenizer(["yes", "yes and no"], padding=True, truncation=True, max_length=4)
        with pytest.warns(UserWarning, match=tokenization.IDENTICAL):
            results.append(tokenize_preferences(load_preferences(path), tokenizer, max_length=32))
    assert len(batches) == 1
    (first, report), (second, again) = results
    assert first[:] == second[:] and first._fingerprint == second._fingerprint
    assert report == again and counts(report.altered) == {tokenization.PROMPT_CUT: 1}


def test_whatever_changes_the_ids_changes_the_cache(tmp_path, batches):
    rows = [chat_row(), chat_row("p")]
    path = write(tmp_path / "pairs.jsonl", rows)
    dataset, tokenizer = load_preferences(path), demo_tokenizer(TEXTS, 300)
    tokenize_preferences(dataset, tokenizer)
    for options in (
        {"max_length": 512},
        {"truncation": "drop"},
        {"add_eos": False},
        {"chat_template_kwargs": {"x": 1}},
    ):
        tokenize_preferences(dataset, tokenizer, **options)
    tokenizer.chat_template += "."
    tokenize_preferences(dataset, tokenizer)
    tokenize_preferences(dataset, demo_tokenizer(TEXTS, 265))
    write(path, [*rows, chat_row("r")])
    changed, _ = tokenize_preferences(load_preferences(path), demo_tokenizer(TEXTS, 300))
    assert len(batches) == 8 and len(changed) == 3


def test_processes_give_the_same_rows(tmp_path, tokenizer):
    dataset = load_preferences(write(tmp_path / "pairs.jsonl", text_rows(7)))
    parallel, report = tokenize_preferences(dataset, tokenizer, num_proc=2)
    single, _ = tokenize_preferences(Dataset.from_list(text_rows(7)), tokenizer)
    assert parallel[:] == single[:] and report.kept == 7
    assert (len(parallel.cache_files), len(single.cache_files)) == (2, 1)


def test_fingerprints_are_the_same_in_another_process(tmp_path, tokenizer):
    path = write(tmp_path / "pairs.jsonl", text_rows())
    code = (
        "import sys, datasets; datasets.config.HF_DATASETS_CACHE = sys.argv[2]\n"
        "from dpo_kernels.data.loading import *; from dpo_kernels.data.tokenization import *\n"
        "from dpo_kernels.data.demo import demo_tokenizer\n"
        f"dataset, _ = tokenize_preferences(load_preferences(sys.argv[1]), demo_tokenizer({TEXTS!r}, 300))\n"
        "print(dataset._fingerprint)"
    )
    (tmp_path / "script.py").write_text(code)
    run = forks.python(tmp_path / "script.py", path, tmp_path / "cache")
    assert run.returncode == 0, run.stderr
    here, _ = tokenize_preferences(load_preferences(path), tokenizer)
    assert run.stdout.split()[-1] == here._fingerprint


# Splitting


def test_split_is_deterministic_and_keeps_prompts_together():
    rows = [{"prompt": f"p{n // 3}", "chosen": f"a{n}", "rejected": "b"} for n in range(60)]
    dataset = normalize_preferences(Dataset.from_list(rows))
    train, held_out = split_train_eval(dataset, eval_fraction=0.2, seed=1)
    assert len(held_out) == 12 and len(train) == 48
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert sorted(train["chosen"][:] + held_out["chosen"][:]) == sorted(row["chosen"] for row in rows)
    assert split_train_eval(dataset, eval_fraction=0.2, seed=1)[1][:] == held_out[:]
    assert split_train_eval(dataset, eval_fraction=0.2, seed=2)[1][:] != held_out[:]
    assert len(split_train_eval(dataset, eval_rows=4)[1]) == 6  # two whole prompts
    assert len(split_train_eval(dataset, eval_fraction=0.001)[1]) == 3  # something at least


def test_split_keeps_rankings_together():
    """Of one prompt, though it was cut to different lengths, and with all that have one of these in turn."""
    prompts = [[1, 2, 3], [2, 3], [3], [9], [2, 3], [3], [8], [7]]
    groups = ["a", "a", None, None, None, "b", "b", None]
    dataset = Dataset.from_dict({"prompt_ids": prompts, "group": groups, "place": range(8)})
    held_out = [split_train_eval(dataset, eval_rows=1, seed=seed)[1]["place"][:] for seed in range(20)]
    assert sorted(map(tuple, {tuple(rows) for rows in held_out})) == [(0, 1, 4), (2, 5, 6), (3,), (7,)]
    dataset = Dataset.from_dict({"prompt_ids": [[1], [2], [2], [1]], "group": [None, None, "a", "a"]})
    with pytest.raises(ValueError, match="4 rows with 1 different prompts leave nothing to train on"):
        split_train_eval(dataset, eval_rows=1)


def test_split_of_tokenized_pairs(tokenizer):
    dataset, _ = tokenize_preferences(Dataset.from_list(text_rows(10)), tokenizer)
    train, held_out = split_train_eval(dataset, eval_rows=3)
    assert sorted(train["index"][:] + held_out["index"][:]) == list(range(10)) and len(held_out) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "eval_fraction=None and eval_rows=None"),
        ({"eval_fraction": 0.1, "eval_rows": 1}, "eval_fraction=0.1 and eval_rows=1"),
        ({"eval_fraction": 1.0}, "eval_fraction: expected a number above 0 and below 1, got 1.0"),
        ({"eval_fraction": True}, "eval_fraction: expected a number above 0 and below 1, got True"),
        ({"eval_fraction": "0.1"}, "eval_fraction: expected a number above 0 and below 1, got '0.1'"),
        ({"eval_rows": 3}, "eval_rows: expected 1 to 2 of 3 rows, got 3"),
        ({"eval_rows": 0}, "eval_rows: expected 1 to 2 of 3 rows, got 0"),
        ({"eval_rows": "1"}, "eval_rows: expected 1 to 2 of 3 rows, got '1'"),
        ({"eval_rows": True}, "eval_rows: expected 1 to 2 of 3 rows, got True"),
        ({"eval_rows": 1, "seed": "a"}, "seed: expected a whole number of at least 0, got 'a'"),
    ],
)
def test_split_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        split_train_eval(Dataset.from_list(text_rows()), **options)


def test_split_of_what_is_no_dataset():
    with pytest.raises(ValueError, match="dataset: expected one split, a datasets.Dataset, got list"):
        split_train_eval(text_rows(), eval_rows=1)


def test_split_of_a_single_prompt():
    rows = [{"prompt": "p", "chosen": f"a{n}", "rejected": "b"} for n in range(3)]
    with pytest.raises(ValueError, match="3 rows with 1 different prompts leave nothing to train on beside held"):
        split_train_eval(Dataset.from_list(rows), eval_rows=1)


# Real data


@pytest.fixture(scope="module")
def real():
    path = REAL / "preferences_en.jsonl"
    if not path.exists():
        pytest.skip(f"no real preference data at {path}")
    return load_preferences(path)


def test_real_preferences_match_the_template_token_for_token(real):
    tokenizer = demo_tokenizer((row["chosen"][0]["content"] for row in real), 600)
    dataset, report = tokenize_preferences(real, tokenizer, max_length=None)
    assert (report.rows, report.kept, report.dropped, report.altered) == (300, 300, {}, {})
    for row, ids in zip(real, dataset, strict=True):
        for key in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(row["prompt"] + row[key])["input_ids"]
            assert ids["prompt_ids"] + ids[f"{key}_ids"] == whole
    cut, report = tokenize_preferences(real, tokenizer, max_length=1024)
    assert max(len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in cut) == 1024
    assert report.kept == 300 and report.altered[tokenization.PROMPT_CUT].count > 0


def test_real_unpaired_completions_are_refused():
    path = REAL / "unpaired_en.jsonl"
    if not path.exists():
        pytest.skip(f"no real unpaired data at {path}")
    with pytest.raises(ValueError, match=r"unpaired: its columns \(prompt, completion, label\)"):
        load_preferences(path)
