"""Metrics of micro-batches that stay on the device until somebody reads them: no step waits for them."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Metrics = dict[str, float]
Dict = TypeVar("Dict", bound=type)


class Recorded(NamedTuple):
    """A micro-batch."""

    names: tuple[str, ...]
    sums: Tensor  # [len(names)], over its processes
    metrics_of: Callable[[Metrics], Metrics]  # what TRL logs, of those sums by name


def _read(batches: Sequence[Recorded], counts: Sequence[Tensor] = ()) -> tuple[list[Metrics], list[float]]:
    """The metrics of the batches, and the counts [], in one transfer."""
    tensors = [*(batch.sums for batch in batches), *(count[None] for count in counts)]
    values = iter(torch.cat(tensors).tolist() if tensors else [])
    metrics = [b.metrics_of(dict(zip(b.names, islice(values, len(b.names)), strict=True))) for b in batches]
    return metrics, list(values)


def _reads_first(kind: Dict) -> Dict:
    """A dictionary whose methods all call its `read` before."""
    names = ["getitem", "setitem", "delitem", "iter", "reversed", "len", "contains", "eq", "ne", "repr", "or", "ror"]
    names = [f"__{name}__" for name in (*names, "ior", "copy", "reduce", "sizeof") if hasattr(kind, f"__{name}__")]
    names += [name for name in dir(dict) if not name.startswith("_") and name != "fromkeys"]

    def reading(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.read()
            return method(self, *args, **kwargs)

        return wrapped

    for name in names:
        setattr(kind, name, reading(getattr(kind, name)))
    return kind


@_reads_first
class Unread(dict[str, float]):
    """The metrics of one micro-batch, as numbers once something of it is read."""

    batch: Recorded | None = None

    @classmethod
    def of(cls, values: dict[str, Tensor]) -> Unread:
        """Of tensors []."""
        metrics = cls(dict.fromkeys(values, math.nan))  # who looks at its size alone sees how many there will be
        metrics.batch = Recorded(tuple(values), torch.stack(list(values.values())), lambda found: found)
        return metrics

    def read(self) -> None:
        batch, self.batch = self.batch, None
        if batch is not None:
            self.update(_read([batch])[0][0])


@_reads_first
class UnreadLists(defaultdict[str, list[float]]):
    """What a trainer keeps of training, or of evaluation, by the metric's name: a number for each micro-batch, once
    something of it is read."""

    counting: Any = None  # the trainer, if it counts tokens
    batches: Sequence[Recorded] = ()

    def read(self) -> None:
        batches, self.batches = self.batches, ()
        if not batches:
            return
        metrics, counts = _read(batches, _take_counts(self.counting))
        for batch in metrics:
            for name, value in batch.items():
                self[name].append(value)
        if self.counting is not None:
            _add_counts(self.counting, counts)
            self["num_tokens"] = [vars(self.counting)[TOTAL]]


def unread(stored: dict[str, Any], mode: str, counting: Any = None) -> UnreadLists:
    """The metrics that a trainer has stored for this mode, which are so from here on. A subclass may put a dictionary
    of its own there."""
    if not isinstance(stored[mode], UnreadLists):
        stored[mode] = UnreadLists(list, stored[mode])
        stored[mode].counting = counting
    found: UnreadLists = stored[mode]
    return found


def keep(stored: dict[str, Any], mode: str, batch: Recorded, counting: Any = None) -> None:
    """Puts a micro-batch into the metrics that a trainer has stored for this mode."""
    lists = unread(stored, mode, counting)
    lists.batches = [*lists.batches, batch]
    # who looks at the size alone, as JSON does, sees that there is something: the first one, which there always is
    dict.setdefault(lists, next(iter(batch.metrics_of(dict.fromkeys(batch.names, 1.0)))), [])


# The tokens that a trainer has seen, which wait on the device too

TOTAL, COUNTS = "_total_train_tokens", "_dpo_kernels_token_counts"


def _take_counts(trainer: Any) -> list[Tensor]:
    """What is not in the total yet."""
    counts: list[Tensor] = [] if trainer is None else vars(trainer).pop(COUNTS, [])
    return counts


def _add_counts(trainer: Any, counts: list[float]) -> None:
    vars(trainer)[TOTAL] += sum(int(count) // trainer._tp_size for count in counts)


class TotalTokens:
    """`_total_train_tokens` of a trainer, an attribute that it reads and writes."""

    def __get__(self, trainer: Any, owner: type) -> Any:
        if trainer is None:
            return self
        if TOTAL not in vars(trainer):
            raise AttributeError(f"{owner.__name__!r} object has no attribute {TOTAL!r}")
        if counts := _take_counts(trainer):
            _add_counts(trainer, _read([], counts)[1])
        return vars(trainer)[TOTAL]

    def __set__(self, trainer: Any, value: int) -> None:
        vars(trainer).pop(COUNTS, None)
        vars(trainer)[TOTAL] = value


@torch.no_grad()
def record(
    trainer: Any,
    values: dict[str, Any],
    metrics_of: Callable[[Metrics], Metrics],
    *,
    device: torch.device,
    whole: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Sums the values of a micro-batch over their elements and over processes, in one collective, and keeps the sums
    in `trainer._metrics`, for whoever reads there.

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
    mode = "train" if trainer.model.training else "eval"
    if mode == "train":
        vars(trainer).setdefault(COUNTS, []).append(by_name["input_tokens"])
    keep(trainer._metrics, mode, Recorded(tuple(every), sums, metrics_of), trainer)
    return by_name


def _as_tensor(value: Any, device: torch.device) -> Tensor:
    """A number is filled in there: to copy it from the host would be to wait."""
    return value.to(device) if isinstance(value, Tensor) else torch.full((), value, device=device)


def latest(trainer: Any) -> Metrics:
    """The metrics of the last micro-batch."""
    mode = "train" if trainer.model.training else "eval"
    return {name: values[-1] for name, values in trainer._metrics[mode].items()}
