"""The training loop: a policy learns preferences by DPO, or a relative of it, and its logits never exist."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dpo_kernels.data.batching import PairCollator
from dpo_kernels.dispatch import choose
from dpo_kernels.models.head import LMHead
from dpo_kernels.training.checkpoint import (
    MetricsLog,
    find_checkpoint,
    load_checkpoint,
    random_state,
    remove_leftovers,
    save_checkpoint,
    set_random_state,
)
from dpo_kernels.training.config import TrainConfig, practice_warnings, require_packages, trajectory_settings
from dpo_kernels.training.pairs import (
    TOKEN_COLUMNS,
    check_fits,
    data_fingerprint,
    load_data,
    pair_lengths,
    pairs_of_step,
)
from dpo_kernels.training.plots import plot_training_curves
from dpo_kernels.training.policy import METRICS, PolicyLoss, add_lora, load_model, save_model

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

logger = logging.getLogger(__name__)

# The entries of a row of metrics that a second run does not repeat.
WALL_CLOCK = ("tokens_per_second", "labelled_tokens_per_second", "peak_memory_mb")
# What the progress bar shows.
SHOWN = {
    "loss": "loss",
    "acc": "rewards/accuracies",
    "margin": "rewards/margins",
    "chosen": "rewards/chosen",
    "rejected": "rewards/rejected",
    "grad": "grad_norm",
    "lr": "lr",
    "tok/s": "tokens_per_second",
    "labelled/s": "labelled_tokens_per_second",
    "MB": "peak_memory_mb",
}


class TrainResult(NamedTuple):
    """What a run left behind. `before` and `after` are held-out metrics, None without evaluation."""

    steps: int
    before: dict[str, float] | None
    after: dict[str, float] | None
    output_dir: Path
    final_dir: Path
    best_dir: Path | None
    metrics_path: Path
    curves_path: Path
    starts_at_reference: bool

    def summary(self) -> str:
        lines = [f"{self.steps} optimizer steps"]
        if self.before and self.after:
            lines.append(f"{'held out':24}{'before':>12}{'after':>12}")
            for name in ("rewards/accuracies", "rewards/margins", "loss"):
                start, end = (f"{row[f'eval/{name}']:.4f}" for row in (self.before, self.after))
                if name == "rewards/accuracies" and self.starts_at_reference:
                    start = "tie"  # the policy is the reference: all rewards are 0
                lines.append(f"  {name:22}{start:>12}{end:>12}")
            if not self.best_dir:
                lines.append("  (no evaluation was better than the model that training started from)")
        lines.append(f"final model      {self.final_dir}")
        if self.best_dir:
            lines.append(f"best model       {self.best_dir}")
        lines += [f"metrics          {self.metrics_path}", f"training curves  {self.curves_path}"]
        return "\n".join(lines)


@dataclass
class Window:
    """What gathers between two rows of metrics. The tensors stay on the device until a row is due."""

    sums: Tensor  # [len(METRICS)] over this process's pairs
    grad_norms: Tensor  # [2]: the sum of the norms, and how many they are
    pairs: int = 0  # of all processes, as are the tokens
    tokens: int = 0
    labelled_tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def empty(cls, device: torch.device) -> Window:
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no fp64
        return cls(torch.zeros(len(METRICS), dtype=dtype, device=device), torch.zeros(2, dtype=dtype, device=device))

    def add_step(self, grad_norm: Tensor, scaled: bool, rows: np.ndarray, lengths: dict[str, np.ndarray]) -> None:
        """Counts an optimizer step on the pairs `rows`. With loss scaling (`scaled`), a norm that is not finite belongs
        to a step that is skipped, and does not enter the mean."""
        counts = torch.isfinite(grad_norm) if scaled else torch.ones_like(grad_norm)
        self.grad_norms += torch.stack([torch.where(counts > 0, grad_norm, 0), counts.to(grad_norm.dtype)])
        prompts, chosen, rejected = (int(lengths[column][rows].sum()) for column in TOKEN_COLUMNS)
        self.pairs += len(rows)
        self.tokens += 2 * prompts + chosen + rejected
        self.labelled_tokens += chosen + rejected

    def means(self, accelerator: Accelerator) -> dict[str, Any]:
        """The metrics of all processes: the one transfer to the host."""
        *sums, norms, count = accelerator.reduce(torch.cat([self.sums, self.grad_norms]), "sum").tolist()
        means = {name: value / self.pairs for name, value in zip(METRICS, sums, strict=True)}
        return means | {"grad_norm": norms / count if count else None}

    def throughput(self) -> dict[str, float]:
        return {
            "tokens_per_second": self.tokens / self.seconds,
            "labelled_tokens_per_second": self.labelled_tokens / self.seconds,
        }

    def counts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("pairs", "tokens", "labelled_tokens", "seconds")}

    def tensors(self) -> dict[str, Tensor]:
        return {"sums": self.sums.cpu(), "grad_norms": self.grad_norms.cpu()}


def train(config: TrainConfig) -> TrainResult:
    """Trains as `config` says and writes everything to `config.output_dir`:

        metrics.jsonl          a row every `logging_steps`, and one an evaluation; see below
        training_curves.png    loss, margins, accuracies and rewards
        final/, best/          the model or its adapter (safetensors) and the tokenizer, for transformers and peft
        checkpoint-STEP/       what a killed run goes on from, with the same numbers to the last bit on one device
        config.yaml            the settings

    Rows hold `step`, `epoch`, means over the pairs since the row before (`loss`, `rewards/*`, `logps/*`), the mean
    `grad_norm` before clipping, the `lr` of the step, and the entries `WALL_CLOCK`, the only ones that a second run
    does not repeat. Rows of evaluations, of which one comes before the first step, have the prefix `eval/`.

    Raises:
        ValueError: settings, data or models that do not fit, in words that say which.
        FloatingPointError: the loss is no longer a number.
        ImportError: a package of the extra `train` is missing.
    """
    require_packages(config)
    with deterministic_algorithms(config.deterministic):
        return _train(config)


def _train(config: TrainConfig) -> TrainResult:
    import yaml
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, gather_object, set_seed
    from tqdm import tqdm
    from transformers import get_scheduler

    from dpo_kernels.training import reference_model as references

    # Set-up
    AcceleratorState._reset_state()  # an earlier run in the same process may have had another precision
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.trackers or None,
        project_dir=config.output_dir,
        # The loop accumulates by itself; without this, a setting of `accelerate config` would divide the loss again.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    _check_accelerator(accelerator)
    choose(config.impl, accelerator.device)  # an error now rather than after the models are loaded
    device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    output_dir = Path(config.output_dir)
    checkpoint = find_checkpoint(output_dir, config.resume, config.overwrite)
    if accelerator.is_main_process:
        for message in practice_warnings(config):
            warnings.warn(message, stacklevel=3)
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output_dir)
    else:  # one voice is enough
        logging.getLogger("dpo_kernels").setLevel(logging.ERROR)
        warnings.simplefilter("ignore", UserWarning)

    # Data and models
    set_seed(config.seed)
    with accelerator.main_process_first():  # the others then find the tokenized data in the cache
        tokenizer, train_set, eval_set = load_data(config)
    padding = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # it is masked: any token will do
    collator = PairCollator(next(token for token in padding if token is not None))

    def fetch(dataset: Dataset, rows: Iterable[int]) -> dict[str, Any]:
        return _to_device(collator([dataset[int(row)] for row in rows]), device)

    model = load_model(config, config.model, tokenizer)
    for pairs in (train_set, eval_set) if eval_set else (train_set,):
        check_fits(pairs, model, config.model)
    digests = references.parameter_digests(model)
    fingerprint = references.model_fingerprint(model, digests)
    identity = trajectory_settings(config) | {
        "the training data": data_fingerprint(train_set),
        "the held-out data": data_fingerprint(eval_set) if eval_set else None,
        "the starting weights": fingerprint,
        "the number of processes": processes,
    }
    lengths = pair_lengths(train_set)

    # The reference, before the policy changes
    reference = None
    kind = references.resolve(config)
    if kind == "precompute":
        scorer = references.Reference(LMHead.from_model(model.to(device).eval()), config)
        sets = (train_set, eval_set)
        train_set, eval_set = (
            references.cached_logps(scorer, each, fetch, fingerprint, accelerator) if each else each for each in sets
        )
    elif kind == "copy":
        reference = references.Reference(LMHead.from_model(references.frozen_copy(model).to(device)), config)
    elif kind == "other":
        other = load_model(config, config.reference, tokenizer).eval().requires_grad_(False)
        references.check_same_checkpoint(config, digests, references.parameter_digests(other))
        reference = references.Reference(LMHead.from_model(other.to(device)), config)

    # The policy
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora_r:
        model = add_lora(model, config, accelerator)
    policy_loss = PolicyLoss(model.train(), config)
    if kind == "base":
        reference = references.Reference(policy_loss.head, config, adapter=model)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    trainable = list(weights.values())
    optimizer = make_optimizer(trainable, config, device)
    policy, stepper = accelerator.prepare(policy_loss, optimizer)  # same modules and weights, wrapped

    pairs_per_step = config.per_device_batch_size * config.gradient_accumulation_steps * processes
    steps_per_epoch = math.ceil(len(train_set) / pairs_per_step)
    total_steps = config.max_steps or math.ceil(config.epochs * steps_per_epoch)
    warmup_steps = math.ceil(config.warmup_ratio * total_steps) if config.warmup_steps is None else config.warmup_steps
    schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    scheduler = get_scheduler(schedule, optimizer, warmup_steps, total_steps)
    logger.info(
        "%d trainable of %d weights; %d pairs in %d steps an epoch; %d steps in all; reference: %s",
        sum(weight.numel() for weight in trainable),
        sum(weight.numel() for weight in model.parameters()),
        len(train_set),
        steps_per_epoch,
        total_steps,
        "none" if kind is None else kind if kind != "other" else config.reference,
    )

    # Where the run stands
    step = 0
    window = Window.empty(device)
    before: dict[str, float] | None = None
    latest: dict[str, float] | None = None
    best: dict[str, float] | None = None
    set_seed(config.seed, device_specific=True)  # dropout differs between processes
    if checkpoint:
        state, progress = load_checkpoint(checkpoint, weights, identity)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        set_random_state(state["processes"][rank]["random"], device)
        step, before, latest, best = (progress[name] for name in ("step", "before", "latest", "best"))
        kept = {name: tensor.to(device) for name, tensor in state["processes"][rank]["window"].items()}
        window = Window(**kept, **progress["window"])
        logger.info("going on from %s", checkpoint)
    metrics = None
    if accelerator.is_main_process:
        (output_dir / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
        metrics = MetricsLog(output_dir / "metrics.jsonl", step)
    accelerator.init_trackers(config.run_name, {name: str(value) for name, value in asdict(config).items()})
    show_bar = config.progress_bar and accelerator.is_main_process

    def record(values: dict[str, Any]) -> None:
        row = {"step": step, "epoch": step / steps_per_epoch} | values
        for name, value in row.items():
            if value is not None and not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value}")
        if metrics:
            metrics.write(row)
        accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)

    def evaluate(pairs: Dataset) -> dict[str, float]:
        mean_chosen_length = float(pair_lengths(pairs)["chosen_ids"].mean())
        size = config.per_device_eval_batch_size or config.per_device_batch_size
        mine = range(rank, len(pairs), processes)
        sums = Window.empty(device).sums
        policy_loss.eval()
        with torch.no_grad():
            for first in range(0, len(mine), size):
                batch = fetch(pairs, mine[first : first + size])
                if reference:
                    with accelerator.autocast():
                        batch["ref_logps"] = reference.logps(batch)
                sums += policy_loss(batch, mean_chosen_length)[1]
        policy_loss.train()
        totals = accelerator.reduce(sums, "sum").tolist()
        return {f"eval/{name}": total / len(pairs) for name, total in zip(METRICS, totals, strict=True)}

    # The loop
    with (
        tqdm(total=total_steps, initial=step, unit="step", disable=not show_bar) as bar,
        _divergence_explained(lambda: step, config),
    ):
        if eval_set and step == 0:
            before = latest = evaluate(eval_set)
            record(before)
        mark = time.perf_counter()
        while step < total_steps:
            rows = pairs_of_step(step, len(train_set), pairs_per_step, config.seed)
            mine, share = rows[rank::processes], processes / len(rows)  # DDP takes the mean over the processes
            if len(mine) == 0:  # a last step of few pairs: this process is waited for, but counts for nothing
                mine, share = rows[:1], 0.0
            for first in range(0, len(mine), config.per_device_batch_size):
                micro = mine[first : first + config.per_device_batch_size]
                batch = fetch(train_set, micro)
                if reference:
                    with accelerator.autocast():
                        batch["ref_logps"] = reference.logps(batch)
                is_last = first + len(micro) == len(mine)
                with nullcontext() if is_last else accelerator.no_sync(policy):
                    loss, sums = policy(batch, float(lengths["chosen_ids"][rows].mean()))
                    accelerator.backward(loss * (share * len(micro)))  # in sum: the mean over all pairs of the step
                if share:
                    window.sums += sums
            norm = accelerator.clip_grad_norm_(trainable, config.max_grad_norm or math.inf)
            window.add_step(norm, config.mixed_precision == "fp16", rows, lengths)
            lr = scheduler.get_last_lr()[0]
            stepper.step()
            scheduler.step()
            stepper.zero_grad()
            step += 1
            bar.update()

            if step % config.logging_steps == 0 or step == total_steps:
                values = window.means(accelerator) | {"lr": lr}
                window.seconds += time.perf_counter() - mark
                values |= window.throughput() | {"peak_memory_mb": peak_memory_mb(device)}
                record(values)
                bar.set_postfix({name: f"{values[key]:.4g}" for name, key in SHOWN.items()})
                window = Window.empty(device)
            else:
                window.seconds += time.perf_counter() - mark

            if eval_set and (step % (config.eval_steps or steps_per_epoch) == 0 or step == total_steps):
                latest = evaluate(eval_set)
                record(latest)
                if _better(config.metric_for_best, latest, best or before):
                    best = latest | {"step": step}
                    save_model(output_dir / "best", model, tokenizer, accelerator)
            if config.save_steps and step % config.save_steps == 0:
                here = {"random": random_state(device), "window": window.tensors()}
                state = {
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                    "processes": gather_object([here]),
                }
                progress = {"step": step, "before": before, "latest": latest, "best": best}
                progress |= {"window": window.counts(), "identity": identity}
                if metrics:
                    metrics.sync()
                    save_checkpoint(output_dir, weights, state, progress, config.save_total_limit)
                accelerator.wait_for_everyone()
            mark = time.perf_counter()

    # What is left behind
    final_dir, best_dir = output_dir / "final", output_dir / "best"
    take_best = config.load_best_model_at_end and best is not None
    save_model(final_dir, model, tokenizer, accelerator, copy_of=best_dir if take_best else None)
    if metrics:
        metrics.close()
        plot_training_curves(output_dir / "metrics.jsonl", output_dir / "training_curves.png")
    del policy  # DDP first: were it the last to hold the process group, gloo could wait for itself for ever
    accelerator.free_memory()
    accelerator.end_training()
    result = TrainResult(
        steps=step,
        before=before,
        after=best if take_best else latest,
        output_dir=output_dir,
        final_dir=final_dir,
        best_dir=best_dir if best else None,
        metrics_path=output_dir / "metrics.jsonl",
        curves_path=output_dir / "training_curves.png",
        starts_at_reference=reference is not None or kind == "precompute",
    )
    logger.info(result.summary())
    return result


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


def peak_memory_mb(device: torch.device) -> float:
    """Most memory that the device's tensors took so far; on the CPU, most that the process did."""
    backend: Any = getattr(torch, device.type, None)
    if hasattr(backend, "max_memory_allocated"):
        return backend.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


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


