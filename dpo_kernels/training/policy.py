"""The policy: the model that a configuration names, and the loss on its hidden states as one module."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_kernels.comparisons import Comparisons, comparisons_of
from dpo_kernels.logps import DTYPES
from dpo_kernels.losses import PreferenceLoss, cpo_loss, orpo_loss, simpo_loss
from dpo_kernels.models.head import LMHead
from dpo_kernels.models.segments import laid_out
from dpo_kernels.models.shapes import read_config
from dpo_kernels.training.checkpoint import atomic_directory, damage, write_checksums
from dpo_kernels.training.config import TrainConfig, dpo_options
from dpo_kernels.training.sharding import Sharded, local, whole_state
from dpo_kernels.training.tokenizer import hub_options
from dpo_kernels.training.values import in_one_line

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dpo_kernels.training.zero import Zero

# Sums over pairs, in this order, are what a forward pass leaves for the metrics. Losses count by their pairs' weights.
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


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
        file = Path(name.removeprefix("config:")).expanduser()
        given = read_config(file)
        settings = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id} | given
        torch.manual_seed(config.seed)
        try:
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), **options)
        except Exception as error:  # whatever the code of a model makes of such settings
            raise ValueError(f"model: {file} makes no model: {in_one_line(error)}") from error
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(f"model: {name!r} is a PEFT adapter: merge it into its model and save that first")
    try:
        AutoConfig.from_pretrained(name, **hub_options(config, name))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {name!r} cannot be had: {in_one_line(error)}") from error
    with _damage_named(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True, **options, **hub_options(config, name)
        )
    model, loading = loaded
    if lacking := sorted(loading["missing_keys"]):
        raise ValueError(
            f"model: the weights of {name!r} are damaged, or of another model: {len(lacking)} of its tensors are "
            f"missing, the first is {lacking[0]}"
        )
    if damaged := damaged_weights(model.named_parameters()):
        raise ValueError(f"model: the weights of {name!r} are damaged: {damaged}")
    return model


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """What readers of weights say of files that were cut or changed, as an error that names the model. Where the files
    are here, whatever is raised comes of them."""
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:
        of_a_reader = isinstance(error, (SafetensorError, pickle.UnpicklingError, EOFError, json.JSONDecodeError))
        of_the_machine = isinstance(error, (ImportError, MemoryError, torch.OutOfMemoryError))
        if of_the_machine or not (of_a_reader or Path(name).is_dir()):
            raise
        kind = "are damaged" if of_a_reader else "are damaged, or do not fit its config.json"
        raise ValueError(f"model: the weights of {name!r} {kind}: {in_one_line(error)}") from error


def damaged_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Which of the weights (name, tensor) hold what is no finite number, in words; "" if none does."""
    found = [name for name, weight in weights if not all(map(math.isfinite, _extremes(weight)))]
    return f"NaN or infinity in {len(found)} of them, the first is {found[0]}" if found else ""


def _extremes(weight: Tensor) -> tuple[float, float]:
    """The smallest and the largest number, in this process's shard; NaN if there is one. (0, 0) of what is quantized,
    or empty."""
    shard = local(weight).detach()
    if weight.dtype not in DTYPES or not shard.numel():
        return 0.0, 0.0
    low, high = shard.aminmax()
    return float(low), float(high)


def state_of_weights(whose: str, model: nn.Module) -> str:
    """A sentence on weights from which nothing finite came: what of them is damaged, or could be."""
    if damaged := damaged_weights(model.named_parameters()):
        return f"The {whose}'s weights are damaged: {damaged}"
    sizes = [(max(map(abs, _extremes(weight))), name) for name, weight in model.named_parameters()]
    return f"The {whose}'s weights are finite; the largest number is {{:.3g}}, in {{}}".format(*max(sizes))


@contextmanager
def overflow_named(hidden: Tensor, whose: str, model: nn.Module) -> Iterator[None]:
    """On the CPU the head looks at the hidden states that it gets; it does not know where they come from."""
    try:
        yield
    except ValueError as error:
        if torch.isfinite(hidden).all():
            raise
        state = state_of_weights(whose, model)
        raise FloatingPointError(f"the hidden states of the {whose} are not finite ({error}). {state}") from error


def disable_dropout(model: nn.Module) -> None:
    """Sets every rate of dropout to 0: of layers, of modules that keep it as a number, as attention does, and of
    configurations that modules read it from. What is no dropout, such as the noise of some routers, stays."""
    configurations = [model.config]
    for module in model.modules():
        is_layer = "drop" in type(module).__name__.lower()
        for name, value in list(vars(module).items()):
            if hasattr(value, "to_dict"):
                configurations.append(value)
            elif _is_number(value) and ("drop" in name.lower() or (is_layer and name == "p")):
                setattr(module, name, type(value)(0))
    seen: set[int] = set()
    while configurations:
        settings: Any = configurations.pop()
        if id(settings) in seen:
            continue
        seen.add(id(settings))
        values = settings if isinstance(settings, dict) else vars(settings)
        for name, value in values.items():
            if isinstance(value, dict) or hasattr(value, "to_dict"):
                configurations.append(value)
            elif _is_number(value) and "drop" in str(name).lower():
                values[name] = type(value)(0)  # a configuration may want a whole number where it had one


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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


