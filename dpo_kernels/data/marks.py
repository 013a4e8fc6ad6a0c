"""What of a conversation is found in its rendering, and where: chat templates are not trusted.

A conversation is rendered a second time with marks in the place of its texts. Where putting the texts back in gives
the first rendering, each text is known to be there, and where. Where it does not, each text is looked for by itself:
what the rendering shares with two renderings that differ in this text alone, from the start and from the end, leaves
the place that depends on it. So templates that move, trim or drop a text are told apart, and a text that occurs
elsewhere by chance is not taken for it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_kernels.data.shared_text import shared_length

# What a template does to a text: followed by which text that is
LEAVES_OUT = "the chat template leaves out "
LEAVES_OUT_PART = "the chat template leaves out part of "
CHANGES = "the chat template changes "
CHANGES_SPACE = "the chat template changes white space in "
REPEATS = "the chat template repeats "

TEXT, REASONING, CALLS = "text", "reasoning", "tool calls"  # kinds of fields
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

Messages = list[dict[str, Any]]
_Path = tuple[str | int, ...]
_Render = Callable[[Messages], str | None]  # None where the template refuses a conversation


@dataclass(frozen=True)
class Field:
    """A text of a message, or a name or value of one of its tool calls, at all the `paths` where it stands."""

    message: int
    paths: tuple[_Path, ...]
    value: str | int | float
    kind: str


@dataclass(frozen=True)
class Found:
    """A field, what the template does to it ("": nothing), and its place in the rendering (0, 0: it has none)."""

    field: Field
    what: str
    start: int = 0
    end: int = 0


def look(render: _Render, messages: Messages, text: str, numbers: Iterable[int]) -> list[Found]:
    """What became of the messages with these numbers in `text`, which `render` made of all `messages`."""
    fields = [field for number in numbers for field in _fields(messages[number], number)]
    marked = render(_marked(messages, dict(enumerate(fields)), "a")) if fields else text
    found = _put_back(text, marked, fields) if marked is not None else None
    if found is None:
        found = [_look_for(field, number, render, messages, text) for number, field in enumerate(fields)]
    for message in dict.fromkeys(field.message for field in fields if field.kind == CALLS):
        for silenced in _without_unmarked_arguments(messages[message]):
            if render([*messages[:message], silenced, *messages[message + 1 :]]) == text:
                found.append(Found(Field(message, (), "", CALLS), LEAVES_OUT))
    return found


def _look_for(field: Field, number: int, render: _Render, messages: Messages, text: str) -> Found:
    """What became of one field, from two renderings that differ in it alone. A tool call's parts may be written in
    many ways, and more than once: they count as found where the rendering depends on them."""
    one, other = (render(_marked(messages, {number: field}, kind)) for kind in "ab")
    value = str(field.value)
    if one is None or other is None:  # the template looks into this text
        at = text.rfind(value.strip())
        return Found(field, "", at, at + len(value.strip())) if at >= 0 else Found(field, LEAVES_OUT)
    start = min(shared_length(text, one), shared_length(text, other))
    end = len(text) - min(shared_length(text[::-1], one[::-1]), shared_length(text[::-1], other[::-1]))
    if one == text == other or not text[start:end].strip():
        return Found(field, LEAVES_OUT)
    repeated = len(_MARK.findall(one)) > 1
    if field.kind == CALLS:
        return Found(field, "", start, start + 1 if repeated else end)
    if repeated:
        return Found(field, REPEATS, start, end)
    if place := _occurrence(text, value, start, end):
        return Found(field, "", *place)
    if place := _occurrence_without_space(text, value, start, end):
        return Found(field, CHANGES_SPACE, *place)
    if "".join(text[start:end].split()) not in "".join(value.split()):
        return Found(field, CHANGES, start, end)
    if "</think>" in value and "</think>" not in text[start:end]:
        return Found(replace(field, kind=REASONING), LEAVES_OUT, start, end)
    return Found(field, LEAVES_OUT_PART, start, end)


# Fields


def _fields(message: Mapping[str, Any], number: int) -> list[Field]:
    """What of a message a rendering has to show. Blank texts, and values that are true, false or null, have no mark."""
    fields = []
    reasoning: dict[str, list[_Path]] = {}
    for key in REASONING_KEYS:
        if isinstance(message.get(key), str) and message[key].strip():
            reasoning.setdefault(message[key], []).append((key,))
    fields += [Field(number, tuple(paths), value, REASONING) for value, paths in reasoning.items()]
    if message["content"].strip():
        fields.append(Field(number, (("content",),), message["content"], TEXT))
    for place, call in enumerate(message.get("tool_calls") or ()):
        path: _Path = ("tool_calls", place, "function") if "function" in call else ("tool_calls", place)
        function = call.get("function", call)
        for name in ("name", "arguments"):
            leaves = _leaves(function.get(name), (*path, name))
            fields += [Field(number, (leaf,), value, CALLS) for leaf, value in leaves]
    return fields


def _leaves(value: Any, path: _Path) -> list[tuple[_Path, str | int | float]]:
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return [leaf for key, item in items for leaf in _leaves(item, (*path, key))]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        return []
    return [(path, value)]


def _without_unmarked_arguments(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The message once for each call whose arguments cannot be marked, without them: it has to look different."""
    silenced = []
    for place, call in enumerate(message.get("tool_calls") or ()):
        arguments = call.get("function", call).get("arguments")
        if arguments and not _leaves(arguments, ()):
            other = copy.deepcopy(dict(message))
            function = other["tool_calls"][place]
            function.get("function", function)["arguments"] = {}
            silenced.append(other)
    return silenced


