"""The reference's log-probabilities: from a frozen copy, from the model without its adapter, or computed once and kept.

The reference of DPO is the checkpoint that the policy starts from. Under another model the loss still falls, towards
nothing in particular, which is why a different reference has to be asked for.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_kernels.linear_reference import linear_reference_logps
from dpo_kernels.models.head import LMHead
from dpo_kernels.training.checkpoint import atomic_file, tensor_digests
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.policy import hidden_of, overflow_named
from dpo_kernels.training.schedule import filled, of_process, shared_out
from dpo_kernels.training.sharding import Sharded
from dpo_kernels.training.sizes import Lengths, data_fingerprint, rankings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from dpo_kernels.training.pairs import Pairs
    from dpo_kernels.training.zero import Zero

logger = logging.getLogger(__name__)

LOGP_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class Reference:
    """A frozen model that scores both responses of each pair.

    Args:
        head: of the frozen model, or of the policy if `adapter` is given.
        adapter: the PEFT model whose adapters are off while it scores.
        sharded: what gathers the weights of the frozen model, if they are in shards.
        config: `loss_type`, `ld_alpha`, `temperature`, `chunk_bytes` and `impl` are those of the loss.
    """

    def __init__(
        self,
        head: LMHead,
        config: TrainConfig,
        adapter: nn.Module | None = None,
        sharded: Sharded | Zero | None = None,
    ) -> None:
        self.head, self.config, self.adapter, self.sharded = head, config, adapter, sharded

    @torch.no_grad()
    def logps(self, batch: dict[str, Any], gradients: Sequence[str] = ()) -> Tensor:
        """Log-probabilities [S] fp32 of a batch of `PairCollator`, weighted by token as it and `ld_alpha` have it, and
        summed as the policy's are that takes these gradients of its head's operands."""
        if self.sharded is not None:
            logps: Tensor = self.sharded(self._logps, batch, gradients)
            return logps
        return self._logps(batch, gradients)

    def _logps(self, batch: dict[str, Any], gradients: Sequence[str]) -> Tensor:
        config = self.config
        with _without(self.adapter):
            hidden, _ = hidden_of(self.head, batch)
            with overflow_named(hidden, "reference", self.head.model):
                hidden, weight, bias = self.head.operands(hidden)
                names: Any = {"loss_type": config.loss_type, "impl": config.impl}
                output = linear_reference_logps(
                    hidden,
                    weight,
                    batch["labels"],
                    gradients=gradients,
                    bias=bias,
                    logit_scale=self.head.logit_scale,
                    softcap=self.head.softcap,
                    temperature=config.temperature,
                    shift="layout" not in batch,  # whose labels are aligned
                    predictors=batch.get("predictors"),
                    pairs=batch.get("pairs"),
                    ld_alpha=config.ld_alpha,
                    token_weights=batch.get("token_weights"),
                    num_labelled=batch["num_labelled"],
                    chunk_bytes=config.chunk_bytes,
                    **names,
                )
        return output.logps.float()


@contextmanager
def _without(adapter: Any) -> Iterator[None]:
    """The adapters off and no dropout, which neither the policy's mode nor its random state notices."""
    training = adapter is not None and adapter.training
    if training:
        adapter.eval()
    with adapter.disable_adapter() if adapter is not None else nullcontext():
        yield
    if training:
        adapter.train()


