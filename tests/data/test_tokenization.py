"""From texts to ids: where responses end, which tokens count, and weights through to the batch."""

import json

import chat_templates as families
import datasets
import pyarrow as pa
import pytest
from chat_templates import assistant, call, calling, user
from datasets import Dataset
from places import SHARED
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpo_kernels.data import rendering, tokenization
from dpo_kernels.data.batching import PairCollator
from dpo_kernels.data.loading import load_preferences
from dpo_kernels.data.tokenization import tokenize_preferences

PARTS = ("prompt", "chosen", "rejected")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def tokenized(rows, tokenizer=None, **options):
    """Rows of ids, and the report; `rows` are those of a file, or one of them."""
    rows = rows if isinstance(rows, list) else [rows]
    return tokenize_preferences(Dataset.from_list(rows), tokenizer or families.tokenizer(), **options)


def columns(batch, *, tokenizer=None, **options):
    """What a batch of converted rows becomes, without the dataset around it: rows that are dropped too."""
    names = dict.fromkeys(name for row in batch for name in row)
    stored = []
    for number, row in enumerate(batch, 1):
        parts = {name: [json.dumps(m) for m in row[name]] for name in PARTS if isinstance(row[name], list)}
        stored.append({"source": f"pairs.jsonl, row {number}", **dict.fromkeys(names), **row, **parts})
    options = {"max_length": None, "truncation": "prompt_start", "add_eos": True, "template_kwargs": {}, **options}
    return tokenization._tokenize_batch(
        pa.Table.from_pylist(stored),
        list(range(len(batch))),
        tokenizer=tokenizer or families.tokenizer(),
        **options,
    )


def decoded(columns, name, tokenizer=None, row=0):
    return (tokenizer or families.tokenizer()).decode(columns[name][row])


def text(chosen=" yes", rejected=" no", prompt="Say:", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def chat(chosen="yes", rejected="no", prompt="q", **more):
    parts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    roles = {"prompt": user, "chosen": assistant, "rejected": assistant}
    return {**{key: [roles[key](v)] if isinstance(v, str) else v for key, v in parts.items()}, **more}


# Where a plain response ends


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (" yes", " yes<|im_end|>"),
        (" yes<|im_end|>", " yes<|im_end|>"),
        (" yes<|im_end|>\n", " yes<|im_end|>\n"),
        ("<|im_end|>", "<|im_end|>"),
        (" yes<|im_end|> and", " yes<|im_end|> and<|im_end|>"),
        ("<|im_start|>", "<|im_start|><|im_end|>"),
        (" yes<|endoftext|>", " yes<|endoftext|><|im_end|>"),
        (" yes</s>", " yes</s><|im_end|>"),  # EOS of another family
        (" yes<|eot_id|>\n", " yes<|eot_id|>\n<|im_end|>"),
        (" it ends with [TOOL_CALLS]", " it ends with [TOOL_CALLS]<|im_end|>"),
    ],
)
def test_only_eos_counts_as_eos_at_the_end_of_a_plain_response(response, expected):
    made = columns([text(response)])
    assert decoded(made, "chosen_ids") == expected
    assert decoded(columns([text(response)], add_eos=False), "chosen_ids") == response


def test_responses_are_compared_with_their_eos():
    assert columns([text(" yes", " yes<|im_end|>")])["dropped"] == [rendering.IDENTICAL]
    assert columns([text(" yes", " yes<|im_end|>")], add_eos=False)["dropped"] == [""]
    assert columns([chat("yes", "yes<|im_end|>")])["dropped"] == [rendering.RENDERED_ALIKE]
    bare = families.tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert columns([chat("yes", "yes<|im_end|>")], tokenizer=bare)["dropped"] == [rendering.IDENTICAL]


# Text that the tokenizer does not know


