"""Weights, gradients and moments in shards by DeepSpeed: ZeRO-2 and ZeRO-3, called directly, so that processes on CPUs
do what processes on GPUs do.

With ZeRO-2 each process has all weights, its part of the gradients that are reduced, and the moments of its part; with
ZeRO-3 of the weights too its part alone, and DeepSpeed gathers those of a module for its forward and for its backward.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_kernels.models.head import LMHead, unwrap
from dpo_kernels.training.checkpoint import check_trained
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.sharding import WEIGHT, check_same_everywhere

if TYPE_CHECKING:
    from accelerate import Accelerator

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Call(nn.Module):
    """What DeepSpeed takes for the model: its forward is a call of some function that computes with it. DeepSpeed looks
    for tensors in what a module is given, so this one is given nothing."""

    def __init__(self, model: nn.Module, autocast: Callable[[], Any]) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast
        self.function: Callable[[], Any] | None = None

    def forward(self) -> Any:
        assert self.function is not None
        with self.autocast():
            return self.function()


class Zero:
    """A model in DeepSpeed's hands, and calls of functions that compute with it: `zero(function, *arguments)`.

    With ZeRO-3 the head is gathered once when a call begins, and is whole in `function` and in the backward of what it
    returns: a loss in there multiplies by the head's weight as if there were no shards. `backward`, or where there is
    none `free`, leaves the process with its shards alone again.

    Args:
        model: a transformers causal language model, in adapters or without, the same in all processes.
        accelerator: of the run; its autocast is around each call.
        config: of the run.
        optimizer: of the model's trainable weights, which DeepSpeed has step on this process's part of them; without
            it the model is frozen, and what a call gathers is freed at its end (ZeRO-3 alone).

    Raises:
        ValueError: the model's weights are not the same in all processes, or DeepSpeed is not for this device.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        config: TrainConfig,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        deepspeed = deepspeed_for(accelerator)
        check_same_everywhere(model)
        self.model: Any = model
        self.optimizer, self.device = optimizer, accelerator.device
        self.stage = 3 if config.sharding == "zero3" else 2
        self.call = _Call(model, accelerator.autocast)
        settings = _settings(self.stage, config, model)
        if deepspeed.utils.groups._WORLD_GROUP is None:  # that of DeepSpeed's own making has PyTorch's timeout
            deepspeed.utils.groups._WORLD_GROUP = torch.distributed.new_group(timeout=config.timeout)
        if self.stage == 3:
            head: Any = LMHead(model, at_output_layer=True).output_layer()
            deepspeed.zero.Init(module=self.call, config_dict_or_path=settings)  # weight by weight to the device
            for buffer in model.buffers():
                buffer.data = buffer.to(accelerator.device)
            for weight in head.parameters():
                weight.is_external_param = True  # which no module frees that has used it
        self.engine, *_ = deepspeed.initialize(model=self.call, optimizer=optimizer, config=settings)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.call.function = functools.partial(function, *arguments)
        try:
            return self.engine()
        finally:
            self.call.function = None
            if self.optimizer is None:
                self.free()

    def free(self) -> None:
        """Leaves the shards alone of what calls without a backward have gathered."""
        if self.stage == 3:
            self.engine.empty_partition_cache()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the mean of the processes' gradients to this one's part; `last`: before a step."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)
        self.free()

    def take_step(self) -> Tensor:
        """An optimizer step, clipped as the configuration has it. Returns the norm [] of all gradients before that."""
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        return torch.where(norm < 0, math.nan, norm)  # DeepSpeed's -1 stands for what is not finite

    def close(self) -> None:
        """Takes DeepSpeed's hooks off. It remembers all models that it has had, whose shards go here, and what steps on
        them with its buffers."""
        self.engine.destroy()
        if self.stage == 3:
            shards = (weight.ds_tensor for weight in self.model.parameters())
            for shard in shards:
                shard.data = shard.new_empty(0)
        if self.optimizer is not None:
            vars(self.engine.optimizer).clear()
            self.optimizer.state.clear()
            self.optimizer.param_groups.clear()

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's `param_groups` but for the weights."""
        assert self.optimizer is not None
        return [
            {name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups
        ]

    def take_over(self) -> None:
        """The weights that the model computes with become those that the optimizer steps on."""
        optimizer = self.engine.optimizer
        if self.stage == 2:
            optimizer.update_lp_params()
            return
        for shards, flat in zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            shards.data.copy_(flat.data)

    def parts(self, weights: Mapping[str, Tensor]) -> Iterator[Part]:
        """What this process updates of these, which are all that are trained."""
        names = {id(weight): name for name, weight in weights.items()}
        optimizer, rank = self.engine.optimizer, torch.distributed.get_rank()
        if self.stage == 3:  # a part of each weight, and in it of a last one padding
            for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
                place = 0
                for weight in group:
                    size = weight.partition_numel()
                    count = min(size, weight.ds_numel - rank * size)
                    if count > 0:
                        yield Part(names[id(weight)], rank * size, flat, place, count)
                    place += size
            return
        for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            begin, end, place = rank * flat.numel(), (rank + 1) * flat.numel(), 0  # of all weights in one row
            for weight in group:
                first, last = max(begin, place), min(end, place + weight.numel())
                if first < last:
                    yield Part(names[id(weight)], first - place, flat, first - begin, last - first)
                place += weight.numel()


class Part(NamedTuple):
    """So many numbers of a weight, from `start` on, and where they are in what an optimizer steps on."""

    name: str
    start: int
    flat: Tensor  # [n] fp32, as are its moments
    place: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size

    def of(self, flat: Tensor) -> Tensor:
        """[size], a view."""
        return flat.detach()[self.place : self.place + self.size]


def deepspeed_for(accelerator: Accelerator) -> Any:
    """The package, for the device that the run is on. It asks the environment for that when it is imported, and for the
    rank again and again, which a process that was started alone has not there."""
    kind = accelerator.device.type
    os.environ.setdefault("DS_ACCELERATOR", kind)
    os.environ.setdefault("LOCAL_RANK", str(accelerator.local_process_index))
    import deepspeed

    found = deepspeed.get_accelerator().device_name()
    if found != kind:
        raise ValueError(
            f"sharding: DeepSpeed is set up for {found}, and the run is on {kind}: set DS_ACCELERATOR={kind} in the "
            "environment"
        )
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # What it calls by its older name: one line of that a call
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


@contextmanager
def as_before_deepspeed() -> Iterator[None]:
    """Takes back what DeepSpeed changes in a process, however the run ends: the rank that `deepspeed_for` puts into the
    environment, which accelerate would take for that of one of several processes; a function of PyTorch's; and a group
    of processes that it remembers, and that may not be there in the next run."""
    alone, linear = "LOCAL_RANK" not in os.environ, nn.functional.linear
    try:
        yield
    finally:
        if alone:
            os.environ.pop("LOCAL_RANK", None)
        nn.functional.linear = linear
        groups: Any = sys.modules.get("deepspeed.utils.groups")
        if groups is not None:
            groups._WORLD_GROUP = None


def _settings(stage: int, config: TrainConfig, model: nn.Module) -> dict[str, Any]:
    """DeepSpeed's own. The loop divides its loss by all that there is to divide by, but the number of processes."""
    hidden_size = unwrap(model).get_input_embeddings().weight.shape[-1]
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": hidden_size**2}
    if stage == 3:
        zero["stage3_prefetch_bucket_size"] = int(0.9 * hidden_size**2)
        # Nothing stays gathered because it is small, or because it will be needed again.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    return {
        "train_micro_batch_size_per_gpu": 1,  # is asked for, and used for nothing
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }


