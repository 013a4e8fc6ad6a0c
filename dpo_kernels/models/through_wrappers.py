"""To compute something else in a module's forward, with all that wraps the module still doing its part.

What shards a model over devices (FSDP2, ZeRO-3) gathers the weights of a module for its forward and again for its
backward, and knows of both by hooks on the module and on the tensors that go in and come out. It may cast those tensors
to the precision of the model, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dpo_kernels.parallel import is_dtensor

Found = TypeVar("Found")
# Their hooks and wrappers do what these are there for, and nothing else to the logits.
LIBRARIES = frozenset({"accelerate", "deepspeed", "dpo_kernels", "peft", "torch", "transformers", "trl"})


@contextmanager
def computed_in(
    module: nn.Module, function: Callable[[Tensor], Found], instead: Callable[[Tensor], Tensor]
) -> Iterator[list[Found]]:
    """Has calls of the module compute `function` of its argument in the place of its own forward. Their results are in
    the list that this gives; the caller gets `instead` of the argument. Forward hooks that are not of what shards or
    wraps models are left out, and so are those of tensor parallelism: there is no output for them to see."""
    joins: list[Callable[[Sequence[Tensor]], Found]] = []
    results: list[Found] = []

    @torch.compiler.disable
    def forward(argument: Tensor) -> tuple[Tensor, ...]:
        with _forward_of(module, own):  # for `function`
            with_gradient, join = split(function(on_this_rank(argument)))
        joins.append(join)
        return with_gradient

    @torch.compiler.disable
    def hand_over(module: nn.Module, args: tuple[Tensor], with_gradient: tuple[Tensor, ...]) -> Tensor:
        results.append(joins.pop()(with_gradient))
        return instead(on_this_rank(args[0]))

    own = vars(module).get("forward")
    with _without_observers(module):
        after_all_other_hooks = module.register_forward_hook(hand_over)
        try:
            with _forward_of(module, forward):
                yield results
        finally:
            after_all_other_hooks.remove()


@contextmanager
def _without_observers(module: nn.Module) -> Iterator[None]:
    hooks = module._forward_hooks
    before = dict(hooks)
    observers = {
        number
        for number, hook in before.items()
        if not is_of_a_library(hook) or _module_of(hook).startswith("torch.distributed.tensor")
    }
    for number in observers:
        del hooks[number]
    try:
        yield
    finally:
        now = dict(hooks)
        hooks.clear()  # and filled in the order of registration, in which they run
        hooks.update({number: hook for number, hook in before.items() if number in observers or number in now} | now)


def without_partial(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def is_of_a_library(function: Any) -> bool:
    """By where its code is, not by what it says that it wraps."""
    return _module_of(function).partition(".")[0] in LIBRARIES


def _module_of(function: Any) -> str:
    function = without_partial(function)
    function = getattr(function, "__func__", function)
    return str(getattr(function, "__globals__", {}).get("__name__") or type(function).__module__)


def on_this_rank(hidden: Any) -> Any:
    """Hidden states as a plain tensor, where `parallelize_module` has made of them a DTensor that is whole on all."""
    if not is_dtensor(hidden):
        return hidden
    if not all(placement.is_replicate() for placement in hidden.placements):
        raise ValueError(
            f"hidden: expected hidden states that are whole on each rank, got a DTensor of {list(hidden.placements)}"
        )
    return hidden.to_local()


def as_laid_out(hidden: Tensor, like: Any) -> Any:
    """A plain tensor as the DTensor that `like` is, if it is one."""
    if not is_dtensor(like):
        return hidden
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(hidden, like.device_mesh, like.placements, run_check=False)


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any] | None) -> Iterator[None]:
    """The module with another forward; with None, with that of its class."""
    before = vars(module).pop("forward", None)
    try:
        if forward is not None:
            vars(module)["forward"] = forward
        yield
    finally:
        vars(module).pop("forward", None)
        if before is not None:
            vars(module)["forward"] = before


def split(found: Found) -> tuple[tuple[Tensor, ...], Callable[[Sequence[Tensor]], Found]]:
    """The tensors with a gradient anywhere in `found`, for wrappers to hook; and a function that gives `found` with
    what became of those in their places. The values stay as they were, the gradient takes the new way."""
    leaves, structure = tree_flatten(found)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]

    def join(others: Sequence[Tensor]) -> Found:
        joined = list(leaves)
        for place, other in zip(places, others, strict=True):
            value = leaves[place]
            joined[place] = other if other.dtype == value.dtype else _WithValue.apply(other, value.detach())
        return tree_unflatten(joined, structure)

    return tuple(leaves[place] for place in places), join


class _WithValue(torch.autograd.Function):
    """Another tensor's value, which this one had before it was rounded."""

    @staticmethod
    def forward(ctx: Any, rounded: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = rounded.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None
