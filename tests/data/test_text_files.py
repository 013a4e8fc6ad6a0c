"""Files as other programs write them, and what decides whether converted rows are taken from the cache."""

import csv
import json

import datasets
import pytest

from dpo_kernels.data.demo import demo_tokenizer
from dpo_kernels.data.loading import load_preferences, split_train_eval
from dpo_kernels.data.tokenization import tokenize_preferences


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pair(prompt="How many?", chosen="Three.", rejected="Four."):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def write_csv(path, rows, **options):
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_line_ends_inside_a_cell_stay_as_they_are(tmp_path):
    rows = [pair(chosen="one\r\ntwo\rthree\nfour"), pair("Why?", "Because.", "It\r\nis.")]
    found = load_preferences(write_csv(tmp_path / "pairs.csv", rows))
    assert found["chosen"][:] == [row["chosen"] for row in rows]
    assert found["rejected"][:] == [row["rejected"] for row in rows]


def test_a_cell_of_200_kilobytes(tmp_path):
    """More than the csv module takes by default, which a long response has."""
    csv.field_size_limit(131072)
    rows = [pair(chosen="word " * 40_000 + "end.")]
    assert load_preferences(write_csv(tmp_path / "pairs.csv", rows))["chosen"][:] == [rows[0]["chosen"]]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.csv"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    path, rows = tmp_path / name, [pair(), pair("Why?", "Because.", "It is.")]
    if name == "pairs.csv":
        write_csv(path, rows)
    else:
        text = json.dumps(rows) if name == "pairs.json" else "\n".join(map(json.dumps, rows))
        path.write_text(text, encoding="utf-8")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_preferences(path)["prompt"][:] == [row["prompt"] for row in rows]


def test_every_option_makes_rows_of_its_own(tmp_path):
    """One file, loaded again with another option, gives what that option says, not what was kept before."""
    path = tmp_path / "ranked.jsonl"
    answers = [{"answer": text, "rank": rank} for rank, text in enumerate(("best", "good", "bad"), start=1)]
    path.write_text(json.dumps({"prompt": "q", "answers": answers}) + "\n")
    assert len(load_preferences(path, ranked_pairs="best_vs_worst")) == 1
    assert len(load_preferences(path, ranked_pairs="best_vs_each")) == 2
    assert len(load_preferences(path, ranked_pairs="all_pairs", max_rows=1)) == 3
    path = tmp_path / "empty.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (pair(), pair(rejected=""))))
    assert len(load_preferences(path, empty_response="drop")) == 2
    with pytest.raises(ValueError, match="row 2: the rejected response is empty"):
        load_preferences(path, empty_response="error")


def test_max_rows_makes_rows_of_its_own(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair(f"How many are {n}?")) + "\n" for n in range(3)))
    assert [len(load_preferences(path, max_rows=most)) for most in (None, 2, 1)] == [3, 2, 1]


def test_another_eos_gives_other_ids(tmp_path):
    """It is a token that the vocabulary has anyway: the tokenizer's contents are the same."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (pair(), pair("Why?", "Because.", "It is."))))
    dataset, tokenizer = load_preferences(path), demo_tokenizer(["How many? Three. Four."], 300)
    first, _ = tokenize_preferences(dataset, tokenizer)
    assert first["chosen_ids"][0][-1] == tokenizer.eos_token_id
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids("T"))
    second, _ = tokenize_preferences(dataset, tokenizer)
    assert second["chosen_ids"][0][-1] == tokenizer.eos_token_id != first["chosen_ids"][0][-1]


def test_a_small_fraction_is_one_pair(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair(f"How many are {n}?")) + "\n" for n in range(10)))
    train, held_out = split_train_eval(load_preferences(path), eval_fraction=0.01)
    assert (len(train), len(held_out)) == (9, 1)
