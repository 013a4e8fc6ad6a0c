"""Versions of TRL that are not tested: the first batch is computed by TRL's own code too."""

from __future__ import annotations

import functools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
import trl
from torch import Tensor

from dpo_kernels.models.fused_forward import STATS
from dpo_kernels.models.head import unwrap
from dpo_kernels.trl._head import TRLS_HEAD, WEIGHTS, replaced
from dpo_kernels.trl._metrics import latest

TESTED = ("1.15", "1.16")


def is_to_be_verified(trainer: Any) -> bool:
    tested = trl.__version__.startswith(tuple(f"{version}." for version in TESTED))
    return not tested and not getattr(trainer, "_dpo_kernels_verified", False)


def verified_loss(ours: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """A `_compute_loss` that replaces TRL's `own`."""

    @functools.wraps(own)
    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        result = ours(self, model, inputs, return_outputs)
        if is_to_be_verified(self):
            loss = _everywhere(self, result[0] if return_outputs else result)
            found, plain = {"loss": loss, **latest(self)}, {k: v for k, v in inputs.items() if k not in WEIGHTS}
            if len(plain) < len(inputs):  # TRL's loss knows of no weights
                with _metrics_aside(self), _aside(self):
                    loss = _everywhere(self, ours(self, model, plain, False))
                    found = {"loss": loss, **latest(self)}
            _compare(self, found, _loss_by_trl(self, own, model, plain))
        return result

    return _compute_loss


def verified_metrics(ours: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """A `get_batch_loss_metrics` that replaces TRL's `own`."""

    @functools.wraps(own)
    def get_batch_loss_metrics(self: Any, model: Any, batch: dict[str, Any], train_eval: str = "train") -> Any:
        loss, metrics = ours(self, model, batch, train_eval)
        if is_to_be_verified(self):
            self._dpo_kernels_by_trl = True
            try:
                with _aside(self):
                    trls_loss, trls_metrics = own(self, model, batch, train_eval)
            finally:
                del self._dpo_kernels_by_trl
            expected = {"loss": _everywhere(self, trls_loss), **trls_metrics}
            _compare(self, {"loss": _everywhere(self, loss), **metrics}, expected)
        return loss, metrics

    return get_batch_loss_metrics


def with_our_forward(ours: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """A `concatenated_forward` that replaces TRL's `own`, except where that is what TRL's metrics are to be of."""

    @functools.wraps(own)
    def concatenated_forward(self: Any, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        return (own if hasattr(self, "_dpo_kernels_by_trl") else ours)(self, model, batch)

    return concatenated_forward


@contextmanager
def _aside(trainer: Any) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(enabled=trainer.accelerator.device.type in ("cpu", "cuda")))
        stack.enter_context(torch.no_grad())
        stack.enter_context(trainer.accelerator.autocast())
        yield


def _everywhere(trainer: Any, loss: Tensor) -> float:
    """The mean over processes, which then all come to the same verdict."""
    return trainer.accelerator.gather(loss.detach()[None]).mean().item()


@contextmanager
def _metrics_aside(trainer: Any) -> Iterator[None]:
    before = trainer._metrics, trainer._total_train_tokens
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    try:
        yield
    finally:
        trainer._metrics, trainer._total_train_tokens = before


def _loss_by_trl(trainer: Any, own: Callable[..., Any], model: Any, inputs: dict[str, Any]) -> dict[str, float]:
    """Loss and metrics of a micro-batch by TRL's own head and code."""
    models = [unwrap(each) for each in (trainer.model, trainer.ref_model) if each is not None]
    with ExitStack() as stack:
        stack.enter_context(_metrics_aside(trainer))
        for each in models:
            stack.enter_context(replaced(each, forward=MethodType(type(each).forward, each)))
            TRLS_HEAD(each, outputs=("log_probs", *STATS))
        stack.enter_context(_aside(trainer))
        loss = own(trainer, model, inputs, False)
        return {"loss": _everywhere(trainer, loss), **latest(trainer)}


def _compare(trainer: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    if math.isnan(ours["loss"]) and math.isnan(theirs["loss"]):
        return  # which says nothing: the next batch is compared
    exact = trainer.args.bf16 is False and trainer.args.fp16 is False and trainer.model.dtype == torch.float32
    tolerance = 1e-3 if exact else 5e-2  # TRL rounds logits to the precision of the model
    theirs.pop("num_tokens", None)  # a count that goes on from batch to batch
    differing = [f"{name} is not known" for name in theirs.keys() - ours.keys()]
    for name in theirs.keys() & ours.keys():
        a, b = float(ours[name]), float(theirs[name])
        if name == "rewards/accuracies" and abs(float(theirs["rewards/margins"])) < 1e-3:
            continue  # policy and reference are still the same: rounding decides
        if not abs(a - b) <= tolerance * max(1.0, abs(b)):  # NaN differs too
            differing.append(f"{name} {a:.6g}, TRL's {b:.6g}")
    if differing:
        raise RuntimeError(
            f"dpo_kernels.trl is tested with TRL {' and '.join(TESTED)}, and does not fit {trl.__version__}: on the "
            f"first batch {'; '.join(sorted(differing))}. Use one of those, or TRL's own trainer"
        )
    warnings.warn(
        f"dpo_kernels.trl is tested with TRL {' and '.join(TESTED)}, not with {trl.__version__}; on the first batch "
        "it agreed with TRL's own head",
        stacklevel=2,
    )
    trainer._dpo_kernels_verified = True
