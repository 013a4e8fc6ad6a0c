"""A checkpoint that is written while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dpo_kernels.training.heartbeat import of_group
from dpo_kernels.training.values import in_one_line


class Saving:
    """`written` is done when shards are on the disk, in the first process those of all. That process then makes of them
    what is `complete`, in a thread, which a process that ends waits for."""

    def __init__(self, step: int, written: Future[Any], complete: Callable[[], Any] | None) -> None:
        self.step, self.done = step, written
        if complete is not None:
            thread = ThreadPoolExecutor(1, "checkpoint")
            self.done = thread.submit(lambda: [written.result(), complete()])
            thread.shutdown(wait=False)

    def wait(self) -> None:
        """Raises `OSError` where the checkpoint could not be written, which names the processes that could not."""
        error = self.done.exception()
        if error is None:
            return
        if of_group(error):
            raise error
        of_processes = getattr(error, "failures", {})  # a CheckpointException has them, each with its traceback
        said = "; ".join(f"process {n}: {in_one_line(each)}" for n, (each, _) in of_processes.items())
        raise OSError(f"the checkpoint of step {self.step} was not written: {said or in_one_line(error)}") from error
