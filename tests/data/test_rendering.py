"""Chat templates: what is prompt, what is labelled, for the habits of many families."""

import json
import re
from pathlib import Path

import chat_templates as families
import pytest
from chat_templates import (
    ASKED,
    CALL,
    OPEN,
    TOOL,
    assistant,
    call,
    calling,
    chatml,
    labelled,
    system,
    texts,
    tool,
    user,
    whole,
)

from dpo_kernels.data import rendering
from dpo_kernels.data.rendering import ChatTemplate

LEFT_OUT = "the chat template leaves out "


# Families: the prompt is what the model is given, the response what it would generate


@pytest.mark.parametrize(
    ("template", "prompt", "response"),
    [
        ("CHATML", "<|im_start|>system\ns<|im_end|>\n" + ASKED, "good<|im_end|>\n"),
        ("QWEN25", "<|im_start|>system\ns<|im_end|>\n" + ASKED, "good<|im_end|>\n"),
        ("QWEN3", "<|im_start|>system\ns<|im_end|>\n" + ASKED, "<think>\n\n</think>\n\ngood<|im_end|>\n"),
        (
            "LLAMA3",
            "s<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "good<|eot_id|>",
        ),
        ("LLAMA2", "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nq [/INST]", " good </s>"),
        ("MISTRAL", "<s>[INST] s\n\nq[/INST]", " good</s>"),
        ("PHI3", "<|system|>\ns<|end|>\n<|user|>\nq<|end|>\n<|assistant|>\n", "good<|end|>\n<|im_end|>"),
        ("ZEPHYR", "<|system|>\ns<|im_end|>\n<|user|>\nq<|im_end|>\n<|assistant|>\n", "good<|im_end|>\n"),
        ("VICUNA", "s USER: q ASSISTANT: ", "good\n"),
        ("GLM", "<|system|>\ns<|user|>\nq<|assistant|>\n", "good"),
        (
            "GPT_OSS",
            "<|im_start|>system<|message|>s<|end|><|im_start|>user<|message|>q<|end|><|im_start|>assistant",
            "<|final|>good<|im_end|>",
        ),
        ("NEVER_OPENS", "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n", OPEN + "good<|im_end|>\n"),
    ],
)
def test_families(template, prompt, response):
    found = texts(getattr(families, template), assistant("good"), prompt=[system("s"), user("q")])
    assert found.altered == []
    assert found.prompt.endswith(prompt) if template == "LLAMA3" else found.prompt == prompt  # that one has the date
    assert whole(found.chosen) == response and whole(found.rejected) == response.replace("good", "bad")
    assert found.chosen.closed == (template not in ("VICUNA", "GLM"))


def test_thinking_switched_off_goes_to_the_prompt():
    found = texts(families.QWEN3, assistant("good"), enable_thinking=False)
    assert found.prompt == ASKED + "<think>\n\n</think>\n\n" and whole(found.chosen) == "good<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "prompt", "response"),
    [
        ("QWEN25", ASKED, '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "x y"}}\n</tool_call><|im_end|>\n'),
        (
            "MISTRAL",
            "q[/INST]",
            '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": "x y"}, "id": "123456789"}]</s>',
        ),
        ("LLAMA3", "\n\n", '{"name": "add", "parameters": {"a": 1, "b": "x y"}}<|eot_id|>'),
        ("GPT_OSS", "assistant", ' to=functions.add<|message|>{"a": 1, "b": "x y"}<|end|>'),
        ("GLM", "\n", "<tool_call>add<key>a</key><value>1</value><key>b</key><value>x y</value></tool_call>"),
        # arguments as text, and the markup of a call is generated although the prompt opens otherwise
        ("DEEPSEEK", "q<|Assistant|>", '<calls>function<sep>add\n{"a": 1, "b": "x y"}</calls></s>'),
    ],
)
def test_tool_calls(template, prompt, response):
    found = texts(getattr(families, template), calling(CALL), [calling(call("add", a=1, b="x"))])
    assert found.prompt.endswith(prompt) and whole(found.chosen) == response
    assert whole(found.rejected) == response.replace("x y", "x")


