"""Which process the others wait for. Each leaves the step that it is in where all can read it; no process waits for
another in that. Who waits in vain says so, and the one that says nothing is the one that hangs, or is gone."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from dpo_kernels.training.checkpoint import list_checkpoints
from dpo_kernels.training.values import in_one_line

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

GRACE = 5.0  # seconds in which those that wait for one process say so: they began at nearly the same time
WAITS = "waits"
# Of gloo, whose errors have no class of their own.
_OF_GROUPS = re.compile(r"\bgloo\b|NCCL|ProcessGroup|[Cc]onnection (closed|reset)|Broken pipe")


class Heartbeat:
    """Of a process among others. One that is alone has none."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self.store: dist.Store | None = None
        if self.processes > 1:
            self.store = dist.PrefixStore("dpo_kernels/heartbeat", dist.distributed_c10d._get_default_store())
        self.beat(0)

    def beat(self, step: int) -> None:
        """This process is in that step, or, in 0, before the first."""
        self.step = step
        self._say("")

    def _say(self, what: str) -> None:
        if self.store is not None:
            self.store.set(str(self.rank), f"{self.step} {what}")

    @contextmanager
    def lost_ones_named(self, output_dir: Path) -> Iterator[None]:
        """Raises `ConnectionError`, which says which processes the others have waited for, where a collective fails or
        times out. Any other error is told to those who wait, and stays what it is."""
        try:
            yield
        except Exception as error:
            if self.store is None:
                raise
            if of_group(error):
                raise ConnectionError(self._account(error, output_dir)) from error
            try:
                self._say(in_one_line(error)[:1000])
            except dist.DistError as lost:
                logger.error("the other processes were not told of the error: %s", in_one_line(lost))
            raise

    def _account(self, error: Exception, output_dir: Path) -> str:
        try:
            self._say(WAITS)
            who = described(self._heard())
        except dist.DistError as lost:  # the store is where the first process was started
            who = f"process {self.rank} of {self.processes} is cut off from all others ({in_one_line(lost)})"
        checkpoints = list_checkpoints(output_dir)
        goes_on = f"goes on from {checkpoints[-1]}" if checkpoints else "starts afresh: there is no checkpoint yet"
        return f"training stopped in step {self.step}: {who}. The same command {goes_on}. ({in_one_line(error)})"

    def _heard(self) -> list[tuple[int, str]]:
        """Of each process the step that it was last seen in, and what it says, "" for nothing."""
        assert self.store is not None
        until = time.monotonic() + GRACE
        while True:
            found = []
            for rank in map(str, range(self.processes)):
                step, _, what = (self.store.get(rank).decode() if self.store.check([rank]) else "0 ").partition(" ")
                found.append((int(step), what))
            if all(what for _, what in found) or time.monotonic() > until:
                return found
            time.sleep(0.1)


def of_group(error: BaseException) -> bool:
    """Whether a collective or the store has failed, rather than what is computed here."""
    return isinstance(error, dist.DistError) or bool(isinstance(error, RuntimeError) and _OF_GROUPS.search(str(error)))


def described(found: list[tuple[int, str]]) -> str:
    """Who failed and who says nothing, or, where all wait, who is behind; and in which step the others wait."""
    failed = {n: f"failed in step {at}: {what}" for n, (at, what) in enumerate(found) if what not in ("", WAITS)}
    silent = [n for n, (_, what) in enumerate(found) if not what]
    if not failed and not silent:
        latest = max(at for at, _ in found)
        silent = [n for n, (at, _) in enumerate(found) if at < latest]
    named = failed | {n: f"was last seen in step {found[n][0]}" for n in silent}
    steps = sorted({at for n, (at, _) in enumerate(found) if n not in named})
    others = "the others wait" if named else "all processes wait for one another"
    lost = [f"process {n} of {len(found)} {what}" for n, what in sorted(named.items())]
    return ", ".join([*lost, f"{others} in step {' and '.join(map(str, steps))}"])
