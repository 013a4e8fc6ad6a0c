"""Every known layout in its published form, and what is said about those that are not known or not sound."""

import json

import pytest

from dpo_kernels.data.layouts import (
    KNOWN_LAYOUTS,
    OTHER_TOOLS,
    RANKED_PAIRS,
    convert,
    has_system,
    is_empty,
    recognize,
    unused,
    unused_note,
)
from dpo_kernels.data.messages import LOOKS_LIKE_MESSAGES
from dpo_kernels.data.turns import OTHER_SYSTEM, REPEATED_TEXT


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
            "weight": None,
            "chosen_token_weights": None,
            "rejected_token_weights": None,
            "altered": [],
            "group": None,
            "members": None,
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


def test_repeated_text_of_plain_pairs_is_taken_off():
    start = "\n\nHuman: q\n\nAssistant:"
    row = {"prompt": start, "chosen": start + " a", "rejected": start + " b"}
    (pair,) = converted(row)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (start, " a", " b")
    assert pair["altered"] == [REPEATED_TEXT]
    # As turns it has no white space around it.
    assert one({**row, "system": "s"})[:2] == ([system("s"), user("q")], [assistant("a")])
    asked = "What colour is the sky?"
    row = {"prompt": [user(asked)], "chosen": f"{asked} blue", "rejected": f"{asked} red"}
    assert one(row)[1:3] == ([assistant("blue")], [assistant("red")])


def test_transcripts_that_repeat_a_prompt_of_text_are_conversations():
    row = {"prompt": "q?", "chosen": "Human: q?\n\nAssistant: a", "rejected": "Human: q?\n\nAssistant: b"}
    assert one(row) == ([user("q?")], [assistant("a")], [assistant("b")], None)
    other = {**row, "prompt": "write a dialogue"}
    assert one(other) == ("write a dialogue", row["chosen"], row["rejected"], None)


# System turns in a column


def test_system_column_makes_text_conversational():
    row = {"system": "s", "prompt": "q", "chosen": " a", "rejected": "b"}
    assert one(row) == ([system("s"), user("q")], [assistant(" a")], [assistant("b")], None)


@pytest.mark.parametrize("nothing", ["", None, " \n", float("nan"), [], {}])
def test_a_system_column_may_be_empty_in_some_rows(nothing):
    rows = [{"system": s, "prompt": "q", "chosen": "a", "rejected": "b"} for s in (nothing, "s", nothing)]
    assert one(rows[0])[0] == "q"
    assert has_system(enumerate(rows)) and not has_system(enumerate(rows[::2]))
    pairs = converted(*rows, conversational=True)
    assert [pair["prompt"] for pair in pairs] == [[user("q")], [system("s"), user("q")], [user("q")]]
    with pytest.raises(ValueError, match="row 2: this row is conversational, the rows before it are plain text"):
        converted(*rows)


