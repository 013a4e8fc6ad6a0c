"""Faults in the CPU's kernels; run as a script, the worker of `dpo-kernels tune` with the one that HARM names."""

import os
import sys
import time

import torch

from dpo_kernels import measure
from dpo_kernels.impl import native
from dpo_kernels.tuning import worker

CASES = worker.CASES[:1] + worker.CASES[4:5]


def faults(harm):
    """Functions in place of those of `native`."""
    calls, halves = [0], [False]

    def fold_(*arguments, of=native.fold_, **options):
        """Paths A, C and D."""
        calls[0] += 1
        if harm == "hangs":
            time.sleep(1000)
        if harm == "aborts":
            os.abort()
        if harm == "leaves":
            print("no such function in this library", file=sys.stderr)
            os._exit(3)
        if harm == "fails":
            raise RuntimeError("an illegal memory access was encountered")
        if harm == "slow":
            time.sleep(0.05)
        of(*arguments, **options)
        fold = arguments[0]
        if harm == "wrong" or (harm == "wrong in halves" and halves[0]):
            fold.state[3] *= 1.01  # the sum of exponentials
        if harm == "other bits":
            fold.state[3] *= 1 + calls[0] * 1e-5

    def operand(t, dtype, of=native.operand):
        halves[0] = dtype != torch.float32
        return of(t, dtype)

    return {"fold_": fold_, "operand": operand}


if __name__ == "__main__":
    harm = os.environ["HARM"]
    with open(os.environ["MARK"], "a") as file:  # how often a worker was started
        file.write("started\n")
    if harm == "mute":
        time.sleep(1000)
    for name, function in faults(harm).items():
        setattr(native, name, function)
    worker.CASES, measure.FLUSH_BYTES = CASES, 2**20
    worker.main()
