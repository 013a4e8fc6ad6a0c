"""This package's head in the models of TRL's trainers, and whose loss a trainer takes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from accelerate.utils import is_peft_model
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import dpo_trainer
from trl.trainer.utils import use_adapter

from dpo_kernels.models.fused_forward import STATS, add_fused_lm_head, restore_fused_lm_head
from dpo_kernels.models.head import unwrap
from dpo_kernels.trl._kernels import with_kernels
from dpo_kernels.trl._metrics import unread

WEIGHTS = ("token_weights", "pair_weights")  # what a batch may hold for this package's loss alone
Method = Callable[..., Any]
Check = Callable[[Any], None]  # of a trainer's settings: raises ValueError

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


def with_our_head(
    init: Method, module: ModuleType, check: Check, set_up: Callable[[Any], None] = lambda trainer: None
) -> Method:
    """The `__init__` of a trainer that adds a fused head to its models, which is ours. `set_up` gets the trainer when
    it has its models, whole and on their device, and has scored nothing yet."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self._dpo_kernels_head = True
        refusal = {"BaseTunerLayer": _NoLayer} if hasattr(module, "BaseTunerLayer") else {}  # it is PEFT's

        def add_head(model: Any, outputs: Sequence[str] = ()) -> None:
            if model is unwrap(self.model):  # which comes before its reference
                set_up(self)
            _add_head(model, outputs)

        with replaced(module, add_fused_lm_head=add_head, **refusal):
            init(self, *args, **kwargs)
        for mode in self._metrics:
            unread(self._metrics, mode, self)
        with_kernels(self)
        _takes_our_loss(self, check)

    return __init__


def with_added_head(init: Method) -> Method:
    """The `__init__` of a trainer that works on logits."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self._dpo_kernels_head = True
        init(self, *args, **kwargs)
        _add_head(unwrap(self.model))
        with_kernels(self)

    return __init__


def _add_head(model: Any, outputs: Sequence[str] = ()) -> None:
    """With every statistic, for other trainers of the model; ours ask for what they need in each call."""
    add_fused_lm_head(model, ("log_probs", *STATS))


def of_our_trainers(ours: Method, trls: Method, check: Check | None = None) -> Method:
    """A method that is TRL's for a trainer that was made without this package's head, before `patch()`, and for one
    with settings that TRL's loss alone takes."""

    @functools.wraps(trls)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "_dpo_kernels_head"):
            return trls(self, *args, **kwargs)
        for model in (self.model, getattr(self, "ref_model", None)):
            if model is not None:
                restore_fused_lm_head(model)
        if check is None or _takes_our_loss(self, check):
            return ours(self, *args, **kwargs)
        for batch in args:
            if isinstance(batch, Mapping):
                refuse_weights(batch, f"TRL's own loss of {type(self).__name__}")
                if "layout" in batch:
                    raise ValueError("batching: expected concatenated for TRL's own loss, got a batch with a layout")
        with self.accelerator.autocast():
            return trls(self, *args, **kwargs)

    return method


def _takes_our_loss(trainer: Any, check: Check) -> bool:
    """Whether our loss takes the settings that the trainer has now; a warning says why not."""
    try:
        check(trainer)
    except ValueError as error:
        if vars(trainer).get("_dpo_kernels_refused") != str(error):
            trainer._dpo_kernels_refused = str(error)
            warnings.warn(
                f"{error}. TRL takes this, so its own loss is computed, from this package's log-probabilities: with a "
                "trained head that costs one matrix product more, and metrics wait for the device in every step",
                stacklevel=4,
            )
        return False
    return True


def refuse_weights(batch: Mapping[str, Any], whose: str) -> None:
    if found := [name for name in WEIGHTS if batch.get(name) is not None]:
        raise ValueError(f"{whose} takes no weights of tokens or pairs: expected a batch without {' and '.join(found)}")


@contextmanager
def as_reference(trainer: Any) -> Iterator[None]:
    """Without gradients; and a policy that is its own reference without its adapter, or with the one that it had."""
    adapter: AbstractContextManager[Any] = nullcontext()
    if trainer.ref_model is None and is_peft_model(trainer.model):
        unwrapped = trainer.accelerator.unwrap_model(trainer.model)
        adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs))
        stack.enter_context(adapter)
        stack.enter_context(trainer.accelerator.autocast())
        yield
