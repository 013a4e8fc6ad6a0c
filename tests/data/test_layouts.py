"""Every known layout in its published form, and what is said about those that are not known or not sound."""

import pytest

from dpo_kernels.data.layouts import KNOWN_LAYOUTS, convert, is_empty, recognize, split_shared_text


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **extra):
    return {"role": "assistant", "content": text, **extra}


def system(text):
    return {"role": "system", "content": text}


def converted(*rows, **options):
    """All rows through recognition and conversion."""
    layout = recognize(list(dict.fromkeys(key for row in rows for key in row)))
    return list(convert(((f"file, row {n}", row) for n, row in enumerate(rows, start=1)), layout, **options))


def one(row, **options):
    (pair,) = converted(row, **options)
    return tuple(pair[key] for key in ("prompt", "chosen", "rejected", "tools"))


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}]


# Explicit prompt


def test_explicit_text_is_kept_as_it_is():
    row = {"prompt": "\n\nHuman: 1+1?\n\nAssistant:", "chosen": " 2", "rejected": " 3 ", "score_chosen": 5}
    assert converted(row) == [
        {
            "source": "file, row 1",
            "prompt": "\n\nHuman: 1+1?\n\nAssistant:",
            "chosen": " 2",
            "rejected": " 3 ",
            "tools": None,
        }
    ]


def test_explicit_messages_with_tools():
    row = {"prompt": [system("s"), user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")], "tools": TOOLS}
    assert one(row) == ([system("s"), user("q")], [assistant("a")], [assistant("b")], TOOLS)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("q", [assistant("a")], [assistant("b")]),
        ([user("q")], "a", "b"),
        ([user("q")], assistant("a"), [assistant("b")]),
        ([{"from": "human", "value": "q"}], {"from": "gpt", "value": "a"}, [assistant("b")]),
    ],
)
def test_text_beside_messages_becomes_a_message(prompt, chosen, rejected):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert one(row) == ([user("q")], [assistant("a")], [assistant("b")], None)


