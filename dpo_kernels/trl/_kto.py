"""KTO: one collective a step, for the KL term and the metrics together."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from dpo_kernels.losses import kto_loss
from dpo_kernels.trl._metrics import Metrics, record

NOT_INPUTS = frozenset({"completion_mask", "label", "ref_logps", "ref_KL_logps"})


def compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
    """TRL's `_compute_loss`, with the reference scored first: its activations are gone when those of the policy come.
    Dropout, which TRL turns off by default, and NEFTune draw other numbers for that reason."""
    passed = {name: value for name, value in inputs.items() if name not in NOT_INPUTS and not name.startswith("KL_")}
    model_inputs = passed | {"use_cache": False}
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    labels[:, 0] = -100  # which virtual tokens before it would score
    scored = {**model_inputs, "labels": labels, "fused_lm_head": True}
    if self.precompute_ref_logps:
        ref_logps, ref_kl_logps = inputs["ref_logps"], inputs.get("ref_KL_logps")
    else:
        ref_logps, ref_kl_logps = _reference(self, inputs, scored)
    kl_logps = self._compute_kl_logps(model, inputs)
    router = {"output_router_logits": True} if self.aux_loss_enabled else {}
    outputs = model(**scored, **router)

    logps = outputs.log_probs.sum(-1)
    device = logps.device  # that of the head, where a model is spread over several
    is_chosen, labels, ref_logps = inputs["label"].to(device).bool(), labels.to(device), ref_logps.to(device)
    values = _values(outputs, logps.detach(), self.beta * (logps.detach() - ref_logps), labels, is_chosen)
    values |= {"input_tokens": inputs["attention_mask"], "processes": 1, "kl": 0.0}
    if self.calculate_KL:
        values["kl"] = (kl_logps - ref_kl_logps).mean()
    if self.aux_loss_enabled:
        values["aux_loss"] = outputs.aux_loss
    sums = record(self, values, _metrics_of, device=device)

    losses = kto_loss(
        logps,
        ref_logps,
        is_chosen,
        kl=(sums["kl"] / sums["processes"]).clamp(min=0) if self.calculate_KL else None,
        beta=self.beta,
        desirable_weight=self.desirable_weight,
        undesirable_weight=self.undesirable_weight,
        loss_type=self.loss_type,
    ).losses
    loss = losses.nanmean()
    if self.aux_loss_enabled:
        loss = loss + self.router_aux_loss_coef * outputs.aux_loss
    if not return_outputs:
        return loss
    with torch.no_grad():
        return loss, model(**model_inputs)  # for `compute_metrics`: the only way to logits


@torch.no_grad()
def _reference(trainer: Any, inputs: dict[str, Any], scored: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """[S] of the completions, and of those for the KL term where the loss has one."""
    model = trainer.ref_model
    adapter: AbstractContextManager[Any] = nullcontext()
    if model is None and is_peft_model(trainer.model):
        model = trainer.model
        unwrapped = trainer.accelerator.unwrap_model(model)
        adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
    with disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs), adapter:
        return model(**scored).log_probs.sum(-1), trainer._compute_kl_logps(model, inputs)


@torch.no_grad()
def _values(outputs: Any, logps: Tensor, rewards: Tensor, labels: Tensor, is_chosen: Tensor) -> dict[str, Any]:
    """What the metrics are made of, of this process. Positions without a label are 0 in `outputs`."""
    tokens, logits = (labels[:, 1:] != -100).sum(-1), outputs.mean_logits.sum(-1)
    values = {"entropy": outputs.entropy}
    for side, is_other in (("chosen", ~is_chosen), ("rejected", is_chosen)):
        values |= {
            side: ~is_other,
            f"{side}_tokens": tokens.masked_fill(is_other, 0),
            f"{side}_logits": logits.masked_fill(is_other, 0.0),
            f"{side}_rewards": rewards.masked_fill(is_other, 0.0).nansum(),
            f"{side}_logps": logps.masked_fill(is_other, 0.0).nansum(),
        }
    return values


def _metrics_of(sums: dict[str, float]) -> Metrics:
    """Under TRL's names, and without those of a side that has no completions."""
    tokens = sums["chosen_tokens"] + sums["rejected_tokens"]
    metrics = {
        "kl": max(sums["kl"] / sums["processes"], 0.0),
        "entropy": sums["entropy"] / tokens if tokens else 0.0,
    }
    for side in ("chosen", "rejected"):
        if sums[f"{side}_tokens"]:
            metrics[f"logits/{side}"] = sums[f"{side}_logits"] / sums[f"{side}_tokens"]
        if sums[side]:
            metrics[f"rewards/{side}"] = sums[f"{side}_rewards"] / sums[side]
            metrics[f"logps/{side}"] = sums[f"{side}_logps"] / sums[side]
    if sums["chosen"] and sums["rejected"]:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if "aux_loss" in sums:
        metrics["aux_loss"] = sums["aux_loss"] / sums["processes"]
    return metrics