@pytest.mark.parametrize(
    "given", ["s", system("s"), [system("s")], json.dumps([system("s")]), {"type": "system", "content": "s"}]
)
def test_forms_of_a_system_column(given):
    shared = {"system": given, "chosen": "a", "rejected": "b"}
    prompt = [system("s"), user("q")]
    for row in (
        {**shared, "prompt": "q"},
        {**shared, "prompt": "\n\nHuman: q\n\nAssistant:"},
        {**shared, "question": "q"},
        {**shared, "conversations": [{"from": "human", "value": "q"}]},
        {"system": given, "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"system": given, "chosen": "Human: q\n\nAssistant: a", "rejected": "Human: q\n\nAssistant: b"},
        {"system": given, "prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
        {
            "system": given,
            "input": {"messages": [user("q")]},
            "preferred_output": "a",
            "non_preferred_output": "b",
        },
    ):
        assert one(row) == (prompt, [assistant("a")], [assistant("b")], None)


def test_system_columns_that_do_not_go_with_the_row():
    row = {"system": "s", "prompt": [system("t"), user("q")], "chosen": "a", "rejected": "b"}
    (pair,) = converted(row)
    assert (pair["prompt"], pair["altered"]) == (row["prompt"], [OTHER_SYSTEM])
    with pytest.raises(ValueError, match="row 1: the field 'system': expected text or a system turn, got .*'user'"):
        one({**row, "system": [user("x")]})
    with pytest.raises(ValueError, match="row 1: the field 'system' needs a conversational prompt"):
        one({"system": "s", "chosen": "Q: a", "rejected": "Q: b"})


# Messages as text


QUESTION, GOOD, BAD = [user("q")], [assistant("a")], [assistant("b")]


@pytest.mark.parametrize("written", [json.dumps, repr])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
        {"prompt": "q", "chosen": QUESTION + GOOD, "rejected": QUESTION + BAD},
        {"chosen": QUESTION + GOOD, "rejected": QUESTION + BAD},
        {"prompt": QUESTION, "answers": [{"rank": 1, "answer": "a"}, {"rank": 2, "answer": "b"}]},
        {"prompt": QUESTION, "answers": [{"rank": 1, "answer": GOOD}, {"rank": 2, "answer": QUESTION + BAD}]},
        {"input": {"messages": QUESTION}, "preferred_output": GOOD, "non_preferred_output": BAD},
        {"input": QUESTION, "preferred_output": GOOD[0], "non_preferred_output": BAD[0]},
        {"conversations": QUESTION, "chosen": GOOD[0], "rejected": BAD[0]},
        {"conversations": QUESTION, "chosen": QUESTION + GOOD, "rejected": QUESTION + BAD},
        {"instruction": QUESTION, "input": "", "history": [], "chosen": GOOD, "rejected": BAD},
        {"question": "q", "chosen": QUESTION + GOOD, "rejected": BAD},
    ],
)
def test_messages_as_text_in_every_layout(row, written):
    row = {**row, "tools": TOOLS, "weight": 2}
    text = {name: value if isinstance(value, str) else written(value) for name, value in row.items()}
    for given in (row, text):
        (pair,) = converted(given)
        assert (pair["prompt"], pair["chosen"], pair["rejected"], pair["tools"]) == (QUESTION, GOOD, BAD, TOOLS)
        assert (pair["weight"], pair["altered"]) == (2.0, [])


def test_text_that_only_looks_like_messages_is_noticed_where_it_stays():
    cut = json.dumps(GOOD)[:-3]
    (pair,) = converted({"prompt": "q", "chosen": cut, "rejected": cut + "x"})
    assert (pair["chosen"], pair["altered"]) == (cut, [LOOKS_LIKE_MESSAGES])
    rows = [{"prompt": "q", "chosen": GOOD, "rejected": BAD}, {"prompt": "q", "chosen": cut, "rejected": "b"}]
    with pytest.raises(ValueError, match=f"row 2: this row is plain text, .*{LOOKS_LIKE_MESSAGES}"):
        converted(*rows)


@pytest.mark.parametrize(
    "write",
    [
        lambda turns: json.dumps(turns)[:-3],
        lambda turns: json.dumps(turns).replace('"', "&quot;"),
        lambda turns: json.dumps([turns, turns]),
        lambda turns: json.dumps([{turn["role"]: turn["content"]} for turn in turns]),
        lambda turns: "".join(f"- role: {turn['role']}\n  content: {turn['content']}\n" for turn in turns),
    ],
)
def test_an_implicit_prompt_does_not_end_inside_of_messages(write):
    sides = {"chosen": write([*QUESTION, *GOOD]), "rejected": write([*QUESTION, *BAD])}
    with pytest.raises(ValueError, match="row 1: chosen and rejected look like messages, and cannot be read as such"):
        converted(sides)


