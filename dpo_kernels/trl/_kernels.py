"""Which kernels compute the head of a trainer: tried before it begins, and the same after a checkpoint."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from dpo_kernels.tuning.heads import head_of
from dpo_kernels.tuning.trial import Kernels

logger = logging.getLogger(__name__)


class DPOKernelsCallback(TrainerCallback, ExportableState):
    """Keeps the families of kernels, for each path, in the trainer's checkpoints. The trainer may make it anew from
    one of these."""

    def __init__(self) -> None:
        self.families: dict[str, Any] = {}
        self._kernels: Kernels | None = None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"families": self.families}}

    def begin(self, model: Any, args: Any, recorded: dict[str, Any] | None = None) -> None:
        """Raises nothing: what has no head that could be described is none of ours, or speaks up by itself."""
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
        try:
            if self._kernels is None:
                bar = not args.disable_tqdm and args.local_process_index == 0
                self._kernels = Kernels("auto", args.device, head_of(model, precision), recorded=recorded, bar=bar)
            elif recorded is not None:
                self._kernels.take(recorded)
        except (ValueError, AttributeError, TypeError) as error:
            logger.info("no kernels were chosen beforehand: %s", error)
            return
        self.families = self._kernels.families

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        recorded = state.stateful_callbacks.get(name)
        recorded = recorded[-1] if isinstance(recorded, list) else recorded
        families = (recorded or {}).get("attributes", {}).get("families") if state.global_step else None
        if families or self._kernels is None:
            self.begin(kwargs["model"], args, families or None)
        if families and self._kernels is not None and self._kernels.reason:
            warnings.warn(f"the checkpoint is not gone on from to the bit: {self._kernels.reason}", stacklevel=2)
        # a checkpoint of a trainer without this callback lacks the entry, which the trainer's next one looks for
        state.stateful_callbacks[name] = self.state()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._kernels is not None:
            self._kernels.release()


def with_kernels(trainer: Any) -> None:
    """Adds the callback to a trainer that has none yet."""
    if not any(isinstance(each, DPOKernelsCallback) for each in trainer.callback_handler.callbacks):
        callback = DPOKernelsCallback()
        callback.begin(trainer.model, trainer.args)
        trainer.add_callback(callback)
