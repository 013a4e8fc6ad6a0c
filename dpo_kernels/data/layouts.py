"""Layouts of preference data: told apart by their columns, converted to rows of prompt, chosen and rejected.

A converted row has the keys

    source                     where the row came from, as in "pairs.jsonl, row 12"
    prompt, chosen, rejected   all plain text, or all lists of messages {"role", "content", ...} (conversational)
    tools                      a list of function descriptions, or None
    weight                     how much the pair counts, at least 0, or None
    chosen_token_weights, rejected_token_weights   a number of at least 0 for each token of a response, or None
    altered                    reasons for which the row was changed or looks odd
    group, members             the name of the ranking that the pair is of, and its places [chosen, rejected] among the
                               ranking's answers from best to worst; None where a ranking is one pair, or there is none
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from dpo_kernels.data import ranked
from dpo_kernels.data.messages import (
    LOOKS_LIKE_MESSAGES,
    Messages,
    field,
    is_blank,
    is_transcript,
    located,
    number,
    parse_text_or_messages,
    records,
    says_nothing,
    text,
    tools,
    transcript,
    weight,
)
from dpo_kernels.data.ranked import RANKED_PAIRS as RANKED_PAIRS
from dpo_kernels.data.ranked import Row
from dpo_kernels.data.shared_text import split_shared_text
from dpo_kernels.data.structured_text import from_json
from dpo_kernels.data.turns import (
    prompt_turns,
    repeats_prompt,
    response_turns,
    split_shared_turns,
    with_system,
    without_repeated_prompt,
    without_repeated_text,
)

EMPTY_RESPONSE = ("error", "drop")

OTHER_TOOLS = "lists of tools that differ were given: the first kept"  # noticed about a row

KNOWN_LAYOUTS = """\
  prompt, chosen, rejected                       text or messages; chosen and rejected may repeat the prompt, as in
                                                 UltraFeedback binarized
  chosen, rejected                               prompt implicit: shared first turns, HH-RLHF transcripts, or text
  prompt, answers                                Nectar: answers is a list of {answer, rank}
  instruction, completions                       UltraFeedback as published: completions is a list of {response,
                                                 fine-grained_score or overall_score}; the higher, the better
  message_id, parent_id, text, role, rank        OpenAssistant: a tree of messages with ranked replies
  input, preferred_output, non_preferred_output  OpenAI and Azure: input is {messages, tools}
  conversations, chosen, rejected                LLaMA-Factory sharegpt ranking: messages are {from, value}
  instruction, [input], chosen, rejected         LLaMA-Factory alpaca ranking, [history]; question may stand for
                                                 instruction
