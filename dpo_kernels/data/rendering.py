"""Conversations to text by a chat template: where the prompt ends, what is labelled, and what the template lost."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_kernels.data import layouts
from dpo_kernels.data.marks import (
    CHANGES_SPACE,
    LEAVES_OUT,
    REASONING,
    REASONING_KEYS,
    TEXT,
    Found,
    Messages,
    look,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN_ON = ("all", "last")

# Why pairs are dropped
IDENTICAL = "chosen and rejected are identical"
RENDERED_ALIKE = "the chat template does not show the difference between chosen and rejected"
EMPTY = "empty response"
NO_PROMPT = "no prompt: nothing predicts the first token of a response"
OTHER_PROMPTS = "chosen and rejected continue different prompts: they part before an assistant turn"
UNKNOWN_ROLE = "a response begins with a turn of the role "  # and which
NO_BOUNDARY = "the tokenizer has no exact boundary between prompt and response"
TEMPLATE_BOUNDARY = "the chat template has no boundary between prompt and response that chosen and rejected share"
REASONING_AFTER_TEXT = "a response begins with reasoning, but continues the text of the prompt's last turn"
ALWAYS_OPENS = "the chat template opens another assistant turn after the response"
INTERLEAVED = "the chat template writes another turn inside one of the assistant's that is labelled"
REFUSED = "the chat template refuses the conversation: "  # and what it says
# And what the template does to a labelled turn of a response (marks.py), unless it changes white space alone.
# How pairs are altered; and what the template does to a prompt, or to a turn that is not labelled.
REDRAWN = "the chat template renders the prompt otherwise before a response: boundary moved to where they part"
CONTINUED = "the prompt ends with an assistant turn: the response continues it"
REOPENED = "the prompt ends with an assistant turn that brings its end of turn: taken off"
EMPTY_TURN = "the prompt ends with an empty assistant turn: left out"
TRAILING = "turns after the last assistant turn of a response left out"
END_TWICE = "a response brings the end of turn that the chat template writes: written once"
END_TWICE_IN_PROMPT = "a turn of the prompt brings the end of turn that the chat template writes: it stands there twice"

_FLAGS = ("train", "weight")  # of messages; for us, not for templates
_KNOWN_ROLES = ("system", "developer", "user", "tool")


class Segment(NamedTuple):
    """Part of a response, and the weight of its tokens; 0: other people's turns, what is not labelled."""

    text: str
    weight: float


class Response(NamedTuple):
    segments: list[Segment]
    closed: bool  # ends with EOS, or with the special token that the template ends turns with


class PairTexts(NamedTuple):
    """A pair's text, once it is known where the prompt ends."""

    prompt: str
    chosen: Response
    rejected: Response
    altered: list[str]


class _Dropped(Exception):
    """The pair cannot be used, and why."""


@dataclass
class _Conversation:
    """Prompt and response together: the rendering, and what of the response was found in it."""

    messages: Messages
    weights: list[float]  # by message; 0 where it is not labelled
    first: int  # the number of the response's first message
    text: str
    found: list[Found]

    def begin(self, message: int) -> int | None:
        return min((f.start for f in self.found if f.field.message == message and f.end > 0), default=None)

    def starts_with_text(self) -> bool:
        first = [f for f in self.found if f.field.message == self.first and f.end > 0]
        return min(first, key=lambda f: f.start).field.kind == TEXT

    def end(self, message: int) -> int | None:
        return max((f.end for f in self.found if f.field.message == message and f.end > 0), default=None)


