"""Messages, tools and tool calls in the forms in which people keep them, also as text; and text that is none."""

import json

import numpy as np
import pytest

from dpo_kernels.data.messages import (
    LOOKS_LIKE_MESSAGES,
    NOT_USED_BESIDE,
    canonical_role,
    is_transcript,
    parse_text_or_messages,
    same_turns,
    tools,
    transcript,
)

TURNS = [
    {"role": "user", "content": 'What\'s "blue"?\n} {'},
    {"role": "assistant", "content": "it's array([1]), é 😀 C:\\n", "name": "null"},
]
PLAIN = [{key: turn[key] for key in ("role", "content")} for turn in TURNS]
NAMES = {"user": "human", "assistant": "ai"}
CLASSES = {"user": "HumanMessage", "assistant": "AIMessageChunk"}


def parsed(value):
    return parse_text_or_messages(value, "chosen").value


def with_nulls(messages):
    return [{**message, "weight": None, "train": True} for message in messages]


# Messages as text


@pytest.mark.parametrize(
    "written",
    [
        json.dumps,
        lambda turns: json.dumps(turns, ensure_ascii=False, indent=2),
        lambda turns: "\ufeff \r\n" + json.dumps(turns) + "\n\n",
        lambda turns: json.dumps(json.dumps(turns)),
        lambda turns: json.dumps(json.dumps(json.dumps(turns))),
        lambda turns: json.dumps(json.dumps(turns))[1:-1],  # quotes escaped once too often
        lambda turns: json.dumps(turns)[:-1] + ",]",
        lambda turns: json.dumps(turns, ensure_ascii=False).replace("?\\n", "?\n"),  # a line end inside a string
        lambda turns: "\n".join(map(json.dumps, turns)),
        lambda turns: json.dumps([json.dumps(turn) for turn in turns]),
        lambda turns: [json.dumps(turn) for turn in turns],
        lambda turns: json.dumps([dict(reversed(turn.items())) for turn in turns]),  # other keys first
        lambda turns: json.dumps({"messages": turns}),
        lambda turns: json.dumps({"conversations": json.dumps(turns)}),
        repr,
        lambda turns: repr(tuple(turns)),
        lambda turns: repr(json.dumps(turns)),
        lambda turns: repr(turns).replace("'null'", "'null', 'x': nan, 'y': None"),
        lambda turns: repr(np.array(turns, dtype=object)),
        lambda turns: str(np.array(turns, dtype=object)),  # what pandas writes: no commas
        lambda turns: str(np.array([json.dumps(turn) for turn in turns], dtype=object)),
        lambda turns: str(np.array(turns, dtype=object)).replace("'null'", "np.str_('null')"),
    ],
)
def test_messages_as_text(written):
    assert parse_text_or_messages(written(TURNS), "chosen") == (TURNS, None, [])


def test_python_names_in_printed_messages():
    assert parsed(repr(with_nulls(TURNS))) == [{**turn, "train": True} for turn in TURNS]


@pytest.mark.parametrize("written", [json.dumps, repr, lambda given: given])
@pytest.mark.parametrize(
    "form",
    [
        lambda turns: [{"from": NAMES[turn["role"]], "value": turn["content"]} for turn in turns],
        lambda turns: [{"Role": turn["role"].upper(), " Content": turn["content"]} for turn in turns],
        lambda turns: [{"type": NAMES[turn["role"]], "content": turn["content"]} for turn in turns],
        lambda turns: [{"type": NAMES[turn["role"]], "data": {"content": turn["content"]}} for turn in turns],
        lambda turns: [
            {"type": "constructor", "id": ["schema", CLASSES[turn["role"]]], "kwargs": {"content": turn["content"]}}
            for turn in turns
        ],
        lambda turns: [{"role": turn["role"], "parts": [{"text": turn["content"]}]} for turn in turns],
        lambda turns: {key: [turn[key] for turn in turns] for key in ("role", "content")},
        lambda turns: {"conversation": turns, "tools": []},
        lambda turns: {"turns": turns},
        lambda turns: [turns],
        lambda turns: [[turns]],
        lambda turns: [{"messages": turns}],
        lambda turns: [{"message": turn} for turn in turns],
        lambda turns: {"dialogue": [{"message": turn} for turn in turns]},
    ],
)
def test_other_forms_of_messages(form, written):
    assert parsed(written(form(PLAIN))) == PLAIN


def test_one_message_is_a_conversation():
    assert parsed(TURNS[1]) == parsed(json.dumps(TURNS[1])) == TURNS[1:]