def hidden_of(head: LMHead, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The hidden states [R, T, H] of a batch of pairs or rankings, of whichever collator, and what
    `LMHead.hidden_states` gives beside them."""
    layout = batch.get("layout")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    with laid_out(layout):
        return head.hidden_states(**inputs)


class PolicyLoss(nn.Module):
    """The policy, its head and the loss as one module, for accelerate to wrap: autocast and DDP see one forward."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.head = LMHead.from_model(model)
        self.config = config
        layer = self.head.output_layer()
        trained = {name.rpartition(".")[2] for name, weight in layer.named_parameters() if weight.requires_grad}
        # of the head's operands; adapters are part of its weight
        self.gradients = ("hidden", *["weight"] * bool(trained - {"bias"}), *["bias"] * ("bias" in trained))

    def forward(self, batch: dict[str, Any], mean_chosen_length: float) -> tuple[Tensor, Tensor]:
        """The loss [] of pairs or rankings, and the sums [len(METRICS)] over their pairs.

        `batch` is from `PairCollator`; `mean_chosen_length` is that of the effective batch, in tokens, which the pairs
        are a part of, and over which the losses that divide by it average.
        """
        hidden, aux_loss = hidden_of(self.head, batch)
        comparisons = comparisons_of(batch.get("pairs"), len(batch["labels"]), hidden.device)
        with overflow_named(hidden, "policy", self.model):
            loss, logps, rewards = self._scored(hidden, batch, comparisons, mean_chosen_length)
        if aux_loss is not None:
            loss = loss + self.head.aux_loss_coef * aux_loss
        weights = batch.get("pair_weights")
        if self.config.listwise and comparisons.pairs > comparisons.groups:  # one loss a group, and one mean a pair
            total = comparisons.groups if weights is None else batch["group_weights"].sum()
            weights = torch.ones_like(rewards[0]) * total / comparisons.pairs
        return loss, _sums(loss, *comparisons.split(logps.detach()), *rewards, weights)

    def _scored(
        self, hidden: Tensor, batch: dict[str, Any], comparisons: Comparisons, mean_chosen_length: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Loss [], log-probabilities [S], and the rewards [P] of chosen and rejected."""
        config = self.config
        options: dict[str, Any] = {
            "shift": "layout" not in batch,  # whose labels are aligned
            "predictors": batch.get("predictors"),
            "num_labelled": batch["num_labelled"],
            "temperature": config.temperature,
            "token_weights": batch.get("token_weights"),
            "impl": config.impl,
        }
        pair_weights = batch.get("pair_weights")
        if config.reference_free:
            scored = self.head.sequence_logps(hidden, batch["labels"], **options)
            logps, lengths = comparisons.split(scored.logps), comparisons.split(scored.num_tokens)
            result = self._reference_free_loss(logps, lengths, mean_chosen_length)
            loss = _weighted_mean(result.losses, pair_weights)
            return loss, scored.logps, (result.chosen_rewards, result.rejected_rewards)
        options |= {"chunk_bytes": config.chunk_bytes, "mean_chosen_length": mean_chosen_length} | dpo_options(config)
        if config.listwise:
            pair_weights = batch.get("group_weights", pair_weights)
        options |= {"pair_weights": pair_weights, "pairs": batch.get("pairs")}
        output = self.head.dpo_loss(hidden, batch["labels"], batch["ref_logps"], **options)
        return output.loss, output.logps, (output.chosen_rewards, output.rejected_rewards)

    def _reference_free_loss(
        self, logps: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor], mean_chosen_length: float
    ) -> PreferenceLoss:
        config = self.config
        options: dict[str, Any] = {"beta": config.beta, "chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        if config.loss_type == ["orpo"]:
            return orpo_loss(*logps, **options)
        options["label_smoothing"] = config.label_smoothing
        if config.loss_type == ["simpo"]:
            return simpo_loss(*logps, gamma=config.simpo_gamma, **options)
        options["mean_chosen_length"] = mean_chosen_length
        return cpo_loss(*logps, cpo_alpha=config.cpo_alpha, **options)


def _weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Of losses [B]; `weights` [B] are above 0, or None for all alike."""
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()


def _sums(
    loss: Tensor,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    weights: Tensor | None,
) -> Tensor:
    """The sums over pairs that `METRICS` names, on the device and without a gradient."""
    accurate = (chosen_rewards > rejected_rewards).to(chosen_rewards.dtype)
    columns = [
        loss.detach().expand_as(chosen_rewards) if weights is None else loss.detach() * weights,
        chosen_rewards,
        rejected_rewards,
        accurate,
        chosen_rewards - rejected_rewards,
        chosen_logps,
        rejected_logps,
    ]
    return torch.stack([column.float() for column in columns]).sum(1)


def save_model(
    directory: Path,
    model: Any,
    tokenizer: Any,
    accelerator: Accelerator,
    copy_of: Path | None = None,
    sharded: Sharded | Zero | None = None,
) -> None:
    """What transformers or peft load: weights in safetensors, configuration and tokenizer; with checksums. Of a model
    in shards the first process gathers the whole weights.

    Raises `ValueError` where what it is to be a copy of is no longer what was written.
    """
    whole = {}
    if sharded is not None and not copy_of:
        whole["state_dict"] = whole_state(sharded, keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        if copy_of and (problems := damage(copy_of, None)):
            raise ValueError(
                f"load_best_model_at_end: {copy_of} is not whole: {problems}. The checkpoints beside it hold those "
                "of other steps"
            )
        with atomic_directory(directory) as temporary:
            if copy_of:
                shutil.copytree(copy_of, temporary, dirs_exist_ok=True)
            else:
                model.save_pretrained(temporary, **whole)
                tokenizer.save_pretrained(temporary)
                files = sorted(file for file in temporary.rglob("*") if file.is_file())
                write_checksums(temporary, [file.relative_to(temporary).as_posix() for file in files])
    accelerator.wait_for_everyone()
