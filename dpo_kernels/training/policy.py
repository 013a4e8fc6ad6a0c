"""The policy: the model that a configuration names, and the loss on its hidden states as one module."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_kernels.losses import PreferenceLoss, cpo_loss, orpo_loss, simpo_loss
from dpo_kernels.models.head import LMHead
from dpo_kernels.training.checkpoint import atomic_directory
from dpo_kernels.training.config import TrainConfig, dpo_options

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Sums over pairs, in this order, are what a forward pass leaves for the metrics.
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def load_tokenizer(config: TrainConfig, dataset: Dataset) -> PreTrainedTokenizerBase:
    """The tokenizer that `config` names; `train:SIZE` makes one from the dataset's texts."""
    from transformers import AutoTokenizer

    from dpo_kernels.data.demo import demo_tokenizer

    name = config.tokenizer or ("train:512" if config.model == "demo" else config.model)
    if name.startswith("config:"):
        raise ValueError(f"tokenizer: model {config.model!r} has none of its own: name one, or train:SIZE")
    if name.startswith("train:"):
        if not name.removeprefix("train:").isdigit():
            raise ValueError(f"tokenizer: expected train:SIZE with a number of entries, got {name!r}")
        columns = [column for column in ("prompt", "chosen", "rejected") if column in dataset.column_names]
        texts = (text for row in dataset.select_columns(columns) for value in row.values() for text in _texts(value))
        return demo_tokenizer(texts, int(name.removeprefix("train:")))
    return AutoTokenizer.from_pretrained(name, **_hub_options(config, name))


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(message["content"]) for message in value or []]


def load_model(config: TrainConfig, name: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The causal language model `name`: from the hub, a path, `config:FILE` with random weights, or the demo's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from dpo_kernels.data.demo import demo_model

    dtype = getattr(torch, config.dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if name == "demo":
        model = demo_model(len(tokenizer), seed=config.seed, eos_token_id=tokenizer.eos_token_id).to(dtype)
        if config.attn_implementation:
            model.set_attn_implementation(config.attn_implementation)
        return model
    if name.startswith("config:"):
        file = Path(name.removeprefix("config:"))
        if not file.is_file():
            raise ValueError(f"model: expected config:FILE with an existing file, got {name!r} in {Path.cwd()}")
        try:
            settings = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"model: {file} is no valid JSON: {error}") from None
        if not isinstance(settings, dict) or "model_type" not in settings:
            raise ValueError(f'model: {file} must be an object with a model_type, such as "qwen2"')
        settings = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id} | settings
        torch.manual_seed(config.seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), **options)
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(f"model: {name!r} is a PEFT adapter: merge it into its model and save that first")
    return AutoModelForCausalLM.from_pretrained(name, **options, **_hub_options(config, name))


def _hub_options(config: TrainConfig, name: str) -> dict[str, Any]:
    revision = config.revision if name == config.model else None
    return {"revision": revision, "trust_remote_code": config.trust_remote_code}


def add_lora(model: PreTrainedModel, config: TrainConfig, accelerator: Accelerator) -> Any:
    """The model inside PEFT, with adapters that change nothing yet. Random weights are saved: nobody else has them."""
    from peft import LoraConfig, get_peft_model

    if config.random_weights:
        model.name_or_path = str((Path(config.output_dir) / "base_model").resolve())
        if accelerator.is_main_process:
            with atomic_directory(Path(model.name_or_path)) as directory:
                model.save_pretrained(directory)
    targets = config.lora_target_modules
    adapters = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapters)


class PolicyLoss(nn.Module):
    """The policy, its head and the loss as one module, for accelerate to wrap: autocast and DDP see one forward."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.head = LMHead.from_model(model)
        self.config = config

    def forward(self, batch: dict[str, Any], mean_chosen_length: float) -> tuple[Tensor, Tensor]:
        """The loss [] of B pairs, and the sums [len(METRICS)] over them.

        `batch` is from `PairCollator`; `mean_chosen_length` is that of the effective batch, in tokens, which the pairs
        are a part of, and over which the losses that divide by it average.
        """
        hidden, aux_loss = self.head.hidden_states(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        try:
            loss, logps, rewards = self._scored(hidden, batch, mean_chosen_length)
        except ValueError as error:  # on the CPU the head looks at what it gets, and does not know about training
            if torch.isfinite(hidden).all():
                raise
            raise FloatingPointError(f"the hidden states are not finite ({error})") from error
        if aux_loss is not None:
            loss = loss + self.head.aux_loss_coef * aux_loss
        return loss, _sums(loss, logps, *rewards)

    def _scored(
        self, hidden: Tensor, batch: dict[str, Any], mean_chosen_length: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Loss [], log-probabilities [2B], and the rewards [B] of chosen and rejected."""
        config = self.config
        options: dict[str, Any] = {
            "shift": True,
            "num_labelled": batch["num_labelled"],
            "temperature": config.temperature,
            "impl": config.impl,
        }
        if config.reference_free:
            scored = self.head.sequence_logps(hidden, batch["labels"], **options)
            result = self._reference_free_loss(scored.logps, scored.num_tokens, mean_chosen_length)
            return result.losses.mean(), scored.logps, (result.chosen_rewards, result.rejected_rewards)
        options |= {"chunk_bytes": config.chunk_bytes, "mean_chosen_length": mean_chosen_length} | dpo_options(config)
        output = self.head.dpo_loss(hidden, batch["labels"], batch["ref_logps"], **options)
        return output.loss, output.logps, (output.chosen_rewards, output.rejected_rewards)

    def _reference_free_loss(self, logps: Tensor, num_tokens: Tensor, mean_chosen_length: float) -> PreferenceLoss:
        config = self.config
        chosen_lengths, rejected_lengths = num_tokens.chunk(2)
        options: dict[str, Any] = {
            "beta": config.beta,
            "chosen_lengths": chosen_lengths,
            "rejected_lengths": rejected_lengths,
        }
        if config.loss_type == ["orpo"]:
            return orpo_loss(*logps.chunk(2), **options)
        options["label_smoothing"] = config.label_smoothing
        if config.loss_type == ["simpo"]:
            return simpo_loss(*logps.chunk(2), gamma=config.simpo_gamma, **options)
        options["mean_chosen_length"] = mean_chosen_length
        return cpo_loss(*logps.chunk(2), cpo_alpha=config.cpo_alpha, **options)


def _sums(loss: Tensor, logps: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """The sums over pairs that `METRICS` names, on the device and without a gradient."""
    chosen_logps, rejected_logps = logps.detach().chunk(2)
    accurate = (chosen_rewards > rejected_rewards).to(chosen_rewards.dtype)
    columns = [
        loss.detach().expand_as(chosen_rewards),
        chosen_rewards,
        rejected_rewards,
        accurate,
        chosen_rewards - rejected_rewards,
        chosen_logps,
        rejected_logps,
    ]
    return torch.stack([column.float() for column in columns]).sum(1)


def save_model(
    directory: Path, model: Any, tokenizer: Any, accelerator: Accelerator, copy_of: Path | None = None
) -> None:
    """What transformers or peft load: weights in safetensors, configuration and tokenizer."""
    if accelerator.is_main_process:
        with atomic_directory(directory) as temporary:
            if copy_of:
                shutil.copytree(copy_of, temporary, dirs_exist_ok=True)
            else:
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
    accelerator.wait_for_everyone()