def save_parts(directory: Path, weights: Mapping[str, Tensor], zero: Zero) -> None:
    """Each process writes its parts of the weights and of the moments into a directory that is there."""
    from torch.distributed import checkpoint

    assert zero.optimizer is not None
    tensors: dict[str, Tensor] = {}
    for part in zero.parts(weights):
        state = zero.optimizer.state[part.flat]
        tensors["step"] = torch.as_tensor(state["step"])
        tensors[f"{WEIGHT}/{part.name}/{part.start}"] = part.of(part.flat)
        tensors |= {f"{moment}/{part.name}/{part.start}": part.of(state[moment]) for moment in MOMENTS}
    checkpoint.save(tensors, checkpoint_id=directory)


def load_parts(directory: Path, weights: Mapping[str, Tensor], zero: Zero, groups: list[dict[str, Any]]) -> None:
    """Fills weights and optimizer with what `save_parts` wrote, be it in another number of processes, which have other
    parts. `groups` are the optimizer's `param_groups` as they were saved.

    Raises `ValueError` where other weights are trained than were.
    """
    from torch.distributed import checkpoint

    saved: dict[str, list[tuple[int, int]]] = {}  # of each weight where its parts begin, and how long they are
    metadata: dict[str, Any] = checkpoint.FileSystemReader(directory).read_metadata().state_dict_metadata
    for key, tensor in metadata.items():
        entry, _, place = key.partition("/")
        name, _, begin = place.rpartition("/")
        if entry == WEIGHT:
            saved.setdefault(name, []).append((int(begin), tensor.size.numel()))
    check_trained(directory.parent, saved, weights)
    assert zero.optimizer is not None
    parts = list(zero.parts(weights))
    tensors: dict[str, Tensor] = {"step": torch.zeros(())}
    for part in parts:
        for start, size in saved[part.name]:
            if start < part.end and part.start < start + size:
                for entry in (WEIGHT, *MOMENTS):
                    tensors[f"{entry}/{part.name}/{start}"] = torch.empty(size)
    checkpoint.load(tensors, checkpoint_id=directory)
    step = tensors.pop("step")
    for part in parts:
        state = zero.optimizer.state[part.flat]
        state["step"] = step.to(part.flat.device if zero.optimizer.defaults["fused"] else "cpu", copy=True)
        for moment in MOMENTS:
            state.setdefault(moment, torch.zeros_like(part.flat))
        for start, size in saved[part.name]:
            first, last = max(start, part.start), min(start + size, part.end)
            if first < last:
                for entry, flat in {WEIGHT: part.flat, **{moment: state[moment] for moment in MOMENTS}}.items():
                    read = tensors[f"{entry}/{part.name}/{start}"][first - start : last - start]
                    part.of(flat)[first - part.start : last - part.start].copy_(read)
    for group, values in zip(zero.optimizer.param_groups, groups, strict=True):
        group |= values
    zero.take_over()