def test_system_column_makes_text_conversational():
    row = {"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}
    assert one(row) == ([system("s"), user("q")], [assistant("a")], [assistant("b")], None)
    assert one({**row, "system": ""})[0] == "q"


def test_a_prompt_with_a_system_turn_of_its_own_gets_no_second_one():
    row = {"system": "s", "prompt": [system("t"), user("q")], "chosen": "a", "rejected": "b"}
    assert one(row)[0] == [system("t"), user("q")]


def test_ultrafeedback_binarized_repeats_the_prompt():
    row = {
        "prompt": "q",
        "prompt_id": "f00",
        "chosen": [user("q"), assistant("a")],
        "rejected": [user("q"), assistant("b")],
        "messages": [user("q"), assistant("a")],
        "score_chosen": 9.0,
        "score_rejected": 3.0,
    }
    assert one(row) == ([user("q")], [assistant("a")], [assistant("b")], None)


@pytest.mark.parametrize(
    ("prompt", "shared", "expected"),
    [
        # the prompt is only the first turn of a longer shared conversation
        ("q", [user("q"), assistant("r"), user("t")], [user("q"), assistant("r"), user("t")]),
        # the conversation has a system turn that the prompt has not
        ("q", [system("s"), user("q")], [system("s"), user("q")]),
        # the prompt has a system turn that the conversation has not
        ([system("s"), user("q")], [user("q")], [system("s"), user("q")]),
    ],
)
def test_repeated_prompts_lose_no_turn(prompt, shared, expected):
    row = {"prompt": prompt, "chosen": [*shared, assistant("a")], "rejected": [*shared, assistant("b")]}
    assert one(row) == (expected, [assistant("a")], [assistant("b")], None)


def test_conversations_that_do_not_repeat_the_prompt_are_refused():
    row = {"prompt": "q", "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]}
    with pytest.raises(ValueError, match="file, row 1: chosen and rejected neither start with an assistant turn nor"):
        one(row)


# Implicit prompt


def test_implicit_messages_share_the_prompt():
    shared = [user("q"), assistant("r"), user("t")]
    row = {"chosen": [*shared, assistant("a")], "rejected": [*shared, assistant("b"), user("x")]}
    assert one(row) == (shared, [assistant("a")], [assistant("b"), user("x")], None)


def test_implicit_messages_keep_a_turn_each():
    same = [user("q"), assistant("a")]
    assert one({"chosen": same, "rejected": same}) == ([user("q")], [assistant("a")], [assistant("a")], None)
    longer = [*same, user("t"), assistant("b")]
    assert one({"chosen": same, "rejected": longer})[:2] == ([user("q")], [assistant("a")])


def test_hh_rlhf_transcripts():
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Is it:\n\n1. good?\n\n2. bad?\n\nAssistant:"
    row = {"chosen": start + " Good.\n\nReally.", "rejected": start + " Bad."}
    prompt = [user("Hi"), assistant("Hello."), user("Is it:\n\n1. good?\n\n2. bad?")]
    assert one(row) == (prompt, [assistant("Good.\n\nReally.")], [assistant("Bad.")], None)


def test_hh_rlhf_empty_last_turn_is_an_empty_response():
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant:"}
    with pytest.raises(ValueError, match="file, row 1: the rejected response is empty"):
        one(row)
    assert one(row, empty_response="drop")[2] == [assistant("")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Q: colour? A: blue", "Q: colour? A: red", ("Q: colour? A:", " blue", " red")),
        ("A: grey sky", "A: green sky", ("A:", " grey sky", " green sky")),  # no cut inside a word
        ("A:\nblue", "A:\nred", ("A:\n", "blue", "red")),  # only a space goes with the word
        ("yes", "no", ("", "yes", "no")),
        ("The sky is blue", "The sky is blue today", ("The sky is", " blue", " blue today")),  # no empty response
        ("same text", "same text", ("same", " text", " text")),
    ],
)
def test_implicit_text_is_cut_before_the_first_different_word(chosen, rejected, expected):
    assert split_shared_text(chosen, rejected) == expected
    assert one({"chosen": chosen, "rejected": rejected}) == (*expected, None)


def test_implicit_prompt_is_not_guessed_beside_a_column_that_may_hold_it():
    with pytest.raises(ValueError, match=r"columns found \(query, chosen, rejected\) are no known preference layout"):
        recognize(["query", "chosen", "rejected"])


# Ranked answers


NECTAR = {
    "prompt": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: q\n\nAssistant: ",
    "answers": [
        {"answer": "middle", "model": "m", "rank": 2},
        {"answer": "best", "model": "m", "rank": 1},
        {"answer": "worst", "model": "m", "rank": 7},
    ],
    "turns": 2,
}


def test_nectar_best_against_worst_or_each():
    prompt = [user("Hi"), assistant("Hello."), user("q")]
    assert one(NECTAR) == (prompt, [assistant("best")], [assistant("worst")], None)
    pairs = converted(NECTAR, ranked_pairs="best_vs_each")
    assert [pair["rejected"][0]["content"] for pair in pairs] == ["middle", "worst"]
    assert {pair["source"] for pair in pairs} == {"file, row 1"}


def test_nectar_ties_make_no_pair():
    tied = {"prompt": "q", "answers": [{"answer": t, "rank": r} for t, r in (("a", 1), ("b", 1), ("c", 2), ("d", 2))]}
    pairs = converted(tied, ranked_pairs="best_vs_each")
    assert [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs] == [("a", "c"), ("a", "d")]
    with pytest.raises(ValueError, match="row 1: .*'answers': expected two differently ranked answers or more, got 1"):
        one({"prompt": "q", "answers": [{"answer": "a", "rank": 1}]})


def tree(message_id, parent_id, role, text, rank=None, **extra):
    return {"message_id": message_id, "parent_id": parent_id, "role": role, "text": text, "rank": rank, **extra}


def test_openassistant_ranked_replies():
    rows = [
        tree("a2", "p", "assistant", "second", 1),  # a reply may come before its parent
        tree("p", None, "prompter", "q"),
        tree("a1", "p", "assistant", "first", 0),
        tree("a3", "p", "assistant", "third", 2),
        tree("a4", "p", "assistant", "removed", 3, deleted=True),
        tree("a5", "p", "assistant", "never ranked"),
        tree("f", "a3", "prompter", "follow-up", 0),
        tree("f2", "a3", "prompter", "other follow-up", 1),  # ranked, but no response of the assistant
        tree("b1", "f", "assistant", "good", 0.0),
        tree("b2", "f", "assistant", "bad", 1.0),
    ]
    pairs = converted(*rows)
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs] == [
        ([user("q")], [assistant("first")], [assistant("third")]),
        ([user("q"), assistant("third"), user("follow-up")], [assistant("good")], [assistant("bad")]),
    ]
    assert [pair["source"] for pair in pairs] == ["file, row 3", "file, row 9"]
    each = converted(*rows, ranked_pairs="best_vs_each")
    assert [pair["rejected"][0]["content"] for pair in each] == ["second", "third", "bad"]


def test_openassistant_reply_to_a_message_that_is_not_there():
    rows = [tree("a1", "p", "assistant", "first", 0), tree("a2", "p", "assistant", "second", 1)]
    with pytest.raises(ValueError, match="row 1: the message 'p', which it answers, is not in the data"):
        converted(*rows)


# Formats of other tools


def test_openai_preference_format():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "input": {"messages": [user("q")], "tools": TOOLS, "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "content": None, "tool_calls": [call]}],
        "non_preferred_output": [assistant("no")],
    }
    prompt, chosen, rejected, tools = one(row)
    assert (prompt, rejected, tools) == ([user("q")], [assistant("no")], TOOLS)
    # Chat templates write the arguments as JSON: they must not be JSON text already.
    decoded = {**call, "function": {"name": "add", "arguments": {"a": 1}}}
    assert chosen == [assistant("", tool_calls=[decoded])]
    assert one({**row, "input": {"messages": [user("q")], "tools": []}})[3] is None


