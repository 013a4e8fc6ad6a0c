"""This package's head in the models of TRL's trainers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from trl.trainer import dpo_trainer

from dpo_kernels.models.fused_forward import add_fused_lm_head
from dpo_kernels.models.head import unwrap

TRLS_HEAD: Callable[..., None] = dpo_trainer.add_fused_lm_head


class _NoLayer:
    """Stands where TRL looks whether an adapter is on the head, in order to refuse it."""


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def with_our_head(init: Callable[..., None], module: ModuleType) -> Callable[..., None]:
    """The `__init__` of a trainer that adds a fused head to its models, which is ours."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        refusal = {"BaseTunerLayer": _NoLayer} if hasattr(module, "BaseTunerLayer") else {}  # it is PEFT's
        with replaced(module, add_fused_lm_head=add_fused_lm_head, **refusal):
            init(self, *args, **kwargs)

    return __init__


def with_added_head(init: Callable[..., None]) -> Callable[..., None]:
    """The `__init__` of a trainer that works on logits."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        add_fused_lm_head(unwrap(self.model))

    return __init__
