"""Pairs as text: what is labelled stands apart, whatever the text and the output are."""

import re

import numpy as np
import pytest

from dpo_kernels.data.preview import BAR, BINS, COLOURS, MARKS, NO_COLOUR, histogram, pair_text, rankings, some_rows


def decode(ids):
    return "".join(map(chr, ids))


def pair(chosen="blue", rejected="red", prompt="sky? ", **more):
    ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    return {name: list(map(ord, text)) for name, text in ids.items()} | more


def test_what_is_labelled_stands_between_marks():
    assert pair_text(pair(), decode).splitlines() == [
        "prompt (5 tokens):",
        "sky? ",
        "chosen (4 tokens, 4 of them labelled):",
        "\u27e6blue\u27e7",
        "rejected (3 tokens, 3 of them labelled):",
        "\u27e6red\u27e7",
        "(labelled text is between \u27e6 and \u27e7)",
    ]


def test_what_weighs_nothing_is_not_labelled():
    weights = [1, 1, 0.5] + [0] * 6 + [2, 1]
    text = pair_text(pair("abc TOOL de", chosen_token_weights=weights, rejected_token_weights=[0, 0, 1]), decode)
    assert (
        "chosen (11 tokens, 5 of them labelled, with weights from 0.5 to 2):\n\u27e6abc\u27e7 TOOL \u27e6de\u27e7\n"
        in text
    )
    assert "rejected (3 tokens, 1 of them labelled):\nre\u27e6d\u27e7\n" in text
    nothing = pair_text(pair("abc", chosen_token_weights=[0, 0, 0]), decode)
    assert "0 of them labelled):\nabc\n" in nothing


def test_colours_take_the_place_of_marks():
    text = pair_text(pair(), decode, colour=True)
    assert f"{COLOURS['chosen']}blue{NO_COLOUR}\n" in text and f"{COLOURS['rejected']}red{NO_COLOUR}\n" in text
    assert not any(mark in text for mark in MARKS[0]) and "in colour" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "shift_jis", "no such encoding"])
def test_marks_are_what_the_output_can_write(encoding):
    text = pair_text(pair(), decode, encoding=encoding)
    assert "[[blue]]" in text
    text.encode("ascii")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gb18030", "utf-8-sig"])
def test_marks_are_brackets_where_the_output_has_them(encoding):
    assert "\u27e6blue\u27e7" in pair_text(pair(), decode, encoding=encoding)


@pytest.mark.parametrize("number", range(len(MARKS) - 1))
def test_marks_are_not_in_the_text(number):
    """Code has [[ ]], templates {{ }}."""
    taken = "".join(start + end for start, end in MARKS[: number + 1])
    start, end = MARKS[number + 1]
    assert f"{start}{taken}{end}" in pair_text(pair(taken), decode)


@pytest.mark.parametrize(
    ("char", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),  # colours and titles of a terminal
        ("a\rb", r"a\rb"),
        ("\x00\x08\x7f", r"\x00\x08\x7f"),
        ("\x9b31m\x85", r"\x9b31m\x85"),  # the same for terminals that know 8 bits
        ("\u202eevil\u2066", r"\u202eevil\u2066"),  # text that runs from right to left
        ("\ud800", r"\ud800"),  # half a character
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\ufeff\u200b\u00ad", r"\ufeff\u200b\xad"),
        ("\U000e0041", r"\U000e0041"),
        ("line\n\ttab", "line\n\ttab"),
        ("青い é 👩\u200d🚀 می\u200cخواهم \u0301", "青い é 👩\u200d🚀 می\u200cخواهم \u0301"),
        (r"\x1b is text", r"\x1b is text"),
    ],
)
@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_what_a_terminal_would_obey_is_escaped(char, shown, part):
    text = pair_text(pair(**{part: f"<{char}>"}), decode)
    assert f"<{shown}>" in text
    text.encode("utf-8")


def test_runs_keep_the_spaces_that_a_tokenizer_drops_at_the_start():
    """SentencePiece drops the space before the first word of what it decodes."""
    words = ["_a", "_b", "_c", "_d"]

    def pieces(ids):
        return "".join(words[i] for i in ids).replace("_", " ").removeprefix(" ")

    example = {"prompt_ids": [0], "chosen_ids": [0, 1, 2, 3], "rejected_ids": [1], "chosen_token_weights": [1, 0, 0, 1]}
    assert "\u27e6a\u27e7 b c\u27e6 d\u27e7\n" in pair_text(example, pieces)


