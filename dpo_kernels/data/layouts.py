"""Layouts of preference data: told apart by their columns, converted to rows of prompt, chosen and rejected.

A converted row is `{"source", "prompt", "chosen", "rejected", "tools"}`. `source` says where the row came from, as in
`"pairs.jsonl, row 12"`. The other three are all plain text, or all lists of messages
`{"role": ..., "content": ..., ...}` (conversational); `tools` is a list of function descriptions, or None.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

Row = dict[str, Any]
Messages = list[dict[str, Any]]

RANKED_PAIRS = ("best_vs_worst", "best_vs_each")
EMPTY_RESPONSE = ("error", "drop")

KNOWN_LAYOUTS = """\
  prompt, chosen, rejected                       text or messages; chosen and rejected may repeat the prompt, as in
                                                 UltraFeedback binarized
  chosen, rejected                               prompt implicit: shared first turns, HH-RLHF transcripts, or text
  prompt, answers                                Nectar: answers is a list of {answer, rank}
  message_id, parent_id, text, role, rank        OpenAssistant: a tree of messages with ranked replies
  input, preferred_output, non_preferred_output  OpenAI and Azure: input is {messages, tools}
  conversations, chosen, rejected                LLaMA-Factory sharegpt ranking: messages are {from, value}
  instruction, [input], chosen, rejected         LLaMA-Factory alpaca ranking; question may stand for instruction"""

# Columns that would hold the prompt of a layout that is not known. With one of these beside chosen and rejected,
# taking the prompt from what the two share would lose it without a word.
_PROMPT_LIKE = {"question", "query", "instruction", "input", "context", "history", "system", "messages", "conversation"}

_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
}


def recognize(columns: Collection[str]) -> str:
    """Name of the layout that has these columns: `"explicit"`, `"implicit"`, `"nectar"`, `"openassistant"`, `"openai"`,
    `"sharegpt"` or `"alpaca"`. Further columns, such as scores, are ignored.

    Raises `ValueError` for unpaired data (KTO) and for anything else that is not known, showing the columns found.
    """
    has = set(columns).issuperset
    if has(("prompt", "chosen", "rejected")):
        return "explicit"
    if has(("input", "preferred_output", "non_preferred_output")):
        return "openai"
    if has(("conversations", "chosen", "rejected")):
        return "sharegpt"
    if has(("instruction", "chosen", "rejected")) or has(("question", "chosen", "rejected")):
        return "alpaca"
    if has(("prompt", "answers")):
        return "nectar"
    if has(("message_id", "parent_id", "text", "role", "rank")):
        return "openassistant"
    if has(("chosen", "rejected")) and not _PROMPT_LIKE.intersection(columns):
        return "implicit"
    found = ", ".join(columns) or "none"
    if has(("completion", "label")) or has(("kto_tag",)):
        raise ValueError(
            f"the dataset is unpaired: its columns ({found}) hold single completions labelled good or bad, which is "
            "what KTO trains on. Preference optimization needs two responses to each prompt: columns prompt, chosen "
            "and rejected"
        )
    raise ValueError(
        f"the columns found ({found}) are no known preference layout. Known layouts:\n{KNOWN_LAYOUTS}\n"
        "Rename or convert the columns to one of these"
    )


def convert(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    layout: str,
    *,
    ranked_pairs: str = "best_vs_worst",
    empty_response: str = "error",
) -> Iterator[Row]:
    """Converts `(source, row)` pairs of a layout that `recognize` named, one at a time (OpenAssistant: all at once,
    since a reply may come before its prompt).

    Args:
        ranked_pairs: for Nectar and OpenAssistant, `"best_vs_worst"` gives one pair a prompt, `"best_vs_each"` pairs
            the best answer with every answer that is ranked below it.
        empty_response: `"error"`, or `"drop"` to let rows with an empty response through, for the tokenization to
            drop and count.

    Raises `ValueError` that begins with the row's source: a field that is missing, of another type than its layout
    has, or empty; a row of text among conversations, or the other way round.
    """
    if ranked_pairs not in RANKED_PAIRS:
        raise ValueError(f"ranked_pairs: expected one of {RANKED_PAIRS}, got {ranked_pairs!r}")
    if empty_response not in EMPTY_RESPONSE:
        raise ValueError(f"empty_response: expected one of {EMPTY_RESPONSE}, got {empty_response!r}")
    converter: Callable[[Mapping[str, Any]], Row]
    if layout == "openassistant":
        converted = _from_message_tree(rows, ranked_pairs)
    elif layout == "nectar":
        converted = ((source, pair) for source, row in rows for pair in _located(source, _nectar, row, ranked_pairs))
    else:
        converter = {
            "explicit": _explicit,
            "implicit": _implicit,
            "openai": _openai,
            "sharegpt": _sharegpt,
            "alpaca": _alpaca,
        }[layout]
        converted = ((source, _located(source, converter, row)) for source, row in rows)
    conversational = None
    for source, pair in converted:
        is_conversational = isinstance(pair["prompt"], list)
        if conversational is None:
            conversational = is_conversational
        if is_conversational != conversational:
            kinds = ("conversational", "plain text") if is_conversational else ("plain text", "conversational")
            raise ValueError(f"{source}: this row is {kinds[0]}, the rows before it are {kinds[1]}: expected one kind")
        for field in ("chosen", "rejected"):
            if empty_response == "error" and is_empty(pair[field]):
                raise ValueError(f"{source}: the {field} response is empty")
        yield {"source": source, "tools": None, **pair}


def is_empty(response: str | Messages) -> bool:
    """Whether a response says nothing: blank text, or messages with neither text nor a tool call."""
    if isinstance(response, str):
        return not response.strip()
    return not any(message["content"].strip() or message.get("tool_calls") for message in response)


def _located(source: str, converter: Callable[..., Any], *args: Any) -> Any:
    try:
        return converter(*args)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


# Fields


def _field(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise ValueError(f"the field {name!r} is {'null' if name in row else 'missing'}")
    return row[name]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the field {name!r}: expected text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the field {name!r} holds half of a surrogate pair, which is no Unicode text") from None
    return value


def _text_or_messages(value: Any, name: str) -> str | Messages:
    if isinstance(value, str):
        return _text(value, name)
    if isinstance(value, Mapping):
        return [_message(value, name)]
    if isinstance(value, list) and value:
        return [_message(message, name) for message in value]
    came = "an empty list" if value == [] else type(value).__name__
    raise ValueError(f"the field {name!r}: expected text or a list of messages, got {came}")


def _messages(value: Any, name: str, role: str) -> Messages:
    """Messages as they are; text becomes one message of the given role."""
    value = _text_or_messages(value, name)
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _message(value: Any, name: str) -> dict[str, Any]:
    """One message with the keys role and content first, from {role, content} or {from, value}; null keys are left out.

    Tool calls keep their arguments as an object, which is what chat templates expect, also where they came as the JSON
    text that the OpenAI format has.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"the field {name!r}: expected messages, objects with role and content, got {value!r:.80}")
    role = value.get("role", value.get("from"))
    if not isinstance(role, str):
        raise ValueError(f"the field {name!r}: a message has no role (keys: {', '.join(map(str, value))})")
    content = value.get("content", value.get("value"))
    extra = {k: v for k, v in value.items() if k not in ("role", "from", "content", "value") and v is not None}
    if role == "function_call":
        calls = _json(_text(content, name), name)
        extra["tool_calls"] = [{"type": "function", "function": call} for call in _as_list(calls)]
        role, content = "assistant", None
    if extra.get("tool_calls"):
        extra["tool_calls"] = [_tool_call(call, name) for call in extra["tool_calls"]]
    if content is None:
        if not extra.get("tool_calls"):
            raise ValueError(f"the field {name!r}: a message of role {role!r} has no content")
        content = ""
    if isinstance(content, list):
        content = "".join(_text_part(part, name) for part in content)
    return {"role": _ROLES.get(role, role), "content": _text(content, name), **extra}