The column rejected may hold a list of several responses, each text or messages.
Messages, tools and tool calls may be JSON text. In each but OpenAssistant: [system], [tools], [weight]; in those
without ranks also [chosen_token_weights], [rejected_token_weights]"""

# Columns by which layouts are told apart; the first that has its columns is taken
_REQUIRED = (
    ("explicit", ("prompt", "chosen", "rejected")),
    ("openai", ("input", "preferred_output", "non_preferred_output")),
    ("sharegpt", ("conversations", "chosen", "rejected")),
    ("alpaca", ("instruction", "chosen", "rejected")),
    ("alpaca", ("question", "chosen", "rejected")),
    ("nectar", ("prompt", "answers")),
    ("ultrafeedback", ("instruction", "completions")),
    ("openassistant", ("message_id", "parent_id", "text", "role", "rank")),
    ("implicit", ("chosen", "rejected")),
)
_TOKEN_WEIGHTS = ("chosen_token_weights", "rejected_token_weights")
_WHERE_GIVEN = ("tools", "weight", *_TOKEN_WEIGHTS, "members")
_OPTIONAL = {"alpaca": ("input", "history"), "openassistant": ("deleted",)}
_OPTIONAL_IN_MOST = ("system", "tools", "weight", *_TOKEN_WEIGHTS)
_NOT_IN = {"openassistant": _OPTIONAL_IN_MOST, "nectar": _TOKEN_WEIGHTS, "ultrafeedback": _TOKEN_WEIGHTS}
_WITH_REJECTED = {layout for layout, required in _REQUIRED if "rejected" in required}
_SCORES = ("fine-grained_score", "overall_score")

# Columns that would hold the prompt of a layout that is not known. With one of these beside chosen and rejected,
# taking the prompt from what the two share would lose it without a word.
_PROMPT_LIKE = {
    *("prompt", "prompts", "question", "questions", "query", "instruction", "instructions", "input", "inputs"),
    *("context", "history", "messages", "conversation", "conversations", "dialog", "dialogue", "problem", "request"),
    *("user_prompt", "user_message", "post"),
}
# Further columns that would change what is trained if they were used
_TELLING = {
    *("image", "images", "video", "videos", "audio", "audios", "function", "functions", "tools", "system", "weight"),
    *("system_prompt", "system_message", "documents", "weights", "sample_weight", *_TOKEN_WEIGHTS),
}


def recognize(columns: Collection[str]) -> str:
    """Name of the layout that has these columns: `"explicit"`, `"implicit"`, `"nectar"`, `"ultrafeedback"`,
    `"openassistant"`, `"openai"`, `"sharegpt"` or `"alpaca"`. Further columns, such as scores, are not used: `unused`
    names them.

    Raises `ValueError` for unpaired data (KTO) and for anything else that is not known, showing the columns found, and
    those that would be a layout if they were written as it has them.
    """
    has = set(columns).issuperset
    for layout, required in _REQUIRED:
        if has(required) and (layout != "implicit" or not _PROMPT_LIKE.intersection(map(_plain, columns))):
            return layout
    found = ", ".join(columns) or "none"
    if has(("completion", "label")) or has(("kto_tag",)):
        raise ValueError(
            f"the dataset is unpaired: its columns ({found}) hold single completions labelled good or bad, which is "
            "what KTO trains on. Preference optimization needs two responses to each prompt: columns prompt, chosen "
            "and rejected"
        )
    raise ValueError(
        f"the columns found ({found}) are no known preference layout. Known layouts:\n{KNOWN_LAYOUTS}\n"
        f"Rename or convert the columns to one of these{_hint(columns)}"
    )


def _plain(column: str) -> str:
    return re.sub(r"[\s-]+", "_", column.strip("\ufeff \t").lower())


def _hint(columns: Collection[str]) -> str:
    """Which columns come closest to a layout, and to what they would have to be renamed."""
    plain = {_plain(column): column for column in columns}
    for _, required in _REQUIRED:
        missing = [name for name in required if name not in columns]
        if missing and all(name in plain for name in missing):
            return ": " + ", ".join(f"{plain[name]!r} to {name!r}" for name in missing)
    for _, required in _REQUIRED:
        missing = [name for name in required if name not in plain]
        if len(missing) == 1 and len(required) > 1:
            others = [name for name in plain if name not in required]
            close = [name for name in others if missing[0] == "prompt" and name in _PROMPT_LIKE]
            close = close or difflib.get_close_matches(missing[0], others, n=1)
            which = f": is it {plain[close[0]]!r}?" if close else ""
            return f". Of {', '.join(required)} only {missing[0]!r} is missing{which}"
    return ""


def unused(layout: str, columns: Collection[str]) -> list[str]:
    """The columns that a layout, as `recognize` named it, does not read."""
    used = {*_OPTIONAL.get(layout, ()), *_OPTIONAL_IN_MOST}.difference(_NOT_IN.get(layout, ()))
    used.update(*(names for known, names in _REQUIRED if known == layout))
    if layout == "alpaca" and "instruction" in columns:
        used.remove("question")
    return [column for column in columns if column not in used]


def unused_note(layout: str, columns: Collection[str]) -> str:
    """A sentence about the columns that are not used, or nothing: first those that one would expect to be."""
    names = unused(layout, columns)
    telling = [name for name in names if _plain(name) in _PROMPT_LIKE | _TELLING]
    rest = [name for name in names if name not in telling]
    parts = [
        f"the column {group[0]!r} is not used"
        if len(group) == 1
        else f"the columns {', '.join(map(repr, group))} are not used"
        for group in (telling, rest)
        if group
    ]
    if telling:
        parts[0] += ", and training would differ with " + ("it" if len(telling) == 1 else "them")
    return "; ".join(parts)


def has_system(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> bool:
    """Whether the column `system` holds something in any row: then no row of the dataset is plain text."""
    return any(_has_system(row) for _, row in rows)


def _has_system(row: Mapping[str, Any]) -> bool:
    return bool(row.get("system")) and not is_blank(row["system"])


def convert(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    layout: str,
    *,
    ranked_pairs: str = "best_vs_worst",
    empty_response: str = "error",
    conversational: bool = False,
    max_rows: int | None = None,
    tied: list[str] | None = None,
    unpaired: list[str] | None = None,
) -> Iterator[Row]:
    """Converts `(source, row)` pairs of a layout that `recognize` named, one at a time (OpenAssistant: all at once,
    since a reply may come before its prompt).

    Args:
        ranked_pairs: for answers with ranks or scores, `"best_vs_worst"` gives one pair a prompt, `"best_vs_each"`
            pairs the best answer with every answer that is ranked below it, `"all_pairs"` every answer with each that
            is ranked below it. Of several rejected responses none is better than another: the first takes the last
            one listed, the others take all.
        empty_response: `"error"`, or `"drop"` to let rows with an empty response through, for the tokenization to
            drop and count.
        conversational: make conversations of rows of plain text, too: for datasets with a system turn in some row
            (`has_system`).
        max_rows: how many pairs, or more, so that the last one's ranking is whole; what comes after it is not read.
        tied: gets the sources of UltraFeedback's and OpenAssistant's rankings that give no pair, since all of their
            answers have the same rank.
        unpaired: gets a row's source for each of its rejected responses that is in no pair, since `"best_vs_worst"`
            takes the last of several.

    Raises `ValueError` that begins with the row's source: a field that is missing, of another type than its layout
    has, or empty; a row of text among conversations, or a row without a weight among rows that have one, and the
    other way round.
    """
    if ranked_pairs not in RANKED_PAIRS:
        raise ValueError(f"ranked_pairs: expected one of {RANKED_PAIRS}, got {ranked_pairs!r}")
    if empty_response not in EMPTY_RESPONSE:
        raise ValueError(f"empty_response: expected one of {EMPTY_RESPONSE}, got {empty_response!r}")
    tied, unpaired = ([] if noted is None else noted for noted in (tied, unpaired))
    if layout == "openassistant":
        converted = ranked.from_message_tree(rows, ranked_pairs, tied)
    else:
        converters: dict[str, Callable[[_Fields], list[Row]]] = {
            "explicit": _explicit,
            "implicit": _implicit,
            "nectar": partial(_nectar, ranked_pairs=ranked_pairs),
            "ultrafeedback": partial(_ultrafeedback, ranked_pairs=ranked_pairs),
            "openai": _openai,
            "sharegpt": _sharegpt,
            "alpaca": _alpaca,
        }
        per_response = ranked_pairs if layout in _WITH_REJECTED else None
        converted = _from_rows(rows, converters[layout], conversational, per_response, tied, unpaired)
    first: Row = {}
    taken = 0
    for ranking in converted:
        for source, pair in ranking:
            group = source if "members" in pair else None
            pair = {"source": source, **dict.fromkeys(_WHERE_GIVEN), "altered": [], "group": group, **pair}
            first = first or pair
            _check_alike(pair, first)
            for side in ("chosen", "rejected"):
                if empty_response == "error" and is_empty(pair[side]):
                    raise ValueError(f"{source}: the {side} response is empty")
            yield pair
        taken += len(ranking)
        if max_rows is not None and taken >= max_rows:
            return


def _from_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    converter: Callable[[_Fields], list[Row]],
    conversational: bool,
    per_response: str | None,
    tied: list[str],
    unpaired: list[str],
) -> Iterator[list[tuple[str, Row]]]:
    """The pairs of each row, with its source."""
    for source, row in rows:
        parts, left = located(source, ranked.one_rejected_each, row, per_response) if per_response else ([(row, {})], 0)
        unpaired += [source] * left
        found = [
            (source, {**pair, **members})
            for part, members in parts
            for pair in located(source, _pairs_of, part, converter, conversational)
        ]
        if not found:
            tied.append(source)
        yield found


def _check_alike(pair: Row, first: Row) -> None:
    """Whether a row is of one kind with those before it."""
    source = pair["source"]
    kinds = [("conversational" if isinstance(row["prompt"], list) else "plain text") for row in (pair, first)]
    if kinds[0] != kinds[1]:
        why = next((f" ({LOOKS_LIKE_MESSAGES})" for row in (pair, first) if LOOKS_LIKE_MESSAGES in row["altered"]), "")
        raise ValueError(f"{source}: this row is {kinds[0]}, the rows before it are {kinds[1]}: expected one kind{why}")
    if (pair["weight"] is None) != (first["weight"] is None):
        has, had = ("no weight", "has one") if pair["weight"] is None else ("a weight", "has none")
        raise ValueError(f"{source}: this row has {has}, {first['source']} {had}: expected one for each row")


def is_empty(response: str | Messages) -> bool:
    """Whether a response says nothing: blank text, or an assistant's turns with neither text nor a tool call."""
    if isinstance(response, str):
        return not response.strip()
    turns = [message for message in response if message["role"] == "assistant"] or response
    return all(map(says_nothing, turns))