@pytest.mark.parametrize(
    "answer",
    [
        '{"answer": 4}',
        '[{"name": "x"}]',
        "[1, 2, 3]",
        '["role", "content"]',
        '{"role": "admin"}',
        '{"title": "x", "content": "y"}',
        '{"type": "object", "properties": {"value": {}}}',
        '[{"type": "question", "text": "why?"}, {"type": "answer", "text": "so"}]',
        '{"from": "Paris", "to": "Rome"}',
        '{"hint": "write {\\"role\\": \\"user\\", \\"content\\": 1}"}',
        "[a link](http://x) with role: user and content: text",
        "- Role: manager\n- Content: weekly",
        "(role) the content",
        '"quoted"',
        "[]",
        "",
    ],
)
def test_answers_that_are_json_stay_text(answer):
    assert parse_text_or_messages(answer, "chosen") == (answer, None, [])


@pytest.mark.parametrize(
    "given",
    [
        json.dumps(TURNS)[:-5],
        json.dumps(TURNS) + " Sure!",
        json.dumps(TURNS).replace('"', "“"),
        json.dumps(TURNS).replace('"', "&quot;"),
        json.dumps(TURNS).replace('"', '""'),
        "[{'role': 'user', 'content': 'don't'}]",
        "[{'role': 'user', 'content': 'a'}, ...]",
        "[{role: 'user', content: 'a'}]",
        "[Message(role='user', content='a')]",
        "- role: user\n  content: a",
        '[{"role": "narrator", "content": "a"}]',
        '[{"role": "user", "content": 5}]',
        '[{"role": "user", "content": "a"}, "b"]',
        '{"choices": [{"message": {"role": "assistant", "content": "a"}}]}',
        '{"role": "model", "value": "x1"}',
        '[{"user": "a"}, {"assistant": "b"}]',
        "[{'Human': 'a'}, {'AI': 'b'}]",
        '{"user": "a"',
        '[{"role": "user", "message": "a"}]',
        json.dumps([PLAIN, PLAIN]),
        '[{"role": "user", "content": "a", "x": ' + "[" * 5000,
    ],
)
def test_what_looks_like_messages_and_is_none_stays_text_and_is_noticed(given):
    assert parse_text_or_messages(given, "chosen") == (given, None, [LOOKS_LIKE_MESSAGES])


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([{"role": "user", "content": [{"type": "image"}]}], "content parts must be text, got 'image'"),
        ([{"role": "user", "content": "a", "train": "yes"}], "'chosen.train': expected true or false, got 'yes'"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "f("}]}],
            "'chosen.arguments': expected JSON",
        ),
    ],
)
def test_unsound_messages_in_text_are_errors(messages, error):
    with pytest.raises(ValueError, match=error):
        parsed(json.dumps(messages))


@pytest.mark.parametrize("role", [1, True, ["user"], {"name": "user"}])
def test_roles_that_are_no_text(role):
    with pytest.raises(ValueError, match="'chosen': expected text for a message's role, got "):
        parsed([{"role": role, "content": "a"}])


def test_what_an_object_holds_beside_messages():
    tool = {"name": "f"}
    assert parse_text_or_messages({"messages": PLAIN, "tools": json.dumps([tool])}, "prompt") == (PLAIN, [tool], [])
    assert parse_text_or_messages({"messages": PLAIN, "id": None, "parallel_tool_calls": True}, "prompt").altered == []
    assert parse_text_or_messages(json.dumps({"messages": PLAIN, "x": 1}), "prompt").altered == [NOT_USED_BESIDE]


# Roles


@pytest.mark.parametrize(
    ("role", "names"),
    [
        (
            "user",
            ["User", "USER ", " human", "Human:", "Human：", "<|user|>", "[USER]", "prompter", "instruct", "用户"],
        ),
        (
            "assistant",
            ["Assistant", "GPT", "ChatGPT", "bot", "Model", "AI", "\tassistant\n", "### AI Assistant:", "助手"],
        ),
        ("system", ["System", "SYSTEM", "sys", "<<SYS>>", "**System**"]),
        ("tool", ["Tool", "function", "Function Response", "function-response", "ipython", "Observation"]),
        ("developer", ["developer", "Developer"]),
        ("narrator", ["narrator"]),
        (" Critic ", [" Critic "]),
    ],
)
def test_roles(role, names):
    assert {canonical_role(name) for name in names} == {role}


