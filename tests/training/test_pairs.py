"""The data of a run: several datasets, templates and their settings, and errors in the words of the settings."""

import json

import pytest

pytest.importorskip("transformers")
from short_runs import TINY, write_rows

from dpo_kernels.data.demo import CHAT_TEMPLATE
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.pairs import decoder, load_data, load_parts
from dpo_kernels.training.sizes import data_fingerprint
from dpo_kernels.training.tokenizer import read_chat_template

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SHOUTING = CHAT_TEMPLATE.replace("<|im_start|>", "<|im_start|>HEY ")


def config(dataset, **settings):
    return TrainConfig(**TINY | {"max_rows": None, "dataset": dataset, "eval_fraction": 0} | settings)


def talks(file, count, answer="blue"):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What colour has {file.stem} {n}?"}],
            "chosen": [{"role": "assistant", "content": f"{answer}, as {n}"}],
            "rejected": [{"role": "assistant", "content": "I do not know"}],
        }
        for n in range(count)
    ]
    return write_rows(file, rows)


def texts(file, count):
    return write_rows(file, [{"prompt": f"{n} is ", "chosen": f"{n}!", "rejected": f"{n}?"} for n in range(count)])


@pytest.fixture
def two(tmp_path):
    return [talks(tmp_path / "a.jsonl", 6), talks(tmp_path / "b.jsonl", 8)]


def sources(part):
    return [part.source(n).rpartition("/")[2] for n in range(len(part.pairs))]


def test_several_datasets_are_one(two):
    _, (part,) = load_parts(config(two))
    assert sources(part) == [f"a.jsonl, row {n + 1}" for n in range(6)] + [f"b.jsonl, row {n + 1}" for n in range(8)]
    _, (weighted,) = load_parts(config(two, dataset_weights=[2, 0.5]))
    assert [sources(weighted).count(f"a.jsonl, row {n + 1}") for n in range(6)] == [2] * 6
    assert sum(name.startswith("b.jsonl") for name in sources(weighted)) == 4
    _, (one,) = load_parts(config(two, dataset_weights="1,0"))
    assert len(one.pairs) == 6
    _, (single,) = load_parts(config(two[0], dataset_weights=0.5))
    assert len(single.pairs) == 3
    _, (mixed,) = load_parts(config([two[0], "demo"], max_rows=5))
    assert len(mixed.pairs) == 10


def test_a_mixture_is_the_same_every_time_and_another_with_other_weights(two):
    prints = {
        name: data_fingerprint(load_data(config(two, dataset_weights=weights, seed=seed))[1])
        for name, weights, seed in (
            ("first", [1, 0.5], 1), ("again", [1, 0.5], 1), ("weights", [1, 0.25], 1), ("seed", [1, 0.5], 2)
        )
    }  # fmt: skip
    assert prints.pop("again") == prints["first"] and len(set(prints.values())) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": ["a.jsonl", "nowhere.jsonl"]}, r"^dataset: there is no file .*nowhere.jsonl"),
        ({"dataset": "nowhere.jsonl"}, r"^dataset: there is no file .*nowhere.jsonl"),
        ({"dataset_weights": [1e-9, 1]}, r"^dataset_weights: .*a.jsonl"),
        ({"dataset_weights": [5000, 1]}, r"^dataset_weights: .*5000"),
        ({"dataset_split": "test"}, r"^dataset_split: .*test"),
        ({"dataset_split": ["train", "test"]}, r"^dataset_split: .*test"),
        ({"eval_dataset": "nowhere.jsonl"}, r"^eval_dataset: there is no file .*nowhere.jsonl"),
        ({"eval_dataset": "a.jsonl", "eval_split": "test"}, r"^eval_split: .*test"),
        ({"dataset": ["a.jsonl", "text.jsonl"]}, r"text.jsonl"),
    ],
)
def test_errors_name_the_settings(tmp_path, monkeypatch, two, settings, message):
    monkeypatch.chdir(tmp_path)
    texts(tmp_path / "text.jsonl", 3)
    with pytest.raises(ValueError, match=message):
        load_data(config(**{"dataset": ["a.jsonl", "b.jsonl"]} | settings))


def test_both_reports_are_named(two, tmp_path, caplog):
    same = [{"prompt": "x ", "chosen": "y", "rejected": "y"}]
    mine = write_rows(tmp_path / "mine.jsonl", [{"prompt": "x ", "chosen": "y", "rejected": "z"}, *same])
    with pytest.warns(UserWarning) as caught, caplog.at_level("INFO", "dpo_kernels"):
        load_data(config(mine, eval_dataset=texts(tmp_path / "theirs.jsonl", 2)))
    reports = [str(warning.message) for warning in caught if "preference pairs kept" in str(warning.message)]
    assert len(reports) == 1 and reports[0].startswith("train: 1 of 2 preference pairs kept\n  dropped 1: chosen and")
    assert caplog.text.count("eval: 2 of 2 preference pairs kept") == 1 and "train: " not in caplog.text
    nothing = write_rows(tmp_path / "nothing.jsonl", same)
    with pytest.raises(
        ValueError, match="(?s)^the held-out pairs: no preference pair is left.*0 of 1 preference pairs"
    ):
        load_data(config(mine, eval_dataset=nothing))
    with pytest.raises(ValueError, match="(?s)^the training pairs: no preference pair is left"):
        load_data(config(nothing, eval_dataset=mine))
    rows = [{"prompt": "a ", "chosen": "b", "rejected": "b"}, {"prompt": "c ", "chosen": "d", "rejected": "e"}]
    for seed in range(6):  # one of two rows is held out
        half = config(write_rows(tmp_path / "half.jsonl", rows), eval_fraction=0.5, seed=seed)
        with pytest.raises(ValueError, match="^the (held-out|training) pairs: no preference pair is left"):
            load_data(half)


