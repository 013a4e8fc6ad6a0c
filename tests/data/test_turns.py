"""Where a pair's prompt ends: prompts that chosen and rejected repeat, as turns or as text."""

import pytest

from dpo_kernels.data.turns import (
    OTHER_SYSTEM,
    OTHER_TURNS,
    REPEATED_TEXT,
    prompt_turns,
    split_shared_turns,
    with_system,
    without_repeated_prompt,
    without_repeated_text,
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **extra):
    return {"role": "assistant", "content": text, **extra}


def system(text):
    return {"role": "system", "content": text}


def parted(prompt, chosen, rejected):
    altered = []
    prompt, chosen, rejected = without_repeated_prompt(prompt_turns(prompt), chosen, rejected, altered)
    assert (chosen[0]["content"], rejected[0]["content"]) == ("a", "b")
    return prompt, altered


@pytest.mark.parametrize(
    ("prompt", "repeated", "expected", "altered"),
    [
        ("q", [user("q")], [user("q")], []),
        ("what  is\r\nit? ", [user(" what is it?")], [user(" what is it?")], []),  # other white space
        ("\n\nHuman: q\n\nAssistant:", [user("q")], [user("q")], []),
        ([system("s"), user("q")], [system("t"), user("q")], [system("t"), user("q")], [OTHER_SYSTEM]),
        ([system("s "), user("q")], [system("s"), user("q")], [system("s"), user("q")], []),
        # the prompt has turns before what is repeated; the system turn of the conversation is not lost
        (
            [user("p"), assistant("r"), user("q")],
            [system("s"), user("q")],
            [system("s"), user("p"), assistant("r"), user("q")],
            [],
        ),
        # the assistant speaks first
        ([assistant("hello"), user("q")], [assistant("hello"), user("q")], [assistant("hello"), user("q")], []),
        # the last turn has been there before
        ([user("q"), assistant("r"), user("q")],) + ([user("q"), assistant("r"), user("q")],) * 2 + ([],),
        (
            [user("q"), assistant("r"), user("q")],
            [system("s"), user("q"), assistant("r"), user("q")],
            [system("s"), user("q"), assistant("r"), user("q")],
            [],
        ),
        (
            [user("p"), assistant("r"), user("q")],
            [user("o"), assistant("r"), user("q")],
            [user("o"), assistant("r"), user("q")],
            [OTHER_TURNS],
        ),
    ],
)
def test_prompts_that_are_repeated(prompt, repeated, expected, altered):
    assert parted(prompt, [*repeated, assistant("a")], [*repeated, assistant("b")]) == (expected, altered)


def test_each_side_may_repeat_the_prompt_in_its_way():
    full = [system("s"), user("q"), assistant("a")]
    assert parted("q", full, [user("q"), assistant("b")]) == ([system("s"), user("q")], [])
    assert parted("q", full, [assistant("b")]) == ([system("s"), user("q")], [])
    assert parted("q", full, [system("t"), user("q"), assistant("b")]) == ([system("s"), user("q")], [OTHER_SYSTEM])


def test_responses_alone_are_left():
    chosen = [assistant("a"), user("q"), assistant("r")]  # the question again, in the middle of a response
    assert without_repeated_prompt([user("q")], chosen, [assistant("b")], []) == ([user("q")], chosen, [assistant("b")])
    begun = [user("q"), assistant("Sure, ")]
    assert without_repeated_prompt(begun, [assistant("a")], [assistant("b")], [])[0] == begun


@pytest.mark.parametrize(
    ("chosen", "rejected", "error"),
    [
        ([user("x"), assistant("a")], [user("q"), assistant("b")], "neither start with an assistant turn nor repeat"),
        ([{"role": "tool", "content": "5"}, assistant("a")], [assistant("b")], "neither start with an assistant"),
        ([assistant("a")], [{"role": "Agent", "content": "b"}], "starts with a turn of the role 'Agent'"),
        ([user("q"), assistant("a")], [user("q")], "the rejected conversation ends with the prompt: no response"),
        (
            [user("p"), assistant("r"), user("q"), assistant("a")],
            [user("p"), assistant("s"), user("q"), assistant("b")],
            "repeat the prompt after different turns",
        ),
    ],
)
def test_conversations_that_do_not_go_with_the_prompt(chosen, rejected, error):
    with pytest.raises(ValueError, match=error):
        without_repeated_prompt([user("q")], chosen, rejected, [])


@pytest.mark.parametrize(
    ("begun", "chosen", "rejected"),
    [
        ("Sure, ", "Sure, a", "Sure, b"),
        ("Sure, ", " Sure,  a", "Sure,\nb"),
        ("Sure:\n", "Sure:\na", "Sure:\nb"),
        ("<think>\n", "<think>a", "<think>\n\nb"),
        ("答：", "答：a", "答：b"),
    ],
)
def test_responses_that_repeat_the_turn_that_the_prompt_begins(begun, chosen, rejected):
    prompt, responses = [user("q"), assistant(begun)], ([assistant(chosen)], [assistant(rejected)])
    expected = (prompt, [REPEATED_TEXT])
    assert parted(prompt, *responses) == expected
    assert parted(prompt, *([user("q"), *response] for response in responses)) == expected
    assert parted(prompt, [user("q"), *responses[0]], responses[1]) == expected