def test_long_texts_lose_their_middle():
    text = pair_text(pair("a" * 50 + "b" * 50, prompt="p" * 11), decode, longest=10)
    assert "ppppp [... 1 characters ...] ppppp\n" in text and "\u27e6aaaaa\u27e7 [... 90 characters ...] " in text
    assert "\u27e6bbbbb\u27e7\n" in text and "(100 tokens, 100 of them labelled)" in text
    weights = [0] * 50 + [1] * 50
    text = pair_text(pair("a" * 50 + "b" * 50, chosen_token_weights=weights), decode, longest=10)
    assert "aaaaa [... 90 characters ...] \u27e6bbbbb\u27e7\n" in text
    assert "...]" not in pair_text(pair("a" * 10), decode, longest=10)


@pytest.mark.parametrize(
    "lengths",
    [[5], [0, 0], [1, 2, 3], [1, 100_000], range(1, 12), [9, 10], [19, 20, 21, 39], [7] * 1000 + [8], range(0, 977, 3)],
    ids=str,
)
def test_histograms_count_everything_once(lengths):
    title, *lines = histogram("prompt tokens", list(lengths)).splitlines()
    assert title == f"prompt tokens: {min(lengths)} to {max(lengths)}, median {np.median(lengths):g}"
    assert 1 <= len(lines) <= BINS
    counts = []
    for line in lines:
        low, high, count, bar = re.fullmatch(r" *(\d+)(?: to +(\d+))? +(\d+) *(#*)", line).groups()
        high = high or low
        counts.append(int(count))
        assert sum(int(low) <= length <= int(high) for length in lengths) == int(count)
        assert set(bar) <= {"#"} and bool(bar) == bool(int(count)) and len(bar) <= BAR
    assert sum(counts) == len(lengths) and any(len(line.split()[-1]) == BAR for line in lines)


def test_a_histogram_of_nothing():
    assert histogram("chosen tokens", []) == "chosen tokens: none"


def test_the_same_pairs_for_the_same_seed():
    assert some_rows(100, 3, 7) == some_rows(100, 3, 7) != some_rows(100, 3, 8)
    assert some_rows(2, 5, 0) == [0, 1] and some_rows(5, 0, 0) == [] and some_rows(0, 3, 0) == []
    assert some_rows(100, 10, 1) == sorted(set(some_rows(100, 10, 1)))
    with pytest.raises(ValueError, match="pairs: expected a number of at least 0, got -1"):
        some_rows(5, -1, 0)


# Rankings


def ranking(*responses, pairs, **more):
    return {"prompt_ids": [63], "response_ids": [list(map(ord, text)) for text in responses], "pairs": pairs} | more


def test_a_ranking_shows_each_response_once():
    row = ranking("blue", "grey", "red", pairs=[[0, 1], [0, 2], [1, 2]])
    assert pair_text(row, decode).splitlines()[:-1] == [
        "prompt (1 tokens):",
        "?",
        "response 1, chosen over 2, 3 (4 tokens, 4 of them labelled):",
        "\u27e6blue\u27e7",
        "response 2, chosen over 3 (4 tokens, 4 of them labelled):",
        "\u27e6grey\u27e7",
        "response 3 (3 tokens, 3 of them labelled):",
        "\u27e6red\u27e7",
    ]
    coloured = pair_text(row, decode, colour=True).splitlines()
    kinds = dict(zip(coloured[3:9:2], ("chosen", "both", "rejected"), strict=True))
    assert list(kinds) == [
        f"{COLOURS[kind]}{text}{NO_COLOUR}" for kind, text in zip(kinds.values(), ("blue", "grey", "red"), strict=True)
    ]


def test_token_weights_of_a_ranking():
    row = ranking("blue", "red", pairs=[[0, 1]], response_token_weights=[[1, 1, 0, 0], [0.5, 1, 2]])
    lines = pair_text(row, decode).splitlines()
    assert lines[2:4] == ["response 1, chosen over 2 (4 tokens, 2 of them labelled):", "\u27e6bl\u27e7ue"]
    assert lines[4] == "response 2 (3 tokens, 3 of them labelled, with weights from 0.5 to 2):"


def test_rankings_are_counted():
    assert rankings(["a", None, "b", "a", "b", "a"]) == "rankings: 2 of 2 to 3 pairs each, 5 in all; other pairs: 1"
    assert rankings(["a", "a"]) == "rankings: 1 of 2 pairs each, 2 in all; other pairs: 0"
    assert rankings([None]) == rankings([]) == "rankings of more than one pair: none"
