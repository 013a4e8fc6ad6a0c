"""Tokenized pairs as text to look at: what is labelled in them, and how long they are."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# What stands around labelled text where colours do not: the first that the output can write and the text does not have.
MARKS = (("\u27e6", "\u27e7"), ("\u27ea", "\u27eb"), ("[[", "]]"), ("<<", ">>"), ("{{", "}}"))
COLOURS = {"chosen": "\x1b[32m", "rejected": "\x1b[31m", "both": "\x1b[33m"}  # green, red, yellow
NO_COLOUR = "\x1b[0m"
BINS, BAR = 10, 40
# Joiners, which are parts of words in Persian and of emoji, are the only invisible characters that are shown as such.
_JOINERS = "\u200c\u200d"
_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


def histogram(name: str, lengths: Sequence[int] | np.ndarray) -> str:
    """How many of the lengths lie in each of at most `BINS` ranges of one round width, as lines with bars."""
    values = np.asarray(lengths, dtype=np.int64)
    if not len(values):
        return f"{name}: none"
    low, high = int(values.min()), int(values.max())
    width = next(width for width in _round_widths() if high // width - low // width < BINS)
    first = low // width
    counts = np.bincount(values // width - first)
    digits = len(str((first + len(counts)) * width - 1))
    lines = [f"{name}: {low} to {high}, median {np.median(values):g}"]
    for number, count in enumerate(counts.tolist(), start=first):
        bar = "#" * max(round(BAR * count / counts.max()), int(count > 0))
        span = f"{number * width:>{digits}}" + (f" to {(number + 1) * width - 1:>{digits}}" if width > 1 else "")
        lines.append(f"  {span}  {count:>{len(str(len(values)))}}  {bar}".rstrip())
    return "\n".join(lines)


def _round_widths() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def rankings(groups: Iterable[str | None]) -> str:
    """How many rankings the column `group` of tokenized pairs has, and how many pairs are from them, as a line."""
    counts = Counter(groups)
    alone = counts.pop(None, 0)
    if not counts:
        return "rankings of more than one pair: none"
    least, most = min(counts.values()), max(counts.values())
    each = f"{least}" if least == most else f"{least} to {most}"
    return f"rankings: {len(counts)} of {each} pairs each, {sum(counts.values())} in all; other pairs: {alone}"


def some_rows(count: int, wanted: int, seed: int) -> list[int]:
    """So many of `count` rows, or all of them, in their order: the same for the same seed."""
    if wanted < 0:
        raise ValueError(f"pairs: expected a number of at least 0, got {wanted}")
    return sorted(np.random.default_rng(seed).permutation(count)[:wanted].tolist())


def pair_text(
    pair: Mapping[str, Any],
    decode: Callable[[list[int]], str],
    *,
    colour: bool = False,
    encoding: str = "utf-8",
    longest: int | None = None,
) -> str:
    """A pair of `tokenize_preferences`, or a row of `group_rankings`, as text, with what is labelled in it shown apart.

    Args:
        pair: `prompt_ids`, `chosen_ids`, `rejected_ids`, and `chosen_token_weights`, `rejected_token_weights` where it
            has them: what weighs 0 is not labelled. Of a ranking `prompt_ids`, `response_ids`, `pairs`, and
            `response_token_weights` where it has them.
        decode: token ids to text, special tokens as what they are.
        colour: labelled text in colours of the terminal, and not between marks: what is chosen in one pair and rejected
            in another is yellow.
        encoding: of the output, which decides on the marks.
        longest: characters of each part that are shown; None: all. The middle is left out.
    """
    prompt = pair["prompt_ids"]
    parts = [(f"prompt ({len(prompt)} tokens):", "prompt", [(_printable(decode(list(prompt))), False)])]
    for name, kind, ids, weights in _responses(pair):
        heading = f"{name} ({len(ids)} tokens, {_labelled(ids, weights)}):"
        parts.append((heading, kind, _segments(ids, weights, decode)))
    marks = _marks("".join(text for *_, segments in parts for text, _ in segments), encoding)
    lines = []
    for heading, kind, segments in parts:
        start, end = (COLOURS[kind], NO_COLOUR) if colour and kind in COLOURS else marks
        text = "".join(f"{start}{text}{end}" if labelled else text for text, labelled in _cut(segments, longest))
        lines += [heading, text]
    legend = "labelled text is in colour" if colour else f"labelled text is between {marks[0]} and {marks[1]}"
    return "\n".join([*lines, f"({legend})"])


class _Response(NamedTuple):
    name: str
    kind: str  # a key of COLOURS
    ids: Sequence[int]
    weights: Sequence[float] | None


def _responses(pair: Mapping[str, Any]) -> list[_Response]:
    if "response_ids" not in pair:
        return [
            _Response(key, key, pair[f"{key}_ids"], pair.get(f"{key}_token_weights")) for key in ("chosen", "rejected")
        ]
    responses = []
    weights = pair.get("response_token_weights") or [None] * len(pair["response_ids"])
    for place, (ids, its_weights) in enumerate(zip(pair["response_ids"], weights, strict=True)):
        worse = [str(rejected + 1) for chosen, rejected in pair["pairs"] if chosen == place]
        is_rejected = any(rejected == place for _, rejected in pair["pairs"])
        name = f"response {place + 1}" + (f", chosen over {', '.join(worse)}" if worse else "")
        kind = "both" if worse and is_rejected else "chosen" if worse else "rejected"
        responses.append(_Response(name, kind, ids, its_weights))
    return responses


def _labelled(ids: Sequence[int], weights: Sequence[float] | None) -> str:
    weights = [weight for weight in weights or [1] * len(ids) if weight]
    range_ = f", with weights from {min(weights):g} to {max(weights):g}" if set(weights) - {1} else ""
    return f"{len(weights)} of them labelled{range_}"


def _segments(
    ids: Sequence[int], weights: Sequence[float] | None, decode: Callable[[list[int]], str]
) -> list[tuple[str, bool]]:
    """Text of runs of tokens that are all labelled or all not."""
    labelled = [True] * len(ids) if weights is None else [weight != 0 for weight in weights]
    ends = [i + 1 for i in range(len(ids)) if i + 1 == len(ids) or labelled[i] != labelled[i + 1]]
    found, before, start = [], "", 0
    for end in ends:
        text = decode(list(ids[:end]))  # by itself a run may lose the space that it begins with
        run = text[len(before) :] if text.startswith(before) else decode(list(ids[start:end]))
        found.append((_printable(run), labelled[start]))
        before, start = text, end
    return found


def _cut(segments: list[tuple[str, bool]], longest: int | None) -> list[tuple[str, bool]]:
    """The segments without the middle of their text, if together they are longer than that."""
    length = sum(len(text) for text, _ in segments)
    if longest is None or length <= longest:
        return segments
    head, tail = longest // 2, length - (longest - longest // 2)
    cut, at = [], 0
    for text, labelled in segments:
        left, right = text[: max(0, head - at)], text[max(0, tail - at) :]
        gap = f" [... {tail - head} characters ...] " if at <= head < at + len(text) else ""
        cut += [(left, labelled), (gap, False), (right, labelled)]
        at += len(text)
    return [(text, labelled) for text, labelled in cut if text]


def _marks(text: str, encoding: str) -> tuple[str, str]:
    fitting = [marks for marks in MARKS if _can_be_written("".join(marks), encoding)]
    return next((marks for marks in fitting if not any(mark in text for mark in marks)), fitting[-1])


def _can_be_written(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):  # an encoding that nobody knows
        return text.isascii()
    return True


def _printable(text: str) -> str:
    """The text with what a terminal would obey, or would not show, as escapes; line ends and tabs stay."""
    return "".join(_escape(char) if _is_hidden(char) else char for char in text)


def _is_hidden(char: str) -> bool:
    return char not in "\n\t" and char not in _JOINERS and unicodedata.category(char) in _INVISIBLE


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")