# Fields


class _Fields:
    """A row's fields as layouts read them, and in `altered` what was noticed about them."""

    def __init__(self, row: Mapping[str, Any], conversational: bool) -> None:
        self.row = row
        self.altered: list[str] = []
        self._tools = [tools(row.get("tools"))]
        self.system = self._read_system()
        self.conversational = conversational or bool(self.system)

    def __contains__(self, name: str) -> bool:
        return not is_blank(self.row.get(name))

    def read(self, name: str) -> str | Messages:
        """Text or messages of a field that has to be there."""
        return self.parsed(field(self.row, name), name)

    def parsed(self, value: Any, name: str) -> str | Messages:
        parsed = parse_text_or_messages(value, name)
        self.altered += parsed.altered
        self._tools.append(parsed.tools)
        return parsed.value

    def tools(self) -> list[Any] | None:
        """Those of the row, or those that came with its messages."""
        given = [one for one in self._tools if one]
        if len({json.dumps(one, sort_keys=True, default=repr) for one in given}) > 1:
            self.altered.append(OTHER_TOOLS)
        return given[0] if given else None

    def refuse_without_turns(self) -> None:
        for name, given in (("tools", self.tools()), ("system", self.conversational)):
            if given:
                raise ValueError(
                    f"the field {name!r} needs a conversational prompt for the chat template, got plain text"
                )

    def _read_system(self) -> Messages:
        if not _has_system(self.row):
            return []
        system = self.parsed(self.row["system"], "system")
        turns = [{"role": "system", "content": system}] if isinstance(system, str) else system
        if others := {turn["role"] for turn in turns} - {"system", "developer"}:
            raise ValueError(f"the field 'system': expected text or a system turn, got one of role {min(others)!r}")
        return turns


