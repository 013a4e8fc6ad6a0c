"""Where a run stands, and what it writes down: steps, metrics, evaluations, the best model, checkpoints."""

from __future__ import annotations

import copy
import functools
import logging
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dpo_kernels.training.checkpoint import (
    PREFIX,
    SHARDS,
    MetricsLog,
    load_checkpoint,
    load_state,
    random_state,
    save_checkpoint,
    set_random_state,
)
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.policy import METRICS, damaged_weights, save_model, state_of_weights
from dpo_kernels.training.saving import Saving, failures_named
from dpo_kernels.training.setup import Run
from dpo_kernels.training.sharding import from_all, group_for_saving, load_shards, save_shards, start_saving_shards
from dpo_kernels.training.sizes import Sizes
from dpo_kernels.training.values import in_one_line
from dpo_kernels.training.zero import Zero, load_parts, save_parts

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

# The entries of a row of metrics that a second run does not repeat.
WALL_CLOCK = ("tokens_per_second", "labelled_tokens_per_second", "peak_memory_mb")


@dataclass
class Window:
    """What gathers between two rows of metrics. The tensors stay on the device until a row is due."""

    sums: Tensor  # [len(METRICS)] over this process's pairs
    grad_norms: Tensor  # [2]: the sum of the norms, and how many they are
    pairs: int = 0  # of all processes, as are their weights and tokens
    weight: float = 0.0
    tokens: int = 0
    labelled_tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def empty(cls, device: torch.device) -> Window:
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no fp64
        return cls(torch.zeros(len(METRICS), dtype=dtype, device=device), torch.zeros(2, dtype=dtype, device=device))

    def add_step(self, grad_norm: Tensor, scaled: bool, rows: np.ndarray, sizes: Sizes) -> None:
        """Counts an optimizer step on the pairs `rows`. With loss scaling (`scaled`), a norm that is not finite belongs
        to a step that is skipped, and does not enter the mean."""
        counts = torch.isfinite(grad_norm) if scaled else torch.ones_like(grad_norm)
        self.grad_norms += torch.stack([torch.where(counts > 0, grad_norm, 0), counts.to(grad_norm.dtype)])
        self.pairs += int(sizes.pairs[rows].sum())
        self.weight += float(sizes.weight[rows].sum())
        self.tokens += int(sizes.tokens[rows].sum())
        self.labelled_tokens += int(sizes.labelled[rows].sum())

    def means(self, accelerator: Accelerator) -> dict[str, Any]:
        """The metrics of all processes: the one transfer to the host."""
        *sums, norms, count = accelerator.reduce(torch.cat([self.sums, self.grad_norms]), "sum").tolist()
        means: dict[str, Any] = metric_means(sums, self.pairs, self.weight)
        return means | {"grad_norm": norms / count if count else None}

    def throughput(self) -> dict[str, float]:
        return {
            "tokens_per_second": self.tokens / self.seconds,
            "labelled_tokens_per_second": self.labelled_tokens / self.seconds,
        }

    def counts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("pairs", "weight", "tokens", "labelled_tokens", "seconds")}

    def tensors(self) -> dict[str, Tensor]:
        return {"sums": self.sums.cpu(), "grad_norms": self.grad_norms.cpu()}


def metric_means(sums: list[float], pairs: int, weight: float) -> dict[str, float]:
    """The `METRICS` of so many pairs, of that weight in all, from their sums."""
    return {name: value / (weight if name == "loss" else pairs) for name, value in zip(METRICS, sums, strict=True)}