def without_bytes(**special):
    """A tokenizer of whole characters: it knows those of a few words."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>", "<pad>"], show_progress=False)
    backend.train_from_iterator(["Say: yes and no qa<>|_"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", **special}
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ ':' if add_generation_prompt }}"
    return tokenizer


@pytest.mark.parametrize(
    "row",
    [text(" yes 😀"), text(prompt="Sag: ä"), text(rejected="не"), text(" 是"), text("Q"), text("yes", "no\u200b")],
)
def test_unknown_text_is_reported(row):
    made = columns([row, text()], tokenizer=without_bytes())
    assert made["altered"] == [[tokenization.UNKNOWN], []] and made["dropped"] == ["", ""]


def test_unknown_tokens_that_are_no_loss_are_not_reported():
    assert columns([text(" yes <unk>")], tokenizer=without_bytes())["altered"] == [[]]  # it says so itself
    for role in ("eos_token", "pad_token", "bos_token"):  # one token for all, as in GPT-2
        made = columns([text(" yes é")], tokenizer=without_bytes(**{role: "<unk>"}))
        assert made["altered"] == [[]]
    assert columns([text(" yes 😀")])["altered"] == [[]]  # bytes know everything


# Weights


MULTI = [assistant("a1"), user("u"), assistant("a2")]


def test_weights_are_as_long_as_the_ids_and_0_for_other_turns():
    tokenizer = families.tokenizer()
    made = columns([chat(MULTI)])
    ids, weights = made["chosen_ids"][0], made["chosen_token_weights"][0]
    assert len(ids) == len(weights) and set(weights) == {0, 1}
    parts = {w: tokenizer.decode([i for i, weight in zip(ids, weights, strict=True) if weight == w]) for w in (0, 1)}
    assert parts == {1: "a1<|im_end|>a2<|im_end|>\n", 0: "\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"}
    assert made["rejected_token_weights"][0] == [1] * len(made["rejected_ids"][0])
    assert ids == tokenizer.apply_chat_template([user("q"), *MULTI])["input_ids"][len(made["prompt_ids"][0]) :]


def test_the_last_turn_alone_or_turns_that_say_so():
    tokenizer = families.tokenizer()

    def kept(response, **options):
        made = columns([chat(response)], **options)
        pairs = zip(made["chosen_ids"][0], made["chosen_token_weights"][0], strict=True)
        return tokenizer.decode([i for i, weight in pairs if weight])

    assert kept(MULTI, train_on="last") == "a2<|im_end|>\n"
    assert kept([assistant("a1"), user("u"), assistant("a2", train=False)]) == "a1<|im_end|>"
    assert (
        kept([assistant("a1", train=True), user("u"), assistant("a2")], train_on="last") == "a1<|im_end|>a2<|im_end|>\n"
    )
    made = columns([chat([assistant("yes", weight=0.1)])])
    assert made["chosen_token_weights"][0] == [0.1] * len(made["chosen_ids"][0])


def test_eos_weighs_what_the_last_turn_weighs():
    bare = families.tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}{{ ':' if add_generation_prompt }}")
    made = columns([chat([assistant("yes", weight=0.5)])], tokenizer=bare)
    assert made["chosen_ids"][0][-1] == bare.eos_token_id and made["chosen_token_weights"][0][-1] == 0.5
    made = columns([chat([assistant("a", weight=2), user("u"), assistant("b", train=False)])], tokenizer=bare)
    assert made["chosen_ids"][0][-1] == bare.eos_token_id and made["chosen_token_weights"][0][-1] == 0


@pytest.mark.parametrize(
    "response",
    [
        [assistant("yes", train=False)],
        [assistant("yes", weight=0)],
        [assistant("a", train=False), user("u"), assistant("b", weight=0)],
    ],
)
def test_pairs_with_nothing_labelled_are_dropped(response):
    for row in (chat(response), chat("other", response)):
        assert columns([row])["dropped"] == [tokenization.UNLABELLED]


def test_token_weights_of_a_row():
    tokenizer = families.tokenizer()
    length = len(tokenizer(" yes", add_special_tokens=False)["input_ids"])
    given = [0.5] + [2.0] * (length - 1)
    for weights, expected in ((given, [*given, 1.0]), ([*given, 0.25], [*given, 0.25])):  # without EOS, and with it
        made = columns([text(chosen_token_weights=weights)])
        assert made["chosen_token_weights"] == [expected]
        assert made["rejected_token_weights"] == [[1.0] * len(made["rejected_ids"][0])]
    made = columns([text(chosen_token_weights=[1.0] * length)])
    assert made["chosen_token_weights"] == [None]  # nothing to keep
    made = columns([text(chosen_token_weights=[0.0] * length + [0.0])])
    assert made["dropped"] == [tokenization.UNLABELLED]


def test_token_weights_of_a_row_multiply_with_those_of_turns():
    plain = columns([chat(MULTI)])
    ones = [2.0] * len(plain["chosen_ids"][0])
    made = columns([chat(MULTI, chosen_token_weights=ones)])
    assert made["chosen_token_weights"][0] == [2 * w for w in plain["chosen_token_weights"][0]]


@pytest.mark.parametrize("count", [0, 1, 30])
@pytest.mark.parametrize("key", ["chosen", "rejected"])
def test_token_weights_of_another_length_are_errors(key, count):
    row = text(" yes and yes", " no and no", **{f"{key}_token_weights": [1.0] * count})
    with pytest.raises(
        ValueError, match=rf"^pairs.jsonl, row 2: {key}_token_weights: expected .* with EOS, got {count}$"
    ):
        columns([text(), row])
    with pytest.raises(ValueError, match=rf"row 1: {key}_token_weights: expected .* response, \d+, got {count}$"):
        columns([row], add_eos=False)


def test_weights_are_cut_with_their_tokens():
    row = text(" yes" * 20, chosen_token_weights=[float(n) for n in range(1, 21)])
    length = len(families.tokenizer()(" yes", add_special_tokens=False)["input_ids"])
    row["chosen_token_weights"] = [float(n) for n in range(1, 20 * length + 1)]
    made = columns([row], max_length=16, truncation="response_end")
    assert len(made["chosen_ids"][0]) == len(made["chosen_token_weights"][0])
    assert made["chosen_token_weights"][0] == row["chosen_token_weights"][: len(made["chosen_ids"][0])]
    late = {**row, "chosen_token_weights": [0.0] * (20 * length - 1) + [1.0]}
    assert columns([late], max_length=16, truncation="response_end")["dropped"] == [tokenization.UNLABELLED]


def test_columns_of_weights_are_there_where_some_row_has_them():
    dataset, report = tokenized([chat(), chat("other")])
    assert dataset.column_names == ["index", "prompt_ids", "chosen_ids", "rejected_ids"] and report.altered == {}
    with pytest.warns(UserWarning, match=rendering.IDENTICAL):
        dataset, _ = tokenized([chat(), chat(MULTI), chat("same", "same"), chat([assistant("a", weight=0.5)])])
    assert dataset.column_names[-2:] == ["chosen_token_weights", "rejected_token_weights"]
    for row in dataset:
        assert len(row["chosen_token_weights"]) == len(row["chosen_ids"])
        assert len(row["rejected_token_weights"]) == len(row["rejected_ids"])
    assert set(dataset[0]["chosen_token_weights"]) == {1} and set(dataset[2]["chosen_token_weights"]) == {0.5}
    batch = PairCollator(0)([dict(row) for row in dataset])
    assert batch["token_weights"].shape == batch["labels"].shape
    dataset, _ = tokenized([chat(MULTI), chat()], train_on="last")
    assert "token_weights" not in PairCollator(0)([dict(row) for row in dataset])  # 0 and 1 are said by labels


# Reports, options and the cache


def test_the_template_changes_the_report_not_the_other_rows():
    rows = [chat(), chat([calling(call("add", a=1))]), chat(prompt=[user("q"), assistant("Sure, ")])]
    with pytest.warns(UserWarning, match="leaves out the response's tool calls"):
        dataset, report = tokenized(rows)
    assert dataset["index"][:] == [0, 2]
    assert {reason: rows.count for reason, rows in report.altered.items()} == {rendering.CONTINUED: 1}
    assert report.dropped["the chat template leaves out the response's tool calls"].examples == ("dataset, row 2",)


def test_reasons_of_the_conversion_go_into_the_report():
    made = columns([chat(altered=["roles renamed"]), chat("same", "same", altered=["roles renamed"])])
    assert made["altered"] == [["roles renamed"], ["roles renamed"]] and made["dropped"][1] == rendering.IDENTICAL
    made = columns([chat(prompt=[user("q"), assistant("Sure, ")], altered=["a", "b"])])
    assert made["altered"] == [["a", "b", rendering.CONTINUED]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_on": "first"}, r"train_on: expected one of \('all', 'last'\), got 'first'"),
        ({"chat_template_kwargs": {"continue_final_message": True}}, "continue_final_message are set by"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "add_generation_prompt are set by"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        tokenized(chat(), **options)


def test_a_template_may_come_with_the_options():
    tokenizer = families.demo_tokenizer(["abc"], 300)
    tokenizer.chat_template = None
    dataset, _ = tokenized(chat(), tokenizer, chat_template_kwargs={"chat_template": families.VICUNA})
    assert tokenizer.decode(dataset[0]["prompt_ids"]) == "USER: q ASSISTANT: "
    with pytest.raises(ValueError, match="has no chat template"):
        tokenized(chat(), tokenizer)


def test_what_is_trained_on_changes_the_cache():
    dataset = Dataset.from_list([chat(MULTI)])
    (every, _), (last, _) = (tokenize_preferences(dataset, families.tokenizer(), train_on=t) for t in ("all", "last"))
    assert every._fingerprint != last._fingerprint
    assert every[0]["chosen_token_weights"] != last[0]["chosen_token_weights"]


def test_another_eos_changes_the_cache():
    dataset, ends = Dataset.from_list([text()]), []
    for eos in ("<|im_end|>", "<|im_start|>"):
        tokenizer = families.demo_tokenizer(["abc"], 300)
        tokenizer.eos_token = eos
        (row,), _ = tokenize_preferences(dataset, tokenizer)
        ends.append(tokenizer.decode(row["chosen_ids"]))
    assert ends == [" yes<|im_end|>", " yes<|im_start|>"]


# Cases


def case(name):
    path = SHARED / "cases" / name
    if not path.exists():
        pytest.skip(f"no cases at {path}")
    return load_preferences(path, empty_response="drop")


def test_case_of_tool_calls_that_the_template_ignores():
    dataset = case("tool_calls.jsonl")
    with pytest.raises(ValueError, match=r"0 of 2 .*\n.*leaves out the response's tool calls \(.*row 1, row 2\)"):
        tokenize_preferences(dataset, families.tokenizer())
    kept, report = tokenize_preferences(dataset, families.tokenizer(families.QWEN25))
    assert report.kept == 2 and not report.altered
    assert '"arguments": {"a": 1, "b": 1}' in families.tokenizer().decode(kept[0]["chosen_ids"])


def test_case_of_a_begun_turn():
    dataset, report = tokenize_preferences(case("prefill.jsonl"), families.tokenizer())
    tokenizer = families.tokenizer()
    assert tokenizer.decode(dataset[0]["prompt_ids"]) == "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\nSure, "
    assert tokenizer.decode(dataset[0]["chosen_ids"]) == "good<|im_end|>\n"
    assert report.altered[rendering.CONTINUED].count == 2


def test_case_of_a_plain_response_that_ends_with_a_special_token():
    dataset, _ = tokenize_preferences(case("plain_special_end.jsonl"), families.tokenizer())
    assert families.tokenizer().convert_ids_to_tokens(dataset[0]["chosen_ids"]) == ["<|im_start|>", "<|im_end|>"]


# Rankings


def test_rankings_are_handed_on(tmp_path):
    rows = [text(" a", [" b", " c", " d"]), text(" a", [" b"])]
    tokenizer = families.tokenizer()
    loaded = load_preferences(Dataset.from_list(rows), ranked_pairs="best_vs_each", cache_dir=str(tmp_path))
    pairs, _ = tokenize_preferences(loaded, tokenizer)
    assert pairs["group"][:] == ["dataset, row 1"] * 3 + [None]
    assert pairs["members"][:] == [[0, 1], [0, 2], [0, 3], None]
    assert set(pairs.column_names) == {"index", "prompt_ids", "chosen_ids", "rejected_ids", "group", "members"}
    plain, _ = tokenize_preferences(loaded.select([3]), tokenizer)
    assert set(plain.column_names) == {"index", "prompt_ids", "chosen_ids", "rejected_ids"}


def test_the_chosen_response_among_the_rejected_is_dropped(tmp_path):
    loaded = load_preferences(
        Dataset.from_list([text(" a", [" b", " a", " c"])]), ranked_pairs="all_pairs", cache_dir=str(tmp_path)
    )
    with pytest.warns(UserWarning, match="dropped 1: chosen and rejected are identical"):
        pairs, report = tokenize_preferences(loaded, families.tokenizer())
    assert pairs["members"][:] == [[0, 1], [0, 3]] and report.kept == 2