def test_a_response_that_is_messages_among_text_is_named():
    rows = [{"prompt": "q", "chosen": chosen, "rejected": "b"} for chosen in ("a", json.dumps(GOOD))]
    with pytest.raises(ValueError, match="row 2: this row is conversational, the rows before it are plain text"):
        converted(*rows)


def test_tools_that_come_with_messages():
    other = [{"name": "other"}]
    row = {"prompt": {"messages": QUESTION, "tools": TOOLS}, "chosen": GOOD, "rejected": BAD}
    assert one(row)[3] == TOOLS
    (pair,) = converted({**row, "tools": other})
    assert (pair["tools"], pair["altered"]) == (other, [OTHER_TOOLS])


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


@pytest.mark.parametrize(
    ("ranks", "got"),
    [([], "0"), ([1], "1"), ([1, 1.0], "2, all of the same rank"), ([2] * 3, "3, all of the same rank")],
)
def test_nectar_without_a_pair(ranks, got):
    row = {"prompt": "q", "answers": [{"answer": f"{n}", "rank": rank} for n, rank in enumerate(ranks)]}
    with pytest.raises(
        ValueError, match=f"row 1: .*'answers': expected two differently ranked answers or more, got {got}$"
    ):
        one(row)


def contents(pairs):
    return [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs]


def test_all_pairs_of_a_ranking():
    pairs = converted(NECTAR, NECTAR, ranked_pairs="all_pairs")
    assert contents(pairs) == [("best", "middle"), ("best", "worst"), ("middle", "worst")] * 2
    assert [pair["members"] for pair in pairs] == [[0, 1], [0, 2], [1, 2]] * 2
    assert [pair["group"] for pair in pairs] == ["file, row 1"] * 3 + ["file, row 2"] * 3


def test_all_pairs_with_ties():
    tied = {"prompt": "q", "answers": [{"answer": t, "rank": r} for t, r in (("c", 2), ("a", 1), ("d", 2), ("b", 1))]}
    pairs = converted(tied, ranked_pairs="all_pairs")
    assert contents(pairs) == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]
    assert [pair["members"] for pair in pairs] == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert [pair["members"] for pair in converted(tied, ranked_pairs="best_vs_each")] == [[0, 2], [0, 3]]


@pytest.mark.parametrize("ranked_pairs", RANKED_PAIRS)
def test_a_ranking_of_one_pair_is_a_plain_pair(ranked_pairs):
    two = {"prompt": "q", "answers": [{"answer": n, "rank": n} for n in "12"]}
    (pair,) = converted(two, ranked_pairs=ranked_pairs)
    assert pair["group"] is None and pair["members"] is None
    (pair,) = converted(NECTAR)
    assert pair["group"] is None and pair["members"] is None


@pytest.mark.parametrize(
    "answers",
    [
        [{"answer": "a", "rank": "1"}, {"answer": "b", "rank": " 2.0"}],
        {"answer": ["b", "a"], "rank": [2, 1]},
        [json.dumps({"answer": "a", "rank": 1}), {"answer": "b", "rank": 7}],
        "[{'answer': 'a', 'rank': 0}, {'answer': 'b', 'rank': np.float64(0.5)}]",
    ],
)
def test_nectar_answers_in_other_forms(answers):
    assert one({"prompt": "q", "answers": answers}) == ([user("q")], [assistant("a")], [assistant("b")], None)


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([{"answer": "a", "rank": rank}, {"answer": "b", "rank": 2}], error)
        for rank, error in [
            (None, "'rank' is null"),
            (float("nan"), "'rank' is null"),
            ("1st", "'rank': expected a number, got '1st'"),
            (True, "'rank': expected a number, got True"),
            (float("inf"), "'rank': expected a number, got inf"),
        ]
    ]
    + [("best", "'answers': expected JSON text"), (3, "'answers': expected a list"), (["a"], "expected JSON text")],
)
def test_unsound_nectar_answers(answers, error):
    with pytest.raises(ValueError, match=f"row 1: the field {error}|row 1: .*{error}"):
        one({"prompt": "q", "answers": answers})


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


