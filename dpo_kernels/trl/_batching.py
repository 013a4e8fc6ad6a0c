"""DPO on rows without padding, or in which each prompt is there once."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch.distributed.tensor import DTensor
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_kernels.data.packing import PackedCollator
from dpo_kernels.models.head import unwrap
from dpo_kernels.models.layouts import use_layouts
from dpo_kernels.models.segments import ATTENTION
from dpo_kernels.trl._dpo import check_options
from dpo_kernels.trl._verify import TESTED, is_to_be_verified

logger = logging.getLogger(__name__)

Batching = Literal["auto", "concatenated", "padding_free", "shared_prefix", "packed_shared_prefix"]
BATCHINGS: tuple[Batching, ...] = get_args(Batching)
SIDES = ("chosen", "rejected")
REF_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
USUAL_ATTENTION = (None, "eager", "sdpa", ATTENTION)  # what models have without having been asked


def with_batching(init: Callable[..., None]) -> Callable[..., None]:
    """An `__init__` with one keyword more."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, batching: Batching = "concatenated", **kwargs: Any) -> None:
        if batching not in BATCHINGS:
            raise ValueError(f"batching: expected one of {list(BATCHINGS)}, got {batching!r}")
        if batching != "concatenated":
            collator = inspect.signature(init).bind_partial(self, *args, **kwargs).arguments.get("data_collator")
            if collator is not None:
                raise ValueError(
                    f"data_collator: expected None beside batching {batching!r}, which brings its own, got "
                    f"{type(collator).__name__}"
                )
        self.batching = batching
        init(self, *args, **kwargs)

    return __init__


def set_up(trainer: Any) -> None:
    """Gives a trainer whose models are there, and have scored nothing yet, what its `batching` takes."""
    asked = trainer.batching
    if asked == "concatenated":
        return
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    try:
        _refuse(trainer, [unwrap(model).config._attn_implementation for model in models])
        use_layouts(*models)
    except ValueError as error:
        if asked != "auto":
            raise ValueError(f"batching: expected concatenated, got {asked!r}: {error}") from error
        logger.warning("batching: concatenated, since %s", error)
        trainer.batching = "concatenated"
        return
    trainer.batching = "packed_shared_prefix" if asked == "auto" else asked
    trainer.data_collator = LaidOutCollator.like(trainer.data_collator, trainer.batching)


def _refuse(trainer: Any, attentions: Sequence[str | None]) -> None:
    """Raises `ValueError` for what goes with concatenated batches alone, or has not been tried with others."""
    if trainer._is_vision_dataset:
        raise ValueError("the dataset has images, which are for rows of one sequence each")
    if trainer.compute_metrics is not None:
        raise ValueError("compute_metrics: expected None, since there are no logits of sequences, got a function")
    if noise := trainer.args.neftune_noise_alpha:
        raise ValueError(f"neftune_noise_alpha: expected none, since its noise is by the length of a row, got {noise}")
    asked = (trainer.args.model_init_kwargs or {}).get("attn_implementation")
    unusual = next((attention for attention in (asked, *attentions) if attention not in USUAL_ATTENTION), asked)
    if unusual is not None:
        raise ValueError(f"attn_implementation: expected none, since batching brings its own, got {unusual!r}")
    if untried := _parallelism(trainer):
        raise ValueError(f"it has not been tried with {untried}")
    if is_to_be_verified(trainer):
        raise ValueError(f"it is for TRL {' and '.join(TESTED)}, with whose loss it has been compared")
    if trainer.batching == "auto" and trainer.aux_loss_enabled and trainer.router_aux_loss_coef:
        raise ValueError(
            f"{type(unwrap(trainer.model)).__name__} has a loss of its router, which counts all tokens computed"
        )
    check_options(trainer)  # TRL's own loss, which takes more, knows no layouts


def _parallelism(trainer: Any) -> str:
    """What there is beside processes that hold the whole model; "" if nothing."""
    config = trainer.accelerator.parallelism_config
    sizes = [getattr(config, f"{kind}_size", 1) for kind in ("tp", "cp", "sp")]
    sizes.append(getattr(unwrap(trainer.model), "tp_size", None) or 1)
    in_pieces = any(isinstance(weight, DTensor) for weight in trainer.model.parameters())
    found = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
        "parallelism of tensors or sequences": max(sizes) > 1 or in_pieces,
        "torch_compile": trainer.args.torch_compile,
    }
    return ", ".join(name for name, is_there in found.items() if is_there)


class _Sequence(NamedTuple):
    """What truncation leaves of a prompt and a completion."""

    prompt: list[int]
    completion: list[int]
    weights: list[float] | None  # of the completion's tokens


