"""The training loop: a policy learns preferences by DPO, or a relative of it, and its logits never exist."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dpo_kernels.training.config import TrainConfig, require_packages
from dpo_kernels.training.heartbeat import Heartbeat
from dpo_kernels.training.launched import as_launched
from dpo_kernels.training.plots import plot_training_curves
from dpo_kernels.training.policy import save_model
from dpo_kernels.training.schedule import in_order, of_process
from dpo_kernels.training.setup import Run, deterministic_algorithms, set_up
from dpo_kernels.training.state import RunState, Window, metric_means
from dpo_kernels.training.zero import rank_forgotten

logger = logging.getLogger(__name__)

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


def train(config: TrainConfig) -> TrainResult:
    """Trains as `config` says and writes everything to `config.output_dir`:

        metrics.jsonl          a row every `logging_steps`, and one an evaluation; see below
        training_curves.png    loss, margins, accuracies and rewards
        final/, best/          the model or its adapter (safetensors) and the tokenizer, for transformers and peft
        checkpoint-STEP/       what a killed run goes on from, with the same numbers to the last bit on one device
        config.yaml            the settings

    Rows hold `step`, `epoch`, means over the pairs since the row before (`loss`, in which they count by their weights,
    and `rewards/*`, `logps/*`, in which they count alike), the mean `grad_norm` before clipping, the `lr` of the step,
    and the entries `WALL_CLOCK`, the only ones that a second run does not repeat. Rows of evaluations, of which one
    comes before the first step, have the prefix `eval/`.

    Raises:
        ValueError: settings, data or models that do not fit, in words that say which.
        FloatingPointError: the loss is no longer a number.
        ConnectionError: another process hangs or is gone; the message says which, and what the run can go on from.
        ImportError: a package of the extra `train` is missing.
    """
    if not isinstance(config, TrainConfig):
        raise ValueError(
            f"config: expected a TrainConfig, got {type(config).__name__}: TrainConfig(beta=0.1, ...), or of a file "
            "`dpo-kernels train FILE`"
        )
    with as_launched(config) as settled, deterministic_algorithms(config.deterministic), rank_forgotten():
        require_packages(settled)
        return _train(settled)


def _train(config: TrainConfig) -> TrainResult:
    from tqdm import tqdm

    run = set_up(config)
    state, heartbeat = RunState(run), Heartbeat(run.accelerator)
    accelerator, pairs, schedule = run.accelerator, run.pairs, run.schedule
    hidden = not (config.progress_bar and accelerator.is_main_process)
    with (
        tqdm(total=schedule.steps, initial=state.step, unit="step", disable=hidden) as bar,
        heartbeat.lost_ones_named(run.output_dir),
        state.divergence_explained(),
    ):
        if pairs.held_out and state.step == 0:
            state.evaluated(evaluate(run))
        while not state.finished:
            started = time.perf_counter()
            heartbeat.beat(state.step + 1)
            step = schedule.step(state.step)
            rows = np.concatenate([micro for of_one in step for micro in of_one])
            mean_chosen_length = run.sizes.mean_chosen_length(rows)
            for micro, share, is_last in run.micro_batches(step):
                batch = pairs.batch(pairs.train, micro)
                batch |= run.reference_logps(batch)
                with nullcontext() if is_last or run.sharded else accelerator.no_sync(run.policy):
                    loss, sums = run.policy(batch, mean_chosen_length)
                    run.backward(loss * share, is_last)  # in sum: the mean over all pairs of the step
                if share:
                    state.window.sums += sums
            lr = run.scheduler.get_last_lr()[0]
            norm = run.take_step()
            run.scheduler.step()
            state.window.add_step(norm, config.mixed_precision == "fp16", rows, run.sizes)
            state.step += 1
            bar.update()

            if state.is_due(config.logging_steps):
                row = state.log(lr, started)
                bar.set_postfix({name: f"{row[key]:.4g}" for name, key in SHOWN.items()})
            else:
                state.window.seconds += time.perf_counter() - started
            if pairs.held_out and state.is_due(config.eval_steps):
                state.evaluated(evaluate(run))
            state.finish_saving(wait=False)
            if config.save_steps and state.step % config.save_steps == 0:
                state.save()
        state.finish_saving()
    return finish(run, state)


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """The metrics of the policy over all held-out pairs, which the processes share out."""
    config, accelerator, held_out = run.config, run.accelerator, run.pairs.held_out
    sizes = run.held_out_sizes
    assert held_out is not None and sizes is not None
    mean_chosen_length = sizes.mean_chosen_length()
    sums = Window.empty(run.device).sums
    run.policy_loss.eval()
    step = in_order(config, sizes, accelerator.num_processes)
    for rows, counts in of_process(step, accelerator.process_index, even=run.sharded is not None):
        batch = run.pairs.batch(held_out, rows)
        batch |= run.reference_logps(batch)
        found = (run.policy if run.sharded else run.policy_loss)(batch, mean_chosen_length)[1]
        if counts:
            sums += found
    run.policy_loss.train()
    if run.sharded:
        run.sharded.free()
    totals = accelerator.reduce(sums, "sum").tolist()
    means = metric_means(totals, int(sizes.pairs.sum()), float(sizes.weight.sum()))
    return {f"eval/{name}": mean for name, mean in means.items()}


def finish(run: Run, state: RunState) -> TrainResult:
    """Leaves the final model and the curves behind."""
    final_dir, best_dir, metrics = (run.output_dir / name for name in ("final", "best", "metrics.jsonl"))
    take_best = run.config.load_best_model_at_end and state.best is not None
    copy_of = best_dir if take_best else None
    save_model(final_dir, run.model, run.pairs.tokenizer, run.accelerator, copy_of, run.sharded)
    curves = run.output_dir / "training_curves.png"
    state.close()
    if state.metrics:
        plot_training_curves(metrics, curves)
    run.close()
    result = TrainResult(
        steps=state.step,
        before=state.before,
        after=state.best if take_best else state.latest,
        output_dir=run.output_dir,
        final_dir=final_dir,
        best_dir=best_dir if state.best else None,
        metrics_path=metrics,
        curves_path=curves,
        starts_at_reference=run.starts_at_reference,
    )
    logger.info(result.summary())
    return result