def frozen_copy(model: nn.Module) -> nn.Module:
    """The model as it is now, in evaluation mode and out of reach of the optimizer."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def parameter_digests(model: nn.Module) -> dict[str, str]:
    """A SHA-256 of every parameter and buffer by name: equal for equal names, dtypes, shapes and bits alone."""
    return tensor_digests(dict(model.named_parameters()) | dict(model.named_buffers()))


def model_fingerprint(model: nn.Module, digests: dict[str, str]) -> str:
    """Identifies what the model computes: its class, its configuration, and every bit of its weights."""
    settings = model.config.to_dict()  # type: ignore[union-attr,operator]
    for key in ("_name_or_path", "transformers_version", "_commit_hash"):
        settings.pop(key, None)
    return _digest([type(model).__name__, settings, sorted(digests.items())])


def resolve(config: TrainConfig) -> str | None:
    """What `config.reference` comes to: "base", "copy", "precompute", "other" (a model named there), or None."""
    if config.reference_free:
        return None
    if config.reference == "auto":
        return "base" if config.lora_r else "copy"
    if config.reference == config.model:
        return "copy"
    return {"adapter-free": "base", "base": "base", "copy": "copy", "precompute": "precompute"}.get(
        config.reference, "other"
    )


def check_same_checkpoint(config: TrainConfig, policy: dict[str, str], reference: dict[str, str]) -> None:
    """Raises `ValueError` naming both models unless their digests agree or `allow_different_reference` is set."""
    differing = sorted(name for name in policy.keys() | reference.keys() if policy.get(name) != reference.get(name))
    if not differing:
        return
    found = f"{len(differing)} of their tensors differ, the first is {differing[0]}"
    if not config.allow_different_reference:
        raise ValueError(
            f"reference: {config.reference!r} is not the checkpoint that the policy {config.model!r} starts from: "
            f"{found}. DPO measures how far the policy moves from where it starts: use reference 'copy', or "
            "allow_different_reference if another reference is what you mean"
        )
    logger.warning(
        "the reference %r is not the policy's starting checkpoint %r: %s", config.reference, config.model, found
    )


def cached_logps(
    reference: Reference,
    dataset: Dataset,
    pairs: Pairs,
    fingerprint: str,
    accelerator: Accelerator,
    kernels: str,
) -> Dataset:
    """The dataset with the columns `ref_chosen_logps` and `ref_rejected_logps`, or for rankings `ref_logps`, read from
    the cache or computed once.

    The cache is keyed by the token ids, by the model (`fingerprint`, see `model_fingerprint`), and by everything else
    that the values depend on but the order of floating-point sums: dtypes, attention, token weights, temperature,
    implementation and kernels, device and versions.
    """
    from safetensors.torch import save_file

    config = reference.config
    key = {
        "data": data_fingerprint(dataset, weighted=False),
        "model": fingerprint,
        "head": [reference.head.logit_scale, reference.head.softcap],
        "device": accelerator.device.type,
        "kernels": kernels,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        **{
            name: getattr(config, name)
            for name in ("dtype", "mixed_precision", "attn_implementation", "ld_alpha", "temperature", "impl")
        },
    }
    path = Path(config.cache_dir).expanduser() / "reference" / f"{_digest(key)}.safetensors"
    logps = _read(path)
    found = torch.tensor(float(logps is not None), device=accelerator.device)
    everywhere = accelerator.reduce(found, "mean") == 1  # processes on several machines need not share a cache
    if logps is not None and everywhere:
        logger.info("reference log-probabilities of %d pairs: read from %s", len(dataset), path)
    else:
        logger.info("reference log-probabilities of %d pairs: computing them once for %s", len(dataset), path)
        logps = _score(reference, dataset, pairs, accelerator)
        if accelerator.is_local_main_process:
            with atomic_file(path) as temporary:
                metadata = {"key": json.dumps(key, default=str), "sha256": _checksum(logps)}
                save_file({"logps": logps}, temporary, metadata=metadata)
    if rankings(dataset):
        ends = np.cumsum(Lengths.of(dataset).counts)
        return dataset.add_column("ref_logps", [each.tolist() for each in np.split(logps.numpy(), ends[:-1])])
    for column, values in zip(LOGP_COLUMNS, logps.view(-1, 2).T, strict=True):
        dataset = dataset.add_column(column, values.numpy())
    return dataset


def _read(path: Path) -> Tensor | None:
    """Log-probabilities from the cache, or None where they are not there, or are no longer what was written."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            logps, checksum = file.get_tensor("logps"), (file.metadata() or {}).get("sha256")
    except SafetensorError as error:
        logps, checksum = None, str(error)
    if logps is not None and checksum == _checksum(logps):
        return logps
    warnings.warn(
        f"{path} is damaged, or of an earlier version: its log-probabilities are computed again", stacklevel=4
    )
    return None


def _checksum(logps: Tensor) -> str:
    return hashlib.sha256(logps.contiguous().numpy().tobytes()).hexdigest()


def _score(reference: Reference, dataset: Dataset, pairs: Pairs, accelerator: Accelerator) -> Tensor:
    """Log-probabilities [S] of all responses, those of one example after the other. Similar lengths together, and
    shared out among the processes."""
    from tqdm import tqdm

    config, lengths, sizes = reference.config, Lengths.of(dataset), pairs.sizes(dataset)
    order = np.argsort(sizes.tokens, kind="stable")
    rank, processes = accelerator.process_index, accelerator.num_processes
    size = config.per_device_eval_batch_size or config.per_device_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    if config.max_tokens_per_batch is not None and config.per_device_eval_batch_size is None:
        batches = filled(order, sizes, config.max_tokens_per_batch)
    logps = torch.zeros(len(lengths.responses), device=accelerator.device)
    mine = of_process(shared_out(batches, sizes, processes), rank, reference.sharded is not None)
    show = config.progress_bar and accelerator.is_main_process
    for rows, counts in tqdm(mine, desc="reference", unit="batch", disable=not show):
        with accelerator.autocast():
            values = reference.logps(pairs.batch(dataset, rows))
        if not counts:
            continue
        if not rankings(dataset):  # chosen ones first
            values = values.view(2, -1).T.flatten()
        logps[torch.as_tensor(lengths.numbers(rows), device=logps.device)] = values
    return accelerator.reduce(logps, "sum").cpu()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
