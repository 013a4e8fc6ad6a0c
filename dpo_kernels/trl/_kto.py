"""KTO: one collective a step, for the KL term and the metrics together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_kernels.losses import losses_of_responses
from dpo_kernels.models.fused_forward import Reference
from dpo_kernels.trl._head import as_reference, refuse_weights
from dpo_kernels.trl._metrics import Metrics, record

NOT_INPUTS = frozenset({"completion_mask", "label", "ref_logps", "ref_KL_logps"})


def check_options(trainer: Any) -> None:
    """Raises `ValueError` for settings that `kto_loss` would refuse in the first step."""
    nothing = torch.zeros(1)
    losses_of_responses(nothing, nothing, nothing.bool(), kl=0.0 if trainer.calculate_KL else None, **_options(trainer))


def _options(trainer: Any) -> dict[str, Any]:
    return {
        "beta": trainer.beta,
        "desirable_weight": trainer.desirable_weight,
        "undesirable_weight": trainer.undesirable_weight,
        "loss_type": trainer.loss_type,
    }


def _scored(inputs: dict[str, Any]) -> dict[str, Any]:
    """What a model is called with."""
    refuse_weights(inputs, "KTOTrainer")
    taken = {name: value for name, value in inputs.items() if name not in NOT_INPUTS and not name.startswith("KL_")}
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    labels[:, 0] = -100  # which virtual tokens before it would score
    return {**taken, "use_cache": False, "labels": labels, "fused_lm_head": True}


def compute_ref_log_probs(self: Any, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """TRL's, [S] of the completions and of those for the KL term where the loss has one, summed as the policy's are."""
    scored = _scored(inputs)
    reference = Reference.of(self.model, {})
    if reference.gradients != ("hidden",):  # of a trained head the policy's forward is without gradients, too
        reference.gradients = ()
    with as_reference(self):
        return model(**scored, reference=reference).log_probs.sum(-1), self._compute_kl_logps(model, inputs)


def compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
    """TRL's `_compute_loss`, with the reference scored first: its activations are gone when those of the policy come.
    Dropout, which TRL turns off by default, and NEFTune draw other numbers for that reason."""
    scored = _scored(inputs)
    if self.precompute_ref_logps:
        ref_logps, ref_kl_logps = inputs["ref_logps"], inputs.get("ref_KL_logps")
    else:
        ref_model = self.model if self.ref_model is None else self.ref_model
        ref_logps, ref_kl_logps = self.compute_ref_log_probs(ref_model, inputs)
    router = {"output_router_logits": True} if self.aux_loss_enabled else {}
    with self.accelerator.autocast():  # which it puts around a model's forward once, for the first trainer of it
        kl_logps = self._compute_kl_logps(model, inputs)
        outputs = model(**scored, **router, outputs=("log_probs", "entropy", "mean_logits"))

    logps = outputs.log_probs.sum(-1)
    device = logps.device  # that of the head, where a model is spread over several
    labels = scored["labels"].to(device)
    is_chosen, ref_logps = inputs["label"].to(device).bool(), ref_logps.to(device)
    values = _values(outputs, logps.detach(), self.beta * (logps.detach() - ref_logps), labels, is_chosen)
    values |= {"input_tokens": inputs["attention_mask"], "processes": 1, "kl": 0.0}
    if self.calculate_KL:
        values["kl"] = (kl_logps - ref_kl_logps).mean()
    if self.aux_loss_enabled:
        values["aux_loss"] = outputs.aux_loss
    sums = record(self, values, _metrics_of, device=device)

    kl = (sums["kl"] / sums["processes"]).clamp(min=0) if self.calculate_KL else None
    loss = losses_of_responses(logps, ref_logps, is_chosen, kl=kl, **_options(self)).losses.nanmean()
    if self.aux_loss_enabled:
        loss = loss + self.router_aux_loss_coef * outputs.aux_loss
    if not return_outputs:
        return loss
    model_inputs = {name: value for name, value in scored.items() if name not in ("labels", "fused_lm_head")}
    with torch.no_grad():
        return loss, model(**model_inputs)  # for `compute_metrics`: the only way to logits


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
