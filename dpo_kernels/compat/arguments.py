"""Errors in the words of the library whose arguments were given."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

Result = TypeVar("Result")


def renamed(names: Mapping[str, str], function: Callable[..., Result], *args: Any, **options: Any) -> Result:
    """Calls `function`. Where it raises a ValueError, arguments that are keys of `names` get their values for names."""
    try:
        return function(*args, **options)
    except ValueError as error:
        argument = rf"\b({'|'.join(names)})\b(?! size)"  # a hidden size is no argument
        raise ValueError(re.sub(argument, lambda found: names[found[0]], str(error))) from error


def described(value: object) -> str:
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
