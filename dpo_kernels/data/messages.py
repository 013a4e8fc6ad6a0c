r"""Messages, tools and tool calls in the forms in which people keep them, made one.

A message is `{"role": ..., "content": ..., ...}` with text for content, and `tool_calls` that are
`{"type": "function", "function": {"name": ..., "arguments": {...}}}`. Read are, besides: `{from, value}` (ShareGPT),
`{type, content}` and `{type, data}` (LangChain), parts of text, Anthropic's `tool_use` and `tool_result`, lists under
`role` and `content` (as `datasets` keeps sequences of objects), and the text that JSON, Python and NumPy write for any
of these.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from dpo_kernels.data.structured_text import BLANK, from_json, looks_like_messages, structure, structure_or_text

Message = dict[str, Any]
Messages = list[Message]

# What is noticed about a row
LOOKS_LIKE_MESSAGES = "text that looks like messages, and cannot be read as such: kept as text"
NOT_USED_BESIDE = "an object that holds messages holds more than these: the rest is not used"

_CALL = "function_call"  # a role for an assistant's turn whose content is its tool calls
_ALIASES = {
    "system": ("sys", "system_prompt", "系统", "系統", "システム", "시스템"),
    "developer": (),
    "user": (
        *("human", "humans", "users", "usr", "prompter", "instruct", "instruction", "question"),
        *("用户", "用戶", "使用者", "人类", "ユーザー", "사용자"),
    ),
    "assistant": (
        *("gpt", "chatgpt", "chat_gpt", "ai", "ai_assistant", "assistants", "asst", "bot", "chatbot", "chat_bot"),
        *("model", "llm", "bing", "bard", "claude", "answer", "助手", "助理", "アシスタント", "어시스턴트"),
    ),
    "tool": (
        *("observation", "ipython", "environment", "function", "function_response", "function_result"),
        *("function_output", "function_call_output", "tool_response", "tool_result", "tool_output"),
    ),
    _CALL: ("tool_call", "tool_calls", "function_calls"),
}
_ROLES = {alias: role for role, aliases in _ALIASES.items() for alias in (role, *aliases)}
# Those of them by which messages are told from other JSON
_SPEAKERS = {"user", "assistant", "system", "developer", "human", "gpt", "chatgpt", "bot", "ai", "prompter"}
_SPEAKERS |= {_CALL, "tool_call"}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value", "text", "parts")
# Keys of an object that holds a conversation, or one message of it
_HOLDERS = ("messages", "conversations", "conversation", "turns", "dialog", "dialogue", "chat", "message")
_CALL_KEYS, _ARGUMENTS = ("tool_calls", "function_call"), ("arguments", "parameters", "input", "args")
_FLAGS = ("train", "weight")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
# Keys of a message that no template reads: two turns that differ in these alone are the same turn.
_BOOKKEEPING = {
    *("id", "message_id", "index", "timestamp", "create_time", "created", "created_at", "model", "score", "metadata"),
    *(*_FLAGS, "type", "example", "additional_kwargs", "response_metadata", "usage_metadata"),
}


class Parsed(NamedTuple):
    """Text or messages, tools that came with these, and what was noticed about them."""

    value: str | Messages
    tools: list[Any] | None
    altered: list[str]


# Single values


def is_null(value: Any) -> bool:
    """None, and the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_blank(value: Any) -> bool:
    """Null, or text without anything but white space."""
    return is_null(value) or (isinstance(value, str) and not value.strip(BLANK))


def field(row: Mapping[str, Any], name: str) -> Any:
    if is_null(row.get(name)):
        raise ValueError(f"the field {name!r} is {'null' if name in row else 'missing'}")
    return row[name]


def located(source: str, converter: Callable[..., Any], *args: Any) -> Any:
    """What `converter` gives; its errors begin with the source."""
    try:
        return converter(*args)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the field {name!r}: expected text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the field {name!r} holds half of a surrogate pair, which is no Unicode text") from None
    return value


def number(value: Any, name: str) -> float:
    """A finite number, also from text, which is all that CSV has."""
    found = value
    if isinstance(value, str):
        try:
            found = float(value)
        except ValueError:
            found = None
    if isinstance(found, bool) or not isinstance(found, Real) or not math.isfinite(found):
        raise ValueError(f"the field {name!r}: expected a number, got {value!r:.80}")
    return float(found)


def weight(value: Any, name: str) -> float:
    found = number(value, name)
    if found < 0:
        raise ValueError(f"the field {name!r}: expected a weight of at least 0, got {value!r}")
    return found


def records(value: Any) -> Any:
    """Objects from lists of their fields, `{"role": [...], "content": [...]}`; anything else as it is."""
    if not isinstance(value, Mapping) or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    return [dict(zip(value, fields, strict=True)) for fields in zip(*value.values(), strict=True)]


# Messages


def parse_text_or_messages(value: Any, name: str) -> Parsed:
    """Text as it is, messages as a list, whether they came as such or as text.

    Text is read as messages where all of it is a structure of messages, one of which at least is of a user, an
    assistant or the system: an answer that is JSON stays text. What looks like messages and is none is noticed.

    Raises `ValueError` naming the field for anything else, and for messages that are not sound.
    """
    if isinstance(value, str):
        found, altered = _messages_of_text(text(value, name))
        if found is None:
            return Parsed(value, None, altered)
        value = found
    if not isinstance(value, Mapping | list | tuple) or not value:
        came = "an empty list" if value == [] else type(value).__name__
        raise ValueError(f"the field {name!r}: expected text or a list of messages, got {came}")
    given_tools, altered = None, []
    if isinstance(value, Mapping) and (holder := _holder(value)):
        given_tools = tools(value.get("tools"), f"{name}.tools")
        rest = {key for key, item in value.items() if not is_null(item)} - {holder, "tools", "parallel_tool_calls"}
        altered = [NOT_USED_BESIDE] if rest else []
    messages = [turn for item in _items(value) for turn in _turns(item, name)]
    if not messages:
        raise ValueError(f"the field {name!r}: expected text or a list of messages, got {value!r:.80}")
    return Parsed(messages, given_tools, altered)


def several_responses(value: Any) -> list[Any] | None:
    """The responses in a list of several, each text or messages; None for a single response.

    A list of messages is one response, also where each of them is JSON text, or an object that holds it alone. A list
    is several where none of its items is a message: texts, lists of messages, objects that hold such lists.
    """
    if not isinstance(value, list | tuple) or not value:
        return None
    if any(isinstance(item, Mapping) and _holder(item) is None for item in value):
        return None
    return None if _are_messages(value) else list(value)


def _messages_of_text(given: str) -> tuple[Any, list[str]]:
    """The messages that text stands for, or None; and what is noticed about it."""
    if not looks_like_messages(given):
        return None, []
    try:
        found = structure(given)
        if _are_messages(found):
            return found, []
        return None, [LOOKS_LIKE_MESSAGES] if _mentions_messages(found) else []
    except (ValueError, RecursionError):
        return None, [LOOKS_LIKE_MESSAGES]


def _holder(value: Mapping[Any, Any]) -> str | None:
    """The key under which an object holds a conversation."""
    if not is_null(value.get("role")):
        return None
    kinds = {"message": Mapping}  # text under this key is that of one message
    return next((k for k in _HOLDERS if isinstance(value.get(k), kinds.get(k, list | tuple | str | Mapping))), None)


def _items(value: Any) -> list[Any]:
    """The messages of a list, of an object or a list that holds one, of lists of their fields, or the one message."""
    holder = _holder(value) if isinstance(value, Mapping) else None
    value = value[holder] if holder else records(value)
    if isinstance(value, str):
        value = structure_or_text(value)
    if not isinstance(value, list | tuple):
        return [value]
    items = [structure_or_text(item) if isinstance(item, str) else item for item in value]
    if len(items) == 1 and (isinstance(items[0], list | tuple) or _holds_alone(items[0])):
        return _items(items[0])
    return [_items(item)[0] if _holds_alone(item) and len(_items(item)) == 1 else item for item in items]


def _holds_alone(value: Any) -> bool:
    """Whether an object holds messages and nothing beside them."""
    return isinstance(value, Mapping) and len(value) == 1 and _holder(value) is not None


def _are_messages(found: Any) -> bool:
    """Whether what text stands for is messages, and no other JSON that has types and roles. What is wrong inside of
    messages is an error then, not text to train on."""
    items = _items(found)
    if not items or not all(isinstance(item, Mapping) for item in items):
        return False
    opened = [_opened(item) for item in items]
    sound = all(
        isinstance(role, str) and (isinstance(content, str | list) or any(extra.get(key) for key in _CALL_KEYS))
        for role, content, extra in opened
    )
    return sound and any(
        _role_key(role) in (_SPEAKERS if any(key in _ROLE_KEYS for key in map(_key, item)) else ("human", "ai"))
        for item, (role, *_) in zip(items, opened, strict=True)
    )


def _mentions_messages(found: Any) -> bool:
    """Whether there is an object with a role and a content, or with a role for its key, anywhere in a structure."""
    if isinstance(found, Mapping):
        role, content, extra = _opened(found)
        content = extra.get("message") if content is None else content
        spoken = len(found) == 1 and _role_key(str(next(iter(found)))) in _SPEAKERS  # {"user": "Hi"}
        return spoken or (role is not None and content is not None) or any(map(_mentions_messages, found.values()))
    return isinstance(found, list | tuple) and any(map(_mentions_messages, found))