def test_content_parts_of_text_are_joined_and_others_refused():
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": "a", "rejected": "b"}
    assert one(row)[0] == [user("two parts")]
    row["prompt"] = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    with pytest.raises(ValueError, match="'prompt': content parts must be text, got 'image_url'"):
        one(row)


def test_llama_factory_sharegpt():
    row = {
        "conversations": [
            {"from": "human", "value": "add 1"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
        ],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
        "system": "s",
        "tools": '[{"name": "add"}]',
    }
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    prompt = [system("s"), user("add 1"), assistant("", tool_calls=[call]), {"role": "tool", "content": "2"}]
    assert one(row) == (prompt, [assistant("a")], [assistant("b")], [{"name": "add"}])
    row = {**row, "chosen": "a", "rejected": "b", "system": "", "tools": ""}
    assert one(row) == (prompt[1:], [assistant("a")], [assistant("b")], None)
    with pytest.raises(ValueError, match="'conversations': expected JSON text, got 'add'"):
        one({**row, "conversations": [{"from": "function_call", "value": "add"}]})


def test_llama_factory_alpaca():
    row = {"instruction": "translate", "input": "oui", "chosen": "yes", "rejected": "no"}
    assert one(row) == ([user("translate\noui")], [assistant("yes")], [assistant("no")], None)
    row = {**row, "input": "", "system": "s", "history": [["hi", "hello"]]}
    prompt = [system("s"), user("hi"), assistant("hello"), user("translate")]
    assert one(row) == (prompt, [assistant("yes")], [assistant("no")], None)
    with pytest.raises(ValueError, match="'history': expected pairs of question and answer"):
        one({**row, "history": ["hi"]})


def test_question_may_stand_for_instruction():
    row = {"system": "s", "question": "q", "chosen": "a", "rejected": "b"}
    assert one(row) == ([system("s"), user("q")], [assistant("a")], [assistant("b")], None)


# What is refused


@pytest.mark.parametrize("columns", [["prompt", "completion", "label"], ["instruction", "output", "kto_tag"]])
def test_unpaired_data_is_named_as_such(columns):
    with pytest.raises(ValueError, match="unpaired.*KTO.*two responses to each prompt: columns prompt, chosen"):
        recognize(columns)


def test_unknown_layouts_show_the_columns_and_the_layouts():
    with pytest.raises(ValueError) as error:
        recognize(["text", "stars"])
    assert "(text, stars)" in str(error.value)
    assert KNOWN_LAYOUTS in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": None}, "row 2: the field 'rejected' is null"),
        ({"rejected": 3}, "row 2: the field 'rejected': expected text or a list of messages, got int"),
        ({"chosen": []}, "row 2: the field 'chosen': expected text or a list of messages, got an empty list"),
        ({"chosen": ["a"]}, "row 2: the field 'chosen': expected messages, objects with role and content, got 'a'"),
        ({"chosen": [{"content": "a"}]}, r"row 2: the field 'chosen': a message has no role \(keys: content\)"),
        ({"chosen": [{"role": "assistant"}]}, "row 2: the field 'chosen': a message of role 'assistant' has no conten"),
        ({"chosen": [assistant(5)]}, "row 2: the field 'chosen': expected text, got int"),
        ({"chosen": [assistant(" \n")]}, "row 2: the chosen response is empty"),
        ({"chosen": [assistant("\ud83d")]}, "row 2: the field 'chosen' holds half of a surrogate pair"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "row 2: this row is plain text, the rows before it are conv"),
        ({"tools": "{"}, "row 2: the field 'tools': expected JSON text"),
        ({"chosen": [assistant("", tool_calls=["add"])]}, "row 2: the field 'chosen': expected a tool call"),
    ],
)
def test_unsound_rows_are_named(change, message):
    sound = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    with pytest.raises(ValueError, match=message):
        converted(sound, {**sound, **change})


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="row 2: the field 'rejected' is missing"):
        converted({"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a"})


def test_tools_need_a_conversation():
    with pytest.raises(ValueError, match="row 1: the field 'tools' needs a conversational prompt"):
        one({"prompt": "p", "chosen": "a", "rejected": "b", "tools": TOOLS})


def test_options_out_of_range():
    with pytest.raises(ValueError, match="ranked_pairs: expected one of .* got 'all'"):
        list(convert([], "nectar", ranked_pairs="all"))
    with pytest.raises(ValueError, match="empty_response: expected one of .* got 'keep'"):
        list(convert([], "explicit", empty_response="keep"))


def test_is_empty():
    assert is_empty(" \n") and is_empty([assistant("")])
    assert not is_empty("x") and not is_empty([assistant("", tool_calls=[{"name": "add"}])])
