"""Tokenized pairs as text to look at: what is labelled in them, and how long they are."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# What stands around labelled text where colours do not: the first that the output can write and the text does not have.
MARKS = (("\u27e6", "\u27e7"), ("\u27ea", "\u27eb"), ("[[", "]]"), ("<<", ">>"), ("{{", "}}"))
COLOURS = {"chosen": "\x1b[32m", "rejected": "\x1b[31m"}  # green, red
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
    """A pair of `tokenize_preferences` as text, with what is labelled in it shown apart.

    Args:
        pair: `prompt_ids`, `chosen_ids`, `rejected_ids`, and `chosen_token_weights`, `rejected_token_weights` where it
            has them: what weighs 0 is not labelled.
        decode: token ids to text, special tokens as what they are.
        colour: labelled text in colours of the terminal, and not between marks.
        encoding: of the output, which decides on the marks.
        longest: characters of each part that are shown; None: all. The middle is left out.
    """
    parts = {"prompt": [(_printable(decode(list(pair["prompt_ids"]))), False)]}
    for key in ("chosen", "rejected"):
        parts[key] = _segments(pair[f"{key}_ids"], pair.get(f"{key}_token_weights"), decode)
    whole = "".join(text for segments in parts.values() for text, _ in segments)
    marks = _marks(whole, encoding)
    lines = []
    for key, segments in parts.items():
        start, end = (COLOURS[key], NO_COLOUR) if colour and key in COLOURS else marks
        text = "".join(f"{start}{text}{end}" if labelled else text for text, labelled in _cut(segments, longest))
        labelled = "" if key == "prompt" else f", {_labelled(pair, key)}"
        lines += [f"{key} ({len(pair[f'{key}_ids'])} tokens{labelled}):", text]
    legend = "labelled text is in colour" if colour else f"labelled text is between {marks[0]} and {marks[1]}"
    return "\n".join([*lines, f"({legend})"])


def _labelled(pair: Mapping[str, Any], key: str) -> str:
    weights = [weight for weight in pair.get(f"{key}_token_weights") or [1] * len(pair[f"{key}_ids"]) if weight]
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