class RunState:
    """How far a run has come, from its beginning or from a checkpoint on.

    Attributes:
        step: optimizer steps done.
        window: what gathered since the last row of metrics.
        before, latest, best: held-out metrics before the first step, of the last evaluation, and of the best one.
    """

    def __init__(self, run: Run) -> None:
        import yaml

        self.run, self.step, self.window = run, 0, Window.empty(run.device)
        self.before: dict[str, float] | None = None
        self.latest: dict[str, float] | None = None
        self.best: dict[str, float] | None = None
        self.saving: Saving | None = None
        self.group = group_for_saving(run.config.timeout) if run.config.async_checkpoints else None
        if run.checkpoint:
            self.load()
        self.metrics = None
        if run.accelerator.is_main_process:
            (run.output_dir / "config.yaml").write_text(yaml.safe_dump(asdict(run.config), sort_keys=False))
            self.metrics = MetricsLog(run.output_dir / "metrics.jsonl", self.step)
        settings = {name: str(value) for name, value in asdict(run.config).items()}
        run.accelerator.init_trackers(run.config.run_name, settings)

    @property
    def finished(self) -> bool:
        return self.step >= self.run.schedule.steps

    def is_due(self, every: int | None) -> bool:
        """Whether the step just done is one of every so many, by default one that ends an epoch, or the last."""
        due = self.step % every == 0 if every else self.run.schedule.ends_epoch(self.step)
        return due or self.finished

    def log(self, lr: float, started: float) -> dict[str, Any]:
        """Ends the window: its metrics as a row, for a step that `started` then (`time.perf_counter`)."""
        values = self.window.means(self.run.accelerator) | {"lr": lr}
        self.window.seconds += time.perf_counter() - started
        values |= self.window.throughput() | {"peak_memory_mb": peak_memory_mb(self.run.device)}
        self._record(values)
        self.window = Window.empty(self.run.device)
        return values

    def evaluated(self, held_out: dict[str, float]) -> None:
        """Writes down an evaluation, and the model too if it is the best so far."""
        self._record(held_out)
        self.latest = held_out
        if self.step == 0:
            self.before = held_out
        elif _better(self.run.config.metric_for_best, held_out, self.best or self.before):
            self.best = held_out | {"step": self.step}
            run = self.run
            save_model(run.output_dir / "best", run.model, run.pairs.tokenizer, run.accelerator, sharded=run.sharded)

    def _record(self, values: dict[str, Any]) -> None:
        row = {"step": self.step, "epoch": self.run.schedule.epoch(self.step)} | values
        for name, value in row.items():
            if value is not None and not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value}")
        if self.metrics:
            self.metrics.write(row)
        shown = {name: value for name, value in values.items() if value is not None}
        self.run.accelerator.log(shown, step=self.step)

    def save(self) -> None:
        """Writes a checkpoint, or begins to: with `load`, the run goes on with the same bits. Of weights in shards each
        process writes its own, and the optimizer's state with them."""
        from accelerate.utils import gather_object

        self.finish_saving()
        run, scaler = self.run, self.run.accelerator.scaler
        here = {"random": random_state(run.device), "window": self.window.tensors()}
        if isinstance(run.sharded, Zero):
            optimizer: dict[str, Any] = {"param_groups": run.sharded.groups()}
        else:
            optimizer = run.optimizer.state_dict()
        state = {
            "optimizer": {"param_groups": optimizer["param_groups"]} if run.sharded else optimizer,
            "scheduler": run.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "processes": gather_object([here]),
        }
        progress = {name: getattr(self, name) for name in ("step", "before", "latest", "best")}
        progress |= {"window": self.window.counts(), "identity": run.identity, "kernels": run.kernels.families}
        damaged = damaged_weights(run.weights.items())
        if run.sharded:
            damaged = next(filter(None, from_all(damaged)), "")
        if damaged:
            raise FloatingPointError(f"the weights are damaged, and no checkpoint is made of them: {damaged}")
        if self.metrics:
            self.metrics.sync()
        shards = self._folder_of_shards() if run.sharded else None
        if self.group is not None:  # the next steps change what this is made of
            state, progress = copy.deepcopy((state, progress))
        limit = run.config.save_total_limit
        complete = functools.partial(save_checkpoint, run.output_dir, run.weights, state, progress, limit, shards)
        if self.group is not None:
            assert shards is not None
            written = start_saving_shards(shards, run.weights, run.optimizer, self.group)
            self.saving = Saving(self.step, written, complete if run.accelerator.is_main_process else None)
            return
        if shards is not None:
            with failures_named(f"the checkpoint of step {self.step} was not written"):
                if isinstance(run.sharded, Zero):
                    save_parts(shards, run.weights, run.sharded)
                else:
                    save_shards(shards, run.weights, run.optimizer)
            run.accelerator.wait_for_everyone()
        if run.accelerator.is_main_process:
            complete()
        run.accelerator.wait_for_everyone()

    def _folder_of_shards(self) -> Path:
        """Into which all processes write theirs."""
        run = self.run
        folder = run.output_dir / f".{PREFIX}{self.step}.shards.tmp"
        if run.accelerator.is_main_process:
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir()
        run.accelerator.wait_for_everyone()
        return folder

    def finish_saving(self, wait: bool = True) -> None:
        """Raises `OSError` where the checkpoint that was begun last could not be written. Without `wait`, only if that
        is known."""
        if self.saving is not None and (wait or self.saving.done.done()):
            saving, self.saving = self.saving, None
            saving.wait()

    def load(self) -> None:
        run, scaler = self.run, self.run.accelerator.scaler
        assert run.checkpoint is not None
        if run.sharded:
            state, progress = load_state(run.checkpoint, run.identity)
            groups = state["optimizer"]["param_groups"]
            with failures_named(f"{run.checkpoint} could not be read"):
                if isinstance(run.sharded, Zero):
                    load_parts(run.checkpoint / SHARDS, run.weights, run.sharded, groups)
                else:
                    load_shards(run.checkpoint / SHARDS, run.weights, run.optimizer, groups)
        else:
            state, progress = load_checkpoint(run.checkpoint, run.weights, run.identity)
            run.optimizer.load_state_dict(state["optimizer"])
        run.scheduler.load_state_dict(state["scheduler"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
        here = _part(state["processes"], run.accelerator.process_index, run.accelerator.num_processes)
        set_random_state(here["random"], run.device)
        for name in ("step", "before", "latest", "best"):
            setattr(self, name, progress[name])
        tensors = {name: tensor.to(run.device) for name, tensor in here["window"].items()}
        self.window = Window(**tensors, **progress["window"])
        logger.info("going on from %s", run.checkpoint)

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()
        if self.group is not None:
            torch.distributed.destroy_process_group(self.group)
            self.group = None

    @contextmanager
    def closed_after_errors(self) -> Iterator[None]:
        """Closes what waits for no other process, which may not be there any more, and logs that a checkpoint could not
        be written either, if that is known."""
        try:
            yield
        except BaseException:
            try:
                self.finish_saving(wait=self.run.accelerator.num_processes == 1)
            except Exception as error:
                logger.error("%s", in_one_line(error))
            if self.saving is not None:
                self.group = None  # its thread still talks to others
            self.close()
            raise

    @contextmanager
    def divergence_explained(self) -> Iterator[None]:
        try:
            yield
        except FloatingPointError as error:
            said = "weights are" in str(error)
            what = str(error) if said else f"{error}. {state_of_weights('policy', self.run.model)}"
            raise FloatingPointError(_diverged(what, self.step, self.run.config)) from error


def _part(saved: list[dict[str, Any]], rank: int, processes: int) -> dict[str, Any]:
    """What a process has of what so many had: its own; or, in another number of them, the norms, which are those of
    all, and the first one the sums of all pairs."""
    if len(saved) == processes:
        return saved[rank]
    sums = torch.stack([each["window"]["sums"] for each in saved]).sum(0)
    window = {"sums": sums if rank == 0 else torch.zeros_like(sums), "grad_norms": saved[0]["window"]["grad_norms"]}
    return {"random": saved[rank % len(saved)]["random"], "window": window}


def _diverged(what: str, step: int, config: TrainConfig) -> str:
    reasons = [f"the learning rate ({config.learning_rate:g}) is too high or its warm-up too short"]
    if config.mixed_precision == "fp16" or config.dtype == "float16":
        reasons.append("fp16 overflows (bf16 does not)")
    if not config.max_grad_norm:
        reasons.append("gradients are not clipped (max_grad_norm 0)")
    if step <= 1:
        reasons.append("the model's own weights are damaged")
    return f"training stopped at step {step}: {what}. Likely reasons: {'; '.join(reasons)}"


def _better(metric: str, new: dict[str, float], old: dict[str, float] | None) -> bool:
    if old is None:
        return True
    difference = new[f"eval/{metric}"] - old[f"eval/{metric}"]
    return difference < 0 if metric == "loss" else difference > 0


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