def _pairs_of(row: Mapping[str, Any], converter: Callable[[_Fields], list[Row]], conversational: bool) -> list[Row]:
    """The pairs of a row, each with what the row says of all of them."""
    fields = _Fields(row, conversational)
    pairs = converter(fields)
    common: Row = {"weight": weight(row["weight"], "weight") if "weight" in fields else None}
    for name in _TOKEN_WEIGHTS:
        common[name] = _token_weights(row[name], name) if name in fields else None
    return [{**pair, **common, "altered": list(dict.fromkeys(fields.altered))} for pair in pairs]


def _token_weights(value: Any, name: str) -> list[float]:
    value = from_json(value, name)
    if not isinstance(value, list | tuple):
        raise ValueError(f"the field {name!r}: expected a list with a number for each token, got {value!r:.80}")
    return [weight(item, name) for item in value]


# Layouts


def _text_pair(prompt: str, chosen: str, rejected: str) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _conversation(fields: _Fields, prompt: str | Messages, chosen: str | Messages, rejected: str | Messages) -> Row:
    if isinstance(chosen, str) and isinstance(rejected, str):
        before = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        responses = without_repeated_text(before, chosen, rejected, fields.altered)
        if responses != (chosen, rejected) or is_transcript(before):
            chosen, rejected = (response.strip() for response in responses)  # the space was part of the whole text
    prompt, chosen, rejected = without_repeated_prompt(
        prompt_turns(prompt), response_turns(chosen), response_turns(rejected), fields.altered
    )
    return _with_prompt(fields, prompt, chosen, rejected)


def _with_prompt(fields: _Fields, prompt: Messages, chosen: Messages, rejected: Messages) -> Row:
    prompt = with_system(prompt, fields.system, fields.altered)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": fields.tools()}