def test_reasoning_is_part_of_the_response():
    thought = assistant("good", reasoning_content="hm")
    assert whole(texts(families.QWEN3, thought).chosen) == "<think>\nhm\n</think>\n\ngood<|im_end|>\n"
    inline = assistant("<think>\nhm\n</think>\n\ngood")
    assert whole(texts(families.QWEN3, inline).chosen) == "<think>\nhm\n</think>\n\ngood<|im_end|>\n"
    found = texts(families.GPT_OSS, assistant("good", thinking="hm"))
    assert whole(found.chosen) == "<|analysis|>hm<|end|><|im_start|>assistant<|final|>good<|im_end|>"
    assert whole(texts(families.REASONING, thought).chosen) == "<think>hm</think>good<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "row", "prompt", "response"),
    [
        # reasoning is opened for generation alone
        ("DEEPSEEK", {}, "<s><|User|>q<|Assistant|>", "good</s>"),
        # the system text is in prompts for generation alone: what the model is given stays the prompt
        ("MISTRAL_LOOP_LAST", {"prompt": [system("s"), user("q")]}, "<s>[INST] s\n\nq[/INST]", " good</s>"),
        (
            chatml(opening="{% if add_generation_prompt %}<|im_start|>bot\n{% elif false %}"),
            {},
            ASKED,
            "good<|im_end|>\n",
        ),
    ],
    ids=["reasoning", "system", "header"],
)
def test_prompts_that_are_rendered_otherwise_before_a_response(template, row, prompt, response):
    found = texts(getattr(families, template, template), assistant("good"), **row)
    assert found.altered == [rendering.REDRAWN]
    assert (found.prompt, whole(found.chosen)) == (prompt, response)


def test_a_tag_is_not_cut_where_the_renderings_part():
    template = chatml(opening="{% if add_generation_prompt %}" + OPEN + "<think>\n{% elif false %}").replace(
        "{{ message['content'] }}",
        "{% for c in message.tool_calls or [] %}<tool>{{ c.function | tojson }}{% endfor %}{{ message.content }}",
    )
    found = texts(template, calling(CALL))
    assert found.prompt == ASKED and whole(found.chosen).startswith('<tool>{"name": "add"')


def test_content_is_never_cut_off_by_a_prompt_that_opens_like_it():
    template = chatml(opening="{% if add_generation_prompt %}" + OPEN + "<think>{% elif false %}")
    found = texts(template, assistant("<b>"), [assistant("<c>")])
    assert (found.prompt, whole(found.chosen)) == (ASKED, "<b><|im_end|>\n")


# Several turns