def test_openassistant_rankings_are_named_by_their_message():
    rows = [
        tree("p", None, "prompter", "q"),
        *(tree(f"a{n}", "p", "assistant", str(n), n) for n in range(3)),
        tree(7, None, "prompter", "q2"),
        *(tree(f"b{n}", 7, "assistant", str(n), n // 2) for n in range(3)),
        tree("s", None, "prompter", "q3"),
        *(tree(f"c{n}", "s", "assistant", str(n), 1) for n in range(3)),
        tree("d", None, "prompter", "q4"),
        tree("d0", "d", "assistant", "alone", 0),
    ]
    tied = []
    pairs = list(
        convert(
            ((f"a, b.jsonl, row {n}", row) for n, row in enumerate(rows, start=1)),
            "openassistant",
            ranked_pairs="all_pairs",
            tied=tied,
        )
    )
    assert [(pair["group"], pair["members"]) for pair in pairs] == [
        *(("a, b.jsonl, message 'p'", members) for members in ([0, 1], [0, 2], [1, 2])),
        *(("a, b.jsonl, message 7", members) for members in ([0, 2], [1, 2])),
    ]
    assert contents(pairs) == [("0", "1"), ("0", "2"), ("1", "2"), ("0", "2"), ("1", "2")]
    assert tied == ["a, b.jsonl, message 's'"]


def ultrafeedback(*scores, key="fine-grained_score", **more):
    answers = [{"response": f"r{n}", "model": "m", key: score, **more} for n, score in enumerate(scores)]
    return {"source": "flan", "instruction": "q", "models": ["m"], "completions": answers, "correct_answers": ["None"]}


def test_ultrafeedback():
    assert recognize(list(ultrafeedback(1))) == "ultrafeedback"
    assert unused("ultrafeedback", list(ultrafeedback(1))) == ["source", "models", "correct_answers"]
    row = ultrafeedback(3.25, "4.5", 2, 4.5)
    assert one(row) == ([user("q")], [assistant("r1")], [assistant("r2")], None)
    pairs = converted(row, ranked_pairs="all_pairs")
    assert contents(pairs) == [("r1", "r0"), ("r1", "r2"), ("r3", "r0"), ("r3", "r2"), ("r0", "r2")]
    assert [pair["members"] for pair in pairs] == [[0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert {pair["group"] for pair in pairs} == {"file, row 1"}
    fields = {key: [answer[key] for answer in row["completions"]] for key in ("response", "fine-grained_score")}
    assert converted({**row, "completions": fields}, ranked_pairs="all_pairs") == pairs
    assert converted({**row, "completions": json.dumps(row["completions"])}, ranked_pairs="all_pairs") == pairs
    assert one({**row, "system": "s"})[0] == [system("s"), user("q")]


def test_ultrafeedback_goes_by_the_score_that_all_have():
    row = ultrafeedback(1, 2, overall_score=5)
    row["completions"][0]["overall_score"] = 10
    assert one(row)[1] == [assistant("r1")]
    row["completions"][0]["fine-grained_score"] = None
    assert one(row)[1] == [assistant("r0")]
    row["completions"][1]["overall_score"] = float("nan")
    with pytest.raises(
        ValueError, match=r"row 1: the field 'completions': expected one of \('fine-grained_score', 'ov"
    ):
        one(row)


def test_ultrafeedback_rows_without_a_pair_are_noted():
    tied = []
    rows = [("1", ultrafeedback(2, 2, 2)), ("2", ultrafeedback(1, 2)), ("3", ultrafeedback(1)), ("4", ultrafeedback())]
    assert [pair["source"] for pair in convert(rows, "ultrafeedback", tied=tied)] == ["2"]
    assert tied == ["1", "3", "4"]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (ultrafeedback(1, "N/A"), "the field 'fine-grained_score': expected a number, got 'N/A'"),
        (ultrafeedback(1, 2, key="rating"), "the field 'completions': expected one of"),
        (ultrafeedback(1, 2, response=None), "the field 'response' is null"),
        ({"instruction": "q", "completions": ["a", "b"]}, "the field 'completions': expected JSON text"),
        ({"instruction": "q", "completions": 3}, "the field 'completions': expected a list of objects with response"),
        ({"instruction": "q", "completions": None}, "the field 'completions' is null"),
    ],
)
def test_unsound_ultrafeedback(row, error):
    with pytest.raises(ValueError, match=f"row 1: {error}"):
        one(row)


# Several rejected responses


@pytest.mark.parametrize(
    ("rejected", "expected"),
    [
        (["b", "c"], ["b", "c"]),
        (("b", "c"), ["b", "c"]),
        (["b"], ["b"]),
        (["b", "b", "a"], ["b", "b", "a"]),
        (["1", '{"x": 1}', "[2]"], ["1", '{"x": 1}', "[2]"]),  # answers that are JSON stay answers
    ],
)
def test_several_rejected_texts(rejected, expected):
    pairs = converted({"prompt": "Say:", "chosen": "a", "rejected": rejected}, ranked_pairs="all_pairs")
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs] == [("Say:", "a", each) for each in expected]
    several = len(expected) > 1
    assert [p["members"] for p in pairs] == [[0, n + 1] if several else None for n in range(len(expected))]
    assert {p["group"] for p in pairs} == {"file, row 1" if several else None}


@pytest.mark.parametrize(
    "rejected",
    [
        [[assistant("b")], [assistant("c")]],
        [[assistant("b")], "c"],
        ["b", assistant("c")["content"]],
        [[{"from": "gpt", "value": "b"}], {"messages": [user("q"), assistant("c")]}],
        [json.dumps([assistant("b")]), [user("q"), assistant("c")]],
        [[assistant("c")], "b"],
    ],
)
def test_several_rejected_conversations(rejected):
    row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": rejected}
    pairs = converted(row, ranked_pairs="all_pairs")
    assert [pair["prompt"] for pair in pairs] == [[user("q")]] * 2
    assert {chosen for chosen, _ in contents(pairs)} == {"a"}
    assert sorted(rejected for _, rejected in contents(pairs)) == ["b", "c"]
    assert [pair["members"] for pair in pairs] == [[0, 1], [0, 2]]


@pytest.mark.parametrize(
    "rejected",
    [
        [assistant("b"), user("and?"), assistant("c")],
        [json.dumps(turn) for turn in (assistant("b"), user("and?"), assistant("c"))],
        [[assistant("b"), user("and?"), assistant("c")]],
        [{"message": turn} for turn in (assistant("b"), user("and?"), assistant("c"))],
        {"role": ["assistant", "user", "assistant"], "content": ["b", "and?", "c"]},
        [{"messages": [user("q"), assistant("b"), user("and?"), assistant("c")]}],
    ],
)
def test_a_list_of_messages_is_one_response(rejected):
    (pair,) = converted({"prompt": [user("q")], "chosen": "a", "rejected": rejected}, ranked_pairs="all_pairs")
    assert pair["rejected"] == [assistant("b"), user("and?"), assistant("c")] and pair["members"] is None


def test_several_rejected_by_choice_of_pairs():
    row = {"prompt": "Say:", "chosen": "a", "rejected": ["b", "c", "d"]}
    assert converted(row, ranked_pairs="best_vs_each") == converted(row, ranked_pairs="all_pairs")
    unpaired = []
    (pair,) = converted(row, unpaired=unpaired)
    assert pair["rejected"] == "d" and pair["group"] is None and pair["members"] is None
    assert unpaired == ["file, row 1"] * 2


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [user("q"), assistant("a")], "rejected": [[user("q"), assistant(n)] for n in "bc"]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": ["b", "c"]},
        {"instruction": "q", "chosen": "a", "rejected": ["b", "c"]},
        {"question": "q", "chosen": "a", "rejected": ["b", "c"]},
    ],
)
def test_several_rejected_in_other_layouts(row):
    pairs = converted(row, ranked_pairs="best_vs_each")
    assert contents(pairs) == [("a", "b"), ("a", "c")] and [pair["members"] for pair in pairs] == [[0, 1], [0, 2]]
    assert [pair["prompt"] for pair in pairs] == [[user("q")]] * 2


