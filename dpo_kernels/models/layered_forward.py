"""A model's forward, and what was put around it: fused heads, TRL's and ours, and what wrapped those.

Each trainer puts its own head around the forward that it finds, and accelerate wraps the result in autocast. The next
trainer of the same model finds all of that. What is put there by this module is found by a number in the model itself,
so that a copy of the model, by `copy.deepcopy`, finds what belongs to the copy.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, Protocol

from dpo_kernels.models.through_wrappers import is_of_a_library

ASKED = ("preference", "reference", "predictors", "all_mean_logits")  # keywords of fused heads that no model has
Forward = Callable[..., Any]


class Layer(Protocol):
    """What stands in a forward: it gets the calls with `fused_lm_head=True`."""

    original: Forward  # for other calls
    own: Forward  # the model's own, beneath every head

    def __call__(self, *args: Any, **inputs: Any) -> Any: ...


def install(model: Any, layer: Layer) -> None:
    """Puts a forward around the model's, in the place of heads that are outermost there."""
    layer.original, number = _beneath_heads(model, model.forward)
    layer.own = _own(model, layer.original)
    layers = layers_of(model)
    if number is None:
        number = len(layers)
    model._fused_lm_heads = [*layers[:number], layer]
    model.forward = MethodType(_forward(type(model), number), model)


def layers_of(model: Any) -> list[Any]:
    """What `install` put there, the latest last."""
    layers: list[Any] = vars(model).get("_fused_lm_heads", [])
    return layers


def is_outermost(model: Any) -> bool:
    """Whether a call with `fused_lm_head=True` comes to what `install` put there, and to no other head before."""
    return next((_is_ours(each) for each in _wrapped(model.forward) if _is_head(each)), False)


def _forward(model_class: type, number: int) -> Forward:
    @functools.wraps(model_class.forward)  # type: ignore[attr-defined]  # `generate` looks at the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
        layer: Layer = self._fused_lm_heads[number]
        if not fused_lm_head and (of_head := [name for name in ASKED if inputs.get(name) is not None]):
            raise ValueError(f"{', '.join(of_head)}: expected with fused_lm_head=True, got a call without")
        return layer(*args, **inputs) if fused_lm_head else layer.original(*args, **inputs)

    forward.number, forward.ours = number, forward  # type: ignore[attr-defined]
    return forward


def _is_ours(function: Any) -> bool:
    """Its attributes are those of what wraps it, too."""
    return function is not None and getattr(function, "ours", None) is function


def _inside_trls(function: Any) -> Any:
    """What TRL's head was put around, or None if the function is no head of TRL's. Its closure has it, and is the same
    in a copy of the model: there it would be the forward of the original."""
    if getattr(function, "__globals__", {}).get("__name__") != "trl.trainer.utils":
        return None
    return inspect.getclosurevars(function).nonlocals.get("original_forward")


def _is_head(function: Any) -> bool:
    return _is_ours(function) or _inside_trls(function) is not None


def _bound(function: Any, model: Any) -> Forward:
    """To this model, not to the one that it was copied from."""
    return MethodType(function.__func__, model) if hasattr(function, "__func__") else function


def _beneath_heads(model: Any, forward: Forward) -> tuple[Forward, int | None]:
    """The forward without the heads that are outermost, and the number of the innermost of those that is ours."""
    number = None
    while True:
        function = getattr(forward, "__func__", None)
        if _is_ours(function):
            number = function.number  # type: ignore[union-attr]
            forward = layers_of(model)[number].original
        elif (inside := _inside_trls(function)) is not None:
            forward = _bound(inside, model)
        else:
            return forward, number


def _own(model: Any, forward: Forward) -> Forward:
    """The same beneath every head, where there is one inside: without what a library put around that for an earlier
    trainer, but with what anybody else did."""
    if hasattr(model, "_hf_hook"):  # accelerate moves inputs between devices there
        return forward
    for function in _wrapped(forward):
        if _is_head(function):
            return _own(model, _beneath_heads(model, MethodType(function, model))[0])
        if not is_of_a_library(function):
            return forward
    return forward


def _wrapped(forward: Any) -> Iterator[Any]:
    """The functions that say of each other that they wrap them, from the outermost on."""
    while forward is not None:
        forward = getattr(forward, "__func__", forward)
        yield forward
        forward = getattr(forward, "__wrapped__", None)
