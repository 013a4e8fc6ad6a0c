"""What a run works with, made from its settings: accelerator, data, models, reference, optimizer, schedule."""

from __future__ import annotations

import functools
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_kernels.dispatch import check_runs
from dpo_kernels.losses import BATCH_LOSSES
from dpo_kernels.models.head import LMHead
from dpo_kernels.models.layouts import use_layouts
from dpo_kernels.training import reference_model as references
from dpo_kernels.training.alike import check_alike, check_settings, check_shared
from dpo_kernels.training.checkpoint import find_checkpoint, read_progress, remove_leftovers
from dpo_kernels.training.config import TrainConfig, practice_warnings, trajectory_settings
from dpo_kernels.training.pairs import Pairs
from dpo_kernels.training.policy import PolicyLoss, add_lora, disable_dropout, load_model
from dpo_kernels.training.schedule import Schedule, Step, shares
from dpo_kernels.training.sharding import Sharded, check_ready, layers_of, size_of, whole
from dpo_kernels.training.sizes import Sizes, check_fits, data_fingerprint
from dpo_kernels.training.values import in_one_line
from dpo_kernels.training.zero import Zero
from dpo_kernels.tuning.heads import head_of
from dpo_kernels.tuning.trial import Kernels

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """The parts of a run. Nothing here knows how far it has come, but weights, optimizer and schedule."""

    config: TrainConfig
    accelerator: Accelerator
    checkpoint: Path | None  # what to go on from
    pairs: Pairs
    sizes: Sizes  # of the training pairs
    held_out_sizes: Sizes | None
    model: Any  # the policy, with its adapters if it has any
    policy_loss: PolicyLoss  # the policy and the loss
    policy: Any  # policy_loss inside what accelerate puts around it, or within what gathers the model's shards
    sharded: Sharded | Zero | None  # the model, where it or its gradients are in shards
    reference: references.Reference | None  # None where none is needed, and where its values are columns of the pairs
    starts_at_reference: bool
    weights: dict[str, nn.Parameter]  # those that are trained
    optimizer: torch.optim.Optimizer
    stepper: Any  # the optimizer inside what accelerate puts around it; DeepSpeed has its own
    scheduler: Any
    schedule: Schedule
    identity: dict[str, Any]  # what the trajectory follows from
    kernels: Kernels  # of the head

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def reference_logps(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The entry of a batch that the reference adds, if there is one."""
        if not self.reference:
            return {}
        gradients = self.policy_loss.gradients if torch.is_grad_enabled() else ()
        with self.accelerator.autocast():
            return {"ref_logps": self.reference.logps(batch, gradients)}

    def micro_batches(self, step: Step) -> Iterator[tuple[np.ndarray, float, bool]]:
        """The part of this process in a step, as `shares` gives it."""
        return shares(step, self.accelerator.process_index, self.sizes.weight, even=self.sharded is not None)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Adds up gradients, the mean of which over the processes is there after the last one of a step."""
        if isinstance(self.sharded, Zero):
            self.sharded.backward(loss, is_last)
        else:
            self.accelerator.backward(loss)

    def take_step(self) -> Tensor:
        """Clips the gradients, takes an optimizer step and forgets them. Returns their norm [] before clipping."""
        if isinstance(self.sharded, Zero):
            return self.sharded.take_step()
        most = self.config.max_grad_norm or math.inf
        norm = whole(self.accelerator.clip_grad_norm_(list(self.weights.values()), most))
        self.stepper.step()
        self.stepper.zero_grad()
        return norm

    def close(self) -> None:
        self.kernels.release()
        for sharded in {self.sharded, self.reference and self.reference.sharded}:
            if isinstance(sharded, Zero):
                sharded.close()
        self.policy = None  # DDP first: were it the last to hold the process group, gloo could wait for itself for ever
        self.accelerator.free_memory()
        self.accelerator.end_training()

    @contextmanager
    def closed_after_errors(self) -> Iterator[None]:
        """Closes a process alone. Others may not be there any more, and what waits for them stays as it is."""
        try:
            yield
        except BaseException:
            if self.accelerator.num_processes == 1:
                try:
                    self.close()
                except Exception as error:
                    logger.error("the run could not be closed after its error: %s", in_one_line(error))
            raise


def set_up(config: TrainConfig, accelerator: Accelerator) -> Run:
    """Makes all parts, each once it is known that what it rests on is right."""
    from accelerate.utils import set_seed

    check_runs(config.impl, accelerator.device)  # an error now rather than after the models are loaded
    in_shards = config.sharding in ("fsdp2", "zero3")  # the weights, and with them those of the reference
    if config.sharding != "none":
        check_ready(accelerator, config.sharding, config.timeout)
    check_settings(config, accelerator)
    if not accelerator.is_main_process:  # one voice is enough
        logging.getLogger("dpo_kernels").setLevel(logging.ERROR)
        warnings.simplefilter("ignore", UserWarning)
    if Path(config.output_dir).is_file():
        raise ValueError(f"output_dir: expected a directory, or none yet, got the file {config.output_dir}")
    checkpoint = find_checkpoint(Path(config.output_dir), config.resume, config.overwrite)
    if accelerator.is_main_process:
        for message in practice_warnings(config):
            warnings.warn(message, stacklevel=4)
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        remove_leftovers(Path(config.output_dir))
    if config.sharding != "none":
        check_shared(Path(config.output_dir), accelerator)
    check_alike({"resume": checkpoint and checkpoint.name}, accelerator)

    set_seed(config.seed)
    pairs = Pairs.load(config, accelerator)
    if not checkpoint:
        logger.info("one of the training pairs:\n%s\n", pairs.example(config.seed))
    model = load_model(config, config.model, pairs.tokenizer)
    for each in pairs.sets():
        check_fits(each, model, config.model)
    digests = references.parameter_digests(model)
    fingerprint = references.model_fingerprint(model, digests)
    identity = trajectory_settings(config) | {
        "the training data": data_fingerprint(pairs.train),
        "the held-out data": data_fingerprint(pairs.held_out) if pairs.held_out else None,
        "the starting weights": fingerprint,
        "the number of processes": accelerator.num_processes,
    }
    check_alike(identity, accelerator)
    if config.sharding != "none":
        identity = free_of_processes(identity, config, model)
    if config.sharding == "fsdp2":
        layers_of(model)  # an error now where it names none
    kind, other = references.resolve(config), None
    if kind == "other":
        other = load_model(config, config.reference, pairs.tokenizer).eval().requires_grad_(False)
        references.check_same_checkpoint(config, digests, references.parameter_digests(other))
    for each in (model, other):
        if each is not None and not in_shards:  # shards go there layer by layer, later
            each.to(accelerator.device)
    batching = resolve_batching(config, model, other)
    identity["batching"] = batching
    pairs = replace(pairs, batching=batching)
    sizes, held_out_sizes = (each and pairs.sizes(each, config.listwise) for each in (pairs.train, pairs.held_out))
    assert sizes is not None
    if config.disable_dropout:
        disable_dropout(model)

    kernels = Kernels(
        config.impl,
        accelerator.device,
        head_of(model, config.mixed_precision),
        recorded=read_progress(checkpoint).get("kernels") if checkpoint else None,
        wanted=config.tune,
        bar=config.progress_bar and accelerator.is_local_main_process,
    )
    if kernels.reason and accelerator.is_main_process:
        warnings.warn(f"{checkpoint} is not gone on from to the bit: {kernels.reason}", stacklevel=4)

    def scorer_of(frozen: Any) -> references.Reference:
        head = LMHead.from_model(frozen)
        sharded: Sharded | Zero | None = None
        if config.sharding == "fsdp2":
            sharded = Sharded(frozen, accelerator, frozen=True)
        elif config.sharding == "zero3":
            sharded = Zero(frozen, accelerator, config)
            sharded(head.ensure_checked)  # with DeepSpeed's hooks
        return references.Reference(head, config, sharded=sharded)

    # The reference comes before the policy changes
    reference = None
    if kind == "precompute":
        scored = references.frozen_copy(model) if in_shards else model.eval()
        scorer = scorer_of(scored)
        given = fingerprint, accelerator, kernels.families["A"]
        pairs = pairs.map(lambda each: references.cached_logps(scorer, each, pairs, *given))
        if isinstance(scorer.sharded, Zero):
            scorer.sharded.close()
        del scored, scorer  # shards of a copy
    elif kind == "copy":
        reference = scorer_of(references.frozen_copy(model))
    elif other is not None:
        reference = scorer_of(other)

    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora_r:
        model = add_lora(model, config, accelerator)
    policy_loss = PolicyLoss(model.train(), config)
    sharded: Sharded | Zero | None = None
    if config.sharding == "fsdp2":
        policy_loss.eval()
        policy_loss.head.ensure_checked()  # in both modes, while the model is whole
        policy_loss.train()
        sharded = Sharded(model, accelerator)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = make_optimizer(list(weights.values()), config, accelerator.device)
    if config.by_deepspeed:  # which takes the weights out of the optimizer
        sharded = Zero(model, accelerator, config, optimizer)
        for is_training in (False, True):  # with DeepSpeed's hooks, and in calls of its own: others are to be alike
            policy_loss.train(is_training)
            sharded(policy_loss.head.ensure_checked)
        sharded.free()
    if kind == "base":
        reference = references.Reference(policy_loss.head, config, adapter=model, sharded=sharded)
    policy: Any
    stepper: Any = None
    if sharded is not None:
        policy = functools.partial(sharded, policy_loss)
        if not config.by_deepspeed:
            stepper = accelerator.prepare(optimizer)
    else:
        policy, stepper = accelerator.prepare(policy_loss, optimizer)  # same modules and weights, wrapped
    schedule = Schedule.of(config, sizes, accelerator.num_processes)
    logger.info(
        "%d trainable of %d weights; %d pairs%s in %d steps an epoch; %d steps in all; batching: %s; reference: %s",
        sum(map(size_of, weights.values())),
        sum(map(size_of, model.parameters())),
        sizes.pairs.sum(),
        f" in {len(sizes.pairs)} groups" if sizes.pairs.max() > 1 else "",
        schedule.order.steps(0),
        schedule.steps,
        batching,
        "none" if kind is None else kind if kind != "other" else config.reference,
    )
    set_seed(config.seed, device_specific=True)  # dropout differs between processes
    return Run(
        config=config,
        accelerator=accelerator,
        checkpoint=checkpoint,
        pairs=pairs,
        sizes=sizes,
        held_out_sizes=held_out_sizes,
        model=model,
        policy_loss=policy_loss,
        policy=policy,
        sharded=sharded,
        reference=reference,
        starts_at_reference=kind is not None,
        weights=weights,
        optimizer=optimizer,
        stepper=stepper,
        scheduler=make_scheduler(optimizer, config, schedule),
        schedule=schedule,
        identity=identity,
        kernels=kernels,
    )


def free_of_processes(identity: dict[str, Any], config: TrainConfig, model: Any) -> dict[str, Any]:
    """What the trajectory of a run in shards follows from: the pairs of a step, in however many processes and
    micro-batches they are taken. Where random numbers come in, or a loss that is no mean over pairs, these too."""
    has_dropout = config.lora_dropout or not config.disable_dropout
    of_batches = BATCH_LOSSES.intersection(config.loss_type) or LMHead(model).has_router_loss
    if has_dropout or of_batches:
        return identity
    micro_batches = config.gradient_accumulation_steps * identity["the number of processes"]
    of_step = {"the micro-batches of a step": micro_batches}
    left_out = {"gradient_accumulation_steps", "the number of processes"}
    if config.max_tokens_per_batch is None:
        of_step = {"the pairs of a step": micro_batches * config.per_device_batch_size}
        left_out.add("per_device_batch_size")
    return {name: value for name, value in identity.items() if name not in left_out} | of_step


def resolve_batching(config: TrainConfig, model: Any, reference: Any = None) -> str:
    """What `config.batching` comes to for a model, and a reference of its own, which are then set up for it."""
    if config.batching == "concatenated":
        return config.batching
    try:
        if config.batching == "auto" and LMHead(model).has_router_loss:
            raise ValueError(f"{type(model).__name__} has a loss of its router, which counts all tokens computed")
        if config.attn_implementation:
            raise ValueError(
                f"attn_implementation: expected none beside batching {config.batching!r}, which brings its own, got "
                f"{config.attn_implementation!r}"
            )
        use_layouts(*(each for each in (model, reference) if each is not None))
    except ValueError as error:
        if config.batching != "auto":
            raise ValueError(f"batching: expected concatenated, got {config.batching!r}: {error}") from error
        logger.warning("batching: concatenated, since %s", error)
        return "concatenated"
    return "packed_shared_prefix" if config.batching == "auto" else config.batching


def make_accelerator(config: TrainConfig) -> Accelerator:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

    AcceleratorState._reset_state()  # an earlier run in the same process may have had another precision
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.trackers or None,
        project_dir=config.output_dir,
        # The loop accumulates by itself; without this, a setting of `accelerate config` would divide the loss again.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=config.timeout),
        ],
    )
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA"):  # the first two from code: `as_launched` is before this
        raise ValueError(
            f"accelerate is set up for {kind}: this loop runs on one device, with DDP, or on shards, as its own "
            "setting `sharding` says. Start it with accelerate's settings for several processes without that"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:  # they would all write to the same files
        raise ValueError(
            f"{launched} processes were launched, and accelerate sees {accelerator.num_processes}: on CPUs it takes "
            "ACCELERATE_USE_CPU=true in the environment"
        )
    return accelerator


def make_optimizer(trainable: list[nn.Parameter], config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    groups = [
        {"params": [weight for weight in trainable if weight.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [weight for weight in trainable if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=device.type == "cuda",  # there, the loss scaler needs no host synchronisation either
    )


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, schedule: Schedule) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.rate(config.schedule, step))


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Where PyTorch has a deterministic algorithm it takes it; where it has none it warns."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # costs time and changes no result of ours
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill
