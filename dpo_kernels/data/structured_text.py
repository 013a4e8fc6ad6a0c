"""Structure that is kept as text: JSON, and what Python and NumPy print.

A cell of a CSV file holds nothing else, and in other files it is left behind by a `json.dumps` or `str` too many.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import warnings
from typing import Any

BLANK = " \t\r\n\f\v\ufeff\u200b\x00"  # byte order marks and the like are no text

_NAMES = {"null": "None", "true": "True", "false": "False", "nan": "None", "NaN": "None"}
_PRINTED = re.compile(
    r"""(?P<strings>(?:'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")(?=\s*['"])) | # two strings without a comma
        (?P<string>'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*") |
        (?P<array>\b(?:(?:np|numpy)\.\w+|array)\() | (?P<dtype>,\s*dtype=(?:'[^']*'|"[^"]*"|[\w.]+)) |
        (?P<objects>\}(?=\s*\{)) | (?P<name>\b(?:null|true|false|nan|NaN)\b)""",
    re.VERBOSE | re.DOTALL,
)


def structure(given: str) -> Any:
    """What JSON text stands for, text in which the quotes are escaped once more, or what Python and NumPy print.

    Raises `ValueError` where it is none of these.
    """
    value: Any = given
    for _ in range(4):  # JSON text may hold JSON text
        value = _read_structure(value.strip(BLANK))
        if not isinstance(value, str):
            break
    return value


def _read_structure(given: str) -> Any:
    try:
        return json.loads(given, strict=False)  # not strict: line ends inside strings
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as json_error:
        error = json_error
    try:
        if re.match(r'[\[{\s]+\\"', given):
            return json.loads(f'"{given}"', strict=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # about escapes in strings, which stay as they are
            return ast.literal_eval(f"({_PRINTED.sub(_as_python, given)})")  # objects a line are a tuple
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(str(error)) from None


def _as_python(match: re.Match[str]) -> str:
    """A piece of printed structure as Python reads it; strings whole, so that nothing inside of them is changed."""
    kind, piece = match.lastgroup or "", match[0]
    if piece.startswith('"'):
        with contextlib.suppress(ValueError):
            piece = repr(json.loads(piece, strict=False))  # JSON's escapes, where they are
    if kind in ("strings", "objects"):
        return piece + ","
    return {"array": "(", "dtype": "", "name": _NAMES.get(piece, piece)}.get(kind, piece)


def structure_or_text(given: str) -> Any:
    try:
        return structure(given)
    except ValueError:
        return given


def from_json(value: Any, name: str) -> Any:
    """Structure, also where it is kept as text."""
    if not isinstance(value, str):
        return value
    try:
        return structure(value)
    except ValueError as error:
        raise ValueError(f"the field {name!r}: expected JSON text, got {value!r:.80} ({error})") from None


_QUOTE = r"""(?:\\{0,9}["'“”„‘’`´]|&quot;|&\#0?3[49];){1,3}"""
_OPENING = re.compile(
    r"""(?:[\s\ufeff\u200b\x00\\("'“”„‘’`´]|&quot;|&\#0?3[49];)*(?:(?:np\.|numpy\.)?array\(\s*)?[\[{-]""", re.VERBOSE
)
_SPEAKER = re.compile(
    rf"""{_QUOTE}(?:role|from){_QUOTE}\s*[:=]
        |(?:[{{(,]|^\s*-)\s*(?:role|from)\s*[:=]\s*(?:{_QUOTE})?(?:user|assistant|system|human|gpt)\b
        |{_QUOTE}type{_QUOTE}\s*:\s*{_QUOTE}(?:human|ai|system|constructor|\w+Message)\b""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_SAYING = re.compile(
    rf"(?:{_QUOTE}|\b)(?:content|value|text|parts|message|data|kwargs|tool_calls|function_call)(?:{_QUOTE})?\s*[:=]",
    re.VERBOSE | re.IGNORECASE,
)
_BY_SPEAKER = re.compile(rf"\{{\s*{_QUOTE}(?:user|human|assistant|gpt|ai|bot){_QUOTE}\s*:\s*{_QUOTE}", re.IGNORECASE)


def looks_like_messages(given: str) -> bool:
    """Whether text opens like a structure, in any quotes, and names both who speaks and what is said, be it as
    `{"user": "Hi"}`."""
    if not _OPENING.match(given):
        return False
    return bool((_SPEAKER.search(given) and _SAYING.search(given)) or _BY_SPEAKER.search(given))
