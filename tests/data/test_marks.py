"""What chat templates leave out, change, repeat or refuse: dropped in responses, reported in prompts."""

import chat_templates as families
import pytest
from chat_templates import CALL, TOOL, assistant, call, calling, chatml, labelled, system, texts, tool, user, whole

from dpo_kernels.data import rendering

LEFT_OUT = "the chat template leaves out "


@pytest.mark.parametrize(
    ("template", "chosen", "reason"),
    [
        ("CHATML", calling(CALL), "leaves out the response's tool calls"),
        ("CHATML", calling(CALL, text="one moment"), "leaves out the response's tool calls"),
        ("CHATML", [calling(CALL), tool("7"), assistant("7")], "leaves out the response's tool calls"),
        ("CHATML", calling(call("now")), "leaves out the response's tool calls"),  # no arguments: the name
        ("LLAMA3", calling(CALL, text="one moment"), "leaves out the response's text"),
        (
            "LLAMA3",
            calling(CALL, CALL),
            "refuses the conversation: only supports single tool-calls at once!",
        ),
        ("GPT_OSS", calling(CALL, call("sub", c=1)), "leaves out the response's tool calls"),  # all but the first
        ("CHATML", assistant("good", reasoning_content="hm"), "leaves out the response's reasoning"),
        ("CHATML", assistant("good", thinking="hm"), "leaves out the response's reasoning"),
        ("DEEPSEEK", assistant("<think>\nhm\n</think>\n\ngood"), "leaves out the response's reasoning"),
        (
            "QWEN3",
            [assistant("<think>hm</think>a"), user("u"), assistant("b")],
            "leaves out the response's reasoning",
        ),
        ("GPT_OSS", [assistant("a", thinking="hm"), user("u"), assistant("b")], "leaves out the response's reasoning"),
        (chatml(skip="assistant"), assistant("good"), "leaves out the response's text"),
        (chatml("{{ message.content | upper }}"), assistant("good"), "changes the response's text"),
        (chatml("{{ message.content | replace('o', '0') }}"), assistant("good"), "changes the response's text"),
        (chatml("{{ message.content | e }}"), assistant("a < b"), "changes the response's text"),
        (
            chatml("{{ message.content[:9] }}"),
            assistant("good, better, best"),
            "leaves out part of the response's text",
        ),
        (
            chatml("{{ message.content[3:] }}"),
            assistant("good, better, best"),
            "leaves out part of the response's text",
        ),
        (chatml("{{ message.content }} {{ message.content }}"), assistant("good"), "repeats the response's text"),
        (chatml("{{ message.text }}"), assistant("good"), "leaves out the response's text"),
        (
            chatml("{% if message.content is not string %}{{ message.content }}{% endif %}"),
            assistant("good"),
            "leaves out",
        ),
        (
            chatml("{% if 'secret' not in message.content %}{{ message.content }}{% endif %}"),
            assistant("secret"),
            "leaves out",
        ),
        (
            chatml("{{ message.tool_calls[0].function.name if message.tool_calls else message.content }}"),
            calling(CALL),
            "calls",
        ),
        (
            chatml("{{ message.tool_calls[0].function.arguments if message.tool_calls else message.content }}"),
            calling(CALL),
            "c",
        ),
        (
            chatml("{{ message.tool_calls[0].function.name if message.tool_calls else message.content }}"),
            calling(call("set", on=True)),
            "leaves out the response's tool calls",
        ),
    ],
)
def test_responses_that_lost_something_are_dropped(template, chosen, reason):
    template = getattr(families, template, template)
    for found in (
        texts(template, chosen),
        texts(template, assistant("fine"), chosen if isinstance(chosen, list) else [chosen]),
    ):
        assert isinstance(found, str) and found.startswith("the chat template ") and reason in found


@pytest.mark.parametrize(
    "arguments",
    [{}, {"on": True}, {"n": 0}, {"x": 1.5, "y": -2}, {"s": 'say "hi"\n\\'}, {"list": [1, "日本", None, {"k": False}]}],
)
@pytest.mark.parametrize("template", ["QWEN25", "LLAMA3", "GLM", "MISTRAL"])
def test_calls_that_are_there_are_found(template, arguments):
    found = texts(getattr(families, template), calling(call("do", **arguments)))
    assert not isinstance(found, str) and found.altered == []


def test_differences_that_the_template_does_not_show():
    first = {**call("add", a=1), "id": "call_1"}
    assert texts(families.QWEN25, calling(first), [calling({**first, "id": "call_2"})]) == rendering.RENDERED_ALIKE
    assert texts(families.LLAMA3, assistant("yes"), [assistant("yes ")]) == rendering.RENDERED_ALIKE
    assert texts(families.QWEN25, calling(first), [calling(first, train=True)]) == rendering.IDENTICAL
    for other in (call("add", a=2), call("add", a=True), call("add", a="1"), call("add", b=1), call("sub", a=1)):
        found = texts(families.QWEN25, calling(call("add", a=1)), [calling(other)])
        assert found.altered == [] and whole(found.chosen) != whole(found.rejected)