@pytest.mark.parametrize("form", ["file", "text", "json", "bom"])
def test_a_chat_template_takes_the_place_of_the_tokenizers_own(two, tmp_path, form):
    file = tmp_path / {"json": "chat_template.json"}.get(form, "mine.jinja")
    content = json.dumps({"chat_template": SHOUTING}) if form == "json" else SHOUTING
    file.write_text(content, encoding="utf-8-sig" if form == "bom" else "utf-8")
    tokenizer, pairs, _ = load_data(config(two[0], chat_template=SHOUTING if form == "text" else str(file)))
    assert tokenizer.chat_template == SHOUTING
    assert decoder(tokenizer)(pairs[0]["prompt_ids"]).count("HEY user") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{\x00{\x00", "mine.jinja is not UTF-8 text"),
        ("{{ 'caf\u00e9' }}".encode("latin-1"), "mine.jinja is not UTF-8 text"),
        (b"", "mine.jinja is empty"),
        (b" \n ", "mine.jinja is empty"),
        (b"{% for m in messages %}\n{{ m.content }", "mine.jinja, line 2: "),
        (b"{% if x %}\n\n{{ 1 }}\n", "mine.jinja, line 3: .*'if'"),
        (b'{"chat_template": 3}', "mine.jinja has no text named chat_template"),
        (b'{"chat_template": "', "mine.jinja is no valid JSON"),
        (None, "mine.jinja.*there is no such file"),
    ],
)
def test_what_is_no_template_is_named(two, tmp_path, content, message):
    file = tmp_path / "mine.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"chat_template: .*{message}"):
        load_data(config(two[0], chat_template=str(file)))


@pytest.mark.parametrize("setting", ["", " ", "no/such/file", "chatml", "x" * 30])
def test_what_names_no_file_and_is_no_template(setting):
    with pytest.raises(ValueError, match="chat_template: expected a file with a template or the text of one"):
        read_chat_template(setting)


def test_the_syntax_of_a_template_in_the_configuration_is_checked(two):
    with pytest.raises(ValueError, match="chat_template: its text, line 1: "):
        load_data(config(two[0], chat_template="{% for %}"))
    # one that refuses the conversation that it is tried with may take others
    fussy = "{% if 'colour' not in messages[0].content %}{{ raise_exception('no colour') }}{% endif %}" + CHAT_TEMPLATE
    assert len(load_data(config(two[0], chat_template=fussy))[1]) == 6
    broken = "{{ 1 / 0 if messages | length < 2 and 'colour' not in messages[0].content else '' }}" + CHAT_TEMPLATE
    assert len(load_data(config(two[0], chat_template=broken))[1]) == 6


def test_arguments_of_the_template_reach_it(two):
    template = "{{ 'Today is ' + date_string + '. ' }}" + CHAT_TEMPLATE
    settings = {"chat_template": template, "chat_template_kwargs": {"date_string": "26 Jul 2024"}}
    tokenizer, pairs, _ = load_data(config(two[0], **settings))
    assert decoder(tokenizer)(pairs[0]["prompt_ids"]).startswith("Today is 26 Jul 2024. <|im_start|>user")
    other = load_data(config(two[0], **settings | {"chat_template_kwargs": '{"date_string": "1 May"}'}))[1]
    assert data_fingerprint(pairs) != data_fingerprint(other)


@pytest.mark.parametrize(
    "setting", [{"chat_template": "{{ messages }}"}, {"chat_template_kwargs": {"a": 1}}, {"train_on": "last"}], ids=str
)
def test_plain_text_goes_through_no_template(tmp_path, setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}: has an effect only on conversations, and .*text.jsonl.*plain text"):
        load_data(config(texts(tmp_path / "text.jsonl", 3), **setting))


def test_the_last_turn_alone_can_be_labelled(tmp_path):
    def answer(word):
        turns = [("assistant", "Which one?"), ("user", "The large one"), ("assistant", word)]
        return [{"role": role, "content": content} for role, content in turns]

    prompt = [{"role": "user", "content": "Which colour?"}]
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": prompt, "chosen": answer("blue"), "rejected": answer("red")}])
    labelled = {}
    for train_on in ("all", "last"):
        tokenizer, pairs, _ = load_data(config(file, train_on=train_on))
        weights = zip(pairs[0]["chosen_ids"], pairs[0]["chosen_token_weights"], strict=True)
        labelled[train_on] = decoder(tokenizer)([token for token, weight in weights if weight])
    assert "blue" in labelled["last"] and "Which one?" not in labelled["last"]
    assert "Which one?" in labelled["all"] and "The large one" not in labelled["all"]