def _opened(value: Mapping[Any, Any]) -> tuple[Any, Any, dict[Any, Any]]:
    """Role, content and the other keys of a message, None where it has none; null keys are left out."""
    envelope = next((key for key in ("data", "kwargs") if isinstance(value.get(key), Mapping)), None)  # LangChain's
    if envelope and "role" not in value and "content" not in value:
        kind = value["id"][-1] if isinstance(value.get("id"), list) and value["id"] else value.get("type")
        value = {**value[envelope], "type": kind}
    given: dict[Any, Any] = {}
    for key, item in value.items():
        plain = _key(key)
        if item is not None and (plain in _FLAGS or not is_null(item)):
            given[plain if plain in (*_ROLE_KEYS, *_CONTENT_KEYS, *_FLAGS) and plain not in value else key] = item
    if isinstance(given.get("additional_kwargs"), Mapping):
        given = {**given.pop("additional_kwargs"), **given}
    role = next((given.pop(key) for key in _ROLE_KEYS if key in given), None)
    if role is None and isinstance(given.get("type"), str):
        kind = re.sub(r"_?message(_?chunk)?$", "", _role_key(given["type"]))
        if kind in _ROLES:
            role = kind
            del given["type"]
    content = next((given.pop(key) for key in _CONTENT_KEYS if key in given), None)
    return role, content, given


def _key(key: Any) -> str:
    return str(key).strip().lower()


def _role_key(role: str) -> str:
    """A role's words in lower case, without what a template or a transcript has around them (`<|user|>`, `AI:`)."""
    return re.sub(r"[\W_]+", "_", role.lower()).strip("_")


def canonical_role(role: str) -> str:
    """`"user"`, `"assistant"`, `"system"`, `"tool"` or `"developer"` for any name or case of these; others stay."""
    return _ROLES.get(_role_key(role), role)


def _turns(value: Any, name: str) -> list[Message]:
    """The message of an object; more than one where tool results stand in the content of a user's turn."""
    if not isinstance(value, Mapping):
        raise ValueError(f"the field {name!r}: expected messages, objects with role and content, got {value!r:.80}")
    role, content, extra = _opened(value)
    if role is not None and not isinstance(role, str):
        raise ValueError(f"the field {name!r}: expected text for a message's role, got {role!r:.80}")
    if role is None or is_blank(role):
        raise ValueError(f"the field {name!r}: a message has no role (keys: {', '.join(map(str, value))})")
    role = canonical_role(role)
    calls = [call for key in _CALL_KEYS for call in _tool_calls(extra.pop(key, None), name)]
    if role == _CALL:
        calls += _tool_calls(text(content, name) if content is None else content, name)
        role, content = "assistant", None
    said = ""
    results: Messages = []
    if isinstance(content, Mapping):
        content = [content]
    if isinstance(content, list):
        said, used, results = _from_parts(content, name)
        calls += used
    elif content is not None:
        said = text(content, name)
    elif not calls and not any(extra.get(key) for key in _REASONING):
        keys = ", ".join(map(str, value))
        raise ValueError(f"the field {name!r}: a message of role {role!r} has no content (keys: {keys})")
    _check_flags(extra, name)
    if calls:
        extra["tool_calls"] = calls
    if results and not said:
        return results
    return [*results, {"role": role, "content": said, **extra}]


def _from_parts(parts: Sequence[Any], name: str) -> tuple[str, list[Message], Messages]:
    """Text, tool calls and messages of tool results in a list of content parts."""
    said, calls = "", []
    results: Messages = []
    for part in parts:
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, Mapping) else None
        if isinstance(part, str):
            said += text(part, name)
        elif kind in _TEXT_PARTS:
            said += text(part.get("text"), name)
        elif kind == "tool_use":
            calls.append(_tool_call({key: item for key, item in part.items() if key != "type"}, name))
        elif kind == "tool_result":
            rest = {key: item for key, item in part.items() if key not in ("type", "tool_use_id")}
            result = {**rest, "role": "tool", "content": part.get("content") or ""}
            results += _turns({**result, "tool_call_id": part.get("tool_use_id")}, name)
        else:
            came = kind or (f"keys {', '.join(map(str, part))}" if isinstance(part, Mapping) else type(part).__name__)
            raise ValueError(f"the field {name!r}: content parts must be text, got {came!r}")
    return said, calls, results


def _check_flags(message: Message, name: str) -> None:
    """Whether and how much a turn is trained on."""
    if "train" in message:
        if message["train"] not in (True, False) or not isinstance(message["train"], Real):
            raise ValueError(f"the field '{name}.train': expected true or false, got {message['train']!r:.80}")
        message["train"] = bool(message["train"])
    if "weight" in message:
        given = message["weight"]
        if isinstance(given, str):
            raise ValueError(f"the field '{name}.weight': expected a number, got {given!r:.80}")
        message["weight"] = weight(given, f"{name}.weight")