def test_weights_of_several_rejected():
    row = {"prompt": "Say:", "chosen": "a", "rejected": ["b", "c"], "weight": 2, "chosen_token_weights": [1, 0]}
    pairs = converted({**row, "rejected_token_weights": [[0.5], [1, 2]]}, ranked_pairs="all_pairs")
    assert [pair["rejected_token_weights"] for pair in pairs] == [[0.5], [1, 2]]
    assert [(pair["weight"], pair["chosen_token_weights"]) for pair in pairs] == [(2, [1, 0])] * 2
    assert [pair["rejected_token_weights"] for pair in converted(row, ranked_pairs="all_pairs")] == [None, None]
    for given in ([[0.5]], 3, "[1]"):
        with pytest.raises(ValueError, match="row 1: the field 'rejected_token_weights': expected a list for each of"):
            converted({**row, "rejected_token_weights": given})


@pytest.mark.parametrize(
    ("rejected", "error"),
    [
        ([], "the field 'rejected': expected text or a list of messages, got an empty list"),
        (["b", None], "the field 'rejected' is null"),
        (["b", 3], "the field 'rejected': expected text or a list of messages, got int"),
        (["b", []], "the field 'rejected': expected text or a list of messages, got an empty list"),
        (["b", assistant("c")], "the field 'rejected': expected messages, objects with role and content, got 'b'"),
        (["b", " "], "the rejected response is empty"),
        (["b", [assistant("c")]], "this row is conversational, the rows before it are plain text"),
    ],
)
def test_unsound_rejected_lists(rejected, error):
    with pytest.raises(ValueError, match=f"row 1: {error}"):
        converted({"prompt": "Say:", "chosen": "a", "rejected": rejected}, ranked_pairs="all_pairs")