class ChatTemplate:
    """A tokenizer's chat template, and what `texts` makes of conversations with it.

    Args:
        template_kwargs: passed to the template.
        train_on: which assistant turns of a response are labelled, `"all"` or `"last"`; a message's `train` overrides.

    Raises nothing for a conversation: what cannot be used is a reason.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any], train_on: str = "all"
    ) -> None:
        self.tokenizer, self.train_on = tokenizer, train_on
        self.kwargs = dict(template_kwargs)
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)} - {""}
        self.special = tuple(sorted(special, key=lambda token: (-len(token), token)))
        self.unsplit = [*self.special, *(token.content for token in added)]
        self.eos: str = tokenizer.eos_token or ""

    def texts(self, row: Mapping[str, Any]) -> PairTexts | str:
        """The text of a conversational pair, or the reason for dropping it."""
        try:
            return _Pair(self, row.get("tools") or None).texts(row["prompt"], row["chosen"], row["rejected"])
        except _Dropped as dropped:
            return str(dropped)

    def render(self, messages: Messages, tools: list[Any] | None, opening: bool) -> str:
        def apply(messages: Messages) -> str:
            kwargs = {**self.kwargs, "tools": tools, "add_generation_prompt": opening}
            named = self.tokenizer.chat_template
            if isinstance(named, list) and "chat_template" not in kwargs:  # as in a tokenizer_config.json
                by_name = {entry["name"]: entry["template"] for entry in named}
                kwargs["chat_template"] = by_name["tool_use" if tools and "tool_use" in by_name else "default"]
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))

        try:
            try:
                return apply(messages)
            except TypeError:  # templates that join the arguments of tool calls to text want them as JSON text
                if (as_text := _with_arguments_as_text(messages)) == messages:
                    raise
                return apply(as_text)
        except Exception as error:  # a template raises what its expressions raise
            from jinja2.exceptions import TemplateError

            said = " ".join(str(error).split())
            kind = type(error).__name__
            if not isinstance(error, TemplateError) or not said:
                said = f"{kind}: {said}" if said else kind
            raise _Dropped(f"{REFUSED}{said:.120}") from error

    def ends(self, text: str) -> bool:
        """Whether a text ends with EOS."""
        return bool(self.eos) and text.rstrip().endswith(self.eos)

    def shared_length(self, texts: Sequence[str]) -> int:
        """Length of what all texts begin with, less the beginning of a special token or tag that not all of them have:
        for texts between messages, in which `<` and `[` are the template's."""
        shared = len(os.path.commonprefix(list(texts)))
        if shared < max(map(len, texts)):
            for begin, end in ("<>", "[]"):
                if texts[0].rfind(begin, 0, shared) > texts[0].rfind(end, 0, shared):
                    shared = texts[0].rfind(begin, 0, shared)
        for token in self.unsplit:
            for start in range(max(0, shared - len(token) + 1), shared):
                if any(text.startswith(token, start) for text in texts):
                    return start
        return shared


