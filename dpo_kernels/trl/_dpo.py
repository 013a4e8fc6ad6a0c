"""DPO: head and loss together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.linear_dpo import LinearDPOOutput
from dpo_kernels.losses import LOSSES, SMOOTHED_LOSSES, validate_dpo_options
from dpo_kernels.models.fused_forward import Preference, Reference
from dpo_kernels.models.segments import laid_out
from dpo_kernels.trl._head import WEIGHTS, as_reference
from dpo_kernels.trl._metrics import Metrics, record

F_DIVERGENCES = {"js_divergence": "js", "alpha_divergence": "alpha"}  # the others have the same name
NOT_INPUTS = frozenset({"completion_mask", "ref_chosen_logps", "ref_rejected_logps", *WEIGHTS})
OF_LAYOUT = frozenset({"layout", "completion_lengths", "sequence_lengths"})  # no inputs either, where there is one
STATS = ("entropy", "mean_logits", "is_top1")


def with_known_losses(init: Callable[..., None]) -> Callable[..., None]:
    """An `__init__` that refuses losses which nobody knows, as TRL would in the first step."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if unknown := [name for name in self.loss_types if name not in LOSSES]:
            raise ValueError(f"loss_type: expected some of {sorted(LOSSES)}, got {unknown}")

    return __init__


def check_options(trainer: Any) -> None:
    """Raises `ValueError` for what `linear_dpo_loss` would refuse in the first step."""
    validate_dpo_options(**dpo_options(trainer))


def dpo_options(trainer: Any) -> dict[str, Any]:
    """The trainer's settings as `linear_dpo_loss` takes them."""
    smoothed = not SMOOTHED_LOSSES.isdisjoint(trainer.loss_types)
    return {
        "beta": trainer.beta,
        "loss_type": tuple(trainer.loss_types),
        "loss_weights": tuple(trainer.loss_weights),
        "label_smoothing": trainer.label_smoothing if smoothed else 0.0,  # TRL's other losses take no notice of it
        "f_divergence": F_DIVERGENCES.get(trainer.f_divergence_type, trainer.f_divergence_type),
        "f_alpha": trainer.f_alpha_divergence_coef,
        "discopop_tau": trainer.args.discopop_tau,
        "ld_alpha": trainer.ld_alpha,
        "use_weighting": trainer.use_weighting,
    }


def _scored(trainer: Any, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a model is called with, and the options of the loss of this batch."""
    taken = {name: value for name, value in inputs.items() if name not in NOT_INPUTS}
    weights = {name: inputs[name] for name in WEIGHTS if inputs.get(name) is not None}
    if "layout" in inputs:
        taken = {name: value for name, value in taken.items() if name not in OF_LAYOUT}
        options = dpo_options(trainer) | weights | {"lengths": inputs["completion_lengths"]}
        return {**taken, "use_cache": False, "fused_lm_head": True}, options
    mask = inputs["completion_mask"]
    if "token_weights" in weights:
        if weights["token_weights"].shape != mask.shape:
            raise ValueError(
                f"token_weights: expected the shape {list(mask.shape)} of completion_mask, got "
                f"{list(weights['token_weights'].shape)}"
            )
        mask = mask.masked_fill(weights["token_weights"] == 0, 0)
    labels = inputs["input_ids"].masked_fill(mask == 0, -100)
    labels[:, 0] = -100  # which virtual tokens before it would score
    # TRL divides by all tokens of a completion, be it that the first of them is the first of all, which nothing scores
    options = dpo_options(trainer) | weights | {"lengths": (mask != 0).sum(1)}
    return {**taken, "use_cache": False, "labels": labels, "fused_lm_head": True}, options


def compute_ref_log_probs(self: Any, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """TRL's, summed as `linear_dpo_loss` sums the policy's."""
    scored, options = _scored(self, inputs)
    reference = Reference.of(self.model, options)
    with as_reference(self), laid_out(inputs.get("layout")):
        chosen, rejected = model(**scored, reference=reference).logps.chunk(2)
    return chosen, rejected


def compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
    """TRL's `_compute_loss`, with the reference scored first: then the gradients of the head are formed in the forward,
    with three products instead of four. Dropout, which TRL turns off by default, and NEFTune draw other numbers for
    that reason."""
    if return_outputs and "layout" in inputs:
        raise ValueError(
            "batching: expected concatenated for logits, which compute_metrics and predict ask for, got a batch with a "
            "layout, whose rows are no sequences"
        )
    scored, options = _scored(self, inputs)
    if self.precompute_ref_logps:
        reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
    else:
        reference = self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, inputs)
    router = {"output_router_logits": True} if self.aux_loss_enabled else {}
    # autocast: which it puts around a model's forward once, for the first trainer of it
    with self.accelerator.autocast(), laid_out(inputs.get("layout")):
        outputs = model(**scored, **router, outputs=STATS, preference=Preference(torch.cat(reference), **options))
    loss = outputs.preference.loss
    values = _values(outputs, inputs["sequence_lengths" if "layout" in inputs else "attention_mask"])
    if self.aux_loss_enabled:
        loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        values["aux_loss"] = outputs.aux_loss
    record(self, values, _metrics_of, device=loss.device, whole=_whole(outputs.preference))
    if not return_outputs:
        return loss
    model_inputs = {name: value for name, value in scored.items() if name not in ("labels", "fused_lm_head")}
    with torch.no_grad():
        return loss, model(**model_inputs)  # for `compute_metrics`: the only way to logits


def _values(outputs: Any, input_tokens: Tensor) -> dict[str, Any]:
    """What the metrics of tokens are made of, of this process. `input_tokens` sum to those of all sequences."""
    (chosen_logits, rejected_logits), (chosen_top1, _) = outputs.mean_logits.chunk(2), outputs.is_top1.chunk(2)
    chosen_tokens, rejected_tokens = outputs.preference.num_tokens.chunk(2)
    return {
        "processes": 1,
        "input_tokens": input_tokens,
        "chosen_tokens": chosen_tokens,
        "rejected_tokens": rejected_tokens,
        "entropy": outputs.entropy,
        "chosen_logits": chosen_logits,
        "rejected_logits": rejected_logits,
        "top1": chosen_top1,
    }


def _whole(found: LinearDPOOutput) -> dict[str, Any]:
    """What the metrics of pairs are made of."""
    chosen_logps, rejected_logps = found.logps.chunk(2)
    return {
        "pairs": found.losses.shape[0],
        "chosen_rewards": found.chosen_rewards,
        "rejected_rewards": found.rejected_rewards,
        "accurate": found.chosen_rewards > found.rejected_rewards,
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
    }


def _metrics_of(sums: dict[str, float]) -> Metrics:
    """Under TRL's names."""

    def mean(name: str, count: float) -> float:
        return sums[name] / count if count else 0.0

    metrics = {
        "entropy": mean("entropy", sums["chosen_tokens"] + sums["rejected_tokens"]),
        "mean_token_accuracy": mean("top1", sums["chosen_tokens"]),
        "rewards/accuracies": mean("accurate", sums["pairs"]),
    }
    for side in ("chosen", "rejected"):
        metrics[f"logits/{side}"] = mean(f"{side}_logits", sums[f"{side}_tokens"])
        metrics[f"rewards/{side}"] = mean(f"{side}_rewards", sums["pairs"])
        metrics[f"logps/{side}"] = mean(f"{side}_logps", sums["pairs"])
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if "aux_loss" in sums:
        metrics["aux_loss"] = mean("aux_loss", sums["processes"])
    return metrics
