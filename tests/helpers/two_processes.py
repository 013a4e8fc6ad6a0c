"""A script in two processes, or more, that know of each other, as torchrun starts them. They end together: one that
leaves while another still talks to it would take it along."""

import os
import runpy
import select
import signal
import sys
import traceback

import forks


def run_in_two(script, *args, processes=2, **environment):
    """Runs the file `script` with those arguments and more of an environment; it may import the helpers."""
    import torch

    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    done = forks.ready().run(__file__, script, *args, **environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-8000:]}"


def both(command):
    """Forks them, and waits until all are ready to leave. Where one fails, the others would wait for it."""
    may_leave, leave = os.pipe()
    running = {}  # what a process writes to when it is ready, and its id
    for rank in range(int(os.environ["WORLD_SIZE"])):
        end, ready = os.pipe()
        if (process := os.fork()) == 0:
            os.close(leave)
            one(rank, command, ready, may_leave)
        os.close(ready)
        running[end] = process
    waiting = set(running)
    while waiting:
        for end in select.select(waiting, [], [])[0]:
            if os.read(end, 1) == b"":
                for process in running.values():
                    os.kill(process, signal.SIGKILL)
                os._exit(1)
            waiting.discard(end)
    os.close(leave)
    os._exit(any(os.waitpid(process, 0)[1] for process in running.values()))


def one(rank, command, ready, may_leave):
    signal.alarm(forks.SECONDS)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os.write(ready, b"r")
    os.read(may_leave, 1)
    os._exit(0)  # at once: much is imported


if __name__ == "__main__":
    both(sys.argv[1:])