# Content


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (["a", {"type": "text", "text": "b"}], "ab"),
        ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b", "annotations": []}], "ab"),
        ([{"type": "text", "text": "a", "image_url": None}], "a"),
        ({"type": "text", "text": "a"}, "a"),
        ([{"text": "a"}], "a"),
        ([], ""),
        ('[{"type": "text", "text": "a"}]', '[{"type": "text", "text": "a"}]'),  # what a tool gives: text
    ],
)
def test_content_parts(content, text):
    assert parsed([{"role": "user", "content": content}]) == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("content", "came"),
    [
        ([{"type": "image_url", "image_url": {}}], "got 'image_url'"),
        ([{"type": "text", "text": "a"}, {"type": "image", "text": None}], "got 'image'"),
        ([{"image": "x.png"}], "got 'keys image'"),
        ([3], "got 'int'"),
        (5, "expected text, got int"),
        (True, "expected text, got bool"),
        (None, r"role 'user' has no content \(keys: role, content\)"),
        ([{"type": "text", "text": 5}], "expected text, got int"),
    ],
)
def test_content_that_is_no_text(content, came):
    with pytest.raises(ValueError, match=f"the field 'chosen': .*{came}"):
        parsed([{"role": "user", "content": content}])


def test_reasoning_is_content():
    (message,) = parsed({"role": "assistant", "content": None, "reasoning_content": "hm"})
    assert message == {"role": "assistant", "content": "", "reasoning_content": "hm"}


# Tool calls

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
BARE = CALL["function"]
AS_TEXT = {"name": "add", "arguments": json.dumps(BARE["arguments"])}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "assistant", "content": "", "tool_calls": [json.dumps(AS_TEXT)]},
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "function": AS_TEXT}]},
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "function": json.dumps(AS_TEXT)}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": repr(BARE["arguments"])}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**AS_TEXT, "arguments": json.dumps(AS_TEXT["arguments"])}],
        },
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "parameters": BARE["arguments"]}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "input": AS_TEXT["arguments"]}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "args": BARE["arguments"]}]},
        {"role": "assistant", "content": None, "function_call": AS_TEXT},
        {"role": "assistant", "content": None, "function_call": json.dumps(AS_TEXT), "tool_calls": []},
        {"role": "assistant", "content": [{"type": "tool_use", "name": "add", "input": BARE["arguments"]}]},
        {"from": "function_call", "value": json.dumps(BARE)},
        {"role": "Tool-Call", "content": [BARE]},
        {"type": "ai", "content": "", "additional_kwargs": {"tool_calls": [{**CALL, "function": AS_TEXT}]}},
    ],
)
def test_tool_calls(message):
    assert parsed([message]) == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]


@pytest.mark.parametrize("arguments", ["", " ", None, "{}", {}, "null", '"{}"'])
def test_calls_without_arguments(arguments):
    (message,) = parsed({"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": arguments}}]})
    assert message["tool_calls"] == [{"function": {"name": "now", "arguments": {}}}]


@pytest.mark.parametrize("none", [[], "", None, "[]", "null", float("nan")])
def test_no_tool_calls(none):
    message = {"role": "assistant", "content": "hi", "tool_calls": none, "function_call": None}
    assert parsed([message]) == [{"role": "assistant", "content": "hi"}]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("add", "'chosen': expected a tool call with a function, got 'add'"),
        (5, "'chosen': expected a tool call with a function, got 5"),
        ({"arguments": {}}, "'chosen': a tool call's function has no name"),
        ({"name": "f", "arguments": "print(1)"}, r"'chosen.arguments': expected JSON text, got 'print\(1\)'"),
        ({"name": "f", "arguments": [1]}, r"'chosen': expected an object for a tool call's arguments, got \[1\]"),
    ],
)
def test_unsound_tool_calls(call, error):
    with pytest.raises(ValueError, match=error):
        parsed([{"role": "assistant", "content": "", "tool_calls": [call]}])


def test_tool_results_in_a_users_turn_are_turns_of_the_tool():
    results = [{"type": "tool_result", "tool_use_id": n, "content": [{"type": "text", "text": str(n)}]} for n in (1, 2)]
    turns = [{"role": "tool", "content": str(n), "tool_call_id": n} for n in (1, 2)]
    assert parsed([{"role": "user", "content": results}]) == turns
    after = {"role": "user", "content": "and?"}
    assert parsed([{"role": "user", "content": [*results, {"type": "text", "text": "and?"}]}]) == [*turns, after]