# Marks


def _mark(number: int, kind: str) -> str:
    """Text that no data have. Those of the two kinds differ in their first and last character."""
    return f"{kind}Kx7Qv{number:05d}Wj3{'z' if kind == 'a' else 'y'}"


def _number_mark(number: int, kind: str) -> int:
    return int(f"{'31' if kind == 'a' else '97'}8209{number:05d}46{'1' if kind == 'a' else '7'}")


_MARK = re.compile(r"aKx7Qv(\d{5})Wj3z|318209(\d{5})461")


def _marked(messages: Messages, fields: Mapping[int, Field], kind: str) -> Messages:
    """The conversation with marks in the place of these fields."""
    touched = {field.message for field in fields.values()}
    messages = [copy.deepcopy(message) if n in touched else message for n, message in enumerate(messages)]
    for number, field in fields.items():
        mark = _mark(number, kind) if isinstance(field.value, str) else _number_mark(number, kind)
        for path in field.paths:
            place: Any = messages[field.message]
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = mark
    return messages


def _put_back(text: str, marked: str, fields: Sequence[Field]) -> list[Found] | None:
    """All fields in their places, where putting them into `marked` gives `text` and each text is in it once."""
    found: dict[int, Found] = {}
    at = done = 0
    for match in _MARK.finditer(marked):
        number = int(match[1] or match[2])
        if number >= len(fields) or not text.startswith(marked[done : match.start()], at):
            return None
        at += match.start() - done
        done = match.end()
        following = _MARK.search(marked, done)
        next_part = marked[done : following.start() if following else None]
        field = fields[number]
        length = next((len(v) for v in _variants(field.value) if text.startswith(v + next_part, at)), None)
        if length is None or (number in found and field.kind != CALLS):
            return None
        found.setdefault(number, Found(field, "", at, at + length))
        at += length
    return [found[n] for n in range(len(fields))] if len(found) == len(fields) and text[at:] == marked[done:] else None


def _variants(value: str | int | float) -> list[str]:
    """How templates write a value: as it is, without white space around it, inside JSON or Python text."""
    if not isinstance(value, str):
        return list(dict.fromkeys([json.dumps(value), str(value)]))
    ways = [value, value.strip(), value.lstrip(), value.rstrip(), value.strip("\n"), value.lstrip("\n")]
    escaped = [json.dumps(way, ensure_ascii=ascii)[1:-1] for way in ways[:2] for ascii in (False, True)]
    return list(dict.fromkeys([*ways, *escaped, repr(value)[1:-1]]))


def _occurrence(text: str, value: str, start: int, end: int) -> tuple[int, int] | None:
    """Where the value stands in `text` so that it covers `start` to `end`, what is known to depend on it."""
    for variant in _variants(value):
        at = text.find(variant, max(0, end - len(variant)), start + len(variant)) if variant else -1
        if at >= 0:
            return at, at + len(variant)
    return None


def _occurrence_without_space(text: str, value: str, start: int, end: int) -> tuple[int, int] | None:
    """The same where white space does not count."""
    low = max(0, start - 2 * len(value) - 16)
    places = [n for n in range(low, min(len(text), end + 2 * len(value) + 16)) if not text[n].isspace()]
    squeezed, wanted = "".join(text[n] for n in places), "".join(value.split())
    blank = end - start - len(text[start:end].lstrip())
    at = squeezed.find(wanted)
    while at >= 0:
        first, last = places[at], places[at + len(wanted) - 1] + 1
        if first <= start + blank and last >= start + len(text[start:end].rstrip()):
            return first, last
        at = squeezed.find(wanted, at + 1)
    return None
