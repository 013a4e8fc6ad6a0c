"""Metrics of micro-batches that stay on the device until they are logged: no step waits for them."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

Metrics = dict[str, float]


class Recorded(NamedTuple):
    """A micro-batch."""

    names: tuple[str, ...]
    sums: Tensor  # [len(names)], over its processes
    metrics_of: Callable[[dict[str, float]], Metrics]  # what TRL logs, of those sums by name

    def metrics(self, sums: list[float]) -> Metrics:
        return self.metrics_of(dict(zip(self.names, sums, strict=True)))


@torch.no_grad()
def record(
    trainer: Any,
    values: dict[str, Any],
    metrics_of: Callable[[dict[str, float]], Metrics],
    *,
    device: torch.device,
    whole: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Sums the values of a micro-batch over their elements and over processes, in one collective, and keeps the sums
    for `report`.

    Args:
        values: tensors of any shape, or numbers, `input_tokens` among them. For these TRL calls `gather_for_metrics`,
            which of the last batch keeps as many rows as the data has left, and so as many processes.
        metrics_of: makes TRL's metrics of the sums.
        whole: more values, for which TRL calls `gather`.

    Returns:
        The sums [] of all, by name.
    """
    every = values | (whole or {})
    wide = torch.float32 if device.type == "mps" else torch.float64
    mine = torch.stack([_as_tensor(value, device).sum(dtype=wide) for value in every.values()])
    processes = trainer.accelerator.gather(mine[None])
    state = trainer.accelerator.gradient_state
    kept = state.remainder if state.end_of_dataloader and state.remainder > 0 else len(processes)
    sums = torch.cat([processes[:kept, : len(values)].sum(0), processes[:, len(values) :].sum(0)])
    by_name = dict(zip(every, sums.unbind(), strict=True))
    recorded(trainer)["train" if trainer.model.training else "eval"].append(Recorded(tuple(every), sums, metrics_of))
    if trainer.model.training:  # evaluation logs them too, whenever it comes
        recorded(trainer)["tokens"].append(by_name["input_tokens"])
    return by_name


def _as_tensor(value: Any, device: torch.device) -> Tensor:
    """A number is filled in there: to copy it from the host would be to wait."""
    return value.to(device) if isinstance(value, Tensor) else torch.full((), value, device=device)


def recorded(trainer: Any) -> dict[str, list[Any]]:
    if "_dpo_kernels_recorded" not in vars(trainer):  # TRL's __init__ knows nothing of it
        trainer._dpo_kernels_recorded = defaultdict(list)
    return trainer._dpo_kernels_recorded


def latest(trainer: Any) -> Metrics:
    """The metrics of the last micro-batch."""
    mode = "train" if trainer.model.training else "eval"
    if batches := recorded(trainer).get(mode):
        return batches[-1].metrics(batches[-1].sums.tolist())
    return {name: values[-1] for name, values in trainer._metrics[mode].items()}


def report(trainer: Any) -> None:
    """Hands what was recorded to TRL's `log`, which takes means over the micro-batches that have a value."""
    mode = "train" if trainer.model.training else "eval"
    batches = recorded(trainer).pop(mode, [])
    if not batches:
        return
    tokens = recorded(trainer).pop("tokens", [])
    values = iter(torch.cat([*(batch.sums for batch in batches), *(count[None] for count in tokens)]).tolist())
    for batch in batches:
        for name, value in batch.metrics(list(islice(values, len(batch.names)))).items():
            trainer._metrics[mode][name].append(value)
    trainer._total_train_tokens += sum(int(count) // trainer._tp_size for count in values)
    trainer._metrics[mode]["num_tokens"] = [trainer._total_train_tokens]


def with_report(log: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(log)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        report(self)
        log(self, *args, **kwargs)

    return wrapped


def with_floats(log: Callable[..., None]) -> Callable[..., None]:
    """The `log` of a trainer whose `_stored_metrics` may be tensors []."""

    @functools.wraps(log)
    def wrapped(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        stored = self._stored_metrics["train" if "loss" in logs else "eval"]
        if tensors := [value for values in stored.values() for value in values if isinstance(value, Tensor)]:
            floats = iter(torch.stack(tensors).tolist())
            for name, values in stored.items():
                stored[name] = [next(floats) if isinstance(value, Tensor) else value for value in values]
        log(self, logs, *args, **kwargs)

    return wrapped