def says_nothing(message: Message) -> bool:
    """Whether a message has neither text nor a tool call."""
    return not (message["content"].strip() or message.get("tool_calls") or any(map(message.get, _REASONING)))


def same_turns(one: Messages, other: Messages) -> bool:
    """Whether messages are the same to a template: in all but bookkeeping. Unlike to Python, 1 is not True to JSON."""

    def readable(messages: Messages) -> str:
        kept = [{k: v for k, v in message.items() if k not in _BOOKKEEPING} for message in messages]
        return json.dumps(kept, sort_keys=True, default=repr)

    said = [[(message["role"], message["content"]) for message in messages] for messages in (one, other)]
    return said[0] == said[1] and readable(one) == readable(other)


# Tools


def tools(value: Any, name: str = "tools") -> list[Any] | None:
    """Descriptions of tools, `{"type": "function", "function": {...}}` or the function alone, also where all or each of
    them are JSON text; None where there are none."""
    value = None if is_blank(value) else records(from_json(value, name))
    return [_tool(tool, name) for tool in _as_list(value)] if value else None


def _tool(given: Any, name: str) -> dict[str, Any]:
    tool = from_json(given, name)
    if not isinstance(tool, Mapping):
        raise ValueError(f"the field {name!r}: expected tools, objects with a function, got {given!r:.80}")
    function = from_json(tool.get("function", tool), f"{name}.function")
    if not isinstance(function, Mapping):
        raise ValueError(f"the field {name!r}: expected an object for a tool's function, got {function!r:.80}")
    if is_blank(function.get("name")):
        raise ValueError(f"the field {name!r}: a tool's function has no name (keys: {', '.join(map(str, function))})")
    if isinstance(function.get("parameters"), str):
        function = {**function, "parameters": from_json(function["parameters"], f"{name}.parameters")}
    return {**tool, "function": dict(function)} if "function" in tool else dict(function)


def _tool_calls(value: Any, name: str) -> list[Message]:
    value = None if is_blank(value) else from_json(value, name)
    return [_tool_call(call, name) for call in _as_list(value)] if value else []


def _tool_call(given: Any, name: str) -> Message:
    """A call in OpenAI's form, its arguments an object, which is what chat templates expect.

    Read are `{id, type, function: {name, arguments}}` and the function alone; `parameters`, `input` and `args` for
    `arguments`, which may be JSON text.
    """
    call = structure_or_text(given) if isinstance(given, str) else given
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if isinstance(function, str):
        function = structure_or_text(function)
    if not isinstance(function, Mapping):
        raise ValueError(f"the field {name!r}: expected a tool call with a function, got {given!r:.80}")
    if is_blank(function.get("name")):
        raise ValueError(f"the field {name!r}: a tool call's function has no name (got {given!r:.80})")
    key = next((key for key in _ARGUMENTS if key in function), "arguments")
    given_arguments = function.get(key)
    arguments = None if is_blank(given_arguments) else from_json(given_arguments, f"{name}.arguments")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the field {name!r}: expected an object for a tool call's arguments, got {arguments!r:.80}")
    function = {**{k: v for k, v in function.items() if k != key}, "arguments": dict(arguments)}
    if "function" in call:
        return {**call, "function": function}
    outside = {k: function.pop(k) for k in ("id", "type") if k in function}
    return {**outside, "type": "function", "function": function}


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


# Transcripts


def _labels(given: str) -> tuple[str, str] | None:
    """The words before the colon that stand for user and assistant in a transcript; None where text is none."""
    user = re.match(r"\s*(Human|User):", given, re.IGNORECASE)
    answers = re.findall(r"(?:\r?\n){2}(Assistant|AI):", given, re.IGNORECASE) if user else []
    # A paragraph that begins with AI is no turn where an Assistant speaks.
    return (user[1], min(answers, key=lambda label: len(label) < 3)) if user and answers else None


def is_transcript(given: str) -> bool:
    r"""Whether text starts with `Human:` or `User:`, and has a paragraph that starts with `Assistant:` or `AI:`."""
    return _labels(given) is not None


def transcript(given: str) -> Messages:
    r"""Messages of `"\n\nHuman: ...\n\nAssistant: ..."`; white space around a turn is part of the format.

    Labels count as written in their first place, so that `human:` in a text of `Human:` turns is text.
    """
    labels = _labels(given)
    assert labels
    _, *turns = re.split(rf"(?:^\s*|(?:\r?\n){{2}})({'|'.join(labels)}):", given)
    return [
        {"role": "user" if label == labels[0] else "assistant", "content": content.strip()}
        for label, content in _two_by_two(turns)
    ]


def _two_by_two(items: list[str]) -> Iterator[tuple[str, str]]:
    return zip(items[::2], items[1::2], strict=True)
