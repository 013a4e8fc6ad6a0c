"""A model whose forward gives log-probabilities and losses instead of logits, through whatever is wrapped around it.

What trainers put around a model (autocast, gradient synchronisation, adapters, shards) works on its forward. So head
and loss are put there: `model(**inputs, labels=labels, fused_lm_head=True)` runs the model's own forward, in which the
output layer gives log-probabilities where there are labels. TRL's trainers call their own head this way, and so call
ours when it is there instead.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from dpo_kernels.linear_dpo import linear_dpo_loss
from dpo_kernels.logps import linear_sequence_logps, sum_over_vocabulary
from dpo_kernels.models.head import HeadOperands, LMHead
from dpo_kernels.models.through_wrappers import split
from dpo_kernels.rows import shift_labels

# What TRL calls the statistics of a position, and what we do.
STATS = {
    "entropy": "entropy",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
    "log_sum_sq_probs": "log_sum_sq_probs",
}


class Preference:
    """What the forward needs for the loss of DPO, on S = 2B sequences, chosen before rejected.

    Attributes:
        ref_logps: [S]. No tuple or dataclass, in which wrappers would find them and cast them to the model's precision.
        options: of `linear_dpo_loss`.
    """

    def __init__(self, ref_logps: Tensor, options: dict[str, Any]) -> None:
        self.ref_logps, self.options = ref_logps, options


@dataclass
class FusedOutput(ModelOutput):
    """What the forward gives, with what is not asked for left out, in the precision in which it was computed whatever
    precision the model's outputs are cast to. (Gradients do go through that cast: under FSDP2 in fp16, one of a loss
    that is scaled by more than 32768 overflows.) Its items are for wrappers; what gathers or stores outputs should be
    given its attributes.

    Attributes:
        log_probs: [S, T - 1] of labels[:, 1:], with a gradient, and 0 where there is no label.
        entropy, mean_logits, is_top1, log_sum_sq_probs: [S, T - 1] of the distributions of those labels, 0 or False
            where there is none.
        preference: what `linear_dpo_loss` gives. Then there are no `log_probs`.
        all_mean_logits: [S, T] the mean logit of every position, without a gradient.
        aux_loss: [] of a mixture of experts, without its coefficient, or None.
    """

    with_gradient: tuple[Tensor, ...]  # for wrappers, which hook and cast what they find
    join: Any = None  # gives the attributes, of what became of those

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        if "join" not in vars(self):  # it is being made
            raise AttributeError(name)
        if name not in self._found:
            raise AttributeError(f"FusedOutput has {sorted(self._found)}, and no {name!r}")
        return self._found[name]

    @functools.cached_property
    def _found(self) -> dict[str, Any]:
        found: dict[str, Any] = self.join(self.with_gradient)
        return found


def add_fused_lm_head(model: Any, outputs: Sequence[str] = ("log_probs",)) -> None:
    """Makes `model(**inputs, labels=labels, fused_lm_head=True)` return a `FusedOutput`. Other calls are as before.

    Args:
        model: a transformers causal language model by itself; adapters may be inside, but it is in no wrapper.
        outputs: "log_probs", and any of `STATS`.

    With `fused_lm_head=True` the forward takes by keyword what the model's own does, and

        labels: [S, T] token ids, -100 where a position's token has no label;
        preference: a `Preference`;
        all_mean_logits: whether to give those too. With a softcap that is a product over all positions.

    The head is checked against the model's own logits in the first such call (`LMHead.check`), when the model is where
    it will be. A copy of the model, by `copy.deepcopy`, has a head of its own. Forward hooks that the output layer has
    see a tuple of tensors in such a call.

    Raises:
        ValueError: the model has no head or base model, or `outputs` has a name that is none of the above; from the
            forward: the head is quantised, or sharded otherwise than by FSDP2, ZeRO-3 or tensor parallelism, or does
            not give the model's own logits.
    """
    if unknown := sorted(set(outputs) - {"log_probs", *STATS}):
        raise ValueError(f"outputs: expected some of {['log_probs', *STATS]}, got {unknown}")
    fused = _Fused(LMHead(model, at_output_layer=True), model.forward, [name for name in STATS if name in outputs])
    model._fused_lm_head = fused

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
        fused: _Fused = self._fused_lm_head
        return fused(*args, **inputs) if fused_lm_head else fused.original(*args, **inputs)

    model.forward = types.MethodType(forward, model)


class _Fused:
    """The head of a model and the forward that it had before. What refers to the model here refers to the copy in a
    copy of it."""

    def __init__(self, head: LMHead, original: Callable[..., Any], names: list[str]) -> None:
        self.head, self.original, self.names = head, original, names
        self.is_checked = False

    def __call__(
        self,
        *args: Any,
        labels: Tensor | None = None,
        preference: Preference | None = None,
        all_mean_logits: bool = False,
        **inputs: Any,
    ) -> FusedOutput:
        if args or labels is None or "shift_labels" in inputs:
            raise ValueError(
                "fused_lm_head: expected labels, no shift_labels, and all inputs by keyword, got "
                f"{'no labels' if labels is None else 'labels'}, {len(args)} input(s) by position, and by keyword "
                f"{sorted(inputs)}"
            )
        if not self.is_checked:
            with torch.autocast(labels.device.type, enabled=False):
                torch.compiler.disable(self.head.check)(self.original)  # the model may be compiled as a whole
            self.is_checked = True

        def scored(operands: HeadOperands) -> dict[str, Any]:
            found = _scored(self.head, operands, shift_labels(labels, -100), self.names, preference)
            return found | ({"all_mean_logits": mean_logits(self.head, operands)} if all_mean_logits else {})

        found, aux_loss = self.head.in_forward(self.original, scored, **inputs)
        return FusedOutput(*split({**found, "aux_loss": aux_loss}))


def _scored(
    head: LMHead, operands: HeadOperands, labels: Tensor, names: list[str], preference: Preference | None
) -> dict[str, Any]:
    hidden, weight, bias = operands
    target = labels.to(hidden.device)
    options: dict[str, Any] = {"bias": bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
    options["stats"] = [STATS[name] for name in names]
    found: dict[str, Any] = {}
    if preference is None:
        scored = linear_sequence_logps(hidden, weight, target, **options)
        found["log_probs"], stats = scored.token_logps[:, :-1].clone(), scored.stats  # FSDP2 warns of views
    else:
        ref_logps = preference.ref_logps.to(hidden.device)
        output = linear_dpo_loss(hidden, weight, target, ref_logps, **options, **preference.options)
        found["preference"], stats = output._replace(stats={}), output.stats
    return found | {name: stats[STATS[name]][:, :-1] for name in names}


@torch.no_grad()
def mean_logits(head: LMHead, operands: HeadOperands) -> Tensor:
    """[S, T] fp32: the mean over the vocabulary of the logits of every position, without computing them where they
    are linear in the hidden states."""
    hidden, weight, bias = operands
    if head.softcap is not None:
        every = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        options: dict[str, Any] = {"bias": bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
        return linear_sequence_logps(hidden, weight, every, stats=("mean_logit",), **options).stats["mean_logit"]
    weight_sum, bias_sum = sum_over_vocabulary(weight, bias, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return (hidden.float() @ weight_sum + bias_sum) * (head.logit_scale / weight.shape[0])