def _text_part(part: Any, name: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise ValueError(f"the field {name!r}: content parts must be text, got {kind!r}")
    return _text(part.get("text"), name)


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(f"the field {name!r}: expected a tool call with a function, got {call!r:.80}")
    if not isinstance(function.get("arguments"), str):
        return dict(call)
    function = {**function, "arguments": _json(function["arguments"], name)}
    return {**call, "function": function} if "function" in call else dict(function)


def _tools(value: Any) -> list[Any] | None:
    """Tools as a list, also from JSON text, in which LLaMA-Factory keeps them; None where there are none."""
    if isinstance(value, str):
        value = _json(value, "tools") if value.strip() else None
    return _as_list(value) if value else None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the field {name!r}: expected JSON text, got {text!r:.80} ({error})") from None


def _with_system(row: Mapping[str, Any], prompt: Messages) -> Messages:
    system = row.get("system")
    if not system or prompt[0]["role"] == "system":
        return prompt
    return [{"role": "system", "content": _text(system, "system")}, *prompt]


# Layouts


def _explicit(row: Mapping[str, Any]) -> Row:
    prompt, chosen, rejected = (_text_or_messages(_field(row, n), n) for n in ("prompt", "chosen", "rejected"))
    tools = _tools(row.get("tools"))
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str) and not row.get("system"):
        if tools:
            raise ValueError("the field 'tools' needs a conversational prompt for the chat template, got plain text")
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    prompt = _messages(prompt, "prompt", "user")
    chosen = _messages(chosen, "chosen", "assistant")
    rejected = _messages(rejected, "rejected", "assistant")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        prompt, chosen, rejected = _without_repeated_prompt(prompt, chosen, rejected)
    return {"prompt": _with_system(row, prompt), "chosen": chosen, "rejected": rejected, "tools": tools}