@pytest.mark.parametrize(
    ("first", "second", "nothing"),
    [(0, 1, None), (1.0, 2.0, float("nan")), ("1", "2", ""), (("a", 1), ("a", 2), None), (True, "x", None)],
)
def test_openassistant_ids_and_ranks_of_other_types(first, second, nothing):
    rows = [
        tree(first, nothing, "Prompter", "q", nothing),
        tree(second, first, "ASSISTANT", "good", "0" if nothing == "" else 0.0, deleted="False"),
        tree("third", first, "gpt", "bad", "1.0" if nothing == "" else 1),
        tree("fourth", first, "assistant", "removed", 2, deleted="true"),
        tree("fifth", first, "assistant", "never ranked", nothing, deleted=nothing),
    ]
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in converted(*rows)] == [
        ([user("q")], [assistant("good")], [assistant("bad")])
    ]


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({}, "row 2: the message 'p', which it answers, is not in the data"),
        ({"message_id": "p", "parent_id": "p"}, "row 2: the message 'p' is among its own ancestors"),
        ({"message_id": "p", "parent_id": "a2"}, "row 2: the message 'p' is among its own ancestors"),
        ({"message_id": "a1"}, "row 2: the message_id 'a1' has been there before"),
        ({"message_id": None}, "row 1: the field 'message_id' is null"),
        ({"message_id": ["x"]}, r"row 1: the field 'message_id': expected text or a number, got \['x'\]"),
        ({"rank": "best"}, "row 1: the field 'rank': expected a number, got 'best'"),
        ({"rank": True}, "row 1: the field 'rank': expected a number, got True"),
        ({"text": None}, "row 1: the field 'text' is null"),
        ({"role": 3}, "row 1: the field 'role': expected text, got int"),
    ],
)
def test_unsound_trees_are_named(changed, error):
    rows = [
        {**tree("other", None, "prompter", "q"), **changed},
        tree("a1", "p", "assistant", "first", 0),
        tree("a2", "p", "assistant", "second", 1),
    ]
    with pytest.raises(ValueError, match=error):
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
    assert one({**row, "history": [user("hi"), assistant("hello")]})[0] == prompt
    for written in (json.dumps, repr, lambda history: list(map(tuple, history))):
        assert one({**row, "history": written([["hi", "hello"]])})[0] == prompt
    for nothing in (None, "", [], "[]", float("nan")):
        assert one({**row, "history": nothing})[0] == [system("s"), user("translate")]
    for history in (["hi"], [["hi"]], ["hi", "hello", "x"], 5):
        with pytest.raises(ValueError, match="'history': expected pairs of question and answer"):
            one({**row, "history": history})
    with pytest.raises(ValueError, match="'history': expected text, got NoneType"):
        one({**row, "history": [["hi", None]]})
    with pytest.raises(ValueError, match="'input' goes with text, got messages in the field 'instruction'"):
        one({**row, "instruction": [user("q")], "input": "x"})