@dataclass
class LaidOutCollator:
    """TRL's `DataCollatorForPreference` whose rows are those of `PackedCollator`.

    Takes the examples of both: `prompt_ids`, `chosen_ids`, `rejected_ids`, and optionally `ref_chosen_logps` and
    `ref_rejected_logps`, a `weight`, and `chosen_token_weights` and `rejected_token_weights`.

    Args:
        pack: lays out the rows.
        max_length: of a sequence, in tokens, or None.
        truncation_mode: "keep_start" or "keep_end". Where the end is kept and prompts of a pair are cut at different
            places, they are different prompts, and each is there.

    Returns a dict with what `PackedCollator` gives, but for
        `shift_labels` `[2B, L]`: its `labels`, which are aligned. Trainers count what is called labels;
        `completion_lengths` `[2B]` int64: what losses divide by, tokens of a completion whose weight is not 0, be it
            that one is the first of all, which nothing scores;
        `sequence_lengths` `[2B]` int64: tokens of prompt and completion;
        `ref_chosen_logps`, `ref_rejected_logps` `[B]` float32: its `ref_logps`.

    Raises `ValueError` as `PackedCollator` does.
    """

    pack: PackedCollator
    max_length: int | None = None
    truncation_mode: str = "keep_start"

    def __post_init__(self) -> None:
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"truncation_mode: expected keep_start or keep_end, got {self.truncation_mode!r}")

    @classmethod
    def like(cls, trls: DataCollatorForPreference, batching: Batching) -> LaidOutCollator:
        """With the settings of TRL's."""
        pack = PackedCollator(
            trls.pad_token_id,
            trls.pad_to_multiple_of,
            packed=batching in ("padding_free", "packed_shared_prefix"),
            shared_prefix=batching in ("shared_prefix", "packed_shared_prefix"),
        )
        return cls(pack, trls.max_length, trls.truncation_mode)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pairs = [tuple(self._truncated(example, side) for side in SIDES) for example in examples]
        batch = self.pack([_example(*pair) | _carried(of) for pair, of in zip(pairs, examples, strict=True)])
        batch["shift_labels"] = batch.pop("labels")
        del batch["num_labelled"]
        if "ref_logps" in batch:
            batch |= zip(REF_LOGPS, batch.pop("ref_logps").chunk(2), strict=True)
        sequences = [pair[side] for side in range(2) for pair in pairs]
        counted = [sum(weight != 0 for weight in _weights(each)) for each in sequences]
        batch["completion_lengths"] = torch.tensor(counted)
        batch["sequence_lengths"] = torch.tensor([len(each.prompt) + len(each.completion) for each in sequences])
        return batch

    def _truncated(self, example: Mapping[str, Any], side: str) -> _Sequence:
        prompt, completion = list(example["prompt_ids"]), list(example[f"{side}_ids"])
        weights = example.get(f"{side}_token_weights")
        if weights is not None and len(weights) != len(completion):
            raise ValueError(f"{side}_token_weights: expected {len(completion)} numbers, got {len(weights)}")
        room = len(prompt) + len(completion) if self.max_length is None else self.max_length
        of_prompt, of_completion = slice(room), slice(max(0, room - len(prompt)))
        if self.truncation_mode == "keep_end":
            of_prompt = slice(max(0, len(prompt) + len(completion) - room), None)
            of_completion = slice(max(0, len(completion) - room), None)
        kept = None if weights is None else list(weights)[of_completion]
        return _Sequence(prompt[of_prompt], completion[of_completion], kept)


def _weights(sequence: _Sequence) -> list[float]:
    return [1.0] * len(sequence.completion) if sequence.weights is None else sequence.weights


def _example(chosen: _Sequence, rejected: _Sequence) -> dict[str, Any]:
    """As `PackedCollator` takes it: of a pair with two prompts, each is the beginning of a response, which counts
    nothing."""
    shared = chosen.prompt == rejected.prompt
    example: dict[str, Any] = {"prompt_ids": chosen.prompt if shared else []}
    for side, (prompt, completion, weights) in zip(SIDES, (chosen, rejected), strict=True):
        if shared:
            example |= {f"{side}_ids": completion, f"{side}_token_weights": weights}
        else:
            of_prompt, of_completion = [0.0] * len(prompt), weights or [1.0] * len(completion)
            example |= {f"{side}_ids": prompt + completion, f"{side}_token_weights": of_prompt + of_completion}
    return example


def _carried(example: Mapping[str, Any]) -> dict[str, Any]:
    return {name: example[name] for name in ("weight", *REF_LOGPS) if name in example}
