"""CPO, SimPO and ORPO: no logits, and two collectives a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.trl._head import refuse_weights
from dpo_kernels.trl._metrics import Unread, keep


def is_orpo(trainer: Any) -> bool:
    return hasattr(trainer, "odds_ratio_loss")


def concatenated_forward(self: Any, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """TRL's, but for the logits, of which it gives the means [] that are logged."""
    orpo = is_orpo(self)
    refuse_weights(batch, f"{'ORPO' if orpo else 'CPO'}Trainer")
    padding = self.padding_value if orpo else self.pad_token_id
    inputs = self.concatenated_inputs(batch, padding_value=padding, device=self.accelerator.device)
    pairs = batch["chosen_labels"].shape[0]
    tokens, mask = inputs["concatenated_input_ids"], inputs["concatenated_attention_mask"]
    labels = inputs["concatenated_labels"]
    scored = labels
    if orpo:  # whose likelihood is that of the prompt too
        scored = torch.cat([tokens[:pairs].masked_fill(mask[:pairs] != 1, -100), labels[pairs:]])
    router = {"output_router_logits": True} if self.aux_loss_enabled else {}
    asked = {"labels": scored, "fused_lm_head": True, "outputs": ("log_probs",), "all_mean_logits": True}
    with self.accelerator.autocast():  # which it puts around a model's forward once, for the first trainer of it
        out = model(input_ids=tokens, attention_mask=mask, **router, **asked)
    is_response = labels[:, 1:] != -100
    logps = (out.log_probs * is_response).sum(-1)
    if orpo or self.loss_type in ("ipo", "simpo"):
        logps = logps / is_response.sum(-1)
    nll = -out.log_probs[:pairs].sum() / (scored[:pairs, 1:] != -100).sum()
    if not orpo and self.cpo_alpha == 0:
        nll = torch.zeros_like(nll)
    logits = out.all_mean_logits[:, :-1] if orpo else out.all_mean_logits
    found = (*logps.split(pairs), *(half.mean() for half in logits.split(pairs)), nll)
    return (*found, out.aux_loss) if self.aux_loss_enabled else found


def get_batch_loss_metrics(
    self: Any, model: Any, batch: dict[str, Any], train_eval: str = "train"
) -> tuple[Tensor, dict[str, float]]:
    """TRL's, but for the metrics, which stay on the device until they are read."""
    chosen_logps, rejected_logps, chosen_logits, rejected_logits, nll, *aux_loss = self.concatenated_forward(
        model, batch
    )
    means = {"logits/rejected": rejected_logits, "logits/chosen": chosen_logits, "nll_loss": nll}
    if is_orpo(self):
        losses, chosen_rewards, rejected_rewards, *odds = self.odds_ratio_loss(chosen_logps, rejected_logps)
        loss = nll - losses.mean()
        means |= zip(("log_odds_ratio", "log_odds_chosen"), odds, strict=True)
    else:
        losses, chosen_rewards, rejected_rewards = self.cpo_loss(chosen_logps, rejected_logps)
        loss = losses.mean() + self.cpo_alpha * nll
    if self.aux_loss_enabled:
        loss = loss + self.aux_loss_coef * aux_loss[0]
    rows = chosen_rewards, rejected_rewards, chosen_logps, rejected_logps
    metrics = _everywhere(self.accelerator, rows, means)
    prefix = "eval_" if train_eval == "eval" else ""
    return loss, Unread.of({prefix + name: value for name, value in metrics.items()})


def store_metrics(self: Any, metrics: dict[str, float], train_eval: str = "train") -> None:
    """TRL's, of what nobody has read yet."""
    if isinstance(metrics, Unread) and metrics.batch is not None:
        keep(self._stored_metrics, train_eval, metrics.batch)
    else:
        for name, value in metrics.items():
            self._stored_metrics[train_eval][name].append(value)


@torch.no_grad()
def _everywhere(accelerator: Any, rows: tuple[Tensor, ...], means: dict[str, Tensor]) -> dict[str, Tensor]:
    """The metrics [] of all processes, of rewards and log-probabilities [B], and of what is a mean of each process."""

    def stacked(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack([each.to(accelerator.device, torch.float32) for each in tensors], -1)

    # Of the last batch, TRL keeps as many rows of a gathered tensor as the data has left: rows by themselves here too.
    pairs, processes = accelerator.gather_for_metrics(
        (stacked(rows), stacked(value.mean() for value in means.values())[None])
    )
    chosen, rejected, chosen_logps, rejected_logps = pairs.unbind(1)
    found = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/rejected": rejected_logps,
        "logps/chosen": chosen_logps,
    }
    found |= zip(means, processes.unbind(1), strict=True)
    return {name: value.mean() for name, value in found.items()}
