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

# With the modules of this process, and none that lies where it happens to be; what anything prints is no message.
_BEGIN = """
import os, sys
messages = os.dup(1)
os.dup2(2, 1)
sys.path[:] = [place for place in sys.path if place]
import json
sys.path[:] = json.loads(sys.argv[1])
from dpo_kernels.tuning.worker import main
main(messages)
"""
STARTED = 180.0  # seconds until it speaks for the first time: PyTorch and a driver start
ENDED = 10.0  # until a process that was killed is gone; one that hangs in its driver may stay
# Of what comes from outside: a user, a scheduler, a system without memory.
OUTSIDE = {getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGKILL") if hasattr(signal, name)}


class Lost(Exception):
    """It is no more, or says nothing more."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind  # "hung", "ended", or "killed" by somebody else


def worker() -> tuple[str, ...]:
    """The command that tries kernels."""
    return sys.executable, "-c", _BEGIN, json.dumps(sys.path)


def watched(task: dict[str, Any], patience: float, command: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The messages of a process that was given `task`, until it is done. Raises `Lost` if it ends before that, or says
    nothing for `patience` seconds; it is ended then, as it is when nobody listens any more: its standard input, which
    it waits at, is closed when this process is gone."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command or worker(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # an interrupt is for this process, which ends that one
        )
        assert process.stdin is not None and process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it is gone already, as is seen below
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
            wait = max(patience, STARTED)
            while True:
                try:
                    line = lines.get(timeout=wait)
                except queue.Empty:
                    raise Lost("hung", f"nothing came of it for {wait:g} s") from None
                if line is None:
                    raise _end(process, errors)
                message = _message(line)
                if message is None:
                    continue
                wait = patience
                if message.get("done"):
                    return
                yield message
        finally:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDED)


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _message(line: str) -> dict[str, Any] | None:
    """None of what was printed before standard output was out of reach."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _end(process: subprocess.Popen[str], errors: IO[str]) -> Lost:
    try:
        status = process.wait(ENDED)
    except subprocess.TimeoutExpired:
        return Lost("ended", "it closed its output")
    errors.seek(0)
    said = errors.read()[-4000:].strip().splitlines()
    how = f"exit status {status}"
    if status < 0:
        try:
            how = signal.Signals(-status).name
        except ValueError:
            how = f"signal {-status}"
    reason = f"the process ended with {how}" + (f": {said[-1].strip()[:200]}" if said else "")
    return Lost("killed" if -status in OUTSIDE else "ended", reason)