# Tools

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([TOOL], [TOOL]),
        (TOOL, [TOOL]),
        ([TOOL["function"]], [TOOL["function"]]),
        (json.dumps([TOOL]), [TOOL]),
        (json.dumps(TOOL), [TOOL]),
        ([json.dumps(TOOL), TOOL], [TOOL, TOOL]),
        (json.dumps(json.dumps([TOOL])), [TOOL]),
        (repr([TOOL]), [TOOL]),
        ([{**TOOL, "function": json.dumps(TOOL["function"])}], [TOOL]),
        ([{"name": "add", "parameters": '{"type": "object"}'}], [TOOL["function"]]),
        ({"type": ["function"], "function": [TOOL["function"]]}, [TOOL]),
        *((none, None) for none in ("", "  ", "[]", "null", "None", None, [], float("nan"))),
    ],
)
def test_tools(given, expected):
    assert tools(given) == expected


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("calculator", "'tools': expected JSON text, got 'calculator'"),
        (["add"], "'tools': expected JSON text, got 'add'"),
        (5, "'tools': expected tools, objects with a function, got 5"),
        ([[TOOL]], "'tools': expected tools, objects with a function"),
        ([{"type": "function", "function": 3}], "'tools': expected an object for a tool's function, got 3"),
        ([{"type": "function", "function": "add"}], "'tools.function': expected JSON text, got 'add'"),
        ([{"type": "code_interpreter"}], r"'tools': a tool's function has no name \(keys: type\)"),
        (json.dumps([TOOL])[:-3], "'tools': expected JSON text"),
    ],
)
def test_unsound_tools(given, error):
    with pytest.raises(ValueError, match=error):
        tools(given)


# Flags


@pytest.mark.parametrize(("given", "train"), [(False, False), (True, True), (0, False), (1, True), (0.0, False)])
def test_whether_a_turn_is_trained_on(given, train):
    (message,) = parsed({"role": "assistant", "content": "a", "train": given, "weight": 1})
    assert message["train"] is train
    assert message["weight"] == 1.0 and isinstance(message["weight"], float)


def test_flags_in_other_letters_are_flags():
    assert parsed({"Role": "assistant", "Content": "a", "Train": False}) == [
        {"role": "assistant", "content": "a", "train": False}
    ]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        *(({"train": train}, "'chosen.train': expected true or false") for train in ("false", 2, -1, [], float("nan"))),
        *(({"weight": weight}, "'chosen.weight': expected a number") for weight in ("1", True, [1])),
        *(({"weight": float(weight)}, "'chosen.weight': expected a number") for weight in ("nan", "inf")),
        ({"weight": -0.5}, "'chosen.weight': expected a weight of at least 0, got -0.5"),
    ],
)
def test_flags_out_of_range(flags, error):
    with pytest.raises(ValueError, match=error):
        parsed([{"role": "assistant", "content": "a", **flags}])


# What two turns have in common


def called(**arguments):
    return [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]


def test_turns_are_the_same_but_for_bookkeeping():
    said = {"role": "assistant", "content": "a"}
    assert same_turns([{**said, "id": 1, "train": False, "weight": 0.5}], [{**said, "id": 2, "timestamp": "x"}])
    assert not same_turns([said], [{**said, "content": "b"}])
    assert not same_turns([said], [{**said, "reasoning_content": "hm"}])
    assert not same_turns([said], [said, said])


@pytest.mark.parametrize("other", [2, True, 1.5, "1", None, [1]])
def test_different_calls_are_never_the_same(other):
    assert same_turns(called(a=1, b=2), called(b=2, a=1))
    assert not same_turns(called(a=1), called(a=other))
    assert not same_turns(called(a=1), called(a=1, b=other))


# Transcripts


@pytest.mark.parametrize(
    ("given", "contents"),
    [
        ("\n\nHuman: q\n\nAssistant: a\n\nb", ["q", "a\n\nb"]),
        ("User: q\n\nAI: a", ["q", "a"]),
        ("HUMAN: q\r\n\r\nASSISTANT: a\r\nb\r\n\r\nHUMAN: c", ["q", "a\r\nb", "c"]),
        ("user: q\n\nassistant: a\n\nUser: is text", ["q", "a\n\nUser: is text"]),
        ("Human: about\n\nAI: the field\n\nAssistant: a", ["about\n\nAI: the field", "a"]),
        ("Human: q\n\n\nAssistant:", ["q", ""]),
        ("User: q\n\nAssistant: a\n\nHuman: text\n\nUser: c", ["q", "a\n\nHuman: text", "c"]),
    ],
)
def test_transcripts(given, contents):
    assert is_transcript(given)
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    assert transcript(given) == turns


@pytest.mark.parametrize(
    "given",
    [
        "The Human: q\n\nAssistant: a",
        "User: q\nAI: a",
        "Users: q\n\nAI: a",
        "User: q\n\nAIs: a",
        "User: q\n\nThe AI: a",
        "Human: q\n\nHuman: r",
        "Assistant: a\n\nHuman: q",
        "Human, Assistant: a",
    ],
)
def test_text_that_has_the_words_alone_is_no_transcript(given):
    assert not is_transcript(given)