@pytest.mark.parametrize(
    ("template", "turns", "between"),
    [
        ("CHATML", ["a1<|im_end|>", "a2<|im_end|>\n"], "\n<|im_start|>user\nu<|im_end|>\n" + OPEN),
        (
            "QWEN3",
            ["a1<|im_end|>", "<think>\n\n</think>\n\na2<|im_end|>\n"],
            "\n<|im_start|>user\nu<|im_end|>\n" + OPEN,
        ),
        (
            "LLAMA3",
            ["a1<|eot_id|>", "a2<|eot_id|>"],
            "<|start_header_id|>user<|end_header_id|>\n\nu<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("LLAMA2", [" a1 </s>", " a2 </s>"], "<s>[INST] u [/INST]"),
        (
            "GEMMA",
            ["a1<end_of_turn>", "a2<end_of_turn>\n"],
            "\n<start_of_turn>user\nu<end_of_turn>\n<start_of_turn>model\n",
        ),
        ("PHI3", ["a1<|end|>", "a2<|end|>\n<|im_end|>"], "\n<|user|>\nu<|end|>\n<|assistant|>\n"),
        ("DEEPSEEK", ["a1</s>", "a2</s>"], "<|User|>u<|Assistant|>"),
        ("ZEPHYR", ["a1<|im_end|>", "a2<|im_end|>\n"], "\n<|user|>\nu<|im_end|>\n<|assistant|>\n"),
        ("VICUNA", ["a1", "a2\n"], "\nUSER: u ASSISTANT: "),
        ("COMMAND_R", ["a1<|END|>", "a2<|END|>"], "<|USER|>u<|END|><|CHATBOT|>"),
        (
            "GPT_OSS",
            ["<|final|>a1<|end|>", "<|final|>a2<|im_end|>"],
            "<|im_start|>user<|message|>u<|end|><|im_start|>assistant",
        ),
        ("GLM", ["a1", "a2"], "<|user|>\nu<|assistant|>\n"),
        ("ALWAYS_OPENS", ["a1<|im_end|>", "a2<|im_end|>"], "\n<|im_start|>user\nu<|im_end|>\n" + OPEN),
    ],
)
def test_the_assistants_turns_are_labelled(template, turns, between):
    found = texts(getattr(families, template), [assistant("a1"), user("u"), assistant("a2")])
    assert found.chosen.segments == [(turns[0], 1.0), (between, 0.0), (turns[1], 1.0)]
    assert found.rejected.segments == [(turns[1].replace("a2", "bad"), 1.0)]


@pytest.mark.parametrize("template", ["QWEN25", "MISTRAL", "LLAMA3", "GPT_OSS", "GLM", "DEEPSEEK"])
def test_tool_outputs_inside_a_response_are_not_labelled(template):
    response = [calling(CALL), tool("seven"), assistant("it is 7")]
    found = texts(getattr(families, template), response, [assistant("no")], tools=[TOOL])
    first, second = labelled(found.chosen)
    assert "add" in first and "x y" in first and "it is 7" in second and "seven" not in first + second
    assert [segment.weight for segment in found.chosen.segments] == [1, 0, 1]
    if template in ("QWEN25", "LLAMA3", "GPT_OSS"):
        assert first.endswith(("<|im_end|>", "<|eot_id|>", "<|end|>"))


def test_a_tool_output_inside_a_labelled_turn_is_not_trained():
    """As with templates that write a call, its output, and then the text of the calling turn."""
    template = (
        "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}\n"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
        "{% for t in messages if t.role == 'tool' %}<output>{{ t.content }}</output>{% endfor %}{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    response = [calling(CALL, text="look:"), tool("seven"), assistant("7")]
    assert texts(template, response) == rendering.INTERLEAVED
    response[0]["train"] = False
    assert labelled(texts(template, response).chosen) == ["7<|im_end|>\n"]


def test_templates_that_move_tools_to_the_last_question():
    response = [assistant("a1"), user("u"), assistant("a2")]
    found = texts(families.MISTRAL, response, [assistant("bad")], tools=[TOOL])
    assert found.prompt == f"<s>[AVAILABLE_TOOLS] [{json.dumps(TOOL)}][/AVAILABLE_TOOLS][INST] q[/INST]"
    assert labelled(found.chosen) == [" a1</s>", " a2</s>"] and labelled(found.rejected) == [" bad</s>"]
    assert found.altered == [rendering.REDRAWN]


@pytest.mark.parametrize(
    ("turns", "train_on", "weights"),
    [
        ([{}, {}], "all", [1, 1]),
        ([{}, {}], "last", [0, 1]),
        ([{"train": False}, {}], "all", [0, 1]),
        ([{}, {"train": False}], "all", [1, 0]),
        ([{"train": True}, {}], "last", [1, 1]),  # what a message says goes before the option
        ([{"train": True}, {"train": False}], "last", [1, 0]),
        ([{"weight": 0.5}, {"weight": 2}], "all", [0.5, 2]),
        ([{"weight": 0.5}, {"weight": 0}], "all", [0.5, 0]),
        ([{"weight": 3}, {"weight": 3}], "last", [0, 3]),
    ],
)
def test_which_turns_count(turns, train_on, weights):
    first, second = turns
    response = [assistant("a1", **first), {**user("u"), "train": True, "weight": 7}, assistant("a2", **second)]
    found = texts(chatml("{{ message.train }}{{ message.weight }}{{ message.content }}"), response, train_on=train_on)
    got = {
        word: s.weight for s in found.chosen.segments for word in ("a1", "u", "a2") if re.search(rf"\b{word}\b", s.text)
    }
    assert got == {"a1": weights[0], "u": 0, "a2": weights[1]}
    assert "".join(s.text for s in found.chosen.segments).startswith("a1<|im_end|>")  # templates see no flags


def test_turns_after_the_last_answer_are_left_out():
    for tail in ([user("thanks")], [tool("7")], [user("a"), user("b")]):
        found = texts(families.CHATML, [assistant("good"), *tail])
        assert whole(found.chosen) == "good<|im_end|>\n" and found.altered == [rendering.TRAILING]
    found = texts(families.CHATML, assistant("good"), [assistant("bad"), user("no!")])
    assert whole(found.rejected) == "bad<|im_end|>\n" and found.altered == [rendering.TRAILING]
    assert texts(families.CHATML, [assistant("bad"), user("thanks")]) == rendering.IDENTICAL
    assert texts(families.CHATML, [assistant("good"), user("u"), assistant(" ")]) == rendering.EMPTY


@pytest.mark.parametrize(
    ("role", "reason"),
    [
        ("user", rendering.OTHER_PROMPTS),
        ("system", rendering.OTHER_PROMPTS),
        ("Narrator", rendering.UNKNOWN_ROLE + "'Narrator'"),
        ("asistant", rendering.UNKNOWN_ROLE + "'asistant'"),
        ("", rendering.UNKNOWN_ROLE + "''"),
    ],
)
def test_responses_that_begin_with_another_role(role, reason):
    assert texts(families.CHATML, {"role": role, "content": "x"}) == reason
    assert texts(families.CHATML, assistant("x"), [{"role": role, "content": "x"}, assistant("y")]) == reason
    other = [{"role": role, "content": "y"}]
    assert texts(families.CHATML, {"role": role, "content": "x"}, other, prompt=[]) == reason


def test_templates_that_always_open_a_turn():
    found = texts(families.ALWAYS_OPENS, assistant("good"))
    assert (found.prompt, whole(found.chosen), found.chosen.closed) == (ASKED, "good<|im_end|>", True)
    no_tokens = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\\n' }}{% endfor %}assistant: "
    found = texts(no_tokens, assistant("good"))
    assert (found.prompt, whole(found.chosen), found.chosen.closed) == ("user: q\nassistant: ", "good", False)
    ends_alike = "{% for m in messages %}{{ m.content ~ ' END ' }}{% endfor %}"  # it opens nothing
    assert whole(texts(ends_alike, assistant("good")).chosen) == "good END "


# Ends of turns


@pytest.mark.parametrize(
    ("template", "content", "expected", "altered"),
    [
        ("CHATML", "good<|im_end|>", "good<|im_end|>\n", [rendering.END_TWICE]),
        ("CHATML", "good<|im_end|>\n", "good<|im_end|>\n", [rendering.END_TWICE]),
        ("CHATML", "good<|im_end|><|im_end|>", "good<|im_end|>\n", [rendering.END_TWICE]),
        ("LLAMA3", "good<|eot_id|>", "good<|eot_id|>", [rendering.END_TWICE]),
        ("GEMMA", "good<end_of_turn>", "good<end_of_turn>\n", [rendering.END_TWICE]),
        ("GLM", "good<|im_end|>", "good<|im_end|>", []),
        ("CHATML", "good</s>", "good</s><|im_end|>\n", []),
    ],
)
def test_an_end_of_turn_that_the_text_brings_is_written_once(template, content, expected, altered):
    found = texts(getattr(families, template), assistant(content))
    assert (whole(found.chosen), found.chosen.closed, found.altered) == (expected, True, altered)


def test_a_special_token_of_the_text_does_not_close_a_response():
    found = texts(
        "{% for m in messages %}{{ m.content }}|{% endfor %}", assistant("<|im_start|>"), [assistant("<|im_end|>")]
    )
    assert not found.chosen.closed
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{% endif %}"
    found = texts(bare, assistant("<|im_start|>"), [assistant("<|im_end|>")])
    assert (found.chosen.closed, found.rejected.closed) == (False, True)


def test_an_end_of_turn_twice_in_a_prompt_is_reported():
    found = texts(families.CHATML, assistant("good"), prompt=[user("p"), assistant("a<|im_end|>"), user("q")])
    assert found.altered == [rendering.END_TWICE_IN_PROMPT]
    only = assistant("<|im_end|>")
    assert texts(families.CHATML, only) == rendering.EMPTY


# A turn that the prompt begins


@pytest.mark.parametrize(
    ("template", "prompt", "response"),
    [
        ("CHATML", ASKED, "<|im_end|>\n"),
        ("LLAMA3", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        ("LLAMA2", "[INST] q [/INST] ", " </s>"),
        ("MISTRAL", "[INST] q[/INST] ", "</s>"),
        ("GEMMA", "<start_of_turn>model\n", "<end_of_turn>\n"),
        ("QWEN3", ASKED + "<think>\n\n</think>\n\n", "<|im_end|>\n"),
        ("DEEPSEEK", "<|User|>q<|Assistant|>", "</s>"),
        ("VICUNA", "USER: q ASSISTANT: ", "\n"),
        ("GPT_OSS", "<|im_start|>assistant<|final|>", "<|im_end|>"),
        ("ALWAYS_OPENS", ASKED, "<|im_end|>"),
    ],
)
@pytest.mark.parametrize(
    ("begun", "go_on"), [("Sure, ", "good"), ("Sure,", " good"), ("{", '"a": 1}'), ("1.\n\n", "2.")]
)
def test_a_begun_turn_is_continued(template, prompt, response, begun, go_on):
    row = [user("q"), assistant(begun, train=False, weight=3)]
    found = texts(getattr(families, template), assistant(go_on), [assistant("bad")], prompt=row)
    assert found.prompt.endswith(prompt + begun)
    assert found.chosen.segments == [(go_on + response, 1.0)]  # the begun turn's flags are its own
    assert whole(found.rejected) == "bad" + response
    assert found.altered == [rendering.CONTINUED]


@pytest.mark.parametrize("begun", ["Sure, <|im_end|>", "Sure, <|im_end|>\n", "Sure, <|im_end|><|im_end|>"])
def test_a_begun_turn_that_brings_its_end_is_open(begun):
    found = texts(families.CHATML, assistant("good"), prompt=[user("q"), assistant(begun)])
    assert (found.prompt, whole(found.chosen)) == (ASKED + "Sure, ", "good<|im_end|>\n")
    assert found.altered == [rendering.REOPENED, rendering.CONTINUED]


def test_begun_turns_of_other_kinds():
    found = texts(families.CHATML, assistant("good"), prompt=[assistant("Sure, ")])
    assert (found.prompt, whole(found.chosen)) == (OPEN + "Sure, ", "good<|im_end|>\n")
    found = texts(
        families.QWEN3, assistant("hm</think>good"), [assistant("</think>bad")], [user("q"), assistant("<think>\n")]
    )
    assert found.prompt == ASKED + "<think>\n" and whole(found.chosen) == "hm\n</think>\n\ngood<|im_end|>\n"
    thought = assistant("", reasoning_content="hm, ")
    found = texts(families.REASONING, assistant("good"), prompt=[user("q"), thought])
    assert (found.prompt, whole(found.chosen)) == (ASKED + "<think>hm, ", "</think>good<|im_end|>\n")
    more = [assistant("good", reasoning_content="well")], [assistant("bad", reasoning_content="no")]
    found = texts(families.REASONING, *more, prompt=[user("q"), thought])
    assert (found.prompt, whole(found.chosen)) == (ASKED + "<think>hm, ", "well</think>good<|im_end|>\n")
    assert texts(families.REASONING, *more, prompt=[user("q"), assistant("Sure, ")]) == rendering.REASONING_AFTER_TEXT
    several = [assistant("good"), user("u"), assistant("bye")]
    assert labelled(texts(families.CHATML, several, prompt=[user("q"), assistant("Sure, ")]).chosen) == [
        "good<|im_end|>",
        "bye<|im_end|>\n",
    ]
    acting = texts(families.QWEN25, calling(CALL), [assistant("bad")], [user("q"), assistant("Sure: ")])
    assert acting.prompt == ASKED + "Sure: " and whole(acting.chosen).startswith("\n<tool_call>")
    trimmed = chatml("{{ message.content | trim }}{{ message.tool_calls | tojson if message.tool_calls }}")
    acting = texts(trimmed, calling(CALL), [assistant("bad")], [user("q"), assistant("Sure: ")])
    assert acting.prompt == ASKED + "Sure:" and whole(acting.rejected) == " bad<|im_end|>\n"
    other = chatml("{{ 'call: ' if message.tool_calls }}{{ message.content }}|{{ message.tool_calls }}")
    acting = texts(other, calling(CALL), [assistant("bad")], [user("q"), assistant("Sure: ")])
    assert acting == rendering.TEMPLATE_BOUNDARY
    newest_first = "{% for m in messages | reverse %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}"
    acting = texts(newest_first, assistant("good"), prompt=[user("q"), assistant("Sure, ")])
    assert acting == rendering.TEMPLATE_BOUNDARY  # the question would be trained


@pytest.mark.parametrize("blank", ["", " ", "\n\n"])
def test_an_empty_turn_at_the_end_of_a_prompt_is_left_out(blank):
    found = texts(families.CHATML, assistant("good"), prompt=[user("q"), assistant(blank)])
    assert (found.prompt, found.altered) == (ASKED, [rendering.EMPTY_TURN])
    assert texts(families.CHATML, assistant("good"), prompt=[assistant(blank)]) == rendering.NO_PROMPT


def test_a_tool_call_at_the_end_of_a_prompt_is_no_begun_turn():
    found = texts(families.QWEN25, assistant("good"), prompt=[user("q"), calling(CALL)])
    assert found.prompt.endswith("</tool_call><|im_end|>\n" + OPEN) and found.altered == []


# Templates by name, cost, and real ones


@pytest.mark.parametrize("kind", [dict, list])
def test_several_templates_by_name(kind):
    named = {"default": families.CHATML, "tool_use": families.QWEN25}
    made = named if kind is dict else [{"name": name, "template": text} for name, text in named.items()]
    tokenizer = families.demo_tokenizer(["abc"], 300)
    tokenizer.chat_template = made
    row = {"prompt": [user("q")], "chosen": [calling(CALL)], "rejected": [assistant("bad")], "tools": [TOOL]}
    assert whole(ChatTemplate(tokenizer, {}).texts(row).chosen).startswith("<tool_call>")
    lost = ChatTemplate(tokenizer, {}).texts({**row, "tools": None})
    assert lost == LEFT_OUT + "the response's tool calls"
    chosen_by_name = ChatTemplate(tokenizer, {"chat_template": families.QWEN25}).texts({**row, "tools": None})
    assert whole(chosen_by_name.chosen).startswith("<tool_call>")


def test_renderings_grow_with_the_turns_not_with_their_square(monkeypatch):
    tokenizer = families.tokenizer(families.QWEN3)
    rendered = []
    apply = type(tokenizer).apply_chat_template
    counting = lambda self, *args, **kwargs: rendered.append(1) or apply(self, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counting)
    texts(families.QWEN3, assistant("good"))
    assert len(rendered) == 6  # prompt and both conversations, each with marks once more
    rendered.clear()
    turns = [turn for n in range(20) for turn in (user(f"q{n}"), assistant(f"<think>hm {n}</think>a{n}"))]
    found = texts(families.QWEN3, assistant("good"), prompt=[*turns, user("q")])
    assert found.altered == ["the chat template leaves out the prompt's reasoning"]
    assert len(rendered) <= 6 + 2 * len(turns) + 2
    rendered.clear()
    answers = [turn for n in range(20) for turn in (assistant(f"a{n}"), user(f"q{n}"))]
    assert len(labelled(texts(families.QWEN3, [*answers, assistant("end")]).chosen)) == 21
    assert len(rendered) <= 6 + 3 * len(answers)


def real_templates():
    trl = pytest.importorskip("trl")
    return sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@pytest.mark.full  # 70 templates, up to 18 KB each to compile
def test_real_templates_keep_prompt_and_response_apart():
    """Those that TRL brings: what is labelled is the assistant's, all of it, and nothing else."""
    paths, answered = real_templates(), 0
    if not paths:
        pytest.skip("this version of TRL brings no chat templates")
    rows = [
        ([assistant("alpha"), user("beta"), assistant("gamma")], None),
        ([calling(call("alpha", x="gamma")), tool("beta"), assistant("delta")], [TOOL]),
        ([assistant("<think>\nalpha\n</think>\n\ngamma")], None),
    ]
    for path in paths:
        for chosen, tools in rows:
            found = texts(path.read_text(), chosen, [assistant("epsilon")], [user("omega")], tools=tools)
            if isinstance(found, str):
                continue
            answered += 1
            ours, wanted = "".join(labelled(found.chosen)), {w for w in ("alpha", "gamma", "delta") if w in str(chosen)}
            assert all(word in ours for word in wanted), (path.name, ours)
            assert "beta" not in ours and "omega" not in ours and "omega" in found.prompt, (path.name, ours)
            assert not any(word in found.prompt for word in (*wanted, "epsilon")), (path.name, found.prompt)
    assert answered > len(paths)
