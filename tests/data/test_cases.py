"""Small files that once were read wrongly, and what is right."""

import datasets
import pytest
from places import SHARED

from dpo_kernels.data.loading import load_preferences

CASES = SHARED / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"the files are not here: {CASES}")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def chat(asked, chosen, rejected, *before):
    return [*before, user(asked)], [assistant(chosen)], [assistant(rejected)]


@pytest.mark.parametrize(
    ("file", "rows"),
    [
        ("messages_as_text.jsonl", [chat("colour?", "blue", "red"), chat("size?", "big", "small")]),
        ("messages_as_text_indented.csv", [chat("colour?", "blue", "red"), chat("size?", "big", "small")]),
        (
            "messages_as_text_other_key.csv",
            [
                ([{"name": "me", **user(asked)}], [assistant(good)], [assistant(bad)])
                for asked, good, bad in (("colour?", "blue", "red"), ("size?", "big", "small"))
            ],
        ),
        ("roles_capitalised.jsonl", [chat("hi", "good", "bad"), chat("hello", "good", "bad")]),
        ("roles_capitalised_implicit.jsonl", [chat("hi", "good", "bad"), chat("hello", "good", "bad")]),
        (
            "system_empty_in_some_rows.jsonl",
            [chat("hi", "good", "bad"), chat("hello", "good", "bad", {"role": "system", "content": "Be nice"})],
        ),
        ("tools_as_text.jsonl", [chat("q", "a", "b"), chat("q2", "a", "b")]),
    ],
)
def test_messages_are_understood(file, rows):
    dataset = load_preferences(CASES / file)
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in dataset] == rows
    assert "altered" not in dataset.column_names


def test_tools_as_text():
    tools = load_preferences(CASES / "tools_as_text.jsonl")[:]["tools"]
    function = {"name": "add", "description": "sum", "parameters": {"type": "object", "properties": {}}}
    assert tools == [None, [{"type": "function", "function": function}]]
