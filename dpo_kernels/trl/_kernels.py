"""Which kernels compute the head of a trainer: tried before it begins, and the same after a checkpoint."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from dpo_kernels.tuning.heads import head_of
from dpo_kernels.tuning.trial import keep, tune_first


class DPOKernelsCallback(TrainerCallback, ExportableState):
    """Keeps the families of kernels, for each path, in the trainer's checkpoints. Made without arguments where they
    are restored from one."""

    def __init__(self, trainer: Any = None) -> None:
        self.families: dict[str, Any] = {}
        self.where: tuple[Any, ...] = ()
        if trainer is not None:
            head = head_of(trainer.model, trainer.accelerator.mixed_precision)
            bar = not trainer.args.disable_tqdm and trainer.is_local_process_zero()
            self.where = "auto", trainer.accelerator.device, head
            self.families = dict(tune_first(*self.where, bar=bar))

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"families": self.families}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        recorded = state.stateful_callbacks.get(name)
        recorded = recorded[-1] if isinstance(recorded, list) else recorded
        families = (recorded or {}).get("attributes", {}).get("families")
        if state.global_step and families and self.where:  # at the beginning it is this trainer's own
            self.families, reason = keep(families, *self.where)
            if reason:
                warnings.warn(f"the checkpoint is not gone on from to the bit: {reason}", stacklevel=2)
        # a checkpoint of a trainer without this callback lacks the entry, which the trainer's next one looks for
        state.stateful_callbacks[name] = self.state()


def with_kernels(trainer: Any) -> None:
    """Adds the callback to a trainer that has none yet."""
    if not any(isinstance(each, DPOKernelsCallback) for each in trainer.callback_handler.callbacks):
        trainer.add_callback(DPOKernelsCallback(trainer))
