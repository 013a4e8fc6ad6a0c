"""Weights in shards: FSDP2, called directly, so that processes on CPUs do what processes on GPUs do.

`torch.distributed.fsdp.fully_shard` gathers the weights of a layer for its forward and again for its backward, reduces
its gradients to their shards, and leaves every process with its part of weights, gradients and optimizer state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_kernels.models.head import LMHead, unwrap
from dpo_kernels.models.operands import name_of
from dpo_kernels.training.checkpoint import check_trained, tensor_digests

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

WEIGHT = "weight"  # beside the names of AdamW's entries


class Sharded(nn.Module):
    """A model in shards, and calls of functions that compute with it: `sharded(function, *arguments)`.

    What belongs to no layer, such as the head and the last norm, is gathered once when a call begins, and is whole in
    `function` and in the backward of what it returns: a loss in there multiplies by the head's weight as if there were
    no shards. Then, or where there is no gradient after `free`, the process has its shards alone again. An embedding
    matrix that is not the head's too is gathered for the look-up alone, a layer for itself.

    Args:
        model: a transformers causal language model, in adapters or without, the same in all processes.
        accelerator: of the run; its autocast is around each call.
        frozen: it has no gradient: what a call gathers is freed at its end.

    Raises:
        ValueError: the model names no layers, or its weights are not the same in all processes.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, *, frozen: bool = False) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        super().__init__()
        self.model, self.autocast = model, accelerator.autocast
        check_same_everywhere(model)
        mesh = init_device_mesh(accelerator.device.type, (torch.distributed.get_world_size(),))
        policy = MixedPrecisionPolicy()
        if takes_bf16(model, accelerator):
            policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in reversed(layers_of(model)):  # those inside others first
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        embedding: Any = unwrap(model).get_input_embeddings()
        head = LMHead(model, at_output_layer=True).output_layer()
        if set(embedding.parameters()).isdisjoint(head.parameters()):
            fully_shard(embedding, mesh=mesh)
        fully_shard(self, mesh=mesh, reshard_after_forward=frozen)

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with self.autocast():
            return function(*arguments)

    def free(self) -> None:
        """Leaves the shards alone of what calls without a backward have gathered."""
        self.reshard()  # type: ignore[operator]  # of FSDPModule, which this is by now


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The modules that the model itself names as those that are not to be split, outer ones first."""
    causal = unwrap(model)
    names = set(getattr(causal, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ValueError(
            f"sharding: fsdp2 gathers a model layer by layer, and {name_of(causal)} names no layers "
            f"(_no_split_modules is {sorted(names)})"
        )
    return found


def takes_bf16(model: nn.Module, accelerator: Accelerator) -> bool:
    """Whether layers are gathered in bf16: where autocast has their matrices rounded to it anyway. What goes from layer
    to layer stays as it is, and on a CPU `layer_norm` takes no weights of another precision than that."""
    if accelerator.mixed_precision != "bf16":
        return False
    return accelerator.device.type == "cuda" or not any(isinstance(part, nn.LayerNorm) for part in model.modules())


def check_ready(accelerator: Accelerator, sharding: str, timeout: timedelta) -> None:
    """Raises `ValueError` where weights cannot be sharded. A process alone gets a group of its own: what it has is all,
    and it can go on from the shards of several."""
    device = accelerator.device.type
    if device not in ("cpu", "cuda"):
        raise ValueError(f"sharding: {sharding} runs on cuda or cpu, got the device {device}")
    if not torch.distributed.is_initialized():
        backend = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}[device]
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    if torch.distributed.get_world_size() == 1:
        logger.warning("sharding: %s in one process, which holds all shards; start several with torchrun", sharding)


def check_same_everywhere(model: nn.Module) -> None:
    """Each process keeps its shard of the weights that it has loaded or drawn: were they others, they would be a
    mixture."""
    mine = tensor_digests(dict(model.named_parameters()))
    everyone = from_all(mine)
    if differing := [name for name, digest in mine.items() if any(each.get(name) != digest for each in everyone)]:
        raise ValueError(
            f"sharding: expected the same weights in all processes before they are sharded, got {len(differing)} that "
            f"differ, the first is {differing[0]}: do all read the same files, with the same versions?"
        )


def from_all(mine: Any) -> list[Any]:
    """What each process of the run has there."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def local(tensor: Any) -> Tensor:
    """The shard of this process, or a tensor that is whole as it is."""
    if hasattr(tensor, "ds_tensor"):  # of ZeRO-3, with padding at the end
        begin = torch.distributed.get_rank() * tensor.partition_numel()
        shard: Tensor = tensor.ds_tensor.detach()[: max(0, tensor.ds_numel - begin)]
        return shard
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Any) -> Tensor:
    """Gathered, by all processes together."""
    if hasattr(tensor, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            gathered: Tensor = tensor.detach().clone()
        return gathered
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def size_of(weight: Any) -> int:
    """How many numbers a weight has, in all shards together."""
    return getattr(weight, "ds_numel", weight.numel())


@torch.no_grad()
def whole_state(sharded: Any, keep: bool) -> dict[str, Tensor]:
    """The state dictionary of the model of a `Sharded` or a `Zero` on the CPU, one tensor gathered after the other, by
    all processes together; those that do not `keep` it get an empty one. Of a model in adapters it is what PEFT may
    save: what is trained, and embeddings and head where these have adapters."""
    sharded.free()
    model: Any = sharded.model
    state = model.state_dict(keep_vars=True)
    if hasattr(model, "get_base_model"):
        causal = unwrap(model)
        ends = [part for part in (causal.get_input_embeddings(), causal.get_output_embeddings()) if part is not None]
        of_ends = {id(weight) for part in ends for weight in part.parameters()}
        if not any(weight.requires_grad for part in ends for weight in part.parameters()):
            of_ends.clear()
        state = {name: each for name, each in state.items() if each.requires_grad or id(each) in of_ends}
    found: dict[str, Tensor] = {}
    gathered: dict[int, Tensor] = {}
    for name, tensor in state.items():
        if id(tensor) not in gathered:  # a tied one once
            value = whole(tensor)
            # A copy, since ZeRO-2 has all weights in one piece of memory
            gathered[id(tensor)] = value.detach().to("cpu", copy=True) if keep else value.new_empty(0)
        if keep:
            found[name] = gathered[id(tensor)]
    return found


def save_shards(directory: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Each process writes its shards of the weights and of the optimizer's state into a directory that is there."""
    from torch.distributed import checkpoint

    checkpoint.save(_by_name(weights, optimizer), checkpoint_id=directory)


def start_saving_shards(
    directory: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, group: ProcessGroup
) -> Future[Any]:
    """The same while weights and optimizer go on: of what they are now there is a copy on the CPU before this returns.
    `group` is that of `group_for_saving`. Of the first process, what is returned is done when all have written."""
    from torch.distributed import checkpoint

    started = checkpoint.async_save(_by_name(weights, optimizer), checkpoint_id=directory, process_group=group)
    assert isinstance(started, Future)
    return started


def group_for_saving(timeout: timedelta) -> ProcessGroup:
    """Of all processes, for what a thread has to say to those of the others: in the group that trains, it would get
    between the collectives. On CPUs, on which copies of shards are, whatever device trains."""
    if not torch.distributed.is_gloo_available():
        raise ValueError("async_checkpoints: expected a PyTorch with gloo, over which processes agree, got one without")
    return torch.distributed.new_group(backend="gloo", timeout=timeout)


def _by_name(weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    tensors: dict[str, Any] = {f"{WEIGHT}/{name}": weight.detach() for name, weight in weights.items()}
    for name, weight in weights.items():
        tensors |= {f"{entry}/{name}": value for entry, value in optimizer.state[weight].items()}
    return tensors


def load_shards(
    directory: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]
) -> None:
    """Fills weights and optimizer with what `save_shards` wrote, be it in another number of processes. `groups` are
    the optimizer's `param_groups` as they were saved.

    Raises `ValueError` where other weights are trained than were.
    """
    from torch.distributed import checkpoint

    saved = checkpoint.FileSystemReader(directory).read_metadata().state_dict_metadata
    check_trained(directory.parent, {name.partition("/")[2] for name in saved}, weights)
    tensors: dict[str, Any] = {}
    for key in saved:
        entry, _, name = key.partition("/")
        weight = weights[name]
        if entry == WEIGHT:
            tensors[key] = weight.detach()
        else:
            tensors[key] = torch.zeros(()) if entry == "step" else torch.zeros_like(weight.detach())
    checkpoint.load(tensors, checkpoint_id=directory)
    numbers = {id(weight): number for number, weight in enumerate(_in_order(optimizer))}
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        entry, _, name = key.partition("/")
        if entry != WEIGHT:
            state.setdefault(numbers[id(weights[name])], {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _in_order(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """As `state_dict` numbers them."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]