@contextmanager
def _divergence_explained(step: Callable[[], int], config: TrainConfig) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(_diverged(str(error), step(), config)) from error


def _diverged(what: str, step: int, config: TrainConfig) -> str:
    reasons = [f"the learning rate ({config.learning_rate:g}) is too high or its warm-up too short"]
    if config.mixed_precision == "fp16" or config.dtype == "float16":
        reasons.append("fp16 overflows (bf16 does not)")
    if not config.max_grad_norm:
        reasons.append("gradients are not clipped (max_grad_norm 0)")
    reasons.append("the model's own weights or a pair are damaged (if this is one of the first steps)")
    return f"training stopped at step {step}: {what}. Likely reasons: {'; '.join(reasons)}"


def _better(metric: str, new: dict[str, float], old: dict[str, float] | None) -> bool:
    if old is None:
        return True
    difference = new[f"eval/{metric}"] - old[f"eval/{metric}"]
    return difference < 0 if metric == "loss" else difference > 0


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)

    return {name: move(value) for name, value in batch.items()}


def _check_accelerator(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA"):
        raise ValueError(f"accelerate is set up for {kind}: this loop runs on one device or with DDP, on whole weights")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:  # they would all write to the same files
        raise ValueError(
            f"{launched} processes were launched, and accelerate sees {accelerator.num_processes}: on CPUs it takes "
            "ACCELERATE_USE_CPU=true in the environment"
        )