def _without_repeated_prompt(prompt: Messages, chosen: Messages, rejected: Messages) -> tuple[Messages, ...]:
    """Splits off the turns that both conversations share. They must hold the prompt's last turn; what the prompt has
    before it (a system turn, say) and what the two share after it belong to the prompt."""
    shared, chosen, rejected = _split_shared_turns(chosen, rejected)
    last = prompt[-1]["content"].strip()
    places = [i for i, message in enumerate(shared) if message["content"].strip() == last]
    if not places:
        raise ValueError(
            "chosen and rejected neither start with an assistant turn nor repeat the prompt: expected the response "
            "alone, or the whole conversation"
        )
    head = shared[: places[-1] + 1]
    return (prompt if len(prompt) > len(head) else head) + shared[len(head) :], chosen, rejected


def _split_shared_turns(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Shared first turns, and the rest of both: at least one turn each, so that equal conversations stay a pair."""
    most = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _implicit(row: Mapping[str, Any]) -> Row:
    chosen, rejected = (_text_or_messages(_field(row, n), n) for n in ("chosen", "rejected"))
    tools = _tools(row.get("tools"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not (_is_transcript(chosen) and _is_transcript(rejected)):
            if tools:
                raise ValueError("the field 'tools' needs conversations for the chat template, got plain text")
            parts = split_shared_text(chosen, rejected)
            return dict(zip(("prompt", "chosen", "rejected"), parts, strict=True))
        chosen, rejected = _transcript(chosen), _transcript(rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError("expected chosen and rejected both as text or both as messages, got one of each")
    prompt, chosen, rejected = _split_shared_turns(chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": tools}


def split_shared_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and responses of two texts that begin alike: cut where the first word in which they differ begins.

    A space before that word goes with the response (`"A:"`, `" blue"`), as byte-level vocabularies have it; other
    white space stays in the prompt. `("A: grey", "A: green")` gives `("A:", " grey", " green")`, not a cut at "gre".
    """
    cut = len(os.path.commonprefix([chosen, rejected]))
    while cut and not chosen[cut - 1].isspace():
        cut -= 1
    if cut and chosen[cut - 1] == " ":
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _is_transcript(text: str) -> bool:
    return re.match(r"\s*Human:", text) is not None and "\n\nAssistant:" in text


def _transcript(text: str) -> Messages:
    r"""Messages of `"\n\nHuman: ...\n\nAssistant: ..."`; white space around a turn is part of the format."""
    _, *turns = re.split(r"(?:^\s*|\n\n)(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[turns[i]], "content": turns[i + 1].strip()} for i in range(0, len(turns), 2)]


def _nectar(row: Mapping[str, Any], ranked_pairs: str) -> list[Row]:
    text, answers = _text(_field(row, "prompt"), "prompt"), _field(row, "answers")
    prompt: Messages = _transcript(text) if _is_transcript(text) else [{"role": "user", "content": text}]
    if prompt[-1] == {"role": "assistant", "content": ""}:
        prompt = prompt[:-1]
    if not isinstance(answers, list) or not all(isinstance(answer, Mapping) for answer in answers):
        raise ValueError(f"the field 'answers': expected a list of objects with answer and rank, got {answers!r:.80}")
    ranked = [(_rank(answer), _text(_field(answer, "answer"), "answer")) for answer in answers]
    if len({rank for rank, _ in ranked}) < 2:
        raise ValueError(f"the field 'answers': expected two differently ranked answers or more, got {len(ranked)}")
    return [
        {
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": best}],
            "rejected": [{"role": "assistant", "content": worse}],
        }
        for best, worse in _pairs(ranked, ranked_pairs)
    ]


def _rank(row: Mapping[str, Any]) -> float:
    rank = _field(row, "rank")
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise ValueError(f"the field 'rank': expected a number, got {rank!r:.80}")
    return rank


def _pairs(ranked: list[tuple[float, Any]], ranked_pairs: str) -> list[tuple[Any, Any]]:
    """(better, worse) of things with ranks, of which the smallest is the best; equal ranks make no pair."""
    ranked = sorted(ranked, key=lambda item: item[0])
    best_rank, best = ranked[0]
    worse = [item for rank, item in ranked if rank > best_rank]
    return [(best, item) for item in (worse if ranked_pairs == "best_vs_each" else worse[-1:])]


def _openai(row: Mapping[str, Any]) -> Row:
    given = _field(row, "input")
    if not isinstance(given, Mapping):
        raise ValueError(f"the field 'input': expected an object with messages, got {type(given).__name__}")
    return {
        "prompt": _messages(_field(given, "messages"), "input.messages", "user"),
        "chosen": _messages(_field(row, "preferred_output"), "preferred_output", "assistant"),
        "rejected": _messages(_field(row, "non_preferred_output"), "non_preferred_output", "assistant"),
        "tools": _tools(given.get("tools")),
    }


def _sharegpt(row: Mapping[str, Any]) -> Row:
    return {
        "prompt": _with_system(row, _messages(_field(row, "conversations"), "conversations", "user")),
        "chosen": _messages(_field(row, "chosen"), "chosen", "assistant"),
        "rejected": _messages(_field(row, "rejected"), "rejected", "assistant"),
        "tools": _tools(row.get("tools")),
    }


def _alpaca(row: Mapping[str, Any]) -> Row:
    name = "instruction" if "instruction" in row else "question"
    question = _text(_field(row, name), name)
    if row.get("input"):
        question += "\n" + _text(row["input"], "input")
    prompt: Messages = []
    for exchange in row.get("history") or []:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise ValueError(f"the field 'history': expected pairs of question and answer, got {exchange!r:.80}")
        prompt += [
            {"role": "user", "content": _text(exchange[0], "history")},
            {"role": "assistant", "content": _text(exchange[1], "history")},
        ]
    prompt.append({"role": "user", "content": question})
    return {
        "prompt": _with_system(row, prompt),
        "chosen": _messages(_field(row, "chosen"), "chosen", "assistant"),
        "rejected": _messages(_field(row, "rejected"), "rejected", "assistant"),
        "tools": _tools(row.get("tools")),
    }


def _from_message_tree(rows: Iterable[tuple[str, Mapping[str, Any]]], ranked_pairs: str) -> Iterator[tuple[str, Row]]:
    """Pairs among an OpenAssistant message's ranked assistant replies; the prompt is the chain of its ancestors.

    Deleted replies, and replies without a rank, are in no pair: they are not preferences. A pair's source is that of
    the better reply.
    """
    messages: dict[str, tuple[dict[str, Any], str | None]] = {}
    replies: dict[str, list[tuple[float, tuple[str, dict[str, Any]]]]] = {}
    for source, row in rows:
        message = _located(source, _tree_message, row)
        parent = row.get("parent_id")
        messages[row["message_id"]] = (message, parent)
        if message["role"] == "assistant" and parent and row.get("rank") is not None:
            rank = _located(source, _rank, row)
            if not row.get("deleted"):
                replies.setdefault(parent, []).append((rank, (source, message)))

    for parent, ranked in replies.items():
        for (source, better), (_, worse) in _pairs(ranked, ranked_pairs):
            prompt: Messages = []
            ancestor: str | None = parent
            while ancestor:
                if ancestor not in messages:
                    raise ValueError(f"{source}: the message {ancestor!r}, which it answers, is not in the data")
                message, ancestor = messages[ancestor]
                prompt.insert(0, message)
            yield source, {"prompt": prompt, "chosen": [better], "rejected": [worse]}


def _tree_message(row: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("message_id", "text", "role"):
        _field(row, name)
    return _message({"role": row["role"], "content": row["text"]}, "text")
