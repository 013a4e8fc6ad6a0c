"""Values of settings, from YAML, flags or Python, as the types that their fields have."""

from __future__ import annotations

import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about a name that nobody knows. One that has all its words is nearer than one of
    other words."""
    known = list(known)
    with_it = sorted((each for each in known if f"_{name}_" in f"_{each}_"), key=len)
    matches = with_it or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else f"; known: {', '.join(sorted(known))}"


def coerce(name: str, value: Any, kind: Any, metadata: Mapping[str, Any]) -> Any:
    """`value` as the type `kind` of the field `name`, checked against the field's choices and limits."""
    if isinstance(kind, types.UnionType):
        kinds = typing.get_args(kind)
        if type(None) in kinds and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
            return None
        if list[str] in kinds:
            return _one_or_more(name, value, metadata)
        kind = kinds[0]
    if typing.get_origin(kind) is dict:
        return _json_object(name, value)
    if typing.get_origin(kind) is list:
        items = value.replace("\n", ",").split(",") if isinstance(value, str) else value
        items = list(items) if isinstance(items, (list, tuple)) else [items]
        items = [item.strip() if isinstance(item, str) else item for item in items]
        return [coerce(name, item, typing.get_args(kind)[0], metadata) for item in items if item != ""]
    if kind is str and value is False and "no" in metadata["choices"]:
        value = "no"  # YAML 1.1 reads a bare `no` as false
    converted = _convert(value, kind)
    if converted is None:
        expected = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}[kind]
        raise ValueError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})")
    if metadata["choices"] and converted not in metadata["choices"]:
        suffix = nearest(str(converted), metadata["choices"])
        raise ValueError(f"{name}: expected one of {', '.join(metadata['choices'])}, got {value!r}{suffix}")
    if metadata["above"] is not None and not converted > metadata["above"]:
        raise ValueError(f"{name}: expected a number above {metadata['above']}, got {value!r}")
    if metadata["minimum"] is not None and not converted >= metadata["minimum"]:
        raise ValueError(f"{name}: expected at least {metadata['minimum']}, got {value!r}")
    if metadata["maximum"] is not None and not converted <= metadata["maximum"]:
        raise ValueError(f"{name}: expected at most {metadata['maximum']}, got {value!r}")
    return converted


def _one_or_more(name: str, value: Any, metadata: Mapping[str, Any]) -> str | list[str]:
    """One name, or several: a list, lines (as `normalize_flags` has it), or, unless there is such a file, what commas
    separate."""
    if isinstance(value, str):
        one = "," not in value or Path(value).expanduser().exists()
        value = value.splitlines() if "\n" in value else [value] if one else value.split(",")
    names = list(value) if isinstance(value, (list, tuple)) else [value]
    names = [coerce(name, item.strip() if isinstance(item, str) else item, str, metadata) for item in names]
    names = [item for item in names if item]
    if not names:
        raise ValueError(f"{name}: expected at least one name, got {value!r}")
    return names if len(names) > 1 else names[0]


def _json_object(name: str, value: Any) -> dict[str, Any]:
    """A mapping, or its JSON text, with nothing in it that JSON does not have."""
    expected = 'a JSON object such as {"enable_thinking": false}'
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{name}: expected {expected}, got {value!r}: {error}") from None
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})")
    for key, item in value.items():
        if not isinstance(key, str):
            raise ValueError(f"{name}: expected text for a key, got {key!r} ({type(key).__name__})")
        try:
            json.dumps(item, allow_nan=False)
        except (TypeError, ValueError) as error:  # YAML reads 2024-07-26 as a date
            raise ValueError(f"{name}: {key}: expected what JSON has; in quotes it is text: {error}") from None
    return dict(value)


def _convert(value: Any, kind: type) -> Any:
    """`value` as `kind`, or None where that would change its meaning."""
    if kind is bool:
        if isinstance(value, str) and value.lower() in TRUE_WORDS + FALSE_WORDS:
            return value.lower() in TRUE_WORDS
        return value if isinstance(value, bool) else None
    if kind is str:
        return value if isinstance(value, str) else None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if kind is int and isinstance(value, str) and value.strip().lstrip("+-").isdigit():
        return int(value)  # not through float, which would round a large seed
    try:
        number = float(value)
    except ValueError:
        return None
    if not math.isfinite(number) or (kind is int and number != int(number)):
        return None
    return value if kind is int and isinstance(value, int) else kind(number)


def in_one_line(error: BaseException) -> str:
    """Of what kind, too: some say nothing else."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