def test_question_may_stand_for_instruction():
    row = {"system": "s", "question": "q", "chosen": "a", "rejected": "b"}
    assert one(row) == ([system("s"), user("q")], [assistant("a")], [assistant("b")], None)
    assert one({**row, "instruction": None})[0] == [system("s"), user("q")]
    assert one({**row, "instruction": "i"})[0] == [system("s"), user("i")]


# Weights


@pytest.mark.parametrize("given", [1.5, "1.5", " 1.50"])
def test_weights_of_pairs(given):
    text = {"prompt": "q", "chosen": "a", "rejected": "b"}
    chat = {"prompt": QUESTION, "answers": [{"answer": n, "rank": n} for n in "123"]}
    for row in (text, chat):
        pairs = converted({**row, "weight": given}, {**row, "weight": 0}, ranked_pairs="best_vs_each")
        assert [pair["weight"] for pair in pairs] == [1.5] * (len(pairs) // 2) + [0.0] * (len(pairs) // 2)


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ([1, None], "row 2: this row has no weight, file, row 1 has one: expected one for each row"),
        ([1, float("nan")], "row 2: this row has no weight"),
        (["1", ""], "row 2: this row has no weight"),
        ([None, 1], "row 2: this row has a weight, file, row 1 has none: expected one for each row"),
        ([1, -1], "row 2: the field 'weight': expected a weight of at least 0, got -1"),
        ([1, "heavy"], "row 2: the field 'weight': expected a number, got 'heavy'"),
        ([True], "row 1: the field 'weight': expected a number, got True"),
        ([float("inf")], "row 1: the field 'weight': expected a number, got inf"),
        (["nan"], "row 1: the field 'weight': expected a number, got 'nan'"),
        ([[1]], r"row 1: the field 'weight': expected a number, got \[1\]"),
    ],
)
def test_unsound_weights(weights, error):
    with pytest.raises(ValueError, match=error):
        converted(*({"prompt": "q", "chosen": "a", "rejected": "b", "weight": weight} for weight in weights))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ([1, 0, 0.5], [1.0, 0.0, 0.5]),
        ("[1, 0]", [1.0, 0.0]),
        ("array([0., 1.])", [0.0, 1.0]),
        (["1"], [1.0]),
        *((none, None) for none in (None, "", float("nan"))),
    ],
)
def test_weights_of_tokens(side, given, weights):
    (pair,) = converted({"prompt": "q", "chosen": "a", "rejected": "b", f"{side}_token_weights": given})
    other = {"chosen": "rejected", "rejected": "chosen"}[side]
    assert (pair[f"{side}_token_weights"], pair[f"{other}_token_weights"]) == (weights, None)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (5, "expected a list with a number for each token, got 5"),
        ({"a": 1}, "expected a list with a number for each token"),
        ("all", "expected JSON text, got 'all'"),
        ([1, -1], "expected a weight of at least 0, got -1"),
        ([None], "expected a number, got None"),
        ([True], "expected a number, got True"),
        ([float("nan")], "expected a number, got nan"),
    ],
)
def test_unsound_weights_of_tokens(given, error):
    with pytest.raises(ValueError, match=f"row 1: the field 'chosen_token_weights': {error}"):
        one({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_token_weights": given})


# Columns that are not used


@pytest.mark.parametrize(
    ("columns", "names", "note"),
    [
        (["system", "tools", "weight", "chosen_token_weights"], [], ""),
        (["id"], ["id"], "the column 'id' is not used"),
        (["id", "score"], ["id", "score"], "the columns 'id', 'score' are not used"),
        (["images"], ["images"], "the column 'images' is not used, and training would differ with it"),
        (
            ["id", "Images", "functions", "History"],
            ["id", "Images", "functions", "History"],
            "the columns 'Images', 'functions', 'History' are not used, and training would differ with them; "
            "the column 'id' is not used",
        ),
    ],
)
def test_unused_columns_are_named(columns, names, note):
    columns = ["prompt", "chosen", "rejected", *columns]
    assert unused(recognize(columns), columns) == names
    assert unused_note(recognize(columns), columns) == note


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        (["question", "instruction", "input", "history", "chosen", "rejected", "output"], ["question", "output"]),
        (["question", "chosen", "rejected"], []),
        (["prompt", "conversations", "chosen", "rejected"], ["conversations"]),
        (["prompt", "answers", "turns", "weight", "rejected_token_weights"], ["turns", "rejected_token_weights"]),
        (["message_id", "parent_id", "text", "role", "rank", "deleted", "lang", "system"], ["lang", "system"]),
        (["chosen", "rejected", "system", "image"], ["image"]),
        (["input", "preferred_output", "non_preferred_output", "prompt"], ["prompt"]),
    ],
)
def test_unused_columns_of_each_layout(columns, names):
    assert unused(recognize(columns), columns) == names