def _explicit(fields: _Fields) -> list[Row]:
    prompt, chosen, rejected = (fields.read(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        responses = without_repeated_text(prompt, chosen, rejected, fields.altered)
        if responses == (chosen, rejected) and repeats_prompt(prompt, responses):
            chosen, rejected = transcript(chosen), transcript(rejected)
        elif not fields.conversational:
            fields.refuse_without_turns()
            return [_text_pair(prompt, *responses)]
    return [_conversation(fields, prompt, chosen, rejected)]


def _implicit(fields: _Fields) -> list[Row]:
    chosen, rejected = (fields.read(name) for name in ("chosen", "rejected"))
    if LOOKS_LIKE_MESSAGES in fields.altered:  # the prompt would end inside an object
        raise ValueError(
            "chosen and rejected look like messages, and cannot be read as such: expected messages, or a column prompt"
        )
    if (
        isinstance(chosen, str)
        and isinstance(rejected, str)
        and not (is_transcript(chosen) and is_transcript(rejected))
    ):
        fields.refuse_without_turns()
        return [_text_pair(*split_shared_text(chosen, rejected))]
    turns = [transcript(side) if isinstance(side, str) and is_transcript(side) else side for side in (chosen, rejected)]
    if isinstance(turns[0], str) or isinstance(turns[1], str):
        raise ValueError("expected chosen and rejected both as text or both as messages, got one of each")
    return [_with_prompt(fields, *split_shared_turns(turns[0], turns[1]))]


def _nectar(fields: _Fields, ranked_pairs: str) -> list[Row]:
    prompt, answers = fields.read("prompt"), _objects(fields.row, "answers", "answer and rank")
    by_rank = [
        (number(field(answer, "rank"), "rank"), fields.parsed(field(answer, "answer"), "answer")) for answer in answers
    ]
    if len({rank for rank, _ in by_rank}) < 2:
        same = ", all of the same rank" * (len(by_rank) > 1)
        raise ValueError(
            f"the field 'answers': expected two differently ranked answers or more, got {len(by_rank)}{same}"
        )
    return _ranked(fields, prompt, by_rank, ranked_pairs)


def _ultrafeedback(fields: _Fields, ranked_pairs: str) -> list[Row]:
    """The mean of the fine-grained scores decides, where all completions have it: the published overall score is 10 for
    some that were found to deserve 1."""
    instruction, completions = fields.read("instruction"), _objects(fields.row, "completions", "response and a score")
    scored = [name for name in _SCORES if all(not is_blank(one.get(name)) for one in completions)]
    if not scored:
        raise ValueError(f"the field 'completions': expected one of {_SCORES} that each of them has, got none")
    by_score = [
        (-number(completion[scored[0]], scored[0]), fields.parsed(field(completion, "response"), "response"))
        for completion in completions
    ]
    return _ranked(fields, instruction, by_score, ranked_pairs)


def _objects(row: Mapping[str, Any], name: str, expected: str) -> list[Mapping[str, Any]]:
    """The answers of a ranking."""
    given = records(from_json(field(row, name), name))
    found = [from_json(item, name) for item in given] if isinstance(given, list | tuple) else given
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        raise ValueError(f"the field {name!r}: expected a list of objects with {expected}, got {found!r:.80}")
    return found


def _ranked(
    fields: _Fields, prompt: str | Messages, answers: list[tuple[float, str | Messages]], ranked_pairs: str
) -> list[Row]:
    return [
        {**_conversation(fields, prompt, better, worse), **members}
        for better, worse, members in ranked.pairs(answers, ranked_pairs)
    ]


def _openai(fields: _Fields) -> list[Row]:
    return [_conversation(fields, *map(fields.read, ("input", "preferred_output", "non_preferred_output")))]


def _sharegpt(fields: _Fields) -> list[Row]:
    return [_conversation(fields, *map(fields.read, ("conversations", "chosen", "rejected")))]


def _alpaca(fields: _Fields) -> list[Row]:
    name = "instruction" if "instruction" in fields or "question" not in fields else "question"
    question = fields.read(name)
    if "input" in fields:
        if not isinstance(question, str):
            raise ValueError(f"the field 'input' goes with text, got messages in the field {name!r}")
        question += "\n" + text(fields.row["input"], "input")
    asked: Messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    history = _history(fields.row["history"]) if "history" in fields else []
    return [_conversation(fields, [*history, *asked], fields.read("chosen"), fields.read("rejected"))]


def _history(value: Any) -> Messages:
    """Turns of `[[question, answer], ...]`, or of messages."""
    value = from_json(value, "history")
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        turns = parse_text_or_messages(value, "history").value
        assert isinstance(turns, list)
        return turns
    prompt: Messages = []
    for exchange in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise ValueError(f"the field 'history': expected pairs of question and answer, got {exchange!r:.80}")
        prompt += [
            {"role": "user", "content": text(exchange[0], "history")},
            {"role": "assistant", "content": text(exchange[1], "history")},
        ]
    return prompt