@pytest.mark.parametrize(
    ("template", "prompt", "lost"),
    [
        (chatml(skip="system"), [system("s"), user("q")], ["leaves out the prompt's system turn"]),
        ("COMMAND_R", [system("s"), user("q")], ["leaves out the prompt's system turn"]),
        ("COMMAND_R", [user("q"), assistant("a"), tool("7"), user("r")], ["leaves out the prompt's tool turn"]),
        (
            "QWEN3",
            [user("q"), assistant("<think>hm</think>a"), user("r")],
            ["leaves out the prompt's reasoning"],
        ),
        (
            "CHATML",
            [user("q"), assistant("a", reasoning_content="hm"), user("r")],
            ["leaves out the prompt's reasoning"],
        ),
        ("CHATML", [user("q"), calling(CALL), tool("7")], ["leaves out the prompt's tool calls"]),
        (chatml(skip="user"), [user("q")], ["leaves out the prompt's user turn"]),
        (chatml("{{ message.content | replace('Q', 'q') }}"), [user("Q")], ["changes the prompt's user turn"]),
        (chatml(before="{{ messages[0].content }}"), [user("q")], ["repeats the prompt's user turn"]),
        (
            chatml("{{ message.content.split() | join(' ') }}"),
            [user("a\n\nb")],
            ["changes white space in the prompt's user turn"],
        ),
        ("LLAMA3", [user(" q\n")], []),  # white space around a text
        ("LLAMA3", [user("q"), calling(CALL), tool('{"r": "x"}')], []),  # as JSON text
    ],
)
def test_prompts_that_lost_something_are_reported(template, prompt, lost):
    found = texts(getattr(families, template, template), assistant("good"), prompt=prompt)
    assert found.altered == [f"the chat template {what}" for what in lost]
    assert "good" in whole(found.chosen)


def test_tools_that_are_not_shown_are_reported():
    assert texts(families.CHATML, assistant("good"), tools=[TOOL]).altered == [LEFT_OUT + "the tools"]
    assert texts(families.QWEN25, assistant("good"), tools=[TOOL]).altered == []
    needs_tools = chatml(before="{{ tools[0].function.name }}\n")
    assert texts(needs_tools, assistant("good"), tools=[TOOL]).altered == []


def test_white_space_inside_a_response_is_reported():
    found = texts(chatml("{{ message.content.split() | join(' ') }}"), assistant("good\n\nbye"))
    assert found.altered == ["the chat template changes white space in the response's text"]
    assert whole(found.chosen) == "good bye<|im_end|>\n"


def test_what_other_turns_of_a_response_lost_is_reported():
    response = [assistant("a"), tool("7"), assistant("b")]
    found = texts(families.COMMAND_R, response)
    assert found.altered == [LEFT_OUT + "the response's tool turn"] and labelled(found.chosen) == [
        "a<|END|>",
        "b<|END|>",
    ]
    untrained = [assistant("<think>hm</think>a", train=False), user("u"), assistant("b")]
    found = texts(families.QWEN3, untrained)
    assert found.altered == ["the chat template leaves out the response's reasoning"]
    assert labelled(found.chosen) == ["<think>\n\n</think>\n\nb<|im_end|>\n"]


def test_texts_that_occur_elsewhere_are_not_taken_for_those_that_are_lost():
    found = texts(chatml(skip="assistant"), assistant("q"), [assistant("user")])
    assert found == LEFT_OUT + "the response's text"
    assert texts(families.CHATML, assistant("assistant"), [assistant("user")]).altered == []
    upper = chatml("{{ message.content | upper }}")
    assert texts(upper, assistant("7"), [assistant("user")]) == "the chat template changes the response's text"


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("raise_exception('no such thing')", "no such thing"),
        ("raise_exception('')", "TemplateError"),
        ("1 // 0", "ZeroDivisionError: integer division or modulo by zero"),
        ("message.content + 1", 'TypeError: can only concatenate str (not "int") to str'),
        ("message.nothing.more", "'dict object' has no attribute 'nothing'"),
        ("message.content.index('?')", "ValueError: substring not found"),
        ("message.content.encode('ascii').decode('utf-16')", "UnicodeDecodeError: "),
        ("dict()['k'].x", "'dict object' has no attribute 'k'"),
        ("message.content.__class__.mro()", ""),
        ("message.content | nothing", "No filter named 'nothing'"),
    ],
)
def test_errors_of_every_class_are_refusals(expression, said):
    found = texts(chatml("{{ " + expression + " }}"), assistant("good"))
    assert isinstance(found, str) and found.startswith(rendering.REFUSED + said)


def test_conversations_that_a_template_does_not_take():
    assert (
        texts(families.GEMMA, assistant("a"), prompt=[system("s"), user("q")])
        == rendering.REFUSED + "System role not supported"
    )
    assert (
        texts(families.LLAMA2, assistant("a"), prompt=[user("q"), user("r")])
        == rendering.REFUSED + "Roles must alternate"
    )