def test_responses_that_repeat_a_begun_turn_keep_the_rest():
    prompt, more = [user("q"), assistant("Sure,")], [user("r"), assistant("s")]
    chosen, rejected = [assistant("Sure, a", weight=2), *more], [user("q"), assistant("Sure, b")]
    assert without_repeated_prompt(prompt, chosen, rejected, []) == (
        prompt,
        [assistant(" a", weight=2), *more],
        [assistant(" b")],
    )


@pytest.mark.parametrize(
    ("begun", "chosen", "rejected"),
    [
        ("I", "In Rome", "It is"),  # it ends in a word
        ("[", "[1], [2]]", "[3]]"),  # a list in a list
        ("Sure, ", "Sure, a", "b"),  # one of both
        ("Sure", "Sure", "Sure"),  # nothing is left
        (" ", " a", " b"),
    ],
)
def test_responses_that_go_on_with_a_begun_turn_are_left(begun, chosen, rejected):
    altered = []
    row = [user("q"), assistant(begun)], [assistant(chosen)], [assistant(rejected)]
    assert without_repeated_prompt(*row, altered) == row
    assert altered == []


def test_shared_turns_are_the_same_but_for_bookkeeping():
    chosen = [user("q"), assistant("r", train=False, id=1), user("s"), assistant("a")]
    rejected = [user("q"), assistant("r", id=2), user("s"), assistant("b")]
    assert split_shared_turns(chosen, rejected) == (chosen[:3], chosen[3:], rejected[3:])
    calls = [assistant("", tool_calls=[{"function": {"name": "f", "arguments": {"a": a}}}]) for a in (1, True)]
    chosen, rejected = ([user("q"), call, assistant("r")] for call in calls)
    assert split_shared_turns(chosen, rejected) == (chosen[:1], chosen[1:], rejected[1:])


@pytest.mark.parametrize("own", [[system("s ")], [system("t")], [{"role": "developer", "content": "t"}]])
def test_a_system_turn_of_its_own_stays(own):
    altered = []
    assert with_system([*own, user("q")], [system("s")], altered) == [*own, user("q")]
    assert altered == ([] if own == [system("s ")] else [OTHER_SYSTEM])


def test_an_empty_last_turn_is_no_part_of_what_is_repeated():
    prompt = [user("q"), assistant(" ")]
    assert parted(prompt, [user("q"), assistant("a")], [user("q"), assistant("b")]) == ([user("q")], [])
    assert parted(prompt, [assistant("a")], [assistant("b")]) == (prompt, [])  # what it means is for the template
    assert prompt_turns("Human: q\n\nAssistant: ") == [user("q")]


# Text

SKY = "What colour is the sky?"


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        (SKY + " ", "blue", "red"),
        (SKY, " blue", "\nred"),
        ("Q: sky?\nA:", " blue", " red"),
        ("**Q:** sky\n**A:**", " blue", " red"),
        ("sky\n", "blue", "red"),
        ("[INST] sky [/INST]", "blue", "red"),
        ("<|user|>sky<|assistant|>", "blue", "red"),
        ("\n\nHuman: q\n\nAssistant:", " blue", " red"),
        ("質問\n空の色は何ですか？よく考えてください。", "青", "赤"),
        ("天空是什么颜色的呢", "蓝", "红"),
        ("空の色。答：", "青", "赤"),
        ("Tell me a story", ", once", " about x"),
    ],
)
def test_repeated_text_is_taken_off(prompt, chosen, rejected):
    altered = []
    assert without_repeated_text(prompt, prompt + chosen, prompt + rejected, altered) == (chosen, rejected)
    assert altered == [REPEATED_TEXT]


def test_white_space_around_repeated_text_does_not_matter():
    assert without_repeated_text(f"\n{SKY}\n", f"{SKY} blue", f" {SKY} red", []) == (" blue", " red")


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Yes", "Yes it is", "Yes but no"),
        ("The sky", "The sky is blue", "The sky is red"),
        ("Hello!", "Hello! Hi", "Hello! Bye"),
        ("How are you?", "How are you? Fine.", "How are you? Bad."),
        ("こんにちは", "こんにちは。元気です", "こんにちは。さよなら"),
        ("おはようございます", "おはようございます。元気です", "おはようございます。さよなら"),
        ("Tell me about the cat", "Tell me about the category", "Tell me about the cats"),  # ends in a word
        ("Give the plural of cafe", "Give the plural of cafe\u0301 is x", "Give the plural of cafe\u0301 is y"),
        (SKY, f"{SKY} blue", "red"),  # one of both
        (SKY, SKY, f"{SKY} red"),  # nothing is left
        (SKY, f"{SKY} \n", f"{SKY} red"),
        (SKY, SKY.lower() + " blue", SKY.lower() + " red"),  # not verbatim
        (SKY, f"Sure. {SKY} blue", f"Sure. {SKY} red"),
        ("", "blue", "red"),
        ("\n", "\nblue", "\nred"),
    ],
)
def test_answers_that_begin_like_the_prompt_are_left(prompt, chosen, rejected):
    altered = []
    assert without_repeated_text(prompt, chosen, rejected, altered) == (chosen, rejected)
    assert altered == []