class _Pair:
    """The work on one pair; `altered` collects what happened to it."""

    def __init__(self, template: ChatTemplate, tools: list[Any] | None) -> None:
        self.template, self.tools = template, tools
        self.altered: dict[str, None] = {}

    def texts(self, prompt: Messages, chosen: Messages, rejected: Messages) -> PairTexts:
        begun: dict[str, Any] | None = None
        prompt = [_without_flags(message) for message in prompt]
        if prompt and prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls"):
            *prompt, begun = prompt
            if (content := self._without_end(begun["content"])) != begun["content"]:
                begun = {**begun, "content": content}
                self.altered[REOPENED] = None
            if not begun["content"].strip() and not _reasoning(begun):
                begun = None
                self.altered[EMPTY_TURN] = None
        if not prompt and begun is None and "assistant" in (chosen[0]["role"], rejected[0]["role"]):
            raise _Dropped(NO_PROMPT)
        chosen, rejected = self._answer(chosen), self._answer(rejected)
        said, also_said = ([_without_flags(message) for message in response] for response in (chosen, rejected))
        if json.dumps(said) == json.dumps(also_said):  # to Python, a call with 1 equals one with true
            raise _Dropped(IDENTICAL)
        for response in (chosen, rejected):
            if (role := response[0]["role"]) != "assistant":
                raise _Dropped(OTHER_PROMPTS if role in _KNOWN_ROLES else f"{UNKNOWN_ROLE}{role!r:.60}")
        if begun is None:
            opening = self._render(prompt, opening=True)
            in_opening = self._look(prompt, opening, range(len(prompt)), opening=True)
            self._note_prompt(in_opening, prompt, opening)
            self._note_tools(opening, lambda: self._render(prompt, opening=True, tools=False))
            pair = [self._converse(prompt, response) for response in (chosen, rejected)]
            start, starts = self._boundary(opening, in_opening, pair)
        else:
            pair = [self._converse(prompt, _continued(begun, response)) for response in (chosen, rejected)]
            in_text = self._look(pair[0].messages, pair[0].text, range(len(prompt)))
            self._note_prompt(in_text, prompt, pair[0].text)
            self._note_tools(pair[0].text, lambda: self._render(pair[0].messages, tools=False))
            prompts = [c.text[: self._after_begun(c, begun)] for c in pair]
            start = os.path.commonprefix(prompts)
            if any(t[len(start) :].strip() for t in prompts) or any(part.end > len(start) for part in in_text):
                raise _Dropped(TEMPLATE_BOUNDARY)
            starts = [len(start)] * 2
            self.altered[CONTINUED] = None
            opening = (prompt and self._try(prompt, opening=True)) or ""
        if pair[0].text[starts[0] :] == pair[1].text[starts[1] :]:
            raise _Dropped(RENDERED_ALIKE)
        texts = [self._segments(conversation, at, opening) for conversation, at in zip(pair, starts, strict=True)]
        return PairTexts(start, texts[0], texts[1], list(self.altered))

    # Messages

    def _answer(self, response: Messages) -> Messages:
        """The response up to its last assistant turn."""
        last = max((n for n, message in enumerate(response) if message["role"] == "assistant"), default=None)
        if last is not None and last + 1 < len(response):
            response = response[: last + 1]
            self.altered[TRAILING] = None
        if layouts.is_empty(response) or (last is not None and layouts.is_empty(response[-1:])):
            raise _Dropped(EMPTY)
        return response

    def _without_end(self, content: str) -> str:
        """The text of a turn that is to go on, without EOS."""
        while self.template.ends(content):
            content = content.rstrip().removesuffix(self.template.eos)
        return content

    def _converse(self, prompt: Messages, response: Messages) -> _Conversation:
        """The whole conversation rendered; drops the pair where a labelled turn lost something."""
        first, last = len(prompt), len(response) - 1
        weights = [0.0] * first
        for number, message in enumerate(response):
            train = message.get("train", self.template.train_on == "all" or number == last)
            labelled = message["role"] == "assistant" and train
            weights.append(float(message.get("weight", 1)) if labelled else 0.0)
        messages = prompt + [_without_flags(message) for message in response]
        text = self._render(messages)
        found = self._look(messages, text, range(first, len(messages)))
        if self._drop_doubled_end(messages, text, found):
            if any(layouts.is_empty([messages[n]]) and weights[n] for n in range(first, len(messages))):
                raise _Dropped(EMPTY)
            text = self._render(messages)
            found = self._look(messages, text, range(first, len(messages)))
        for part in found:
            if part.what:
                number = part.field.message
                ours = weights[number] > 0
                role = messages[number]["role"]
                if not ours and part.field.kind == TEXT:
                    reason = f"{part.what}the response's {role} turn"
                else:
                    reason = f"{part.what}the response's {part.field.kind}"
                if ours and part.what != CHANGES_SPACE:
                    raise _Dropped(reason)
                self.altered[reason] = None
        return _Conversation(messages, weights, first, text, found)

    def _drop_doubled_end(self, messages: Messages, text: str, found: Sequence[Found]) -> bool:
        """Takes the end of turn off the texts of assistant turns that have it before that of the template."""
        doubled = False
        for part in found:
            message = messages[part.field.message]
            own = self._end_twice(part, text)
            if own and part.field.kind == TEXT and message["role"] == "assistant":
                content = message["content"].rstrip()
                while content.endswith(own):
                    content = content[: -len(own)].rstrip()
                messages[part.field.message] = {**message, "content": content}
                self.altered[END_TWICE] = None
                doubled = True
        return doubled

    def _end_twice(self, part: Found, text: str) -> str:
        """The special token with which a turn's text ends, where the template ends the turn with it too."""
        value = str(part.field.value).rstrip()
        own = next((token for token in self.template.special if value.endswith(token)), "")
        return own if own and part.end > 0 and text[part.end :].lstrip().startswith(own) else ""

    def _note_prompt(self, found: Iterable[Found], prompt: Messages, text: str) -> None:
        for part in found:
            if part.what:
                role, kind = prompt[part.field.message]["role"], part.field.kind
                self.altered[f"{part.what}the prompt's {f'{role} turn' if kind == TEXT else kind}"] = None
            if self._end_twice(part, text):
                self.altered[END_TWICE_IN_PROMPT] = None

    def _note_tools(self, text: str, without: Callable[[], str]) -> None:
        if self.tools:
            try:
                if without() == text:
                    self.altered[f"{LEAVES_OUT}the tools"] = None
            except _Dropped:
                return  # a template that cannot do without the tools looks at them

    # Rendering and looking

    def _render(self, messages: Messages, opening: bool = False, tools: bool = True) -> str:
        return self.template.render(messages, self.tools if tools else None, opening)

    def _try(self, messages: Messages, opening: bool = False) -> str | None:
        """The rendering of what the data do not have; a template may refuse it that takes the data."""
        try:
            return self._render(messages, opening)
        except _Dropped:
            return None

    def _look(self, messages: Messages, text: str, numbers: Iterable[int], opening: bool = False) -> list[Found]:
        return look(lambda marked: self._try(marked, opening), messages, text, numbers)

    # Boundaries

    def _boundary(
        self, opening: str, in_opening: Sequence[Found], pair: Sequence[_Conversation]
    ) -> tuple[str, list[int]]:
        """The prompt, and where in each conversation's rendering the response begins.

        The prompt is what the template gives for generation, and exact where both renderings start with it. Otherwise
        what stands between the prompt's last text and the response is compared: the response begins after what the
        prompt for generation and both renderings have in common, or, where both are plain text, at that text, so that
        a header which the prompt for generation does not have is not trained.
        """
        if all(conversation.text.startswith(opening) for conversation in pair):
            return opening, [len(opening)] * 2
        self.altered[REDRAWN] = None
        last = max(in_opening, key=lambda part: part.end, default=None)
        end = last.end if last else 0
        tail, at = opening[end:], []
        for conversation in pair:
            begin = conversation.begin(conversation.first)
            if begin is None:
                raise _Dropped(TEMPLATE_BOUNDARY)
            if conversation.text.startswith(opening[:end]):
                at.append((end, begin))
                continue
            place = last and self._look(conversation.messages, conversation.text, [last.field.message])
            place_end = max((part.end for part in place or []), default=0)
            if 0 < place_end <= begin:
                at.append((place_end, begin))
            elif tail.strip() and conversation.text[:begin].rstrip().endswith(tail.rstrip()):
                at.append((conversation.text.rindex(tail.rstrip(), 0, begin), begin))
            else:
                raise _Dropped(TEMPLATE_BOUNDARY)
        between = [c.text[a:b] for c, (a, b) in zip(pair, at, strict=True)]
        if all(part.startswith(tail) for part in between):
            return opening, [a + len(tail) for a, _ in at]
        shared = self.template.shared_length([tail, *between])
        if between[0] == between[1] and all(c.starts_with_text() for c in pair):
            shared = len(between[0])
        return opening[:end] + between[0][:shared], [a + shared for a, _ in at]

    def _after_begun(self, conversation: _Conversation, begun: Mapping[str, Any]) -> int:
        """Where the prompt's part of a continued turn ends: after its text, whatever became of white space in it."""
        kind = TEXT if begun["content"].strip() else REASONING
        text = begun["content"] if kind == TEXT else _reasoning(begun)
        places = [f for f in conversation.found if (f.field.message, f.field.kind) == (conversation.first, kind)]
        if not places:
            raise _Dropped(TEMPLATE_BOUNDARY)
        at = places[0].start
        for character in "".join(text.split()):
            at = conversation.text.find(character, at) + 1
            if at == 0:
                raise _Dropped(TEMPLATE_BOUNDARY)
        space = text[len(text.rstrip()) :]
        return at + len(os.path.commonprefix([space, conversation.text[at:]]))

    def _segments(self, conversation: _Conversation, start: int, opening: str) -> Response:
        """The response from `start` on, cut where what is labelled begins and ends: each labelled turn from the end of
        its own prompt for generation to the token that ends the turn."""
        last = len(conversation.messages) - 1
        last_end = conversation.end(last)
        text = conversation.text
        if last_end is not None:
            text = self._without_next_opening(conversation, last_end, opening)
        segments: list[Segment] = []
        at = start
        for number in range(conversation.first, last + 1):
            weight = conversation.weights[number]
            if not weight and number < last:
                continue
            begin = at if number == conversation.first else self._turn_start(conversation, number, at)
            end = len(text) if number == last else self._turn_end(conversation, number, begin)
            if weight and any(
                f.field.message != number and f.start < end and f.end > begin for f in conversation.found
            ):
                raise _Dropped(INTERLEAVED)
            segments += [Segment(text[at:begin], 0.0), Segment(text[begin:end], weight)]
            at = max(at, end)
        closing = text[last_end:] if last_end is not None else text
        closed = closing.rstrip().endswith(self.template.special)
        closed = closed or self.template.ends(text)
        return Response([segment for segment in segments if segment.text], closed)

    def _turn_start(self, conversation: _Conversation, number: int, at: int) -> int:
        """Where a later assistant turn of a response begins: after its own prompt for generation."""
        messages, text = conversation.messages, conversation.text
        begin = conversation.begin(number)
        before = max([at, *(conversation.end(n) or 0 for n in range(conversation.first, number))])
        opening = self._try(messages[:number], opening=True)
        if opening is not None and text.startswith(opening) and len(opening) >= before:
            return len(opening)
        if begin is None:
            return before
        if opening is not None:
            places = self._look(messages[:number], opening, [number - 1], opening=True)
            tail = opening[max((part.end for part in places), default=len(opening)) :]
            if text.startswith(tail, before) and before + len(tail) <= begin:
                return before + len(tail)
        return max(before, begin)

    def _turn_end(self, conversation: _Conversation, number: int, begin: int) -> int:
        """Where an earlier assistant turn of a response ends: after the token that ends it, as far as there is one."""
        messages, text = conversation.messages, conversation.text
        end = max(begin, conversation.end(number) or 0)
        begins = (conversation.begin(n) for n in range(number + 1, len(messages)))
        following = next((begin for begin in begins if begin is not None and begin >= end), len(text))
        closed = self._try(messages[: number + 1])
        if closed is not None and text.startswith(closed) and end <= len(closed) <= following:
            return max(end, len(closed.rstrip()))
        between = text[end:following]
        stops = [self.template.eos] if self.template.eos and self.template.eos in between else self.template.special
        places = [(between.find(token) + len(token)) for token in stops if token in between]
        if places:
            return end + min(places)
        closing = text[conversation.end(len(messages) - 1) or len(text) :].strip()
        return text.index(closing, end) + len(closing) if between.lstrip().startswith(closing) else end

    def _without_next_opening(self, conversation: _Conversation, last_end: int, opening: str) -> str:
        """The rendering without the prompt for generation that some templates always end with.

        Only where the prompt for generation ends like the rendering does can this be. A further turn shows it.
        """
        text = conversation.text
        tail = text[last_end:]
        stops = [tail.find(token) + len(token) for token in self.template.special if token in tail]
        keep = last_end + min(stops, default=0)
        extra = text[keep:].strip()
        if not extra or not opening.rstrip().endswith(extra):
            return text
        further = self._try([*conversation.messages, {"role": "user", "content": "And then?"}])
        if further is None or further.startswith(text):
            return text
        if not further.startswith(text[:keep]):
            raise _Dropped(ALWAYS_OPENS)
        return text[:keep]


# Messages


def _without_flags(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in _FLAGS}


def _reasoning(message: Mapping[str, Any]) -> str:
    return next((message[k] for k in REASONING_KEYS if isinstance(message.get(k), str) and message[k].strip()), "")


def _continued(begun: Mapping[str, Any], response: Messages) -> Messages:
    """The response with what the prompt began before its first turn."""
    first = response[0]
    if begun["content"].strip() and _reasoning(first):
        raise _Dropped(REASONING_AFTER_TEXT)
    joined = {**begun, **first, "content": begun["content"] + first["content"]}
    if (reasoning := _reasoning(begun)) and (further := _reasoning(first)):
        joined.update({key: reasoning + further for key in REASONING_KEYS if key in begun or key in first})
    return [joined, *response[1:]]


def _with_arguments_as_text(messages: Messages) -> Messages:
    messages = copy.deepcopy(messages)
    for call in (call for message in messages for call in message.get("tool_calls") or ()):
        function = call.get("function", call)
        if not isinstance(function.get("arguments"), str):
            function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
    return messages
