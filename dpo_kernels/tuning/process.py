"""A process that is watched: what it says, and what became of it when it says nothing more."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import IO, Any

WORKER = (sys.executable, "-m", "dpo_kernels.tuning.worker")
STARTED = 180.0  # seconds until it speaks for the first time: PyTorch and a driver start
ENDED = 10.0  # until a process that was killed is gone; one that hangs in its driver may stay


class Lost(Exception):
    """It is no more, or says nothing more."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind  # "hung" or "ended"


def watched(task: dict[str, Any], patience: float, command: Sequence[str] = WORKER) -> Iterator[dict[str, Any]]:
    """The messages of a process that was given `task`, until it is done. Raises `Lost` if it ends before that, or says
    nothing for `patience` seconds; it is ended then, as it is when nobody listens any more."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
        )
        assert process.stdin is not None and process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it is gone already, as is seen below
                process.stdin.write(json.dumps(task))
                process.stdin.close()
            wait = max(patience, STARTED)
            while True:
                try:
                    line = lines.get(timeout=wait)
                except queue.Empty:
                    raise Lost("hung", f"nothing came of it for {wait:g} s") from None
                if line is None:
                    raise Lost("ended", _end(process, errors))
                wait = patience
                message = json.loads(line)
                if message.get("done"):
                    return
                yield message
        finally:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDED)


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen[str], errors: IO[str]) -> str:
    try:
        status = process.wait(ENDED)
    except subprocess.TimeoutExpired:
        return "it closed its output"
    errors.seek(0)
    said = errors.read().strip().splitlines()
    how = f"exit status {status}"
    if status < 0:
        try:
            how = signal.Signals(-status).name
        except ValueError:
            how = f"signal {-status}"
    return f"the process ended with {how}" + (f": {said[-1].strip()[:200]}" if said else "")