# What is refused


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (
            ["Prompt", "Chosen", "Rejected"],
            "to one of these: 'Prompt' to 'prompt', 'Chosen' to 'chosen', 'Rejected' to 'r",
        ),
        (["prompt", "CHOSEN", "rejected "], "'CHOSEN' to 'chosen', 'rejected ' to 'rejected'$"),
        (["PROMPT", "chosen", "rejected"], "these: 'PROMPT' to 'prompt'$"),  # not an implicit prompt
        (["Non-preferred output", "preferred_output", "input"], "'Non-preferred output' to 'non_preferred_output'$"),
        (["Chosen", "Rejected"], "'Chosen' to 'chosen', 'Rejected' to 'rejected'$"),
        (["prompt", "chosen", "reject"], "only 'rejected' is missing: is it 'reject'\\?$"),
        (["Problem", "chosen", "rejected"], "only 'prompt' is missing: is it 'Problem'\\?$"),
        (["messages", "chosen", "rejected"], "only 'prompt' is missing: is it 'messages'\\?$"),
        (["prompt", "answer", "rejected"], "only 'chosen' is missing$"),
        (["text", "stars"], "Rename or convert the columns to one of these$"),
    ],
)
def test_columns_that_come_close_are_named(columns, hint):
    with pytest.raises(ValueError, match=hint):
        recognize(columns)


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
    assert not is_empty([assistant("", reasoning_content="hm")])
    assert is_empty([assistant(" "), user("said by another")])
